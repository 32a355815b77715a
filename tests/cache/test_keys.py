import functools

import numpy as np
import pytest

from jtl.cache import keys


def scaled(by):
    table = np.array([by, 1.0])

    def transform(batch):
        return batch * table[0]

    return transform


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, batch):
        return batch * self.by

    def method(self, batch):
        return batch + self.by


def again():
    def transform(batch):
        return transform(batch - 1) if batch > 0 else batch

    return transform


@pytest.mark.parametrize(
    "make", [scaled, Scale, lambda by: Scale(by).method, lambda by: functools.partial(np.multiply, by)]
)
def test_what_a_function_holds_is_a_part_of_it(make):
    assert keys.of_function(make(2.0)) == keys.of_function(make(2.0))
    assert keys.of_function(make(2.0)) != keys.of_function(make(3.0))


def test_other_code_is_another_function():
    pairs = [
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x - 1),
        (lambda x, y=1: x, lambda x, y=2: x),
    ]
    for one, other in pairs:
        assert keys.of_function(one) != keys.of_function(other)
    assert keys.of_function(None) != keys.of_function(pairs[0][0])


def test_a_function_that_calls_itself_has_a_digest():
    assert keys.of_function(again()) == keys.of_function(again())

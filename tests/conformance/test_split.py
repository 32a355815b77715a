"""Both halves of a split loss are the loss, for every model and every mask."""

import pytest

import jtl
from jtl.errors import SplitError

from ..boundary.cases import assert_exact, ready  # noqa: TID252
from ..covering import covering  # noqa: TID252
from .cases import CASES, MASKED, built

DROPS = ("function", "head")  # dropout that no flag turns off, with a frozen kernel behind it


def loss_of(case):
    model, variables = built(case)
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy}), variables


@pytest.mark.parametrize(("case", "mask"), covering([pair for pair in MASKED if pair != DROPS], times=2))
def test_the_halves_of_a_loss_are_the_loss(case, mask):
    loss_fn, variables = loss_of(case)
    assert_exact(loss_fn, variables, CASES[case].masks[mask], CASES[case].batch(1))


def test_dropout_that_ignores_the_mask_is_refused_by_its_line():
    loss_fn, variables = loss_of(DROPS[0])
    state, frozen = ready(variables, CASES[DROPS[0]].masks[DROPS[1]])
    with pytest.raises(SplitError, match=r"random key.*cases.py:\d+ \(function.*forward\); frozen leaves come after"):
        jtl.split(loss_fn, state, frozen, CASES[DROPS[0]].batch(1))

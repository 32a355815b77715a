"""Which cases of a table run every time; the others are marked `long`, and run by `pytest -m long`.

    @pytest.mark.parametrize(("case", "mask"), covering(TABLE, times=2))

Nothing is left out: each case of a table is in one of the two runs, under the same name.
"""

import collections
import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def covering(cases: Iterable[Any], times: int = 1, *, fixture: bool = False) -> list[Any]:
    """Cases in their order; marked `long` are those without which each value is still there.

    Each value of each argument is in at least `times` of the cases that run, or in all that have it. The choice
    depends on the table alone: every time the first case that has most values which are still wanted, and of those
    whose values have been taken least often. Of a `fixture`, each case is the one parameter.
    """
    cases = list(cases)
    parts = [[*enumerate(case)] if isinstance(case, tuple) else [(0, case)] for case in cases]
    taken, chosen = collections.Counter(), set()

    def worth(index: int) -> tuple[int, int]:
        counts = [taken[part] for part in parts[index]]
        return sum(count < times for count in counts), -sum(counts)

    while len(chosen) < len(cases):
        best = max((index for index in range(len(cases)) if index not in chosen), key=worth)
        if not worth(best)[0]:
            break
        chosen.add(best)
        taken.update(parts[best])
    return long_but(cases, (cases[index] for index in chosen), fixture=fixture)


def long_but(cases: Iterable[Any], kept: Iterable[Any], *, fixture: bool = False) -> list[Any]:
    """Cases in their order; marked `long` are those that are not among `kept`."""
    cases, kept = list(cases), list(kept)
    unknown = [case for case in kept if case not in cases]
    if unknown:
        raise ValueError(f"no such cases: {unknown}")
    whole = [case if isinstance(case, tuple) and not fixture else (case,) for case in cases]
    marks = [() if case in kept else (pytest.mark.long,) for case in cases]
    return [pytest.param(*values, marks=mark) for values, mark in zip(whole, marks, strict=True)]


def product(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every case of several arguments."""
    return list(itertools.product(*values))

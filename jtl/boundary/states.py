"""Where the examples of a batch lie in an array: the states that `jtl.boundary.rows` infers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Row b of the value depends on example b alone.

    The axis has the size `outer * batch * inner`; a batch axis merged into others by a reshape
    has an outer or inner factor above 1.
    """

    axis: int
    outer: int = 1
    inner: int = 1


class Const(NamedTuple):
    """A value without examples in it, and the axes along which it does not vary."""

    uniform: frozenset[int]


class Mixed(NamedTuple):
    """A row depends on other examples, on its place in the batch, or nobody knows."""

    reason: str


State = Row | Const | Mixed


class Known(NamedTuple):
    """What has been inferred so far: each variable's state, and the equation behind it."""

    states: dict[Any, State]
    producers: dict[Any, Any]


def constant(ndim: int) -> Const:
    """The state of a single number repeated."""
    return Const(frozenset(range(ndim)))


def opaque(aval: Any) -> Const:
    """The state of an array of which nothing is known but that it holds no examples."""
    shape = getattr(aval, "shape", ())
    return Const(frozenset(axis for axis, size in enumerate(shape) if size == 1))


def join(states: Sequence[tuple[State, tuple[int, ...]]]) -> State:
    """What values of one shape have in common, given each with its shape; a scalar goes with any.

    >>> join([(Row(0), (4, 3)), (Const(frozenset({0})), (4, 3))])
    Row(axis=0, outer=1, inner=1)
    """
    mixed = next((state for state, _ in states if isinstance(state, Mixed)), None)
    if mixed is not None:
        return mixed
    rows = {state for state, _ in states if isinstance(state, Row)}
    full = [state for state, shape in states if isinstance(state, Const) and shape]
    if not rows:
        ndim = max((len(shape) for _, shape in states), default=0)
        return Const(frozenset(range(ndim)).intersection(*(state.uniform for state in full)))
    if len(rows) > 1:
        return Mixed("values whose examples lie along different axes meet")
    row = rows.pop()
    if any(row.axis not in state.uniform for state in full):
        return Mixed("a value that differs from place to place in the batch meets the examples")
    return row


def moved(state: State, where: Mapping[Any, Any]) -> State:
    """The state after axes moved; one that is absent from `where` is gone. JAX gives axes as any integers."""
    if isinstance(state, Row):
        if state.axis in where:
            return state._replace(axis=int(where[state.axis]))
        return Mixed("the batch axis is consumed")
    return Const(frozenset(int(where[a]) for a in state.uniform if a in where)) if isinstance(state, Const) else state


def without(ndim: int, gone: Sequence[Any]) -> dict[int, int]:
    """Where the axes go when some are taken out.

    >>> without(3, [1])
    {0: 0, 2: 1}
    """
    return {old: new for new, old in enumerate(axis for axis in range(ndim) if axis not in gone)}

"""Where to cut a traced loss: what is computed once, what is stored, what is computed in every step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from jtl.boundary import trace as tracing
from jtl.boundary.flops import is_heavy, is_light
from jtl.boundary.rows import closed_over, infer
from jtl.boundary.states import Known, Mixed, Row, constant, opaque
from jtl.boundary.trace import Program
from jtl.errors import SplitError

_PASSED = 8
"""A batch's own entry costs this many times less than a stored value: it is there anyway."""


class Rows(NamedTuple):
    """What the batch axis tells of a program.

    Attributes:
      axis: of each value that depends on examples row by row and on nothing trained or random.
      late: for every other value that depends on examples and on nothing trained, why it is not
        the same in every epoch, and the equation that makes it so.
    """

    axis: dict[Any, Row]
    late: dict[Any, tuple[str, Any]]


class Cut(NamedTuple):
    """A program in two halves.

    Attributes:
      stored: the values that cross, and where their examples lie.
      passed: the batch's entries that the second half reads as they are.
      prefix: equations of the first half.
      suffix: equations of the second half.
    """

    stored: dict[Any, Row]
    passed: list[Any]
    prefix: list[Any]
    suffix: list[Any]


def rows(program: Program, doubled: Program) -> Rows:
    """Find what can be cached, and refuse what would be inexact.

    Args:
      program: a traced loss.
      doubled: the same loss at twice the batch size, to tell what depends on that size.

    Raises:
      SplitError: an equation of the frozen part uses a random key, mixes examples, has an effect,
        or depends on the size of the batch.
    """
    known = Known({}, {})
    for var, given in doubled.inputs.items():
        known.states[var] = Row(0) if given.kind == "batch" else opaque(var.aval)
    known.states.update(
        zip(doubled.consts, map(closed_over, program.consts.values(), doubled.consts.values()), strict=True)
    )
    found = Rows({var: Row(0) for var, given in program.inputs.items() if given.kind == "batch"}, {})
    for eqn, twice in zip(program.eqns, doubled.eqns, strict=True):
        marks = program.marks_of(eqn.invars)
        if marks.trained:
            continue
        states = [constant(0)] * len(eqn.outvars) if marks.key else infer(eqn, twice, known)
        known.states.update(zip(twice.outvars, states, strict=True))
        known.producers.update(dict.fromkeys(twice.outvars, twice))
        if marks.batch:
            _sort(program, eqn, states, found)
    return found


def _sort(program: Program, eqn: Any, states: Sequence[Any], found: Rows) -> None:
    """Enter the results of an equation that reads examples, or refuse it."""
    if eqn.effects:
        raise tracing.refuse("the frozen part of the loss has an effect, which caching would run once", eqn)
    marks = program.marks_of(eqn.invars)
    if not marks.key and not any(isinstance(state, Mixed) for state in states):
        found.axis.update({var: s for var, s in zip(eqn.outvars, states, strict=True) if isinstance(s, Row)})
        return
    cause = next((found.late[atom] for atom in eqn.invars if _is_var(atom) and atom in found.late), None)
    reason, origin = cause or (_reason(states, marks.key), eqn)
    if _reads_frozen(program, eqn):
        raise SplitError(
            f"{reason}: {tracing.where(origin)}; frozen leaves come after it ({tracing.where(eqn)}), "
            "so their work cannot be cached"
        )
    for var, state in zip(eqn.outvars, states, strict=True):
        if isinstance(state, Row) and not marks.key:
            found.axis[var] = state
        elif isinstance(state, Mixed) or marks.key:
            found.late[var] = reason, origin


def _reason(states: Sequence[Any], key: bool) -> str:
    if key:
        return "a random key is used before the first trained leaf"
    return f"examples are mixed ({next(state.reason for state in states if isinstance(state, Mixed))})"


def _reads_frozen(program: Program, eqn: Any) -> bool:
    """Whether a product with a frozen leaf, or with any other array, is lost to the cache here."""
    others = [atom for atom in eqn.invars if _is_var(atom) and not program.marks[atom].batch]
    return is_heavy(eqn) and any(program.marks[atom].frozen or atom.aval.ndim for atom in others)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def choose(
    program: Program,
    found: Rows,
    *,
    allowed: Callable[[Any], bool] = lambda _: True,
    rebuild: bool = False,
    also: Sequence[Any] = (),
) -> Cut:
    """The cut that stores the fewest bytes for each example, by a minimum cut.

    A value that light equations can rebuild from stored ones is rebuilt. Products, lookups and loops
    are done in the first half, always.

    Args:
      program: a traced loss.
      found: what can be cached.
      allowed: which values may be stored.
      rebuild: rebuild what lies behind them at any price.
      also: values that must be stored, or be rebuilt from stored ones, beside those that the loss needs.

    Raises:
      SplitError: the allowed values do not suffice.
    """
    behind = {var: eqn for eqn in program.eqns for var in eqn.outvars}
    needed = [*wanted(program, found), *also]
    relevant = _ancestors(program, needed, behind, found)
    graph = _Graph()
    for var in relevant:
        eqn = behind.get(var)
        graph.edge(("in", var), ("out", var), _price(var, found.axis[var], given=eqn is None) if allowed(var) else None)
        if eqn is None or not (rebuild or is_light(eqn)):
            graph.edge("source", ("in", var), None)
        for atom in _row_operands(program, eqn, behind, found):
            graph.edge(("out", atom), ("in", var), None)
    for var in needed:
        graph.edge(("out", var), "sink", None)
    after = graph.after_cut() if needed else set()
    if after is None:
        raise SplitError("evaluation needs values that training does not: they are not among those stored")
    crossing = [var for var in relevant if ("out", var) in after and ("in", var) not in after]
    stored = {var: found.axis[var] for var in crossing if var in behind}
    passed = [var for var in crossing if var not in behind]
    prefix = _needed(program, list(stored), set(), effects=False)
    suffix = _needed(program, program.outputs, {*stored, *passed}, effects=True)
    return Cut(stored, passed, prefix, suffix)


def wanted(program: Program, found: Rows) -> list[Any]:
    """The row values that something trained, something late, or the loss's result reads."""
    read = dict.fromkeys(atom for atom in program.outputs if _is_var(atom) and atom in found.axis)
    for eqn in _needed(program, program.outputs, set(found.axis), effects=True):
        read |= dict.fromkeys(atom for atom in eqn.invars if _is_var(atom) and atom in found.axis)
    return list(read)


def _ancestors(program: Program, wanted: Iterable[Any], behind: Mapping[Any, Any], found: Rows) -> list[Any]:
    """The row values that some of these are computed from, themselves included."""
    seen: dict[Any, None] = {}
    waiting = list(wanted)
    while waiting:
        var = waiting.pop()
        if var not in seen:
            seen[var] = None
            waiting += _row_operands(program, behind.get(var), behind, found)
    order = {var: k for k, var in enumerate(found.axis)}
    return sorted(seen, key=lambda var: order[var])


def _row_operands(program: Program, eqn: Any, behind: Mapping[Any, Any], found: Rows) -> list[Any]:
    """The row values that an equation reads, be it through values that are none, such as `x[jnp.arange(batch), i]`."""
    operands = [atom for atom in (eqn.invars if eqn else []) if _is_var(atom)]
    rows = [atom for atom in operands if atom in found.axis]
    others = [behind[atom] for atom in operands if atom not in found.axis and program.marks[atom].batch]
    return rows + [atom for inner in others for atom in _row_operands(program, inner, behind, found)]


def _needed(program: Program, outputs: Sequence[Any], given: set[Any], *, effects: bool) -> list[Any]:
    """The equations that compute the outputs from the given values and the program's inputs."""
    wanted = {atom for atom in outputs if _is_var(atom)} - given
    kept = []
    for eqn in reversed(program.eqns):
        if (effects and eqn.effects) or any(var in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted |= {atom for atom in eqn.invars if _is_var(atom) and atom not in given}
    return kept[::-1]


def _price(var: Any, row: Row, *, given: bool) -> int:
    price = example_bytes(var.aval, row) * _PASSED
    return max(1, price // _PASSED**2 if given else price)


def example_bytes(aval: Any, row: Row) -> int:
    """Bytes of one example's share of a value."""
    batch = aval.shape[row.axis] // (row.outer * row.inner)
    return math.prod(aval.shape) * aval.dtype.itemsize // max(1, batch)


class _Graph:
    """A minimum cut by SciPy's maximum flow; a capacity of None is infinite."""

    def __init__(self) -> None:
        self.nodes: dict[Any, int] = {"source": 0, "sink": 1}
        self.edges: dict[tuple[int, int], int | None] = {}

    def edge(self, left: Any, right: Any, capacity: int | None) -> None:
        pair = (self.nodes.setdefault(left, len(self.nodes)), self.nodes.setdefault(right, len(self.nodes)))
        self.edges[pair] = capacity

    def after_cut(self) -> set[Any] | None:
        """The nodes on the sink's side, as few as any minimum cut leaves there; None if every cut is infinite."""
        from scipy import sparse
        from scipy.sparse import csgraph

        if self._endless():
            return None
        # The solver counts in int32: bytes are scaled down together if they do not fit.
        finite = sum(capacity for capacity in self.edges.values() if capacity is not None)
        limit = np.iinfo(np.int32).max // 4
        scale = max(1, math.ceil(finite / limit))
        values = [2 * limit if c is None else max(1, c // scale) for c in self.edges.values()]
        index = np.array(list(self.edges)).T.reshape(2, -1)
        capacities = sparse.csr_matrix((np.array(values, np.int32), index), shape=(len(self.nodes),) * 2)
        result = csgraph.maximum_flow(capacities, 0, 1)
        residual = (capacities - result.flow).tocsr()
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = csgraph.breadth_first_order(residual.T.tocsr(), 1, return_predecessors=False)
        inside = set(reached.tolist())
        return {node for node, number in self.nodes.items() if number in inside}

    def _endless(self) -> bool:
        """Whether a way of infinite edges leads from the source to the sink."""
        ahead: dict[int, list[int]] = {}
        for (left, right), capacity in self.edges.items():
            if capacity is None:
                ahead.setdefault(left, []).append(right)
        seen, waiting = {0}, [0]
        while waiting:
            new = [node for node in ahead.get(waiting.pop(), []) if node not in seen]
            seen.update(new)
            waiting += new
        return 1 in seen

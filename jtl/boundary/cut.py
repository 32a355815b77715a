"""Where to cut a traced loss: what is computed once, what is stored, what is computed in every step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from jtl.boundary import trace as tracing
from jtl.boundary.flops import is_heavy, is_light
from jtl.boundary.rows import infer
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
    _check_size(program, doubled)
    known = Known({}, {})
    for var, given in doubled.inputs.items():
        known.states[var] = Row(0) if given.kind == "batch" else opaque(var.aval)
    known.states.update({var: opaque(var.aval) for var in doubled.consts})
    found = Rows({var: Row(0) for var, given in program.inputs.items() if given.kind == "batch"}, {})
    for eqn, twice in zip(program.eqns, doubled.eqns, strict=True):
        marks = program.marks_of(eqn.invars)
        if marks.trained:
            continue
        states = [constant(0)] * len(eqn.outvars) if marks.key else infer(twice, known)
        known.states.update(zip(twice.outvars, states, strict=True))
        known.producers.update(dict.fromkeys(twice.outvars, twice))
        if marks.batch:
            _sort(program, eqn, states, found)
    return found


def _check_size(program: Program, doubled: Program) -> None:
    same = len(program.eqns) == len(doubled.eqns)
    for eqn, twice in zip(program.eqns, doubled.eqns, strict=False):
        if program.marks_of(eqn.invars).trained:
            continue
        values = [
            [float(atom.val) for atom in one.invars if isinstance(atom, jex.Literal) and _is_float(atom)]
            for one in (eqn, twice)
        ]
        if eqn.primitive is not twice.primitive or not np.array_equal(*values, equal_nan=True):
            raise tracing.refuse("the frozen part of the loss depends on the size of the batch", eqn)
    if not same:
        raise SplitError("the loss has other equations at twice the batch size; it cannot be cut by examples")


def _is_float(atom: Any) -> bool:
    return np.ndim(atom.val) == 0 and np.issubdtype(np.asarray(atom.val).dtype, np.floating)


def _sort(program: Program, eqn: Any, states: Sequence[Any], found: Rows) -> None:
    """Enter the results of an equation that reads examples, or refuse it."""
    if eqn.effects:
        raise tracing.refuse("the frozen part of the loss has an effect, which caching would run once", eqn)
    marks = program.marks_of(eqn.invars)
    cause = next((found.late[atom] for atom in eqn.invars if _is_var(atom) and atom in found.late), None)
    if cause is not None and _reads_frozen(program, eqn):
        reason, origin = cause
        raise SplitError(
            f"{reason}: {tracing.where(origin)}; frozen leaves come after it ({tracing.where(eqn)}), "
            "so their work cannot be cached"
        )
    for var, state in zip(eqn.outvars, states, strict=True):
        if isinstance(state, Row) and cause is None and not marks.key:
            found.axis[var] = state
            continue
        reason = "a random key is used before the first trained leaf" if marks.key else "examples are mixed"
        if isinstance(state, Mixed) and not marks.key:
            reason = f"examples are mixed ({state.reason})"
        found.late[var] = cause or (reason, eqn)


def _reads_frozen(program: Program, eqn: Any) -> bool:
    """Whether a frozen leaf, or a product with any other array, meets the examples here."""
    others = [atom for atom in eqn.invars if _is_var(atom) and not program.marks[atom].batch]
    return any(program.marks[atom].frozen or (is_heavy(eqn) and atom.aval.ndim) for atom in others)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def choose(program: Program, found: Rows, *, allowed: Callable[[Any], bool] | None = None) -> Cut:
    """The cut that stores the fewest bytes for each example, by a minimum cut.

    A value that light equations can rebuild from stored ones is rebuilt. Products, lookups and loops
    are done in the first half, always.

    Args:
      program: a traced loss.
      found: what can be cached.
      allowed: which values may be stored; whatever lies behind them is rebuilt at any price.

    Raises:
      SplitError: the allowed values do not suffice.
    """
    behind = {var: eqn for eqn in program.eqns for var in eqn.outvars}
    wanted = _wanted(program, found, behind)
    relevant = _ancestors(wanted, behind, found)
    graph = _Graph()
    for var in relevant:
        eqn = behind.get(var)
        free = allowed is None or allowed(var)
        graph.edge(("in", var), ("out", var), _price(var, found.axis[var], given=eqn is None) if free else None)
        if eqn is None or (allowed is None and not is_light(eqn)):
            graph.edge("source", ("in", var), None)
        for atom in [] if eqn is None else eqn.invars:
            if _is_var(atom) and atom in found.axis:
                graph.edge(("out", atom), ("in", var), None)
    for var in wanted:
        graph.edge(("out", var), "sink", None)
    after = graph.after_cut() if wanted else set()
    if after is None:
        raise SplitError("evaluation needs values that training does not: they are not among those stored")
    crossing = [var for var in relevant if ("out", var) in after and ("in", var) not in after]
    stored = {var: found.axis[var] for var in crossing if var in behind}
    passed = [var for var in crossing if var not in behind]
    prefix = _needed(program, list(stored), set(), effects=False)
    suffix = _needed(program, program.outputs, {*stored, *passed}, effects=True)
    return Cut(stored, passed, prefix, suffix)


def _wanted(program: Program, found: Rows, behind: Mapping[Any, Any]) -> list[Any]:
    """The row values that something trained, something late, or the loss's result reads."""
    wanted = dict.fromkeys(atom for atom in program.outputs if _is_var(atom) and atom in found.axis)
    for eqn in _needed(program, program.outputs, set(found.axis), effects=True):
        wanted |= dict.fromkeys(atom for atom in eqn.invars if _is_var(atom) and atom in found.axis)
    return list(wanted)


def _ancestors(wanted: Iterable[Any], behind: Mapping[Any, Any], found: Rows) -> list[Any]:
    """The row values that some of these are computed from, themselves included."""
    seen: dict[Any, None] = {}
    waiting = list(wanted)
    while waiting:
        var = waiting.pop()
        if var not in seen:
            seen[var] = None
            eqn = behind.get(var)
            waiting += [atom for atom in (eqn.invars if eqn else []) if _is_var(atom) and atom in found.axis]
    order = {var: k for k, var in enumerate(found.axis)}
    return sorted(seen, key=lambda var: order[var])


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

        # The solver counts in int32: bytes are scaled down together if they do not fit.
        finite = sum(capacity for capacity in self.edges.values() if capacity is not None)
        limit = np.iinfo(np.int32).max // 4
        scale = max(1, math.ceil(finite / limit))
        values = [limit if c is None else max(1, c // scale) for c in self.edges.values()]
        index = np.array(list(self.edges)).T.reshape(2, -1)
        capacities = sparse.csr_matrix((np.array(values, np.int32), index), shape=(len(self.nodes),) * 2)
        result = csgraph.maximum_flow(capacities, 0, 1)
        if result.flow_value >= limit:
            return None
        residual = (capacities - result.flow).tocsr()
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = csgraph.breadth_first_order(residual.T.tocsr(), 1, return_predecessors=False)
        inside = set(reached.tolist())
        return {node for node, number in self.nodes.items() if number in inside}

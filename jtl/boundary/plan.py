"""The plans of a split loss: traced, cut and named, one for each shape of batch."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import tree as jtree
from jtl.boundary import text
from jtl.boundary import trace as tracing
from jtl.boundary.cut import Cut, Rows, choose, rows
from jtl.boundary.states import Row
from jtl.boundary.trace import Program, Shapes
from jtl.errors import DataError, SplitError
from jtl.modes import Modes
from jtl.step import LossFn
from jtl.typing import Batch


class Plan(NamedTuple):
    """A loss cut for one shape of batch.

    Attributes:
      program: the traced loss.
      cut: its halves.
      names: of the entries of a cached batch.
      digest: of what the first half computes.
      suffix_digest: of what the second half computes.
    """

    program: Program
    cut: Cut
    names: dict[Any, str]
    digest: str
    suffix_digest: str


class Boundary:
    """The plans of a loss: what `Prefix` and `Suffix` share.

    The first plan for a shape of examples chooses the cut; those for other batch sizes take it over, so
    that a cached entry means the same at every size.
    """

    def __init__(self, loss_fn: LossFn, shapes: Shapes, *, frozen_dropout: bool, dtype: Any):
        self.loss_fn, self.shapes, self.frozen_dropout, self.dtype = loss_fn, shapes, frozen_dropout, dtype
        params = jtree.combine(shapes.state.params, shapes.frozen.params)
        mask = jtree.mask_of(shapes.state.params, params)
        self.fingerprint = Modes(params, mask, frozen_dropout=frozen_dropout).fingerprint
        self._plans: dict[Any, Plan] = {}
        self._first: dict[Any, Plan] = {}
        self._cached: dict[Any, Batch] = {}

    def plan(self, batch: Batch, *, size: int | None = None) -> Plan:
        """The plan of a batch, by its shapes; at another batch size if one is given."""
        shapes = jax.tree.map(tracing.shape_of, batch)
        return self._plan(shapes if size is None else resized(shapes, size), training=True)

    def plan_of_cached(self, cached: Mapping[str, Any], *, training: bool) -> Plan:
        """The plan whose suffix takes a cached batch."""
        size = batch_size(cached)
        entries = {name: tracing.shape_of(value) for name, value in cached.items()}
        fitting = [
            signature
            for signature in self._cached
            if all(name in entries and (entries[name].shape[1:], entries[name].dtype) == s for name, s in signature)
        ]
        if fitting:
            return self._plan(resized(self._cached[max(fitting, key=len)], size), training=training)
        expected = " or ".join(str({name: rest[0] for name, rest in key}) for key in self._cached)
        got = {name: shape.shape[1:] for name, shape in entries.items()}
        raise SplitError(f"these are not cached entries of this split: got {got}, expected {expected} per example")

    def _plan(self, batch: Batch, *, training: bool) -> Plan:
        key = (training, _signature(batch))
        if key not in self._plans:
            self._plans[key] = self._trained(batch) if training else self._evaluating(batch)
        return self._plans[key]

    def _trained(self, batch: Batch) -> Plan:
        alike = _signature(resized(batch, 2))
        if alike not in self._first and batch_size(batch) == 1:
            self._plan(resized(batch, 2), training=True)  # one example cannot tell what the batch axis is
        first = self._first.get(alike)
        program, doubled = self.traced(batch, training=True)
        found = rows(program, doubled)
        cut = self._chosen(batch, program, found) if first is None else _taken_over(first, program, found)
        plan = _named(program, cut, _names(program, cut))
        if first is None:
            self._first[alike] = plan
            self._register(plan, batch)
        return plan

    def traced(self, batch: Batch, *, training: bool) -> tuple[Program, Program]:
        """The loss at the size of a batch and at twice that size, equal equations merged."""
        size = batch_size(batch)
        shapes = [self.shapes._replace(batch=resized(batch, times * size)) for times in (1, 2)]
        once = tracing.trace(self.loss_fn, shapes[0], training=training, frozen_dropout=self.frozen_dropout)
        try:
            twice = tracing.trace(self.loss_fn, shapes[1], training=training, frozen_dropout=self.frozen_dropout)
        except (TypeError, ValueError) as error:
            raise SplitError(f"the loss cannot be traced at twice the batch size, {2 * size}: {error}") from error
        if [eqn.primitive for eqn in once.eqns] != [eqn.primitive for eqn in twice.eqns]:
            alone = "a batch of one example is computed otherwise than one of two: pad it, with weight 0"
            other = (
                f"the loss has other equations for {2 * size} examples than for {size}: it cannot be cut by examples"
            )
            raise SplitError(alone if size == 1 else other)
        return tracing.merged(once, twice)

    def _chosen(self, batch: Batch, program: Program, found: Rows) -> Cut:
        """The cheapest cut from which both training and evaluation can go on."""
        cut = choose(program, found)
        names = tracing.digests(program, _untrained(program))
        kept = {names[var] for var in (*cut.stored, *cut.passed)}
        try:
            evaluated, known = self._evaluated(batch)
            if self._suffices(evaluated, known, kept):
                return cut
            return self._for_both(program, found, names, evaluated, known)
        except SplitError:
            return cut  # evaluation says so itself, if it is ever asked for

    def _suffices(self, evaluated: tuple[Program, Rows], known: dict[Any, str], kept: set[str]) -> bool:
        try:
            choose(*evaluated, allowed=lambda var: known[var] in kept)
        except SplitError:
            return False
        return True

    def _for_both(
        self,
        program: Program,
        found: Rows,
        names: dict[Any, str],
        evaluated: tuple[Program, Rows],
        known: dict[Any, str],
    ) -> Cut:
        """A cut that also stores what evaluation alone needs, as far as training computes it."""
        there = {names[var] for var in found.axis}
        cut = choose(*evaluated, allowed=lambda var: known[var] in there)
        needed = {known[var] for var in (*cut.stored, *cut.passed)}
        return choose(program, found, also=[var for var in found.axis if names[var] in needed])

    def _evaluated(self, batch: Batch) -> tuple[tuple[Program, Rows], dict[Any, str]]:
        program, doubled = self.traced(batch, training=False)
        return (program, rows(program, doubled)), tracing.digests(program, _untrained(program))

    def _evaluating(self, batch: Batch) -> Plan:
        trained = self._plan(batch, training=True)
        (program, found), known = self._evaluated(batch)
        at = tracing.digests(trained.program, trained.cut.prefix)
        name_of = {at[var]: name for var, name in trained.names.items()}
        try:
            cut = choose(program, found, allowed=lambda var: known[var] in name_of)
        except SplitError:
            cut = choose(program, found, allowed=lambda var: known[var] in name_of, rebuild=True)
        return _named(program, cut, {var: name_of[known[var]] for var in (*cut.stored, *cut.passed)})

    def _register(self, plan: Plan, batch: Batch) -> None:
        """Remember which cached entries this plan's suffix takes."""
        one = {name: share(plan, var, self.dtype) for var, name in plan.names.items()}
        signature = tuple(sorted((name, (value.shape, value.dtype)) for name, value in one.items()))
        before = resized(self._cached.setdefault(signature, batch), batch_size(batch))
        if _signature(before) == _signature(batch):
            return
        if self._plan(before, training=True).suffix_digest != plan.suffix_digest:
            raise SplitError(
                f"batches of {_signature(before)} and {_signature(batch)} leave the same shapes "
                "for two different computations; pad them to one length, or split each apart"
            )


def _untrained(program: Program) -> list[Any]:
    return [eqn for eqn in program.eqns if not program.marks_of(eqn.invars).trained]


def _taken_over(first: Plan, program: Program, found: Rows) -> Cut:
    """The cut of a plan, in the same program at another batch size."""
    old = first.program
    if [eqn.primitive for eqn in old.eqns] != [eqn.primitive for eqn in program.eqns]:
        raise SplitError(
            "the loss has other equations at this batch size than at the first: it cannot be cut by examples"
        )
    new = dict(zip(old.inputs, program.inputs, strict=True))
    twin = {id(before): after for before, after in zip(old.eqns, program.eqns, strict=True)}
    for before, after in zip(old.eqns, program.eqns, strict=True):
        new.update(zip(before.outvars, after.outvars, strict=True))
    stored = {new[var]: row for var, row in first.cut.stored.items()}
    for var, row in stored.items():
        if found.axis.get(var) != row:
            raise SplitError("the examples lie otherwise at this batch size than at the first: they cannot be cached")
    prefix, suffix = ([twin[id(eqn)] for eqn in half] for half in (first.cut.prefix, first.cut.suffix))
    return Cut(stored, [new[var] for var in first.cut.passed], prefix, suffix)


def _named(program: Program, cut: Cut, names: dict[Any, str]) -> Plan:
    caller = next((eqn for eqn in cut.prefix if text.calls_back(eqn)), None)
    if caller is not None:
        raise tracing.refuse("the frozen part calls back into Python, which no digest of it can tell", caller)
    known = tracing.digests(program, cut.prefix)
    return Plan(program, cut, names, _prefix_digest(names, known), _suffix_digest(program, cut, names))


def _names(program: Program, cut: Cut) -> dict[Any, str]:
    """The entries of a cached batch."""
    names = {var: program.inputs[var].path or "batch" for var in cut.passed}
    free = (f"cut/{k}" for k in range(len(cut.stored) + len(program.inputs)))
    taken = set(names.values())
    return names | {var: next(name for name in free if name not in taken) for var in cut.stored}


def _prefix_digest(names: Mapping[Any, str], known: Mapping[Any, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {known[var]}" for var, name in names.items()).encode()).hexdigest()


def _suffix_digest(program: Program, cut: Cut, names: Mapping[Any, str]) -> str:
    inputs = {**program.inputs, **{var: tracing.Input("cached", name) for var, name in names.items()}}
    known = tracing.digests(program._replace(inputs=inputs), cut.suffix)
    outputs = [known[atom] if atom in known else str(atom) for atom in program.outputs if not hasattr(atom, "val")]
    return hashlib.sha256("\n".join(outputs).encode()).hexdigest()


def share(plan: Plan, var: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example's share of an entry."""
    row = plan.cut.stored.get(var)
    if row is None:
        return jax.ShapeDtypeStruct(var.aval.shape[1:], var.aval.dtype)
    kept = jnp.dtype(dtype) if dtype is not None and jnp.issubdtype(var.aval.dtype, jnp.floating) else var.aval.dtype
    shape = split_axis(var.aval.shape, row)
    return jax.ShapeDtypeStruct(
        tuple(size for axis, size in enumerate(shape) if axis != row.axis + (row.outer > 1)), kept
    )


def split_axis(shape: tuple[int, ...], row: Row) -> tuple[int, ...]:
    """A shape with the batch axis taken apart from what was merged into it."""
    batch = shape[row.axis] // (row.outer * row.inner)
    middle = [size for size, there in ((row.outer, row.outer > 1), (batch, True), (row.inner, row.inner > 1)) if there]
    return (*shape[: row.axis], *middle, *shape[row.axis + 1 :])


def batch_size(batch: Batch) -> int:
    """The extent of the axis with which every entry leads."""
    sizes = {path: leaf.shape[:1] for path, leaf in jtree.leaves_with_paths(batch)}
    if not sizes:
        raise DataError("the batch is empty; expected arrays that lead with the batch axis")
    if len(set(sizes.values())) > 1 or () in sizes.values():
        raise DataError(f"every entry of a batch leads with the batch axis; got leading sizes {sizes}")
    return next(iter(sizes.values()))[0]


def resized(batch: Batch, size: int) -> Batch:
    """The shapes of a batch of another size."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch)


def _signature(batch: Batch) -> tuple[Any, ...]:
    return tuple((path, leaf.shape, leaf.dtype.name) for path, leaf in jtree.leaves_with_paths(batch))

"""`split`: a loss in two, at the boundary between what is frozen and what is trained.

The idea is LOFF-TA's and every feature extractor's (compute the frozen part once), for any mask and any
loss: the traced loss itself tells what depends on a trained leaf.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import tree as jtree
from jtl.boundary import trace as tracing
from jtl.boundary.cut import Cut, choose, rows
from jtl.boundary.flops import flops, step_flops
from jtl.boundary.states import Row
from jtl.boundary.trace import Program, Shapes
from jtl.errors import ConfigError, DataError, SplitError
from jtl.state import Frozen, TrainState
from jtl.step import Aux, LossFn
from jtl.typing import Batch, Collections, Key, Params, PyTree

Cached = dict[str, Any]


class Stored(NamedTuple):
    """A value that is cached.

    Attributes:
      name: its entry in a cached batch.
      shape: of one example's share.
      dtype: as stored.
      nbytes: of one example's share, as stored.
      source: the primitive, module and source line that it comes from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    source: str


class SplitReport(NamedTuple):
    """What a split caches, and what that saves. All counts are of one example.

    Attributes:
      stored: the cached values.
      passed: the batch's entries that training reads as they are.
      prefix_flops: floating-point operations of the first half.
      suffix_flops: of a training step of the second half, backward pass included.
      boundary: path of the first trained leaf that the examples meet.
    """

    stored: tuple[Stored, ...]
    passed: tuple[str, ...]
    prefix_flops: float
    suffix_flops: float
    boundary: str

    @property
    def nbytes(self) -> int:
        """Bytes to store for an example."""
        return sum(value.nbytes for value in self.stored)

    def speedup(self, epochs: float) -> float:
        """How many times fewer operations that many epochs take with the cache, its filling included."""
        return epochs * (self.prefix_flops + self.suffix_flops) / (self.prefix_flops + epochs * self.suffix_flops)

    def __str__(self) -> str:
        lines = [
            f"{v.name}  {jnp.dtype(v.dtype).name} {list(v.shape)}  {v.nbytes:,} bytes  {v.source}" for v in self.stored
        ]
        work = f"{self.prefix_flops / 1e6:,.1f} MFLOP once, {self.suffix_flops / 1e6:,.1f} MFLOP a step"
        head = f"per example: {self.nbytes:,} bytes cached, {work}; training begins at {self.boundary}"
        return "\n".join(
            [head, *(f"  {line}" for line in lines), f"  from the batch: {', '.join(self.passed) or 'nothing'}"]
        )


class Plan(NamedTuple):
    """A loss cut for one shape of batch."""

    program: Program
    cut: Cut
    digest: str
    suffix_digest: str
    names: dict[Any, str]


class Split(NamedTuple):
    """A loss in two halves.

    Attributes:
      prefix: `prefix(frozen, collections, batch) -> cached`.
      suffix: a loss function of cached batches.
      report: what is cached, for the batch that `split` was given.
    """

    prefix: "Prefix"
    suffix: "Suffix"
    report: SplitReport


class Boundary:
    """The plans of a loss, one for each shape of batch: what `Prefix` and `Suffix` share."""

    def __init__(self, loss_fn: LossFn, shapes: Shapes, *, frozen_dropout: bool, dtype: Any):
        self.loss_fn, self.shapes, self.frozen_dropout, self.dtype = loss_fn, shapes, frozen_dropout, dtype
        self._plans: dict[Any, Plan] = {}
        self._cached: dict[Any, dict[str, Any]] = {}

    def plan(self, batch: Batch) -> Plan:
        """The plan of a batch, by its shapes."""
        shapes = self.shapes._replace(batch=jax.tree.map(tracing.shape_of, batch))
        return self._plan(shapes, training=True)

    def plan_of_cached(self, cached: Mapping[str, Any], *, training: bool) -> Plan:
        """The plan whose suffix takes a cached batch."""
        size = _batch_size(cached)
        entries = {name: tracing.shape_of(value) for name, value in cached.items()}
        for signature, batch in self._cached.items():
            if all(
                name in entries and (entries[name].shape[1:], entries[name].dtype) == rest for name, rest in signature
            ):
                return self._plan(self.shapes._replace(batch=_resized(batch, size)), training=training)
        expected = " or ".join(str({name: rest[0] for name, rest in key}) for key in self._cached)
        got = {name: shape.shape[1:] for name, shape in entries.items()}
        raise SplitError(f"these are not cached entries of this split: got {got}, expected {expected} per example")

    def _plan(self, shapes: Shapes, *, training: bool) -> Plan:
        key = (training, _signature(shapes.batch))
        if key not in self._plans:
            self._plans[key] = self._make(shapes, training=training)
        return self._plans[key]

    def _make(self, shapes: Shapes, *, training: bool) -> Plan:
        size = _batch_size(shapes.batch)
        program, doubled = (
            tracing.trace(
                self.loss_fn,
                shapes._replace(batch=_resized(shapes.batch, times * size)),
                training=training,
                frozen_dropout=self.frozen_dropout,
            )
            for times in (1, 2)
        )
        found = rows(program, doubled)
        known = tracing.digests(program, [eqn for eqn in program.eqns if not program.marks_of(eqn.invars).trained])
        if training:
            cut = choose(program, found)
            names = _names(program, cut)
        else:
            trained = self._plan(shapes, training=True)
            at = tracing.digests(trained.program, trained.cut.prefix)
            name_of = {at[var]: name for var, name in trained.names.items()}
            cut = choose(program, found, allowed=lambda var: known[var] in name_of)
            names = {var: name_of[known[var]] for var in (*cut.stored, *cut.passed)}
        plan = Plan(program, cut, _prefix_digest(names, known), _suffix_digest(program, cut, names), names)
        if training:
            self._register(plan, shapes)
        return plan

    def _register(self, plan: Plan, shapes: Shapes) -> None:
        """Remember which cached entries this plan's suffix takes."""
        one = {name: _share(plan, var, self.dtype) for var, name in plan.names.items()}
        signature = tuple(sorted((name, (value.shape, value.dtype)) for name, value in one.items()))
        before = self._cached.setdefault(signature, shapes.batch)
        other = (
            self._plan(self.shapes._replace(batch=_resized(before, _batch_size(shapes.batch))), training=True)
            if _signature(_resized(before, _batch_size(shapes.batch))) != _signature(shapes.batch)
            else plan
        )
        if other.suffix_digest != plan.suffix_digest:
            raise SplitError(
                f"batches of {_signature(before)} and {_signature(shapes.batch)} leave the same shapes "
                "for two different computations; pad them to one length, or split each apart"
            )


class Prefix:
    """The first half of a split loss: it depends on frozen leaves and the batch alone.

        cached = jax.jit(cut.prefix)(frozen, frozen.collections, batch)

    Args:
      frozen: `Frozen`, or its params.
      collections: the statistics that the mask holds still, or all of them.
      batch: as the loss takes it.

    Returns:
      A flat mapping whose arrays all lead with the batch axis: the stored values as `cut/0`,
      `cut/1`, ..., and the batch's entries that the suffix reads as they are.
    """

    def __init__(self, boundary: Boundary):
        self.boundary = boundary

    def __call__(self, frozen: Frozen | Params, collections: Collections, batch: Batch) -> Cached:
        """The cached form of a batch."""
        plan = self.boundary.plan(batch)
        values = _lookup(frozen, collections)
        values |= {("batch", path): leaf for path, leaf in tracing.leaves(batch).items()}
        inputs = [var for var, given in plan.program.inputs.items() if (given.kind, given.path) in values]
        compute = tracing.function(plan.program, inputs, plan.cut.prefix, list(plan.cut.stored))
        results = compute(*(values[plan.program.inputs[var][:2]] for var in inputs))
        cached = {plan.names[var]: values["batch", plan.program.inputs[var].path] for var in plan.cut.passed}
        for (var, row), value in zip(plan.cut.stored.items(), results, strict=True):
            cached[plan.names[var]] = _cast(_leading(value, row), self.boundary.dtype)
        return cached

    def digest(self, batch: Batch) -> str:
        """What is computed for batches of this shape, leaves apart: equal in any process for an equal computation."""
        plan = self.boundary.plan(batch)
        return hashlib.sha256(f"{plan.digest} {self.boundary.dtype}".encode()).hexdigest()

    def reads(self, batch: Batch) -> list[tuple[str, str]]:
        """Kind and path of the frozen leaves and statistics that it reads for batches of this shape."""
        plan = self.boundary.plan(batch)
        used = {atom for eqn in plan.cut.prefix for atom in eqn.invars if not hasattr(atom, "val")}
        given = [plan.program.inputs[var] for var in plan.program.inputs if var in used]
        return [(one.kind, one.path) for one in given if one.kind != "batch"]


class Suffix:
    """The second half: a loss function of cached batches, for every step, `fit` and `split` itself."""

    def __init__(self, boundary: Boundary):
        self.boundary = boundary

    def __call__(
        self, params: Params, collections: Collections, batch: Cached, *, key: Key | None
    ) -> tuple[jax.Array, Aux]:
        """The loss and its report, as the whole loss would give them."""
        plan = self.boundary.plan_of_cached(batch, training=key is not None)
        values = _lookup(params, collections) | {("key", ""): key}
        program = plan.program
        inputs = [var for var, given in program.inputs.items() if given.kind != "batch"]
        compute = tracing.function(program, [*inputs, *plan.names], plan.cut.suffix, program.outputs)
        arguments = [values.get(program.inputs[var][:2]) for var in inputs]
        missing = [program.inputs[var].path for var, value in zip(inputs, arguments, strict=True) if value is None]
        if missing:
            raise ConfigError(f"the suffix needs the whole tree of params and collections; it lacks {missing[:3]}")
        cached = [
            _restored(jnp.asarray(batch[name]), var, plan.cut.stored.get(var)) for var, name in plan.names.items()
        ]
        return jax.tree.unflatten(program.out_tree, compute(*arguments, *cached))


def split(
    loss_fn: LossFn,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    *,
    dtype: Any = None,
    frozen_dropout: bool = False,
) -> Split:
    """Cut a loss in two where the first trained leaf meets the examples.

    Whatever does not depend on a trained leaf is the same in every epoch. The prefix computes it, and
    what it gives can be cached; the suffix is a loss function that trains from there. Its loss,
    metrics and gradients are those of the whole loss.

        cut = jtl.split(loss_fn, state, frozen, batch)
        cached = jax.jit(cut.prefix)(frozen, frozen.collections, batch)
        state, metrics = jax.jit(jtl.train_step(cut.suffix, tx))(state, frozen, cached)

    Args:
      loss_fn: any loss function; a `jtl.supervised` one, or a researcher's own.
      state: the trained half, for its shapes.
      frozen: the frozen half, for its shapes.
      batch: an example of a batch, arrays or shapes; other shapes are traced when they come.
      dtype: how floats are stored, such as `jnp.bfloat16`; by default as they are.
      frozen_dropout: as in `jtl.train_step`; dropout in frozen modules then stands in the way.

    Returns:
      `(prefix, suffix, report)`.

    Raises:
      DataError: an entry of the batch does not lead with the batch axis.
      SplitError: the frozen part uses a random key, mixes examples, depends on the size of the batch
        or has an effect; the message names module and source line.

    References:
      Gorji and Plested, LOFF-TA, 2024 (training on stored features of a frozen backbone).
    """
    shapes = Shapes.of(state, frozen, batch)
    _batch_size(shapes.batch)
    boundary = Boundary(loss_fn, shapes, frozen_dropout=frozen_dropout, dtype=dtype)
    plan = boundary.plan(shapes.batch)
    return Split(Prefix(boundary), Suffix(boundary), _report(plan, _batch_size(shapes.batch), dtype))


def _report(plan: Plan, size: int, dtype: Any) -> SplitReport:
    program, cut = plan.program, plan.cut
    behind = {var: eqn for eqn in cut.prefix for var in eqn.outvars}
    stored = []
    for var in cut.stored:
        share = _share(plan, var, dtype)
        nbytes = math.prod(share.shape) * share.dtype.itemsize
        stored.append(Stored(plan.names[var], share.shape, share.dtype, nbytes, tracing.where(behind[var])))

    def weight(eqn: Any) -> int:
        return step_flops(eqn, sum(bool(program.marks_of([atom]).trained) for atom in eqn.invars))

    meets = (program.marks_of(eqn.invars) for eqn in cut.suffix if program.marks_of(eqn.invars).batch)
    boundary = next((marks.trained for marks in meets if marks.trained), "")
    return SplitReport(
        tuple(stored),
        tuple(plan.names[var] for var in cut.passed),
        sum(map(flops, cut.prefix)) / size,
        sum(map(weight, cut.suffix)) / size,
        boundary,
    )


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


def _share(plan: Plan, var: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example's share of an entry."""
    row = plan.cut.stored.get(var)
    if row is None:
        return jax.ShapeDtypeStruct(var.aval.shape[1:], var.aval.dtype)
    kept = jnp.dtype(dtype) if dtype is not None and jnp.issubdtype(var.aval.dtype, jnp.floating) else var.aval.dtype
    shape = _split_axis(var.aval.shape, row)
    return jax.ShapeDtypeStruct(
        tuple(size for axis, size in enumerate(shape) if axis != row.axis + (row.outer > 1)), kept
    )


def _split_axis(shape: tuple[int, ...], row: Row) -> tuple[int, ...]:
    """A shape with the batch axis taken apart from what was merged into it."""
    batch = shape[row.axis] // (row.outer * row.inner)
    middle = [size for size, there in ((row.outer, row.outer > 1), (batch, True), (row.inner, row.inner > 1)) if there]
    return (*shape[: row.axis], *middle, *shape[row.axis + 1 :])


def _leading(value: jax.Array, row: Row) -> jax.Array:
    return jnp.moveaxis(value.reshape(_split_axis(value.shape, row)), row.axis + (row.outer > 1), 0)


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype) if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating) else value


def _restored(value: jax.Array, var: Any, row: Row | None) -> jax.Array:
    value = value.astype(var.aval.dtype)
    return value if row is None else jnp.moveaxis(value, 0, row.axis + (row.outer > 1)).reshape(var.aval.shape)


def _lookup(params: Frozen | PyTree, collections: PyTree) -> dict[tuple[str, str], Any]:
    if isinstance(params, Frozen):
        params, collections = params.params, {**params.collections, **(collections or {})}
    found = {("params", path): leaf for path, leaf in tracing.leaves(params).items()}
    return found | {("collections", path): leaf for path, leaf in tracing.leaves(collections).items()}


def _batch_size(batch: Batch) -> int:
    sizes = {path: leaf.shape[:1] for path, leaf in jtree.leaves_with_paths(batch)}
    if not sizes:
        raise DataError("the batch is empty; expected arrays that lead with the batch axis")
    if len(set(sizes.values())) > 1 or () in sizes.values():
        raise DataError(f"every entry of a batch leads with the batch axis; got leading sizes {sizes}")
    return next(iter(sizes.values()))[0]


def _resized(batch: Batch, size: int) -> Batch:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), batch)


def _signature(batch: Batch) -> tuple[Any, ...]:
    return tuple((path, leaf.shape, leaf.dtype.name) for path, leaf in jtree.leaves_with_paths(batch))

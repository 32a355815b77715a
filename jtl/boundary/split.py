"""`split`: a loss in two, at the boundary between what is frozen and what is trained.

The idea is LOFF-TA's and every feature extractor's (compute the frozen part once), for any mask and any
loss: the traced loss itself tells what depends on a trained leaf.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import modes
from jtl.boundary import trace as tracing
from jtl.boundary.plan import Boundary, batch_size, split_axis
from jtl.boundary.report import SplitReport, report
from jtl.boundary.states import Row
from jtl.boundary.trace import Shapes
from jtl.errors import ConfigError
from jtl.state import Frozen, TrainState
from jtl.step import Aux, LossFn
from jtl.typing import Batch, Collections, Key, Params, PyTree

Cached = dict[str, Any]


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

    Attributes:
      boundary: where the loss is cut.
      programs: what was compiled of it, for the caches of all data sets that have it in common.
    """

    def __init__(self, boundary: Boundary):
        self.boundary = boundary
        self.programs: dict[Any, Any] = {}

    def __call__(self, frozen: Frozen | Params, collections: Collections, batch: Batch) -> Cached:
        """The cached form of a batch."""
        if batch_size(batch) == 1:  # of one example alone no trace tells which axis is the batch's
            twice = self(frozen, collections, jax.tree.map(_doubled, batch))
            return {name: value[:1] for name, value in twice.items()}
        plan = self.boundary.plan(batch)
        values = _lookup(frozen, collections)
        values |= {("batch", path): jnp.asarray(leaf) for path, leaf in tracing.leaves(batch).items()}
        inputs = [var for var, given in plan.program.inputs.items() if (given.kind, given.path) in values]
        compute = tracing.function(plan.program, inputs, plan.cut.prefix, list(plan.cut.stored))
        results = compute(*(values[plan.program.inputs[var][:2]] for var in inputs))
        cached = {plan.names[var]: values["batch", plan.program.inputs[var].path] for var in plan.cut.passed}
        for (var, row), value in zip(plan.cut.stored.items(), results, strict=True):
            cached[plan.names[var]] = _cast(_leading(value, row), self.boundary.dtype)
        return cached

    def digest(self, batch: Batch) -> str:
        """What is computed for examples of this shape, leaves apart: equal in any process for an equal computation."""
        plan = self.boundary.plan(batch, size=2)
        return hashlib.sha256(f"{plan.digest} {self.boundary.dtype}".encode()).hexdigest()

    def reads(self, batch: Batch) -> list[tuple[str, str]]:
        """Kind and path of the frozen leaves and statistics that it reads for examples of this shape."""
        plan = self.boundary.plan(batch, size=2)
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
        self._check_mask(training=key is not None)
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

    def _check_mask(self, *, training: bool) -> None:
        policy = modes.current()
        if training and policy is not None and policy.fingerprint != self.boundary.fingerprint:
            raise ConfigError(
                "this step trains other leaves, or has another frozen_dropout, than the split was made for; "
                "split the loss again with the state that is trained"
            )


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
      dtype: how floats are stored, such as `jnp.bfloat16`; by default as they are. With bfloat16, MiniLM's loss was
        off by at most 5e-5, relative, and its gradient by 2.4e-3 of its norm (`benchmarks/stored_dtype.py`).
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
    boundary = Boundary(loss_fn, shapes, frozen_dropout=frozen_dropout, dtype=dtype)
    size = max(2, batch_size(shapes.batch))
    return Split(Prefix(boundary), Suffix(boundary), report(boundary.plan(batch, size=size), size, dtype))


def _doubled(leaf: Any) -> jax.Array:
    return jnp.concatenate([jnp.asarray(leaf)] * 2)


def _leading(value: jax.Array, row: Row) -> jax.Array:
    return jnp.moveaxis(value.reshape(split_axis(value.shape, row)), row.axis + (row.outer > 1), 0)


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype) if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating) else value


def _restored(value: jax.Array, var: Any, row: Row | None) -> jax.Array:
    if value.dtype != var.aval.dtype:
        value = value.astype(var.aval.dtype)
    return value if row is None else jnp.moveaxis(value, 0, row.axis + (row.outer > 1)).reshape(var.aval.shape)


def _lookup(params: Frozen | PyTree, collections: PyTree) -> dict[tuple[str, str], Any]:
    if isinstance(params, Frozen):
        params, collections = params.params, {**params.collections, **(collections or {})}
    found = {("params", path): leaf for path, leaf in tracing.leaves(params).items()}
    return found | {("collections", path): leaf for path, leaf in tracing.leaves(collections).items()}

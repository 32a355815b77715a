"""`fit`: a short loop over public functions, meant to be read, copied and changed."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jtl import metrics as jmetrics
from jtl import parallel
from jtl.cache import Mode, prepare
from jtl.data import Batches
from jtl.errors import DataError
from jtl.state import Frozen, TrainState
from jtl.step import EvalStep, LossFn, checker, eval_step, train_step
from jtl.typing import Batch


class Report(NamedTuple):
    """One step of `fit`.

    Attributes:
      step: number of updates done so far.
      state: the state after the step. The next step donates it: copy what you keep.
      metrics: of this step's batch, still on the device.
      evaluation: of the held-out batches, where they were evaluated after this step.
    """

    step: int
    state: TrainState
    metrics: dict[str, Any]
    evaluation: dict[str, float] | None


def fit(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[Batch],
    *,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    evaluate_every: int | None = None,
    mesh: Mesh | None = None,
    cache: Mode = "auto",
    cache_directory: str | Path | None = None,
    cache_limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Report]:
    """Train on every batch, and report after each step.

        for report in jtl.fit(loss_fn, tx, state, frozen, batches):
            ...
        state = report.state

    Args:
      loss_fn: the loss. If it has a method `checker`, as those of `jtl.supervised` have, every
        batch is checked on the host before it is used.
      tx: the transform that `jtl.init` was given.
      state: where to start; it is copied, so it stays usable.
      frozen: what the mask holds still.
      batches: as many as there are steps to do.
      held_out: a function that starts a pass over the held-out batches. They are evaluated
        after the last step.
      evaluate_every: evaluate them after every so many steps, too.
      mesh: split every batch over the devices of this mesh; see `jtl.parallel`.
      cache: whether to compute what no trained leaf can change once, and train from that; see
        `jtl.cache.prepare`. "auto" does where it saves work, which takes `batches` from
        `jtl.data.batches`, of several epochs; rows and their order stay the same.
      cache_directory: where to keep it; in memory by default.
      cache_limit: bytes that it may take.
      say: called with one line if a cache is used, or could have been; by default it goes to stderr.

    Yields:
      A `Report` for each batch.

    Raises:
      DataError: there is no batch, or one that the loss or the mesh cannot take. The first
        batch is checked before anything is compiled.
      CacheError, ConfigError, SplitError: `cache` is "require", and there can be none.
    """
    if mesh is not None and isinstance(batches, Batches):
        parallel.shard_batch(next(iter(batches)), mesh)  # a size that does not fit is refused before any work
    prepared = prepare(loss_fn, state, frozen, batches, mode=cache, directory=cache_directory, limit=cache_limit)
    if prepared.why:
        say(prepared.why) if say else print(prepared.why, file=sys.stderr)
    state = jax.tree.map(jnp.array, state)
    if mesh is not None:
        state, frozen = parallel.replicate(state, mesh), parallel.replicate(frozen, mesh)
    step, evaluator = compiled_train(prepared.loss_fn, tx), compiled_eval(loss_fn)
    check = checker(loss_fn, state, frozen)
    done, current = int(state.step), None
    for batch, is_last in _with_last(prepared.batches):
        if prepared.cache is None:  # the rows of a cache were checked when it was built
            check(batch)
        state, metrics = step(state, frozen, batch if mesh is None else parallel.shard_batch(batch, mesh))
        done += 1
        due = held_out is not None and (is_last or (evaluate_every and done % evaluate_every == 0))
        current = None
        if due and held_out:
            current = evaluate(evaluator, state, frozen, _checked(check, held_out()), mesh=mesh)
        yield Report(done, state, metrics, current)


@functools.lru_cache(maxsize=16)
def compiled_train(loss_fn: LossFn, tx: optax.GradientTransformation) -> Any:
    """The jitted training step of a loss and a transform; it donates its state.

    The same objects give the same step, so that a second run of `fit`, from another seed or on
    other data, compiles nothing again.
    """
    return jax.jit(train_step(loss_fn, tx), donate_argnums=0)


@functools.lru_cache(maxsize=16)
def compiled_eval(loss_fn: LossFn) -> Any:
    """The jitted evaluation step of a loss; the same loss gives the same step."""
    return jax.jit(eval_step(loss_fn))


def evaluate(
    step: EvalStep, state: TrainState, frozen: Frozen, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> dict[str, float]:
    """The metrics of a whole data set, each example with its weight.

    Args:
      step: a compiled `jtl.eval_step`.
      state: the trained half.
      frozen: the frozen half.
      batches: the data set.
      mesh: split every batch over the devices of this mesh.

    Returns:
      Python floats by name.

    Raises:
      DataError: there is no batch.
    """
    total = None
    for batch in batches:
        part = step(state, frozen, batch if mesh is None else parallel.shard_batch(batch, mesh))
        total = part if total is None else jmetrics.merge(total, part)
    if total is None:
        raise DataError("there is no held-out batch to evaluate: the data set is empty")
    return {name: float(np.asarray(value)) for name, value in jmetrics.compute(total).items()}


def _checked(check: Callable[[Batch], None], batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        check(batch)
        yield batch


def _with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    iterator = iter(batches)
    try:
        held = next(iterator)
    except StopIteration:
        raise DataError("there is no batch to train on: the data set is empty, or smaller than one batch") from None
    for batch in iterator:
        yield held, False
        held = batch
    yield held, True

"""`sweep`: many small trainings at once, over one frozen tree and one cache."""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import metrics as jmetrics
from jtl.cache import Mode, prepare
from jtl.errors import ConfigError, DataError
from jtl.state import Frozen, TrainState, standard_promotion
from jtl.step import LossFn, checker, eval_step, train_step
from jtl.typing import Batch, PyTree

MakeTx = Callable[..., optax.GradientTransformation]


class SweepResult(NamedTuple):
    """N trained members; every array leads with the axis of members.

    Attributes:
      states: the states, stacked.
      metrics: of each member's last batch.
      evaluation: of the held-out batches, at the last time that the member was evaluated; empty without.
      steps: int `[N]`, updates done before the member was stopped.
    """

    states: TrainState
    metrics: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray]
    steps: np.ndarray

    def state(self, member: int) -> TrainState:
        """The state of one member, for `jtl.variables` or more training."""
        return jax.tree.map(lambda leaf: leaf[member], self.states)


class Stopping(NamedTuple):
    """When a member is stopped: its metric has not improved for so many evaluations.

    Attributes:
      metric: a metric of the held-out batches.
      patience: evaluations without improvement.
      higher_is_better: whether an improvement is a rise.
    """

    metric: str = "loss"
    patience: int = 1
    higher_is_better: bool = False


def sweep(
    loss_fn: LossFn,
    make_tx: MakeTx,
    states: Sequence[TrainState],
    frozen: Frozen,
    batches: Iterable[Batch],
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    evaluate_every: int | None = None,
    stopping: Stopping | None = None,
    cache: Mode = "auto",
    cache_directory: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Train N members in one compiled step.

    Members differ in what is stacked: their trained leaves (heads, seeds), their random keys, and the
    hyperparameters of their optimizer. The frozen tree and every batch are shared, so the frozen part
    of the model is computed once for all of them, or once for all epochs with a cache.

        states = [jtl.init(variables, optax.identity(), trainable=mask, key=key)[0] for key in keys]
        result = jtl.sweep(loss_fn, optax.adamw, states, frozen, batches,
                           hyperparameters={"learning_rate": rates, "weight_decay": decays})

    Args:
      loss_fn: the loss.
      make_tx: `make_tx(**hyperparameters)` gives the transform; it is called while the step is traced, with
        scalars.
      states: N states of equal shapes; their optimizer states are made anew.
      frozen: the frozen half that they share.
      batches: as many as there are steps to do, the same for each member.
      hyperparameters: by name, `[N]` each.
      held_out: a function that starts a pass over the held-out batches. They are evaluated after the
        last step.
      evaluate_every: evaluate them after every so many steps, too.
      stopping: when to stop a member early. It is masked: its state stays as it is, and nothing is
        compiled again. The sweep ends when all are stopped.
      cache: as in `jtl.fit`.
      cache_directory: as in `jtl.fit`.
      say: as in `jtl.fit`.

    Returns:
      The N results.

    Raises:
      ConfigError: no states, states of different shapes, hyperparameters of another number, or
        stopping without evaluation.
      DataError: there is no batch, or one that the loss cannot take.
    """
    values = _check(states, hyperparameters or {}, held_out, evaluate_every, stopping)
    prepared = prepare(loss_fn, states[0], frozen, batches, mode=cache, directory=cache_directory)
    if prepared.why:
        say(prepared.why) if say else print(prepared.why, file=sys.stderr)
    stacked = jax.jit(jax.vmap(functools.partial(_start, make_tx)))(_stack(states), values)
    step, evaluator = _compiled_step(prepared.loss_fn, make_tx), _compiled_eval(loss_fn)
    check = checker(loss_fn, states[0], frozen) if prepared.cache is None else lambda batch: None
    watch = _Watch(len(states), stopping)
    done, metrics = 0, None
    for batch in prepared.batches:
        check(batch)
        stacked, metrics = step(stacked, values, watch.active, frozen, batch)
        watch.steps += watch.active
        done += 1
        if held_out is not None and evaluate_every and done % evaluate_every == 0:
            watch.see(_evaluate(evaluator, stacked, frozen, held_out()), metrics, done)
            if not watch.active.any():
                break
    if metrics is None:
        raise DataError("there is no batch to train on: the data set is empty, or smaller than one batch")
    if watch.seen < done:
        watch.see({} if held_out is None else _evaluate(evaluator, stacked, frozen, held_out()), metrics, done)
    return SweepResult(stacked, watch.metrics, watch.evaluation, watch.steps)


class _Watch:
    """Which members are still trained, and what is reported of them."""

    def __init__(self, count: int, stopping: Stopping | None):
        self.stopping, self.seen = stopping, 0
        self.active, self.steps = np.ones(count, bool), np.zeros(count, np.int64)
        self.metrics: dict[str, np.ndarray] = {}
        self.evaluation: dict[str, np.ndarray] = {}
        self._best, self._waited = np.full(count, np.inf), np.zeros(count, np.int64)

    def see(self, evaluation: dict[str, np.ndarray], metrics: dict[str, Any], done: int) -> None:
        """Take in what is known after so many steps; what is reported of a stopped member stays as it was."""
        self.seen = done
        self.evaluation = self._updated(self.evaluation, evaluation)
        self.metrics = self._updated(self.metrics, metrics)
        if self.stopping is None or not evaluation:
            return
        if self.stopping.metric not in evaluation:
            raise ConfigError(f"stopping on {self.stopping.metric!r}: the loss reports {sorted(evaluation)}")
        value = evaluation[self.stopping.metric] * (-1 if self.stopping.higher_is_better else 1)
        better = value < self._best
        self._best = np.where(better, value, self._best)
        self._waited = np.where(better, 0, self._waited + 1)
        self.active = self.active & (self._waited < self.stopping.patience)

    def _updated(self, before: dict[str, np.ndarray], after: Mapping[str, Any]) -> dict[str, np.ndarray]:
        new = {name: np.asarray(value) for name, value in after.items()}
        return {name: np.where(self.active, value, before.get(name, value)) for name, value in new.items()}


def _check(
    states: Sequence[TrainState],
    hyperparameters: Mapping[str, Any],
    held_out: Any,
    evaluate_every: int | None,
    stopping: Stopping | None,
) -> dict[str, jax.Array]:
    if not states:
        raise ConfigError("a sweep needs at least one state")
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), _trained(state)) for state in states]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ConfigError(f"states 0 and {number} differ in structure or shapes; the members of a sweep are alike")
    values = {name: jnp.asarray(value) for name, value in hyperparameters.items()}
    for name, value in values.items():
        if value.shape != (len(states),):
            raise ConfigError(
                f"hyperparameter {name!r} has shape {value.shape}, expected ({len(states)},), one a state"
            )
    if stopping is not None and (held_out is None or not evaluate_every or stopping.patience < 1):
        raise ConfigError("stopping needs held_out, evaluate_every and a patience of at least 1")
    return values


def _trained(state: TrainState) -> PyTree:
    return state._replace(opt_state=())


def _stack(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_trained, states))


def _start(make_tx: MakeTx, state: TrainState, values: dict[str, jax.Array]) -> TrainState:
    with standard_promotion():
        return state._replace(opt_state=make_tx(**values).init(state.params))


@functools.lru_cache(maxsize=16)
def _compiled_step(loss_fn: LossFn, make_tx: MakeTx) -> Callable[..., Any]:
    """The same objects give the same step, so that a second sweep compiles nothing again."""

    def one(state: TrainState, values: Any, active: jax.Array, frozen: Frozen, batch: Batch) -> Any:
        after, metrics = train_step(loss_fn, make_tx(**values))(state, frozen, batch)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)), donate_argnums=0)


@functools.lru_cache(maxsize=16)
def _compiled_eval(loss_fn: LossFn) -> Callable[..., Any]:
    return jax.jit(jax.vmap(eval_step(loss_fn), in_axes=(0, None, None)))


def _evaluate(
    evaluator: Callable[..., Any], stacked: TrainState, frozen: Frozen, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    total = None
    for batch in batches:
        part = evaluator(stacked, frozen, batch)
        total = part if total is None else jmetrics.merge(total, part)
    if total is None:
        raise DataError("there is no held-out batch to evaluate: the data set is empty")
    return {name: np.asarray(value) for name, value in jax.vmap(jmetrics.compute)(total).items()}

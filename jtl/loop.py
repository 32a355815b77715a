"""`fit`: a short loop over public functions, meant to be read, copied and changed."""

import functools
import itertools
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
from jtl import parallel, runs, schedule
from jtl import tree as jtree
from jtl.boundary import Suffix
from jtl.cache import Mode, Prepared, prepare
from jtl.data import Batches
from jtl.errors import ConfigError, DataError
from jtl.memory import Microbatching
from jtl.runs import Run
from jtl.schedule import Phase, Plateau, Progress, Strategy
from jtl.state import Frozen, TrainState, change, freeze
from jtl.step import EvalStep, LossFn, checker, eval_step, microbatches, train_step
from jtl.typing import Batch

_EMPTY = "there is no batch to train on: the data set is empty, or smaller than one batch"


class Report(NamedTuple):
    """One step of `fit`.

    Attributes:
      step: number of updates done so far.
      state: the state after the step. The next step donates it: copy what you keep.
      metrics: of this step's batch, still on the device.
      evaluation: of the held-out batches, where they were evaluated after this step.
      frozen: what the mask of this phase holds still; with one phase, what `fit` was given.
      progress: in the strategy's phases, for `fit` to go on from here.
    """

    step: int
    state: TrainState
    metrics: dict[str, Any]
    evaluation: dict[str, float] | None
    frozen: Frozen
    progress: Progress


def fit(
    loss_fn: LossFn,
    tx: optax.GradientTransformation | Strategy,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[Batch],
    *,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    evaluate_every: int | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    cache: Mode = "auto",
    cache_directory: str | Path | None = None,
    cache_limit: int | None = None,
    say: Callable[[str], None] | None = None,
    accumulate: int = 1,
    run: Run | str | Path | None = None,
) -> Iterator[Report]:
    """Train on every batch, and report after each step.

        for report in jtl.fit(loss_fn, tx, state, frozen, batches):
            ...
        state = report.state

    Args:
      loss_fn: the loss. If it has a method `checker`, as those of `jtl.supervised` have, every
        batch is checked on the host before it is used.
      tx: the transform that `jtl.init` was given, or the strategy. A strategy's phases follow each other; a change
        touches neither the order of the data nor keys nor the count of steps.
      state: where to start; it is copied, so it stays usable.
      frozen: what the mask holds still.
      batches: as many as there are steps to do.
      held_out: a function that starts a pass over the held-out batches. They are evaluated
        after the last step.
      evaluate_every: evaluate them after every so many steps, too.
      progress: where in the strategy `state` is, from the last report; by default its number of steps tells.
      mesh: split every batch over the devices of this mesh; see `jtl.parallel`.
      cache: whether to compute what no trained leaf can change once, and train from that; see
        `jtl.cache.prepare`. "auto" does where it saves work, which takes `batches` from
        `jtl.data.batches`, of several epochs; rows and their order stay the same.
      cache_directory: where to keep it; in memory by default.
      cache_limit: bytes that it may take.
      say: called with one line if a cache is used, or could have been, and with lines on the run; by default they go
        to stderr.
      accumulate: microbatches that each batch is split into for its gradient; see `jtl.train_step`. Where a device
        runs out of memory at the first batch of a shape, batches of that shape go on with at least twice as many: the
        gradient is the same but for the rounding of a sum, about 1e-6 of it in float32, except for what
        `jtl.train_step` says of dropout and of BatchNorm that is trained. So a copy of the trained half is on the host
        while a shape is tried.
      run: a folder to keep checkpoints and metrics in; see `jtl.Run`. If a run is found there, it must be this one, of
        the same start, data, masks and optimizer, and goes on from its newest sound checkpoint: after whatever ended
        it, its steps are bit for bit those of a run that was never interrupted. `state`, `frozen` and `batches` are
        given as at the beginning; `batches` that are not from `jtl.data.batches` are drawn and thrown away up to there.

    Yields:
      A `Report` for each batch; of a run that has ended already, one with its last state.

    Raises:
      DataError: there is no batch, or one that the loss, the mesh or `accumulate` cannot take. The first batch is
        checked before anything is compiled; and with `batches` from `jtl.data.batches`, of data in memory and without
        a transform, each row of the data is.
      CacheError, ConfigError, SplitError: `cache` is "require", and there can be none.
      ConfigError: the batches end before the strategy's last phase begins, or a plateau has nothing to go by; or the
        folder holds another run, each difference listed.
      CheckpointError: a checkpoint cannot be written, or none of the run's is sound.
      OutOfMemoryError: a device does not hold even the smallest microbatch.
      DivergedError: `jtl.transforms.guard` skipped too many steps in a row.
      Interrupted: SIGTERM or SIGINT came. The run is saved; uncaught, the process exits with 75. With a run alone.
    """
    phases, checks = _phases(tx, state, frozen), checker(loss_fn, state, frozen)
    begin = schedule.reached(phases, int(state.step)) if progress is None else progress
    evaluated = held_out is not None and bool(evaluate_every)
    _check_phases(phases, begin, int(state.step), batches, evaluated)
    _check_batches(checks, batches, mesh, accumulate)
    say = say or (lambda line: print(line, file=sys.stderr))
    with runs.opened(run, say) as session:
        if session is not None:
            place = session.enter(phases, state, frozen, batches, accumulate=accumulate)
            state, frozen, batches, begin = place.state, place.frozen, place.batches, place.progress or begin
            if place.ended is not None:
                yield Report(int(state.step), state, *place.ended, frozen, begin)
                return
        store = functools.partial(prepare, loss_fn, directory=cache_directory, limit=cache_limit)
        steps = _Steps(loss_fn, phases, held_out, evaluate_every, mesh, store, cache, say, accumulate, session, checks)
        yield from _loop(steps, state, frozen, batches, begin)


class _Steps(NamedTuple):
    """What the loop of `fit` was told."""

    loss_fn: LossFn
    phases: Strategy
    held_out: Callable[[], Iterable[Batch]] | None
    evaluate_every: int | None
    mesh: Mesh | None
    store: Callable[..., Prepared]
    cache: Mode
    say: Callable[[str], None]
    accumulate: int
    session: runs.Session | None
    check: Callable[[Batch], None]


def _loop(
    given: _Steps, state: TrainState, frozen: Frozen, batches: Iterable[Batch], progress: Progress
) -> Iterator[Report]:
    """The steps of `fit`, from where a run is."""
    rest, phases, mesh, session = _Rest(batches), given.phases.phases, given.mesh, given.session
    evaluator = compiled_eval(given.loss_fn)
    state = jax.tree.map(jnp.array, state)
    done = int(state.step)
    while True:
        phase = phases[progress.phase]
        if not progress.ended(phase, done):
            mode = given.cache if session is None else session.cache(given.cache, progress)
            prepared = given.store(state, frozen, rest.part(phase, progress, done), mode=mode)
            if session is not None:
                session.cached(prepared.cache is not None)
            if prepared.why:
                given.say(prepared.why)
            if mesh is not None:
                state, frozen = parallel.replicate(state, mesh), parallel.replicate(frozen, mesh)
            step = Microbatching(
                functools.partial(_accumulating, prepared.loss_fn, phase.tx),
                given.accumulate,
                devices=1 if mesh is None else mesh.size,
                least=2 if isinstance(prepared.loss_fn, Suffix) else 1,  # it takes no single example
                say=given.say,
                known=None if session is None else session.microbatches(progress),
            )
            if session is not None:
                session.split(step.counts)
            for batch in prepared.batches:
                if prepared.cache is None:  # the rows of a cache were checked when it was built
                    given.check(batch)
                state, metrics = step(state, frozen, batch if mesh is None else parallel.shard_batch(batch, mesh))
                done, current = done + 1, None
                rest.taken += 1
                if given.held_out is not None and (rest.over() or _due(given.evaluate_every, done)):
                    whole, passed = freeze(state, frozen), _checked(given.check, given.held_out())
                    current = evaluate(evaluator, *whole, passed, mesh=mesh)
                    if isinstance(phase.until, Plateau):
                        progress = progress.seen(phase.until, current)
                report = Report(done, state, metrics, current, frozen, progress)
                if session is not None:
                    session.after(report, last=rest.over())
                yield report
                if progress.ended(phase, done):
                    break
        if rest.over() or progress.phase + 1 == len(phases):
            return
        progress = progress.next(done)
        state, frozen = change(state, frozen, phases[progress.phase])


def _accumulating(loss_fn: LossFn, tx: optax.GradientTransformation, count: int) -> Any:
    # Without the option where it is 1: a step is found again by its arguments.
    return compiled_train(loss_fn, tx, **({"accumulate": count} if count != 1 else {}))


def _due(every: int | None, done: int) -> bool:
    return bool(every) and done % every == 0


def _phases(tx: Any, state: TrainState, frozen: Frozen) -> Strategy:
    """The strategy to run; of a transform alone, one phase with the mask that the state was made with."""
    if isinstance(tx, Strategy):
        return schedule.check(tx)
    return Strategy("", (Phase(jtree.mask_of(state.params, jtree.combine(state.params, frozen.params)), tx),))


class _Rest:
    """The batches of a run that are not yet taken."""

    def __init__(self, batches: Iterable[Batch]):
        self.taken, self._run = 0, batches if isinstance(batches, Batches) else None
        self._iterator = iter(()) if self._run is not None else iter(batches)
        self._held: list[Batch] = []
        if self._run is None and self.over():
            raise DataError(_EMPTY)

    def __len__(self) -> int:
        return sys.maxsize if self._run is None else len(self._run) - self.taken

    def __iter__(self) -> Iterator[Batch]:
        while not self.over():
            yield self._held.pop()

    def over(self) -> bool:
        """Whether there is no more."""
        if self._run is not None:
            return not len(self)
        if not self._held:
            self._held = list(itertools.islice(self._iterator, 1))
        return not self._held

    def part(self, phase: Phase, progress: Progress, done: int) -> Iterable[Batch]:
        """What comes, as far as a phase can reach."""
        if self._run is None:
            return self
        start = self._run.start + self.taken
        most = progress.began + phase.until - done if isinstance(phase.until, int) else len(self)
        return self._run.at(start).until(start + min(most, len(self)))


def _check_phases(strategy: Strategy, progress: Progress, done: int, batches: Iterable[Batch], evaluated: bool) -> None:
    if not 0 <= progress.phase < len(strategy.phases):
        raise ConfigError(f"progress is in phase {progress.phase}; {strategy.name!r} has {len(strategy.phases)}")
    count = len(batches) if isinstance(batches, Batches) else sys.maxsize
    if not count:
        raise DataError(_EMPTY)
    lengths = [phase.until for phase in strategy.phases[progress.phase : -1]]
    if any(isinstance(phase.until, Plateau) for phase in strategy.phases[progress.phase :]) and not evaluated:
        raise ConfigError(f"{strategy.name!r} waits for a plateau: it needs held_out and evaluate_every")
    needed = sum(length for length in lengths if isinstance(length, int)) - (done - progress.began)
    if lengths and needed >= count:
        raise ConfigError(
            f"{strategy.name!r} has {needed} more updates before its last phase, and the run {count} batches; "
            "give it more epochs, or shorter phases"
        )


@functools.lru_cache(maxsize=32)  # a strategy may have many phases
def compiled_train(loss_fn: LossFn, tx: optax.GradientTransformation, **options: Any) -> Any:
    """The jitted training step of a loss and a transform, with options of `train_step`; it donates its state.

    The same objects give the same step, so that a second run of `fit`, from another seed or on
    other data, compiles nothing again.
    """
    return jax.jit(train_step(loss_fn, tx, **options), donate_argnums=0)


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


def _check_batches(
    check: Callable[[Batch], None], batches: Iterable[Batch], mesh: Mesh | None, accumulate: int
) -> None:
    """Refuse what no step could take, before any work."""
    if not isinstance(batches, Batches):
        return
    if mesh is not None:
        parallel.shard_batch(next(iter(batches)), mesh)
    if accumulate > 1:
        for shape in batches.shapes:
            microbatches(np.empty(shape[:1], np.bool_), accumulate)
    _check_rows(check, batches)


def _check_rows(check: Callable[[Batch], None], data: Batches) -> None:
    """Check every row before the first step, and name the one that is refused by its place in the data."""
    for rows, batch in data.in_order():
        try:
            check(batch)
        except DataError as error:
            raise DataError(
                _blamed(check, data, rows) or f"rows {rows[0]} to {rows[-1]} of the data: {error}"
            ) from error


def _blamed(check: Callable[[Batch], None], data: Batches, rows: np.ndarray) -> str:
    """What is refused of one of these rows; or of the longest row of all, to whose length they are padded."""
    lengths = data.lengths
    for row in rows if lengths is None else (lengths.argmax(), *rows):
        found = _refusal(check, data.alone(np.array([row])))
        if found and lengths is not None:
            own = _refusal(check, data.alone(np.array([row]), int(lengths[row])))
            if not own:
                return f"all rows of the data are padded to {max(data.layout.buckets)}: {found}"
            found = own
        if found:
            return f"row {row} of the data, by itself in a batch: {found}"
    return ""


def _refusal(check: Callable[[Batch], None], batch: Batch) -> str:
    try:
        check(batch)
    except DataError as error:
        return str(error)
    return ""


def _checked(check: Callable[[Batch], None], batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        check(batch)
        yield batch

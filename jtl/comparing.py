"""`compare`: strategies, learning rates and seeds on one data set, computing nothing twice that they have in common."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import tree as jtree
from jtl.cache import Mode, Prepared, build, follow, prepare
from jtl.data import Batches
from jtl.errors import ConfigError, DataError
from jtl.loop import evaluate
from jtl.metrics import interval
from jtl.schedule import Phase, Plateau, Strategy, check
from jtl.state import Frozen, TrainState, change, freeze, init
from jtl.step import LossFn, checker, eval_step, train_step
from jtl.transforms import scale_by_factor, set_factor
from jtl.typing import Batch, Key, Variables

LIGHT = 1e7
"""Operations of a training step, a row, below which runs are trained side by side: then calls cost more than work."""


class Arm(NamedTuple):
    """A way of adapting that is compared with others.

    Attributes:
      strategy: its phases last for numbers of updates.
      loss_fn: of its model.
      start: `key -> variables`, with a new head, and an adapter if there is one. Frozen leaves that are the same arrays
        for each key are recognised, and what they compute is shared.
      epochs: passes over the training examples.
      factors: of the strategy's learning rates, one run for each.
    """

    strategy: Strategy
    loss_fn: LossFn
    start: Callable[[Key], Variables]
    epochs: int
    factors: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        """Of the strategy."""
        return self.strategy.name


class Trial(NamedTuple):
    """One run.

    Attributes:
      arm: its name.
      seed: of head, order and dropout.
      factor: of the learning rates.
      trained: parameters trained in the last phase.
      share: of all parameters.
      chosen: metrics on the examples that choose.
      scores: metrics on the examples that are reported.
      seconds: of training and evaluation, without compilation; of runs side by side, each one's share.
    """

    arm: str
    seed: int
    factor: float
    trained: int
    share: float
    chosen: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: float


class Row(NamedTuple):
    """An arm at its best factor.

    Attributes:
      arm: its name.
      trained: parameters.
      share: of all parameters.
      factor: the best on the examples that choose, in the mean over seeds.
      scores: on the examples that are reported, one a seed.
      mean: of the scores.
      half: half-width of their 95% t interval; NaN with one seed.
      seconds: of a run.
    """

    arm: str
    trained: int
    share: float
    factor: float
    scores: tuple[float, ...]
    mean: float
    half: float
    seconds: float


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
      metric: that is compared.
      higher_is_better: of it.
      trials: every run.
      left_out: (arm, seed) for which there was no time.
      seconds: of everything.
      compile_seconds: of compilation.
    """

    metric: str
    higher_is_better: bool
    trials: tuple[Trial, ...]
    left_out: tuple[tuple[str, int], ...]
    seconds: float
    compile_seconds: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """Each arm at its best factor, by trained parameters."""
        names = dict.fromkeys(trial.arm for trial in self.trials)
        return tuple(sorted((self._row(name) for name in names), key=lambda row: row.trained))

    @property
    def spot(self) -> Row:
        """The sweet spot: the fewest trained parameters within one standard error of the best mean.

        References:
          Breiman et al, Classification and regression trees, 1984 (the rule of one standard error).
        """
        sign = 1 if self.higher_is_better else -1
        best = max(self.rows, key=lambda row: sign * row.mean)
        error = np.std(best.scores, ddof=1) / len(best.scores) ** 0.5 if len(best.scores) > 1 else 0.0
        return next(row for row in self.rows if sign * row.mean >= sign * best.mean - error)

    def _row(self, name: str) -> Row:
        trials = [trial for trial in self.trials if trial.arm == name]
        sign = 1 if self.higher_is_better else -1
        by_factor = {f: [t for t in trials if t.factor == f] for f in dict.fromkeys(t.factor for t in trials)}
        factor = max(by_factor, key=lambda f: sign * np.mean([t.chosen[self.metric] for t in by_factor[f]]))
        chosen = by_factor[factor]
        scores = tuple(trial.scores[self.metric] for trial in chosen)
        seconds = float(np.mean([trial.seconds for trial in trials]))
        return Row(name, chosen[0].trained, chosen[0].share, factor, scores, *interval(scores), seconds)


def compare(
    arms: Sequence[Arm],
    train: Batches,
    choose: Batches,
    report: Batches,
    *,
    seeds: Sequence[int],
    metric: str,
    higher_is_better: bool = True,
    budget: float | None = None,
    share: bool = True,
    directory: str | Path | None = None,
    on_run: Callable[[str, int, float], None] = lambda arm, seed, done: None,
) -> Comparison:
    """Train every arm with every factor and every seed.

    Shared are: what frozen layers compute, of the examples to train on and of those held out, between all seeds,
    factors, epochs, and arms that are cut at the same place; the compiled step of a phase, between all its runs; and
    the calls of small steps, such as those of a head, which are trained side by side. Values are those of single runs.

    Args:
      arms: with names that differ.
      train: examples to train on; each seed has an order of its own.
      choose: held-out examples that choose each arm's factor.
      report: other held-out examples, whose scores are reported.
      seeds: of the runs. The first is done for every arm, then the second, and so on.
      metric: of the losses' metrics, or "loss".
      higher_is_better: of it.
      budget: seconds; a run that is not expected to fit any more is left out.
      share: whether to share; without, each run computes and compiles all by itself.
      directory: where what frozen layers compute is kept; by default a temporary folder.
      on_run: called with arm, seed and the share of all runs that are done.

    Raises:
      ConfigError: no arm, no seed, two arms of one name, an arm that waits for a plateau or is longer than its run, or
        a metric that the loss does not report.
      DataError: a batch that a loss cannot take.
    """
    _check(arms, seeds, train)
    started, trials, left_out, cost = time.perf_counter(), [], [], {}
    with _folder(directory) as folder:
        runners = [_Runner(arm, train, (choose, report), folder if share else None) for arm in arms]
        for number, seed in enumerate(seeds):
            for place, runner in enumerate(runners):
                on_run(runner.arm.name, seed, (number * len(arms) + place) / (len(seeds) * len(arms)))
                began = time.perf_counter()
                if budget is not None and began - started + cost.get(place, 0.0) > budget:
                    left_out.append((runner.arm.name, seed))
                    continue
                compiled = runner.compile_seconds
                for trial in runner.trials(seed):
                    if metric not in trial.scores:
                        raise ConfigError(f"metric={metric!r}: the loss reports {sorted(trial.scores)}")
                    trials.append(trial)
                cost[place] = time.perf_counter() - began - (runner.compile_seconds - compiled)
    if not trials:
        raise ConfigError(f"a budget of {budget} seconds leaves no run")
    compile_seconds = sum(runner.compile_seconds for runner in runners)
    seconds = time.perf_counter() - started
    return Comparison(metric, higher_is_better, tuple(trials), tuple(left_out), seconds, compile_seconds)


def _check(arms: Sequence[Arm], seeds: Sequence[int], train: Batches) -> None:
    names = [arm.name for arm in arms]
    if not arms or not seeds or len(set(names)) < len(names):
        raise ConfigError(f"a comparison needs seeds, and arms with names that differ; got {seeds} and {names}")
    if not len(train):
        raise DataError("there is no batch to train on")
    for arm in arms:
        if arm.epochs < 1 or not arm.factors or min(arm.factors) <= 0:
            raise ConfigError(f"{arm.name!r} needs epochs and factors above 0; got {arm.epochs} and {arm.factors}")
        phases, steps = check(arm.strategy).phases, arm.epochs * train.steps_per_epoch
        if any(isinstance(phase.until, Plateau) for phase in phases):
            raise ConfigError(f"{arm.name!r} waits for a plateau, which only jtl.fit does")
        if sum(phase.until for phase in phases if isinstance(phase.until, int)) > steps - (phases[-1].until is None):
            raise ConfigError(f"{arm.name!r} has {len(phases)} phases, and the run {steps} steps: give it more epochs")


@contextlib.contextmanager
def _folder(directory: str | Path | None) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class _Compiled:
    """A function compiled ahead for each shape of batch, its last argument; it counts the seconds of that."""

    def __init__(self, function: Callable[..., Any], **settings: Any):
        self.seconds, self._jitted = 0.0, jax.jit(function, **settings)
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = tuple((np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(args[-1]))
        if shapes not in self._programs:
            began = time.perf_counter()
            self._programs[shapes] = self._jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - began
        return self._programs[shapes](*args)


_Member = tuple[TrainState, Frozen]


class _Part(NamedTuple):
    """A phase, ready to be trained."""

    prepared: Prepared
    frozen: Frozen
    light: bool
    step: _Compiled
    together: _Compiled
    evaluator: _Compiled
    held_out: tuple[Any, ...]
    check: Callable[[Batch], None]

    def batches(self, run: Batches) -> Iterator[Batch]:
        """Those of a run, from the cache if there is one."""
        if self.prepared.cache is not None:  # its rows were checked when it was built
            yield from follow(self.prepared.cache, run)
            return
        for batch in run:
            self.check(batch)
            yield batch


class _Runner:
    """The runs of one arm; what they share is kept between them, unless `folder` is None."""

    def __init__(self, arm: Arm, train: Batches, held_out: tuple[Batches, Batches], folder: Path | None):
        phases = arm.strategy.phases
        phases = [phase._replace(tx=optax.chain(phase.tx, scale_by_factor())) for phase in phases]
        self.arm, self.phases, self.train, self.held_out, self.folder = arm, phases, train, held_out, folder
        self._parts: dict[int, _Part] = {}
        self._compile_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Spent on compilation so far."""
        return self._compile_seconds + sum(map(_compilation, self._parts.values()))

    def trials(self, seed: int) -> Iterator[Trial]:
        """The runs of a seed, one for each factor."""
        if self.folder is not None:
            yield from self._run(seed, self.arm.factors)
            return
        for factor in self.arm.factors:
            self._forget()
            yield from self._run(seed, (factor,))

    def _forget(self) -> None:
        self._compile_seconds = self.compile_seconds
        self._parts.clear()

    def _run(self, seed: int, factors: tuple[float, ...]) -> Iterator[Trial]:
        began, compiled = time.perf_counter(), self.compile_seconds
        start_key, run_key = jax.random.split(jax.random.key(seed))
        variables = self.arm.start(start_key)
        run = dataclasses.replace(self.train, seed=seed, epochs=self.arm.epochs)
        first, start = self.phases[0], 0
        members: list[_Member] = [init(variables, first.tx, trainable=first.trainable, key=run_key)] * len(factors)
        for number, phase in enumerate(self.phases):
            if number:
                members = [change(*member, phase) for member in members]
            members = [_with_factor(*member, factor) for member, factor in zip(members, factors, strict=True)]
            stop = start + phase.until if isinstance(phase.until, int) else run.total
            members = self._phase(number, phase, members, run.at(start).until(stop))
            start = stop
        part = self._parts[len(self.phases) - 1]
        scores = [self._scores(part, state, frozen) for state, frozen in members]
        seconds = time.perf_counter() - began - (self.compile_seconds - compiled)
        trained, whole = jtree.size(members[0][0].params), jtree.size(variables["params"])
        for factor, (chosen, reported) in zip(factors, scores, strict=True):
            yield Trial(self.arm.name, seed, factor, trained, trained / whole, chosen, reported, seconds / len(factors))

    def _phase(self, number: int, phase: Phase, members: Sequence[_Member], run: Batches) -> list[_Member]:
        # Of members with frozen leaves of their own, as after a phase that froze what it had trained, each is prepared.
        alike = all(_same(member[1], members[0][1]) for member in members)
        if alike and len(members) > 1 and self._part(number, phase, *members[0], run).light:
            part = self._part(number, phase, *members[0], run)
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for state, _ in members))
            for batch in part.batches(run):
                states, _ = part.together(states, part.frozen, batch)
            unstacked = (jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in range(len(members)))
            return [(state, frozen) for state, (_, frozen) in zip(unstacked, members, strict=True)]
        done = []
        for state, frozen in members:
            part = self._part(number, phase, state, frozen, run)
            state = jax.tree.map(jnp.array, state)  # a step donates it
            for batch in part.batches(run):
                state, _ = part.step(state, frozen, batch)
            done.append((state, frozen))
        return done

    def _part(self, number: int, phase: Phase, state: TrainState, frozen: Frozen, run: Batches) -> _Part:
        found = self._parts.get(number)
        if found is not None and _same(found.frozen, frozen):
            return found
        mode: Mode = "off" if self.folder is None else "auto"
        prepared = prepare(self.arm.loss_fn, state, frozen, run, mode=mode, directory=self.folder)
        step = train_step(prepared.loss_fn, phase.tx)
        look = checker(self.arm.loss_fn, state, frozen)
        light, held_out = False, self.held_out
        if prepared.split is not None:
            light = prepared.split.report.suffix_flops < LIGHT
            caches = [build(prepared.split.prefix, state, frozen, part, directory=self.folder) for part in held_out]
            held_out = tuple(follow(cache, part) for cache, part in zip(caches, held_out, strict=True))
        if found is not None and found.prepared.loss_fn is prepared.loss_fn:
            programs = found.step, found.together, found.evaluator
        else:
            self._compile_seconds += 0.0 if found is None else _compilation(found)
            programs = (
                _Compiled(step, donate_argnums=0),
                _Compiled(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0),
                _Compiled(eval_step(prepared.loss_fn)),
            )
        self._parts[number] = _Part(prepared, frozen, light, *programs, held_out, look)
        return self._parts[number]

    def _scores(self, part: _Part, state: TrainState, frozen: Frozen) -> list[dict[str, float]]:
        whole = freeze(state, frozen)
        return [evaluate(part.evaluator, *whole, batches) for batches in part.held_out]


def _compilation(part: _Part) -> float:
    programs = part.step.seconds + part.together.seconds + part.evaluator.seconds
    return programs + (part.prepared.cache.prefix.seconds if part.prepared.cache else 0.0)


def _with_factor(state: TrainState, frozen: Frozen, factor: float) -> tuple[TrainState, Frozen]:
    return state._replace(opt_state=set_factor(state.opt_state, factor)), frozen


def _same(one: Frozen, other: Frozen) -> bool:
    """Whether they have the very same arrays."""
    pairs = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))

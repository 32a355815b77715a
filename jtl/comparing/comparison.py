"""`compare`: strategies, learning rates and seeds on one data set, computing nothing twice that they have in common."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from jtl.comparing.results import Comparison
from jtl.comparing.runner import Arm, Runner
from jtl.data import Batches
from jtl.errors import ConfigError, DataError
from jtl.schedule import Plateau, check


def compare(
    arms: Sequence[Arm],
    train: Batches | Callable[[int], Batches],
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
      train: examples to train on; each seed has an order of its own. Or a function from a seed to them, where each has
        its own sample; all of as many steps an epoch, and of the same shapes.
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
    sample = (lambda seed: train) if isinstance(train, Batches) else train
    _check(arms, seeds, sample)
    limit = math.inf if budget is None else budget
    started, trials, left_out, cost = time.perf_counter(), [], [], {}
    with _folder(directory) as folder, _compiler() as pool:
        runners = [Runner(arm, sample, (choose, report), folder if share else None) for arm in arms]
        for runner in runners if share else ():
            if time.perf_counter() - started > limit / 4:
                break  # what is not compiled ahead is compiled when it is needed
            runner.ahead(seeds[0], pool)
        for number, seed in enumerate(seeds):
            for place, runner in enumerate(runners):
                on_run(runner.arm.name, seed, (number * len(arms) + place) / (len(seeds) * len(arms)))
                began = time.perf_counter()
                late = began - started + cost.get(place, 0.0) > limit
                if late and (trials or limit <= 0):  # preparing alone does not use the budget up
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


def _check(arms: Sequence[Arm], seeds: Sequence[int], sample: Callable[[int], Batches]) -> None:
    names = [arm.name for arm in arms]
    if not arms or not seeds or len(set(names)) < len(names):
        raise ConfigError(f"a comparison needs seeds, and arms with names that differ; got {seeds} and {names}")
    sizes = {sample(seed).steps_per_epoch for seed in seeds}
    if len(sizes) > 1 or not min(sizes):
        raise DataError(f"the seeds' examples make {sorted(sizes)} steps an epoch: expected one number above 0")
    for arm in arms:
        if arm.epochs < 1 or not arm.factors or min(arm.factors) <= 0:
            raise ConfigError(f"{arm.name!r} needs epochs and factors above 0; got {arm.epochs} and {arm.factors}")
        phases, steps = check(arm.strategy).phases, arm.epochs * min(sizes)
        if any(isinstance(phase.until, Plateau) for phase in phases):
            raise ConfigError(f"{arm.name!r} waits for a plateau, which only jtl.fit does")
        if sum(phase.until for phase in phases if isinstance(phase.until, int)) > steps - (phases[-1].until is None):
            raise ConfigError(f"{arm.name!r} has {len(phases)} phases, and the run {steps} steps: give it more epochs")


@contextlib.contextmanager
def _compiler() -> Iterator[Executor]:
    """One thread: more would take from training what they gain, on few cores."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="jtl-compile")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _folder(directory: str | Path | None) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)

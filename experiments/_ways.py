"""What the comparisons of ways of adapting share: the ways, their rates, and the table."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtl
from jtl import peft, strategies
from jtl.comparing import Arm, Comparison
from jtl.data import Batches
from jtl.metrics import interval

STEPS = 200
"""Updates of a run, or two passes where those are more; of a head alone, which costs next to nothing, five times."""

METRIC = "balanced accuracy"
COUNTS = (50, 200, 1000)
WAYS = (
    "probe",
    "last block",
    "last two",
    "gradual",
    "BitFit",
    "LoRA",
    "layer-wise decay",
    "LP-FT",
    "full",
)


class Task(NamedTuple):
    """A model with its pretrained variables, groups of depth, targets of LoRA, and a rate for each way.

    `random` are the variables from which ways start whose names end with ", random"; their rates are of the same names.
    """

    model: Any
    variables: Mapping[str, Any]
    groups: Sequence[Sequence[str]]
    targets: Sequence[str]
    rates: Mapping[str, float]
    width: int
    classes: int
    random: Mapping[str, Any] | None = None


class Data(NamedTuple):
    """Examples: of a number of labels and a seed to train on, of the same kind to test on, and of another kind."""

    sample: Callable[[int, int], Batches]
    tests: tuple[Batches, Batches]
    validation: tuple[Batches, Batches]


def parser(counts: Sequence[int] = COUNTS, names: Sequence[str] = WAYS) -> argparse.ArgumentParser:
    """The command line of an experiment."""
    line = argparse.ArgumentParser()
    line.add_argument("--seeds", type=int, default=5)
    line.add_argument("--counts", type=int, nargs="+", default=counts)
    line.add_argument("--ways", nargs="+", default=names)
    line.add_argument("--tune", action="store_true", help="thirds and threes of each rate, on seeds of their own")
    return line


def run(task: Task, data: Data, settings: argparse.Namespace) -> None:
    """Compare, and print a line a way as soon as one number of labels is done."""
    seeds = range(100, 102) if settings.tune else range(settings.seeds)
    tests = data.validation if settings.tune else data.tests
    for count in settings.counts:
        steps_per_epoch = data.sample(count, 0).steps_per_epoch
        arms = [_arm(task, way, steps_per_epoch, settings.tune) for way in settings.ways]
        sample = functools.partial(data.sample, count)
        found = jtl.compare(arms, sample, *tests, seeds=seeds, metric=METRIC)
        print(f"\n{count} labels, {found.seconds:.0f} s, of which compilation {found.compile_seconds:.0f} s")
        for arm in arms:
            print(_tuned(found, arm) if settings.tune else _line(found, arm, arms[-1]), flush=True)


def _line(found: Comparison, arm: Arm, control: Arm) -> str:
    cells = []
    for name in ("chosen", "scores"):
        scores, others = (
            [getattr(t, name)[METRIC] for t in found.trials if t.arm == one.name] for one in (arm, control)
        )
        gains = np.subtract(scores, others).tolist()
        cells.append("{:.3f} ± {:.3f}  {:+.3f} ± {:.3f}".format(*interval(scores), *interval(gains)))
    share = next(trial.share for trial in found.trials if trial.arm == arm.name)
    return f"{arm.name:18s}{share:8.2%}   {'    '.join(cells)}"


def _tuned(found: Comparison, arm: Arm) -> str:
    means = {
        factor: np.mean([t.chosen[METRIC] for t in found.trials if t.arm == arm.name and t.factor == factor])
        for factor in arm.factors
    }
    return f"{arm.name:18s}" + "   ".join(f"x {factor:g}: {mean:.3f}" for factor, mean in means.items())


def _arm(task: Task, way: str, steps_per_epoch: int, tune: bool) -> Arm:
    steps = max(STEPS, 2 * steps_per_epoch) * (5 if way == "probe" else 1)
    adapter = peft.lora(task.targets, rank=8) if way == "LoRA" else None
    strategy = jtl.Strategy(way, _strategy(task, way, steps).phases)
    loss_fn = _loss(task.model if adapter is None else peft.adapted(task.model, adapter))
    epochs, factors = -(-steps // steps_per_epoch), (0.3, 1.0, 3.0) if tune else (1.0,)
    start = functools.partial(_start, task, way.endswith(", random"), adapter)
    return Arm(strategy, loss_fn, start, epochs, factors)


def _strategy(task: Task, way: str, steps: int) -> jtl.Strategy:
    groups, tx = task.groups, _optimizer(task.rates.get(way, 0.0), steps)
    third = steps // 3
    return {
        "probe": lambda: strategies.feature_extraction(tx),
        "last block": lambda: strategies.last_blocks(tx, groups, 1),
        "last two": lambda: strategies.last_blocks(tx, groups, 2),
        "gradual": lambda: strategies.gradual_unfreezing(tx, groups, every=third, count=3),
        "BitFit": lambda: strategies.bitfit(tx),
        "LoRA": lambda: strategies.fine_tune(tx, jtl.select("**/lora", "head")),
        "layer-wise decay": lambda: strategies.layerwise_decay(tx, groups, decay=0.75),
        "LP-FT": lambda: strategies.lp_ft(
            _optimizer(task.rates["probe"], third), _optimizer(task.rates[way], steps - third), steps=third
        ),
        "full": lambda: strategies.full(tx),
        "full, random": lambda: strategies.full(tx),
        "LP-FT, norms frozen": lambda: strategies.lp_ft(
            _optimizer(task.rates["probe"], third),
            _optimizer(task.rates["LP-FT"], steps - third),
            steps=third,
            trainable=jtl.everything() - jtl.masks.norms(),
        ),
        "full, norms frozen": lambda: strategies.fine_tune(
            _optimizer(task.rates["full"], steps), jtl.everything() - jtl.masks.norms()
        ),
    }[way]()


@functools.cache  # the same object for the same schedule, so that the same step
def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))


@functools.cache
def _loss(model: Any) -> Any:
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics={METRIC: jtl.metrics.balanced_accuracy})


def _start(task: Task, fresh: bool, adapter: Any, key: jax.Array) -> dict[str, Any]:
    given = task.random or {} if fresh else task.variables
    head = {"kernel": 0.02 * jax.random.normal(key, (task.width, task.classes)), "bias": jnp.zeros(task.classes)}
    variables = {**given, "params": {**given["params"], "head": head}}
    return variables if adapter is None else peft.attach(adapter, variables, key=key)

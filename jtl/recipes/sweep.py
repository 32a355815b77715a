"""`jtl sweep`: which layers to freeze, on a user's own texts or pictures."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import jtl
from jtl.comparing import Arm, Comparison, Row
from jtl.data import examples
from jtl.errors import ConfigError
from jtl.recipes import task, ways
from jtl.recipes.settings import StrategyName, Sweep, Way
from jtl.report import comparison_picture, comparison_table
from jtl.weights.folders import check_new, new_folder

METRIC = "balanced accuracy"

_FACTORS: dict[StrategyName, tuple[float, ...]] = {
    "feature-extraction": (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0),
    "last-blocks": (0.3, 1.0, 3.0),
}
"""Multiples of the usual learning rate: many where runs cost nothing, the usual one alone where they cost most. LoRA
and full fine-tuning, which change what every block computes, share nothing but compilation."""

_PROBE_EPOCHS = 5
"""Times as many epochs for a head alone: linear probing is meant to converge."""


def run(settings: Sweep, console: Console) -> Comparison:
    """Read, compare, print, and save.

    Args:
      settings: as the command line gives them.
      console: where to print.

    Returns:
      The comparison.

    Raises:
      JtlError: whatever is wrong with data, model or settings, before anything is compiled.
    """
    _check(settings)
    given = task.task(settings, settings.seed, console)
    halves = examples.split(given.held_out, [0.5, 0.5], seed=settings.seed)
    train, _, (choose, report) = task.batches(
        settings, given, halves, console, seed=settings.seed, epochs=settings.epochs, keep=settings.share
    )
    arms = list(_arms(settings, given, train.steps_per_epoch))
    runs = sum(len(arm.factors) for arm in arms) * settings.seeds
    console.print(f"{len(arms)} strategies, {runs} runs, at most {settings.minutes:g} minutes")
    with console.status("training") as status:
        found = jtl.compare(
            arms,
            train,
            choose,
            report,
            seeds=range(settings.seed, settings.seed + settings.seeds),
            metric=METRIC,
            budget=60 * settings.minutes,
            share=settings.share,
            on_run=lambda arm, seed, done: status.update(f"{done:.0%}: {arm}, seed {seed}"),
        )
    _print(settings, found, report.layout, console)
    if settings.out is not None:
        _save(settings, found, settings.out)
        console.print(f"saved to {settings.out}", markup=False, soft_wrap=True)
    return found


def _check(settings: Sweep) -> None:
    if min(settings.epochs, settings.seeds) < 1 or not settings.minutes > 0 or not settings.strategies:
        raise ConfigError("a sweep needs strategies, and epochs, seeds and minutes above 0")
    if not all(0 < rate < math.inf for rate in settings.rates):
        raise ConfigError(f"rates are multiples above 0, got {settings.rates}")
    task.check_seed(settings.seed, settings.seeds)
    if "last-blocks" in settings.strategies and not settings.depths:
        raise ConfigError("last-blocks needs depths")
    if settings.out is not None:
        check_new(settings.out)


def _arms(settings: Sweep, given: task.Task, steps: int) -> Iterator[Arm]:
    plain = _loss(given.model)
    for name in dict.fromkeys(settings.strategies):
        for depth in sorted(set(settings.depths)) if name == "last-blocks" else (2,):
            epochs = settings.epochs * (_PROBE_EPOCHS if name == "feature-extraction" else 1)
            asked = Way(strategy=name, blocks=depth)
            way = ways.way(asked, given.model, given.variables["params"], epochs * steps)
            loss_fn = plain if way.adapter is None else _loss(way.model(given.model))
            factors = settings.rates or _FACTORS.get(name, (1.0,))
            yield Arm(way.strategy, loss_fn, _start(given, way), epochs, tuple(factors))


def _loss(model: Any) -> Any:
    metrics = {"accuracy": jtl.metrics.accuracy, METRIC: jtl.metrics.balanced_accuracy}
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics=metrics)


def _start(given: task.Task, way: ways.Way) -> Callable[[jax.Array], dict[str, Any]]:
    """The pretrained variables under a head of the key's own."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given.variables["params"]["head"])

    def start(key: jax.Array) -> dict[str, Any]:
        head_key, adapter_key = jax.random.split(key)
        params = {**given.variables["params"], "head": _new_head(given.model, shapes, head_key)}
        return way.variables({**given.variables, "params": params}, adapter_key)

    return start


def _new_head(model: Any, shapes: Any, key: jax.Array) -> Any:
    """Of the shapes that the head has: its inputs are the first axis of its kernel."""
    width = shapes["kernel"].shape[0]
    return model.head.init(key, jnp.zeros((1, width)))["params"]


def _print(settings: Sweep, found: Comparison, layout: Any, console: Console) -> None:
    title = f"{settings.model} on {settings.data}; {len(layout.bucket_of_row)} examples reported"
    console.print(comparison_table(found, title))
    spot = found.spot
    console.print(
        f"sweet spot: {spot.arm}, {spot.trained:,} parameters ({spot.share:.2%}), {METRIC} {spot.mean:.3f}",
        markup=False,
        soft_wrap=True,
    )
    took = f"{len(found.trials)} runs in {found.seconds:.0f} s"
    console.print(f"{took}, {found.compile_seconds:.0f} s of it waiting for compilation")
    if found.left_out:
        names = ", ".join(f"{arm} (seed {seed})" for arm, seed in found.left_out)
        console.print(f"no time was left for: {names}", markup=False, soft_wrap=True)


def _save(settings: Sweep, found: Comparison, out: Path) -> None:
    with new_folder(out) as folder:
        rows = {"spot": _row(found.spot), "rows": [_row(row) for row in found.rows]}
        rows |= {"seconds": found.seconds, "compile_seconds": found.compile_seconds, "left_out": found.left_out}
        trials = [trial._asdict() for trial in found.trials]
        plain = {name: str(value) for name, value in dataclasses.asdict(settings).items()}
        text = json.dumps({"settings": plain, **rows, "trials": trials}, indent=2)
        (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(comparison_table(found))
        comparison_picture(found, folder / "sweep.png")


def _row(row: Row) -> dict[str, Any]:
    # JSON has no NaN: of one seed there is no interval.
    return {**row._asdict(), "half": None if math.isnan(row.half) else row.half}

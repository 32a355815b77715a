"""`jtl finetune`: a user's own labelled texts or pictures, from files to a trained model in a folder."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jtl
from jtl import runs, strategies
from jtl.data import Batches, Examples
from jtl.errors import ConfigError, DivergedError
from jtl.models.recognise import OWN
from jtl.recipes import progress, task, training, ways
from jtl.recipes.settings import Finetune
from jtl.weights.folders import added_to
from jtl.weights.source import Source

_BATCHES = 8
"""That the gradients are taken of by which surgical fine-tuning chooses."""

_GIVE_UP = runs.Run("").give_up
"""Steps in a row that are skipped, after which a run is of no use."""


def run(settings: Finetune, console: Console) -> training.Outcome:
    """Read, check, train, evaluate, and save.

    Args:
      settings: as the command line gives them.
      console: where to print.

    Returns:
      The outcome.

    Raises:
      JtlError: whatever is wrong with data, model or settings, before anything is compiled.
    """
    _check(settings)
    kind: dict[str, Any] = {"kind": settings.task, "separator": settings.separator}
    given = task.task(settings, settings.seed, console, augment=settings.augment, **kind)
    run_key = jax.random.split(jax.random.key(settings.seed))[1]
    order = {"seed": settings.seed, "epochs": settings.epochs, "augment": settings.augment}
    order["stride"] = settings.stride
    batches, augment, (test,) = task.batches(settings, given, [given.held_out], console, **order)
    norms = functools.partial(_norms, given, batches, augment, run_key)
    way = ways.way(settings, given.model, given.variables["params"], len(batches), norms)
    strategy = strategies.guarded(way.strategy, spike=settings.spike)
    loss_fn = jtl.supervised(way.model(given.model), given.goal.loss, metrics=given.goal.metrics)
    mesh = jtl.parallel.data_mesh() if jax.device_count() > 1 else None
    kept = _run(settings, given.source)
    with runs.opened(kept, _say(console)) as session, progress.steps(console) as advance:
        shown, guarded = advance(escape(way.strategy.name), len(batches)), []

        def on_step(metrics: dict[str, Any]) -> None:
            shown(metrics)
            guarded.append((metrics["skipped"], metrics["skipped_in_a_row"]))

        done = training.run(
            loss_fn,
            strategy,
            way.variables(given.variables, jax.random.fold_in(run_key, 1)),
            batches,
            test,
            key=run_key,
            mesh=mesh,
            cache=settings.cache,
            augment=augment,
            on_step=on_step,
            session=session,
        )
    for line in filter(None, (done.why, _skipped(guarded))):
        console.print(line, markup=False, soft_wrap=True)
    _print(way.strategy.name, done.outcome, given.held_out, console)
    if settings.out is not None:
        # JSON has no NaN: of a single number to evaluate on there is no correlation.
        scores = {name: value if math.isfinite(value) else None for name, value in done.outcome.scores.items()}
        outcome = {**done.outcome._asdict(), "scores": scores}
        notes = {"settings": _plain(settings), "outcome": outcome, "source": given.source.name}
        whole = given.goal.told(way.plain(jtl.variables(done.state, done.frozen)))
        names = {"classes": given.train.classes, "tokenizer": given.tokenizer}
        with added_to(settings.out, last=OWN) as draft:
            jtl.save(draft, given.model, whole, **names, notes=notes)
        console.print(
            f"saved to {settings.out}; jtl.load({str(settings.out)!r}) takes it back", markup=False, soft_wrap=True
        )
    return done.outcome


def _skipped(guarded: Sequence[tuple[Any, Any]]) -> str:
    """What a guard kept from a run, in one line, from whether each step was skipped and how many in a row were.

    Raises:
      DivergedError: they end in steps that were all skipped.
    """
    in_a_row, skipped = int(guarded[-1][1]) if guarded else 0, sum(int(one) for one, _ in guarded)
    if in_a_row and in_a_row >= min(len(guarded), _GIVE_UP):
        raise DivergedError(
            f"the last {in_a_row} steps were all skipped, for loss or gradients were not finite, or the loss far above "
            "those before: lower the learning rate, or look for inputs that are not finite"
        )
    return f"{skipped} of {len(guarded)} steps were skipped: not finite, or a spike of the loss" if skipped else ""


def _run(settings: Finetune, source: Source) -> runs.Run | None:
    """The run's folder; what another run of it must have in common is all but where and how it is kept."""
    if settings.out is None:
        return None
    kept = {name: getattr(settings, name) for name in ("every", "keep", "watchdog")}
    config = {name: value for name, value in _plain(settings).items() if name not in ("out", *kept)}
    config |= {"source": source.name, "commit": source.revision}
    return runs.Run(settings.out, config, **kept)


def _say(console: Console) -> Callable[[str], None]:
    return functools.partial(console.print, markup=False, soft_wrap=True)


def _check(settings: Finetune) -> None:
    if settings.out is not None:
        runs.check(runs.Run(settings.out, every=settings.every, keep=settings.keep, watchdog=settings.watchdog))
    if settings.epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {settings.epochs}")
    ways.rate(settings)
    jtl.transforms.guard(optax.identity(), spike=settings.spike)
    if settings.augment != "none":
        training.check_cache(settings.cache)
    devices = jax.device_count()
    if settings.batch_size % devices:
        few = "smaller than" if settings.batch_size < devices else "not a multiple of"
        raise ConfigError(f"a batch of {settings.batch_size} examples is {few} the {devices} devices")


def _norms(given: task.Task, batches: Batches, augment: Any, key: jax.Array, groups: ways.Groups) -> Any:
    """The relative gradient norm of each group, under a head that was trained for an epoch."""
    loss_fn, epoch = jtl.supervised(given.model, given.goal.loss), batches.until(batches.steps_per_epoch)
    probe = strategies.feature_extraction(training.optimizer(ways.PROBE, len(epoch)))

    def data(run: Batches) -> Iterable[Any]:
        return run if augment is None else jtl.augment.augmented(run, augment, key)

    state, frozen = jtl.init(given.variables, probe, key=key)
    for report in jtl.fit(loss_fn, probe, state, frozen, data(epoch)):
        state = report.state
    some = data(batches.until(min(_BATCHES, len(epoch))))
    return jtl.surgery.gradient_norms(loss_fn, jtl.variables(state, frozen), some, groups, key=key)


def _print(name: str, outcome: training.Outcome, held_out: Examples, console: Console) -> None:
    console.print(f"\n{escape(name)}, on {held_out.size} held-out examples")
    table = Table("", "", box=None, show_header=False)
    table.columns[1].justify = "right"
    values = {
        "trained parameters": f"{outcome.trained:,}",
        "optimizer bytes": f"{outcome.state_bytes:,}",
        "GFLOP/example": f"{outcome.gflops:.3f}",
        "compilation, s": f"{outcome.compile_seconds:.1f}",
        "training, s": f"{outcome.seconds:.1f}",
        "examples/s": f"{outcome.examples_per_second:,.0f}",
        **{metric: f"{value:.3f}" for metric, value in outcome.scores.items()},
    }
    for row in values.items():
        table.add_row(*row)
    console.print(table)


def _plain(settings: Finetune) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}

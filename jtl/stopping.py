"""`early_stopping`: end a run when a held-out metric no longer becomes better, and keep the best of it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.loop import Report
from jtl.schedule import Plateau, Progress
from jtl.state import Frozen, TrainState


class Best(NamedTuple):
    """The best step of a run so far.

    Attributes:
      step: number of updates done.
      evaluation: of the held-out batches after that step.
      state: a copy of the state after it.
      frozen: the other half of the weights then: a strategy's phases have different halves.
    """

    step: int
    evaluation: dict[str, float]
    state: TrainState
    frozen: Frozen


def early_stopping(reports: Iterable[Report], criterion: Plateau | None = None) -> Iterator[tuple[Report, Best | None]]:
    """A run's reports, each with the best step so far, until the criterion says stop.

        reports = jtl.fit(loss_fn, tx, state, frozen, batches, held_out=held_out, evaluate_every=100)
        for report, best in jtl.early_stopping(reports, jtl.Plateau("accuracy", patience=3, higher_is_better=True)):
            ...
        variables = jtl.variables(best.state, best.frozen)

    A value that is not finite is never the best, and counts as an evaluation without a better one. The
    best is kept over all phases of a strategy; `patience` counts over them, too.

    Args:
      reports: of `jtl.fit`, or your own loop's. Those without an evaluation only pass through.
      criterion: what is watched: by default the loss, with patience 1. `best` is the first step that no
        later one betters by more than `by`.

    Yields:
      `(report, best)`; `best` is None until there is a finite value.

    Raises:
      ConfigError: a patience below 1; the metric is not among those evaluated; or the run ends without
        any evaluation.

    References:
      Prechelt, Early stopping - but when?, 1998.
    """
    criterion = Plateau() if criterion is None else criterion
    if criterion.patience < 1:
        raise ConfigError(f"patience={criterion.patience}: expected 1 or more evaluations")
    return _watched(reports, criterion)


def _watched(reports: Iterable[Report], criterion: Plateau) -> Iterator[tuple[Report, Best | None]]:
    progress, best, evaluated = Progress(), None, False
    for report in reports:
        if report.evaluation is not None:
            evaluated, before, progress = True, progress, progress.seen(criterion, report.evaluation)
            if progress.best < before.best:
                # The next step donates the state. The frozen half is never donated.
                best = Best(report.step, report.evaluation, jax.tree.map(jnp.array, report.state), report.frozen)
        yield report, best
        if progress.waited >= criterion.patience:
            return
    if not evaluated:
        raise ConfigError(
            f"early stopping on {criterion.metric!r}: nothing was evaluated; give jtl.fit held_out and evaluate_every"
        )

"""A strategy as data: phases that follow each other, each a mask and an optax transform."""

import math
from typing import NamedTuple

import optax

from jtl.errors import ConfigError
from jtl.typing import MaskLike


class Plateau(NamedTuple):
    """The end of a phase: a metric of the held-out batches has not become better for a while.

    Attributes:
      metric: its name in the evaluation.
      patience: this many evaluations in a row without a better value end the phase.
      higher_is_better: as for accuracy; not as for a loss.
      by: how much better a value must be than the best before it.
    """

    metric: str = "loss"
    patience: int = 1
    higher_is_better: bool = False
    by: float = 0.0


class Phase(NamedTuple):
    """A part of a run with one mask and one transform, so one compiled step.

    Attributes:
      trainable: the mask.
      tx: the transform. It sees trained leaves alone.
      until: the number of updates, or what ends the phase; None lasts to the end of the run.
      fresh: start the transform anew; otherwise what its state holds of leaves that were trained before is kept.
      name: for tables and logs.
    """

    trainable: MaskLike
    tx: optax.GradientTransformation
    until: int | Plateau | None = None
    fresh: bool = False
    name: str = ""


class Strategy(NamedTuple):
    """A way of adapting a model. `jtl.init` and `jtl.fit` take it where they take a transform.

    Attributes:
      name: for tables and logs.
      phases: in their order; only the last one may be without an end.
    """

    name: str
    phases: tuple[Phase, ...]

    @property
    def trainable(self) -> MaskLike:
        """The mask of the first phase."""
        return self.phases[0].trainable

    @property
    def tx(self) -> optax.GradientTransformation:
        """The transform of the first phase."""
        return self.phases[0].tx


class Progress(NamedTuple):
    """How far a run is in its strategy; with the state, all that a resumed run needs to know.

    Attributes:
      phase: the number of the phase, from 0.
      began: updates done before it.
      best: of a plateau's metric, negated where higher is better.
      waited: evaluations since then.
    """

    phase: int = 0
    began: int = 0
    best: float = math.inf
    waited: int = 0

    def next(self, step: int) -> "Progress":
        """The beginning of the next phase, after `step` updates."""
        return Progress(self.phase + 1, step)

    def seen(self, plateau: Plateau, evaluation: dict[str, float]) -> "Progress":
        """After an evaluation. A value that is not finite is never better.

        Raises:
          ConfigError: the metric is not among those evaluated.
        """
        if plateau.metric not in evaluation:
            raise ConfigError(f"a plateau of {plateau.metric!r}: the loss reports {sorted(evaluation)}")
        value = evaluation[plateau.metric] * (-1 if plateau.higher_is_better else 1)
        if math.isfinite(value) and value < self.best - plateau.by:
            return self._replace(best=value, waited=0)
        return self._replace(waited=self.waited + 1)

    def ended(self, phase: Phase, step: int) -> bool:
        """Whether a phase is at its end after `step` updates."""
        if isinstance(phase.until, Plateau):
            return self.waited >= phase.until.patience
        return phase.until is not None and step - self.began >= phase.until


def check(strategy: Strategy) -> Strategy:
    """Refuse a strategy that cannot be run.

    Raises:
      ConfigError: no phase, a phase without updates, or one after a phase that has no end.
    """
    if not strategy.phases:
        raise ConfigError(f"the strategy {strategy.name!r} has no phase")
    for number, phase in enumerate(strategy.phases):
        until, last = phase.until, number == len(strategy.phases) - 1
        if isinstance(until, Plateau) and until.patience < 1:
            raise ConfigError(f"phase {number} of {strategy.name!r} has patience={until.patience}; expected 1 or more")
        if isinstance(until, int) and until < 1:
            raise ConfigError(f"phase {number} of {strategy.name!r} has {until} updates; expected 1 or more")
        if until is None and not last:
            raise ConfigError(f"phase {number} of {strategy.name!r} has no end, and another comes after it")
    return strategy


def reached(strategy: Strategy, step: int) -> Progress:
    """How far a run is after `step` updates, where its phases have numbers of updates.

    At the end of a phase, it is still that phase.

    Raises:
      ConfigError: a phase that ends with a plateau comes before: then only the run itself knows.

    >>> probe = Phase({"head": True, "stem": False}, optax.sgd(0.1), until=3)
    >>> [reached(Strategy("", (probe, probe._replace(until=None))), step).phase for step in (0, 3, 4)]
    [0, 0, 1]
    """
    began = 0
    for number, phase in enumerate(strategy.phases):
        if phase.until is None or (isinstance(phase.until, int) and step <= began + phase.until) or step == began:
            return Progress(number, began)
        if isinstance(phase.until, Plateau):
            raise ConfigError(
                f"phase {number} of {strategy.name!r} ends with a plateau: pass the last report's progress= to go on"
            )
        began += phase.until
    return Progress(len(strategy.phases) - 1, step)

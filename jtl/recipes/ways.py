"""From the settings of a run to its strategy."""

from typing import Any

import jtl
from jtl import strategies
from jtl.errors import ConfigError
from jtl.recipes import training
from jtl.recipes.settings import Finetune

_PROBE = 1e-2
"""The learning rate of a head on frozen features."""

_RATES = {
    "feature-extraction": _PROBE,
    "last-blocks": 2e-4,
    "first-blocks": 2e-4,
    "gradual": 2e-4,
    "layerwise-decay": 2e-4,
    "bitfit": 1e-3,
    "norms": 1e-3,
}
"""The highest learning rate of AdamW where none is given; 1e-4 for strategies that train all weights alike."""


def strategy(settings: Finetune, model: Any, steps: int) -> jtl.Strategy:
    """The strategy that a command line asks for.

    Args:
      settings: of the run.
      model: of jtl's families.
      steps: updates of the whole run.

    Raises:
      ConfigError: the run is too short for the strategy's phases, or a number is out of range.
    """
    tx = training.optimizer(settings.learning_rate or _RATES.get(settings.strategy, 1e-4), steps)
    if settings.trainable:
        return strategies.fine_tune(tx, jtl.select(*settings.trainable), " ".join(settings.trainable))
    return _named(settings, tx, strategies.depth_groups(model), steps)


def _named(settings: Finetune, tx: Any, groups: Any, steps: int) -> jtl.Strategy:
    match settings.strategy:
        case "feature-extraction":
            return strategies.feature_extraction(tx)
        case "last-blocks":
            return strategies.last_blocks(tx, groups, settings.blocks)
        case "first-blocks":
            return strategies.first_blocks(tx, groups, settings.blocks)
        case "full":
            return strategies.full(tx)
        case "lp-ft":
            probe, rest = _phases(settings, steps, 2), steps - steps // 2
            second = training.optimizer(settings.learning_rate or _RATES.get(settings.strategy, 1e-4), rest)
            return strategies.lp_ft(training.optimizer(_PROBE, probe), second, steps=probe)
        case "gradual":
            count = settings.blocks + 1
            every = _phases(settings, steps, count)
            return strategies.gradual_unfreezing(tx, groups, every=every, count=count)
        case "layerwise-decay":
            return strategies.layerwise_decay(tx, groups, decay=settings.decay)
        case "bitfit":
            return strategies.bitfit(tx)
        case "norms":
            return strategies.norms(tx)
        case "l2-sp":
            return strategies.l2_sp(tx, rate=settings.pull, head_rate=settings.pull)


def _phases(settings: Finetune, steps: int, count: int) -> int:
    """The steps of each of so many equal phases."""
    if steps < count:
        raise ConfigError(f"{settings.strategy} has {count} phases, and the run {steps} steps: give it more epochs")
    return steps // count

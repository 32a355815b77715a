"""Strategies as the command line names them, with learning rates that suit them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import jtl
from jtl import masks, peft, strategies
from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.peft import Adapter
from jtl.recipes import settings as jsettings
from jtl.recipes import training
from jtl.typing import Params, Variables

Groups = Sequence[Sequence[str]]

PROBE = 1e-2
"""The learning rate of a head on frozen features."""

_RATES: Mapping[str, float] = {
    "feature-extraction": PROBE,
    "last-blocks": 2e-4,
    "first-blocks": 2e-4,
    "gradual": 2e-4,
    "layerwise-decay": 2e-4,
    "bitfit": 1e-3,
    "norms": 1e-3,
    "lora": 1e-3,
}
"""The highest learning rate of AdamW where none is given; 1e-4 for strategies that train all weights alike."""


class Way(NamedTuple):
    """A strategy, and the adapter that it trains, if it trains one."""

    strategy: jtl.Strategy
    adapter: Adapter | None = None

    def model(self, model: Any) -> Any:
        """What is trained of a model."""
        return model if self.adapter is None else peft.adapted(model, self.adapter)

    def variables(self, variables: Variables, key: jax.Array) -> dict[str, Any]:
        """Where training starts, from those of the plain model."""
        return dict(variables) if self.adapter is None else peft.attach(self.adapter, variables, key=key)

    def plain(self, variables: Variables) -> dict[str, Any]:
        """The variables of the plain model, from those that were trained."""
        return dict(variables) if self.adapter is None else peft.merge(self.adapter, variables)


def way(
    settings: jsettings.Way,
    model: Any,
    params: Params,
    steps: int,
    norms: Callable[[Groups], Sequence[float]] | None = None,
) -> Way:
    """The way that a command line asks for.

    Args:
      settings: of the run.
      model: of jtl's families.
      params: of the model, arrays or shapes.
      steps: updates of the whole run.
      norms: gives the relative gradient norm of each group, where there are data to take it of.

    Raises:
      ConfigError: the run is too short for the strategy's phases, it needs data that are not there, or a number is out
        of range.
    """
    tx = training.optimizer(rate(settings), steps)
    if settings.trainable:
        return Way(strategies.fine_tune(tx, jtl.select(*settings.trainable), " ".join(settings.trainable)))
    if settings.strategy == "lora":
        return _lora(settings, tx, params)
    groups = strategies.depth_groups(model)
    if settings.strategy == "surgical":
        if norms is None:
            raise ConfigError("surgical chooses blocks by the gradients of data, which only jtl finetune has")
        return Way(strategies.surgical(tx, groups, norms(groups), settings.blocks))
    return Way(_named(settings, tx, groups, steps))


def rate(settings: jsettings.Way) -> float:
    """The highest learning rate.

    Raises:
      ConfigError: it is not above 0, or not finite.
    """
    if settings.learning_rate is not None and not 0 < settings.learning_rate < math.inf:
        raise ConfigError(f"learning_rate must be a number above 0, got {settings.learning_rate}")
    return settings.learning_rate or _RATES.get(settings.strategy, 1e-4)


def _lora(settings: jsettings.Way, tx: Any, params: Params) -> Way:
    adapter = peft.lora(settings.targets or _targets(params), rank=settings.rank)
    mask = masks.select("**/lora", "head")
    return Way(strategies.fine_tune(tx, mask, f"LoRA, rank {settings.rank}"), adapter)


def _targets(params: Params) -> list[str]:
    """Queries and values, as in the paper; without attention, every kernel below the head."""
    paths = jtree.paths(params)
    if any(path.endswith("/query/kernel") for path in paths):
        return ["**/query", "**/value"]
    if any(path.endswith("/qkv/kernel") for path in paths):  # GPT-2 has them in one, as PEFT adapts it
        return ["**/qkv"]
    return sorted({path for path in paths if path.endswith("/kernel") and not path.startswith("head/")})


def _named(settings: jsettings.Way, tx: Any, groups: Groups, steps: int) -> jtl.Strategy:
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
            probe = _phases(settings, steps, 2)
            second = training.optimizer(rate(settings), steps - probe)
            return strategies.lp_ft(training.optimizer(PROBE, probe), second, steps=probe)
        case "gradual":
            count = settings.blocks + 1
            every = _phases(settings, steps, count)
            return strategies.gradual_unfreezing(tx, groups, every=every, count=count)
        case "discriminative":
            return strategies.discriminative(tx, list(map(_factor, settings.factors)))
        case "layerwise-decay":
            return strategies.layerwise_decay(tx, groups, decay=settings.decay)
        case "bitfit":
            return strategies.bitfit(tx)
        case "norms":
            return strategies.norms(tx)
        case "l2-sp":
            return strategies.l2_sp(tx, rate=settings.pull, head_rate=settings.pull)
    raise ConfigError(f"there is no strategy {settings.strategy!r}")


def _factor(given: str) -> tuple[str, float]:
    """A pattern and its factor, of "PATTERN=FACTOR"."""
    pattern, _, factor = given.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value < math.inf:
        raise ConfigError(f"factors: expected PATTERN=FACTOR with a number from 0 on, got {given!r}")
    return pattern, value


def _phases(settings: jsettings.Way, steps: int, count: int) -> int:
    """The steps of each of so many equal phases."""
    if steps < count:
        raise ConfigError(f"{settings.strategy} has {count} phases, and the run {steps} steps: give it more epochs")
    return steps // count

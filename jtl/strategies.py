"""Ways of adapting a pretrained model: each gives a `Strategy`, masks and transforms in phases.

    groups   = strategies.depth_groups(model)
    strategy = strategies.layerwise_decay(optax.adamw(1e-4), groups, decay=0.75)
    state, frozen = jtl.init(variables, strategy, key=key)
    for report in jtl.fit(loss_fn, strategy, state, frozen, batches):
        ...

Depth groups are patterns from the input to the output; the last group is all that lies above the blocks, the head
included. Those of jtl's own families are known; for another model write them down.
"""

from collections.abc import Sequence

import numpy as np
import optax

from jtl import masks
from jtl.errors import ConfigError
from jtl.models import registry
from jtl.rules import Rules
from jtl.schedule import Phase, Plateau, Strategy
from jtl.transforms import guard, joining, pull_to_start, scale_by_rules
from jtl.typing import MaskLike

Groups = Sequence[Sequence[str]]


def fine_tune(tx: optax.GradientTransformation, trainable: MaskLike, name: str = "") -> Strategy:
    """Train what a mask says.

    Args:
      tx: any optax transform, without masks.
      trainable: the mask.
      name: for tables and logs; by default the mask's.
    """
    return Strategy(name or (repr(trainable) if isinstance(trainable, masks.Mask) else "mask"), (Phase(trainable, tx),))


def feature_extraction(tx: optax.GradientTransformation, head: MaskLike | None = None) -> Strategy:
    """Train the head alone: linear probing.

    Args:
      tx: any optax transform.
      head: its mask; by default the subtree `head`.

    References:
      Donahue et al, DeCAF, 2013 (arXiv 1310.1531).
    """
    return fine_tune(tx, _head(head), "feature extraction")


def last_blocks(tx: optax.GradientTransformation, groups: Groups, count: int) -> Strategy:
    """Train the last blocks, and all above them.

    Args:
      tx: any optax transform.
      groups: as `depth_groups(model)` gives them.
      count: how many blocks.

    Raises:
      ConfigError: fewer than one, or more than there are.

    References:
      Yosinski et al, How transferable are features in deep neural networks?, 2014 (arXiv 1411.1792).
    """
    blocks = len(groups) - 2
    if not 1 <= count <= blocks:
        raise ConfigError(f"last_blocks trains 1 to {blocks} blocks of this model, got {count}")
    return fine_tune(tx, masks.depth(groups, -(count + 1)), f"last {count} of {blocks} blocks")


def first_blocks(
    tx: optax.GradientTransformation, groups: Groups, count: int, head: MaskLike | None = None
) -> Strategy:
    """Train what is nearest to the input, and the head: surgical fine-tuning, for a shift of the inputs.

    Args:
      tx: any optax transform.
      groups: as `depth_groups(model)` gives them.
      count: how many groups from the input on; the first are the embeddings or the stem.
      head: its mask; by default the subtree `head`. `masks.nothing()` leaves it as it is.

    Raises:
      ConfigError: fewer than one, or as many as there are.

    References:
      Lee et al, Surgical fine-tuning improves adaptation to distribution shifts, 2022 (arXiv 2210.11466).
    """
    if not 1 <= count < len(groups):
        raise ConfigError(f"first_blocks trains 1 to {len(groups) - 1} groups of this model, got {count}")
    trainable = masks.depth(groups, 0, count) | _head(head)
    return fine_tune(tx, trainable, f"first {count} of {len(groups)} groups")


def surgical(
    tx: optax.GradientTransformation,
    groups: Groups,
    norms: Sequence[float] | np.ndarray,
    count: int,
    head: MaskLike | None = None,
) -> Strategy:
    """Train the groups that ask most for change, and the head.

    Args:
      tx: any optax transform.
      groups: as `depth_groups(model)` gives them.
      norms: a number for each group, such as `jtl.surgery.gradient_norms` gives; the highest are chosen.
      count: how many groups.
      head: its mask; by default the subtree `head`.

    Raises:
      ConfigError: another number of norms than of groups, or a count out of range.

    References:
      Lee et al, 2022 (arXiv 2210.11466).
    """
    if len(norms) != len(groups) or not 1 <= count <= len(groups):
        raise ConfigError(f"surgical chooses 1 to {len(groups)} groups by as many norms; got {count} by {len(norms)}")
    best = sorted(sorted(range(len(groups)), key=lambda number: -norms[number])[:count])
    chosen = masks.select(*(pattern for number in best for pattern in groups[number]))
    return fine_tune(tx, chosen | _head(head), f"groups {', '.join(map(str, best))} of {len(groups)}")


def full(tx: optax.GradientTransformation) -> Strategy:
    """Train every leaf."""
    return fine_tune(tx, masks.everything(), "full fine-tuning")


def bitfit(tx: optax.GradientTransformation, head: MaskLike | None = None) -> Strategy:
    """Train biases and the head.

    References:
      Ben Zaken et al, BitFit, 2021 (arXiv 2106.10199).
    """
    return fine_tune(tx, masks.biases() | _head(head), "BitFit")


def norms(tx: optax.GradientTransformation, head: MaskLike | None = None) -> Strategy:
    """Train the scales and biases of normalisation layers, and the head.

    References:
      Frankle et al, Training BatchNorm and only BatchNorm, 2020 (arXiv 2003.00152).
    """
    return fine_tune(tx, masks.norms() | _head(head), "norms")


def lp_ft(
    probe: optax.GradientTransformation,
    tx: optax.GradientTransformation,
    *,
    steps: int | Plateau,
    trainable: MaskLike | None = None,
    head: MaskLike | None = None,
) -> Strategy:
    """Train the head on frozen features, then fine-tune from there, with a fresh optimizer.

    A head that starts at random distorts features in its first steps; a trained one does not.

    Args:
      probe: the transform of the first phase.
      tx: the transform of the second.
      steps: of the first phase.
      trainable: the mask of the second phase; by default everything.
      head: the mask of the first; by default the subtree `head`.

    References:
      Kumar et al, Fine-tuning can distort pretrained features and underperform out-of-distribution, 2022
      (arXiv 2202.10054).
    """
    second = masks.everything() if trainable is None else trainable
    phases = Phase(_head(head), probe, steps, name="probe"), Phase(second, tx, fresh=True, name="fine-tune")
    return Strategy("LP-FT", phases)


def gradual_unfreezing(
    tx: optax.GradientTransformation, groups: Groups, *, every: int | Plateau, count: int | None = None
) -> Strategy:
    """Train the last group, then the last two, and so on.

    What the optimizer knows of leaves in training is kept. New ones start with moments of zero and their own count of
    steps; see `jtl.transforms.joining`.

    Args:
      tx: any optax transform. Its learning-rate schedule goes on through the phases.
      groups: as `depth_groups(model)` gives them.
      every: the number of updates from one phase to the next, or the plateau that ends a phase.
      count: of groups trained at last; by default all.

    Raises:
      ConfigError: fewer groups than one, or more than there are.

    References:
      Howard and Ruder, Universal language model fine-tuning for text classification, 2018 (arXiv 1801.06146).
    """
    count = len(groups) if count is None else count
    if not 1 <= count <= len(groups):
        raise ConfigError(f"gradual_unfreezing trains 1 to {len(groups)} groups of this model, got {count}")
    chosen = [masks.depth(groups, -number) for number in range(1, count + 1)]
    ends = [every] * (count - 1) + [None]
    phases = (
        Phase(mask, joining(tx, chosen[: number + 1]), end, name=f"last {number + 1} groups")
        for number, (mask, end) in enumerate(zip(chosen, ends, strict=True))
    )
    return Strategy("gradual unfreezing", tuple(phases))


def discriminative(tx: optax.GradientTransformation, factors: Rules, trainable: MaskLike | None = None) -> Strategy:
    """Train with learning rates that differ between leaves.

    Args:
      tx: any optax transform; its learning rate is that of the factor 1.
      factors: `(pattern, factor)` pairs; the first match wins.
      trainable: the mask; by default everything.
    """
    trainable = masks.everything() if trainable is None else trainable
    return fine_tune(optax.chain(tx, scale_by_rules(factors)), trainable, "discriminative rates")


def layerwise_decay(
    tx: optax.GradientTransformation, groups: Groups, *, decay: float, trainable: MaskLike | None = None
) -> Strategy:
    r"""Train the group that is n below the last with :math:`d^n` times the learning rate.

    Args:
      tx: any optax transform; its learning rate is that of the last group.
      groups: as `depth_groups(model)` gives them. Leaves outside all groups have the factor 1.
      decay: d, above 0 and at most 1.
      trainable: the mask; by default everything.

    Raises:
      ConfigError: `decay` is out of range.

    References:
      Clark et al, ELECTRA, 2020 (arXiv 2003.10555); Bao et al, BEiT, 2021 (arXiv 2106.08254).
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"decay={decay}: expected a number above 0 and at most 1")
    factors = [
        (pattern, decay ** (len(groups) - 1 - number)) for number, group in enumerate(groups) for pattern in group
    ]
    strategy = discriminative(tx, [*factors, ("**", 1.0)], trainable)
    return strategy._replace(name=f"layer-wise decay {decay:g}")


def l2_sp(
    tx: optax.GradientTransformation,
    *,
    rate: float,
    head_rate: float,
    trainable: MaskLike | None = None,
    head: MaskLike | None = None,
) -> Strategy:
    r"""Train with a penalty on the distance from the pretrained point.

    :math:`\frac{\alpha}{2} \|w - w_0\|^2 + \frac{\beta}{2} \|v\|^2`, w pretrained and v new.

    Args:
      tx: any optax transform.
      rate: alpha.
      head_rate: beta.
      trainable: the mask; by default everything.
      head: the mask of what is new; by default the subtree `head`.

    References:
      Li et al, 2018 (arXiv 1802.01483).
    """
    trainable = masks.everything() if trainable is None else trainable
    pull = pull_to_start(rate, new=_head(head), new_rate=head_rate)
    return fine_tune(optax.chain(pull, tx), trainable, "L2-SP")


def guarded(strategy: Strategy, *, spike: float | None = None, window: int = 128) -> Strategy:
    """The same strategy, with `jtl.transforms.guard` around the transform of each phase.

    Where a phase does not start anew, the counts of skipped updates go on through it, as the rest of the state does.

    Args:
      strategy: any.
      spike: as in `guard`.
      window: as in `guard`.

    Raises:
      ConfigError: as `guard`.
    """
    phases = (phase._replace(tx=guard(phase.tx, spike=spike, window=window)) for phase in strategy.phases)
    return strategy._replace(phases=tuple(phases))


def _head(head: MaskLike | None) -> MaskLike:
    return masks.select("head") if head is None else head


def depth_groups(model: object) -> list[tuple[str, ...]]:
    """The patterns of a model of jtl's families, in groups from the input to the output.

    Raises:
      ConfigError: the model is not of jtl's families.
    """
    return [group for group in registry.of_model(model).depth_groups(model) if group]

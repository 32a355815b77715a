"""What of a pretrained model is trained: each strategy is a name and a mask.

They need a model's depth groups, so they know every family: the groups of patterns from the
input to the output, the last of which is all that lies above the blocks, the head included.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jtl import masks
from jtl.errors import ConfigError
from jtl.masks import Mask
from jtl.models import registry


class Strategy(NamedTuple):
    """A way of adapting a model.

    Attributes:
      name: for tables and logs.
      trainable: the mask.
    """

    name: str
    trainable: Mask


def feature_extraction() -> Strategy:
    """Train the head alone: linear probing.

    References:
      Donahue et al, DeCAF, 2013 (arXiv 1310.1531).
    """
    return Strategy("feature extraction", masks.select("head"))


def last_blocks(groups: Sequence[Sequence[str]], count: int) -> Strategy:
    """Train the last blocks, and all above them.

    Args:
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
    return Strategy(f"last {count} of {blocks} blocks", masks.depth(groups, -(count + 1)))


def full() -> Strategy:
    """Train every leaf."""
    return Strategy("full fine-tuning", masks.everything())


def depth_groups(model: object) -> list[tuple[str, ...]]:
    """The patterns of a model of jtl's families, in groups from the input to the output.

    Raises:
      ConfigError: the model is not of jtl's families.
    """
    return registry.of_model(model).depth_groups(model)

"""The contract that every model family answers, after timm's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jtl.weights.convert import KeyRule


class Features(NamedTuple):
    """What a backbone without a head returns.

    Attributes:
      sequence: `[batch, length, width]` for text, `[batch, height, width, channels]` for pictures.
      pooled: `[batch, width]`, what a head is given.
    """

    sequence: jax.Array
    pooled: jax.Array


class Family(NamedTuple):
    """One model family.

    Attributes:
      name: the `model_type` of its checkpoints.
      modality: what it reads, `text` or `image`.
      parse: `(settings, folder, overrides)` to the family's configuration, from the parsed
        `config.json`.
      build: `(config, head)` to the linen module.
      example: a configuration to inputs by name, for initialisation.
      keys: a configuration to its key rules.
      ignored: patterns of source tensors that have no place in a configuration's tree.
      rename: normalises the name of a source tensor: prefixes, old spellings.
      depth_groups: a model to groups of patterns from the input to the output. The first group
        is what lies below the blocks; the last all above them, the head included.
      paper: where the architecture comes from.
    """

    name: str
    modality: str
    parse: Callable[[Mapping[str, Any], Path | None, Mapping[str, Any]], Any]
    build: Callable[[Any, nn.Module | None], nn.Module]
    example: Callable[[Any], dict[str, jax.ShapeDtypeStruct]]
    keys: Callable[[Any], Sequence[KeyRule]]
    ignored: Callable[[Any], Sequence[str]]
    rename: Callable[[str], str]
    depth_groups: Callable[[Any], list[tuple[str, ...]]]
    paper: str

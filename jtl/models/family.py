"""The contract that every model family answers, after timm's."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jtl.errors import ConfigError, WeightsError
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


def check_overrides(config: type, overrides: Mapping[str, Any]) -> None:
    """Refuse to set what a configuration does not have.

    Args:
      config: a dataclass.
      overrides: values by field.

    Raises:
      ConfigError: names the field, and the nearest ones.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise ConfigError(f"{config.__name__} has no field {name!r}; nearest: {', '.join(near)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      WeightsError: it is not JSON, or not an object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} holds a {type(settings).__name__}, expected an object")
    return settings

"""The contract that every model family answers, after timm's."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jtl import heads
from jtl.errors import ConfigError
from jtl.weights.convert import KeyRule


class Features(NamedTuple):
    """What a backbone of texts gives.

    Attributes:
      sequence: `[batch, length, width]`.
      pooled: `[batch, width]`; None where the model has a head that reads each position.
    """

    sequence: jax.Array
    pooled: jax.Array | None


class PictureFeatures(NamedTuple):
    """What a backbone of pictures gives.

    Attributes:
      spatial: `[batch, height, width, channels]`, the last map of features.
      pooled: `[batch, width]`, what a head is given.
    """

    spatial: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How a picture becomes what a model was trained on.

    Attributes:
      size: height and width that the model is given.
      resize: "shortest" brings the shortest edge to `resize_to`, then crops the centre to `size`;
        "torchvision" does the same, and rounds the crop's place as torchvision and timm do; "exact" brings both
        edges to `size`; "squash" brings both to `resize_to`, then crops; "none" only crops.
      resize_to: pixels of the shortest edge before the crop; by default that of `size`.
      interpolation: nearest, bilinear, bicubic, lanczos, box or hamming, as Pillow has them.
      mean: of each channel, after scaling.
      std: of each channel, after scaling.
      scale: factor of the bytes 0 to 255.
      channels: "rgb", "bgr" or "gray".
    """

    size: tuple[int, int] = (224, 224)
    resize: str = "shortest"
    resize_to: int | None = 256
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = 1 / 255
    channels: str = "rgb"


class Task(NamedTuple):
    """A head that checkpoints come with.

    Attributes:
      head: `(config, outputs)` to the module.
      keys: a configuration to the rules of the head's leaves.
      outputs: the path of a leaf whose last axis is as wide as the outputs; None where their number is the model's own.
      fits: whether the model of a configuration can have it.
      backbone: as of `Family`, where this class differs.
      copies: tensors that repeat others, by the others' names: a checkpoint in which they differ is of another head.
    """

    head: Callable[[Any, int], nn.Module]
    keys: Callable[[Any], Sequence[KeyRule]]
    outputs: str | None = "head/kernel"
    fits: Callable[[Any], bool] = lambda config: True
    backbone: str | None = None
    copies: Mapping[str, str] = MappingProxyType({})


class KeyLayout(NamedTuple):
    """How one library names and lays out the tensors of a family.

    Attributes:
      name: of the library, such as "transformers" or "timm, torchvision".
      keys: a configuration to its key rules. Their paths are those of all collections together, which
        have no leaf in common: `stem/norm/scale` of the parameters, `stem/norm/mean` of the statistics.
        The head's leaves, `head/kernel` and `head/bias`, have rules as well, unless there are `tasks`.
      ignored: patterns of source tensors that have no place in a configuration's tree.
      rename: normalises the name of a source tensor: prefixes, old spellings.
      in_memory: the name of a tensor of a file among the library's own modules, where that differs.
      tasks: the heads that its checkpoints come with, by the ends of the names of their classes, such as
        "ForTokenClassification"; empty where there is but one.
    """

    name: str
    keys: Callable[[Any], Sequence[KeyRule]]
    ignored: Callable[[Any], Sequence[str]] = lambda config: ()
    rename: Callable[[str], str] = lambda name: name
    in_memory: Callable[[str], str] = lambda name: name
    tasks: Mapping[str, Task] = MappingProxyType({})

    def of_task(self, name: str | None) -> "KeyLayout":
        """The layout with the rules of a task's head, and none of the others'."""
        if name is None:
            return self
        return self._replace(keys=lambda config: [*self.keys(config), *self.tasks[name].keys(config)])

    def heads(self, config: Any) -> list[str]:
        """Patterns of the tensors that the leaves of heads have."""
        rules = [rule for task in self.tasks.values() for rule in task.keys(config)]
        rules += [rule for rule in self.keys(config) if rule.path.startswith("head/")]
        return sorted({rule.source.replace(".", "/").replace("{}", "*") for rule in rules})


class Family(NamedTuple):
    """One model family.

    Attributes:
      name: the `model_type` of its checkpoints.
      modality: what it reads, `text` or `image`.
      parse: `(settings, folder, overrides)` to the family's configuration, from the parsed
        `config.json` of transformers or timm, or from what `jtl.save` wrote.
      build: `(config, head)` to the linen module.
      example: a configuration to inputs by name, for initialisation.
      layouts: the layouts that it reads; `jtl.save` writes the first.
      depth_groups: a model to groups of patterns from the input to the output. The first group
        is what lies below the blocks; the last all above them, the head included.
      paper: where the architecture comes from.
      infer: the shapes of a checkpoint's tensors by name, the name of its file, and the fields that a caller
        sets, to the configuration that they tell, or None where they are not of this family.
      head: `(config, outputs)` to the head that the family's own checkpoints have.
      adapt: `(config, path, array, shape)` to an array of the shape that a leaf needs, where a checkpoint for
        another size of input can be changed into it.
      settings: `(config, outputs)` to the `config.json` of transformers; None where that has no such model.
      settle: `(config, tensors)` to the configuration of a checkpoint with these tensors by name, where its settings
        leave something open.
      classes: what the names of transformers' classes begin with, such as "Bert", where there are tasks; by the model
        type where several share the family.
      needs: fields of the configuration by the end of the name of a class, "Model" without a head, with the values
        with which alone that class computes the same.
      bare: a configuration to the end of the name of the class without a head.
      backbone: what the names of the tensors begin with in classes with a head; by default the model type.
      variants: configurations by the names of timm.
      licence: of the usual checkpoints.
    """

    name: str
    modality: str
    parse: Callable[[Mapping[str, Any], Path | None, Mapping[str, Any]], Any]
    build: Callable[[Any, nn.Module | None], nn.Module]
    example: Callable[[Any], dict[str, jax.ShapeDtypeStruct]]
    layouts: Sequence[KeyLayout]
    depth_groups: Callable[[Any], list[tuple[str, ...]]]
    paper: str
    infer: Callable[[Mapping[str, tuple[int, ...]], str, Mapping[str, Any]], Any] = lambda shapes, file, overrides: None
    head: Callable[[Any, int], nn.Module] = lambda config, outputs: heads.Linear(outputs)
    adapt: Callable[[Any, str, np.ndarray, tuple[int, ...]], np.ndarray] = lambda config, path, array, shape: array
    settings: Callable[[Any, int | None], dict[str, Any]] | None = None
    settle: Callable[[Any, Mapping[str, np.ndarray]], Any] = lambda config, tensors: config
    classes: str | Mapping[str, str] = ""
    needs: Mapping[str, Mapping[str, Sequence[Any]]] = MappingProxyType({})
    bare: Callable[[Any], str] = lambda config: "Model"
    backbone: str | None = None
    variants: Mapping[str, Any] = MappingProxyType({})
    licence: str = ""

    def prefix(self, model_type: Any) -> str:
        """What the names of transformers' classes begin with for a model type; empty where there are none."""
        return self.classes if isinstance(self.classes, str) else self.classes.get(str(model_type), "")


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


def renamed(settings: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Settings of transformers by the names of their fields; another name of one goes before its own, as it does there.

    Args:
      settings: the parsed `config.json`.
      aliases: the fields by their other names: the `attribute_map` of transformers' class.

    >>> renamed({"n_layer": 2, "hidden_size": 8, "n_embd": 4}, {"hidden_size": "n_embd"})
    {'n_layer': 2, 'n_embd': 8}
    """
    named = {name: value for name, value in settings.items() if name not in aliases}
    return named | {aliases[name]: value for name, value in settings.items() if name in aliases}


def fields_from_json(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration among settings read from JSON, with the types that the fields have.

    Lists become tuples, the whole numbers of a float floats, and `input` an `ImageInput`.

    Args:
      config: a dataclass.
      settings: by name; what is no field is left out.

    Raises:
      ConfigError: a value is of another type than its field, a number not finite or far too large.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    chosen: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name in kinds
    }
    chosen |= {name: _float(v) for name, v in chosen.items() if kinds[name] in (float, float | None)}
    if isinstance(chosen.get("input"), Mapping):
        check_overrides(ImageInput, chosen["input"])
        chosen["input"] = ImageInput(**fields_from_json(ImageInput, chosen["input"]))
    for name, value in chosen.items():
        kind = kinds[name]
        if not _fits(value, kind):
            expected = kind.__name__ if isinstance(kind, type) and kind is not tuple else kind
            given = f"{value!r:.80}"
            raise ConfigError(f"{config.__name__} has {name}={given}, expected {expected}: correct the settings")
    return chosen


_MOST = 2**31 - 1
"""The largest whole number that a setting can mean: XLA's own index of a dimension."""


def _float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) <= _MOST else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a field.

    >>> _fits((1, 2), tuple[int, ...]), _fits(True, int), _fits(None, int | None), _fits(float("nan"), float)
    (True, False, True, False)
    """
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is ... else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is int:
        return type(value) is int and abs(value) <= _MOST
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, kind)

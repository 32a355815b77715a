"""The configuration of a ResNet, and the settings of transformers and timm that it comes from.

References:
  He et al, Deep residual learning for image recognition, 2015 (arXiv 1512.03385).
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.family import ImageInput, check_overrides, fields_from_json
from jtl.models.pictures import image_input
from jtl.weights.json_file import read_json

LAYER_TYPES = ("basic", "bottleneck")
REDUCTION = 4
"""Channels of a bottleneck's output for each of those within."""

_INPUT = ImageInput()


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The settings of a ResNet, named as in transformers' `config.json`, with the same defaults.

    `hidden_act` follows each block's sum and the stem; within blocks it is always a rectifier, as in transformers.
    `input` says how pictures become what the model was trained on.
    """

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    input: ImageInput = _INPUT

    def __post_init__(self):
        sizes = {"num_channels": (self.num_channels,), "embedding_size": (self.embedding_size,)}
        for name, values in (sizes | {"hidden_sizes": self.hidden_sizes, "depths": self.depths}).items():
            if not values or not all(isinstance(value, int) and value > 0 for value in values):
                raise ConfigError(f"{name} must be integers above 0, got {getattr(self, name)!r}")
        if len(self.hidden_sizes) != len(self.depths):
            raise ConfigError(f"hidden_sizes {self.hidden_sizes} and depths {self.depths} are of different lengths")
        if self.layer_type not in LAYER_TYPES:
            raise ConfigError(f"layer_type {self.layer_type!r} is not among {LAYER_TYPES}")
        if self.layer_type == "bottleneck" and any(size % REDUCTION for size in self.hidden_sizes):
            raise ConfigError(f"hidden_sizes {self.hidden_sizes} of bottlenecks must be multiples of {REDUCTION}")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not among {sorted(ACTIVATIONS)}")


class LayerShape(NamedTuple):
    """One convolution of a block: its channels, its kernel of `kernel` x `kernel` and its stride."""

    features: int
    kernel: int
    stride: int


def block_layers(config: ResNetConfig, features: int, stride: int) -> list[LayerShape]:
    """The convolutions of a block with an output of `features` channels."""
    if config.layer_type == "basic":
        return [LayerShape(features, 3, stride), LayerShape(features, 3, 1)]
    within, early = features // REDUCTION, config.downsample_in_bottleneck
    return [
        LayerShape(within, 1, stride if early else 1),
        LayerShape(within, 3, 1 if early else stride),
        LayerShape(features, 1, 1),
    ]


def stage_strides(config: ResNetConfig) -> Iterator[int]:
    """The stride of each stage's first block."""
    yield 2 if config.downsample_in_first_stage else 1
    yield from [2] * (len(config.depths) - 1)


def _variant(depths: tuple[int, ...], layer_type: str) -> ResNetConfig:
    widths = (64, 128, 256, 512) if layer_type == "basic" else (256, 512, 1024, 2048)
    return ResNetConfig(depths=depths, hidden_sizes=widths, layer_type=layer_type)


# He et al 2015, table 1.
VARIANTS = MappingProxyType(
    {
        "resnet18": _variant((2, 2, 2, 2), "basic"),
        "resnet34": _variant((3, 4, 6, 3), "basic"),
        "resnet50": _variant((3, 4, 6, 3), "bottleneck"),
        "resnet101": _variant((3, 4, 23, 3), "bottleneck"),
        "resnet152": _variant((3, 8, 36, 3), "bottleneck"),
    }
)


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> ResNetConfig:
    """The configuration of a checkpoint.

    Args:
      settings: the `config.json` of transformers or of timm, or a configuration's own fields.
      folder: where it lies; the `preprocessor_config.json` beside it tells the input.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as timm's resnet50d.
    """
    check_overrides(ResNetConfig, overrides)
    if "architecture" in settings:
        return _parse_timm(settings, overrides)
    chosen = fields_from_json(ResNetConfig, {**settings, **overrides})
    preprocessor = folder / "preprocessor_config.json" if folder is not None else None
    if "model_type" in settings and "input" not in chosen and preprocessor is not None and preprocessor.is_file():
        chosen["input"] = image_input(read_json(preprocessor), _INPUT, processor="ConvNext")
    return ResNetConfig(**chosen)


def _parse_timm(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> ResNetConfig:
    name = str(settings["architecture"]).partition(".")[0]
    if name not in VARIANTS:
        near = ", ".join(difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.0))
        raise ConfigError(f"config.json sets architecture={name!r}, which jtl's ResNet does not have; nearest: {near}")
    for key, value in (settings.get("model_args") or {}).items():
        if key != "in_chans":
            raise ConfigError(f"config.json sets model_args {key}={value!r}, which jtl's ResNet does not have")
    if settings.get("global_pool", "avg") != "avg":
        raise ConfigError(f"config.json sets global_pool={settings['global_pool']!r}; jtl's ResNet has only 'avg'")
    channels = (settings.get("model_args") or {}).get("in_chans", 3)
    chosen = fields_from_json(ResNetConfig, {"num_channels": channels, **overrides})
    if "input" not in chosen and ("pretrained_cfg" in settings or "input_size" in settings):
        chosen["input"] = image_input(settings)
    return dataclasses.replace(VARIANTS[name], **chosen)


def settings(config: ResNetConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers.

    Args:
      config: of the model.
      outputs: of the head, or None without one.
    """
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "input"}
    architecture = "ResNetModel" if outputs is None else "ResNetForImageClassification"
    labels = {} if outputs is None else {i: f"LABEL_{i}" for i in range(outputs)}
    names = {} if outputs is None else {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    return {"architectures": [architecture], "model_type": "resnet", **fields, **names}

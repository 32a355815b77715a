"""The configuration of a VGG, and the settings of timm that it comes from.

References:
  Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2014 (arXiv 1409.1556).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jtl.errors import ConfigError
from jtl.models.family import ImageInput, check_overrides, fields_from_json
from jtl.models.pictures import image_input

POOLINGS = ("adaptive", "sliding")

_INPUT = ImageInput()

CAFFE = ImageInput(channels="bgr", scale=1.0, mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0))
"""How the authors' own weights, which Keras distributes, are fed."""


@dataclasses.dataclass(frozen=True)
class VggConfig:
    """The settings of a VGG.

    Attributes:
      num_channels: of the pictures.
      widths: channels of each stage.
      depths: convolutions of each stage.
      batch_norm: whether each convolution is followed by one.
      hidden: width of the two dense layers, and of the pooled features. None leaves them out: pooled features are
        then the mean over positions.
      pool_size: height and width of the map that the dense layers look at.
      pooling: what happens to maps of other sizes. "adaptive" averages them to that size, as torchvision does;
        "sliding" applies the dense layers at each place and averages what they give, as timm does.
      dropout: after each dense layer, the second one's as part of the head.
      input: how pictures become what the model was trained on.
    """

    num_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    batch_norm: bool = False
    hidden: int | None = 4096
    pool_size: int = 7
    pooling: str = "adaptive"
    dropout: float = 0.5
    input: ImageInput = _INPUT

    def __post_init__(self):
        if len(self.widths) != len(self.depths) or not self.depths:
            raise ConfigError(f"widths {self.widths} and depths {self.depths} must be of one length above 0")
        hidden = () if self.hidden is None else (self.hidden,)
        single = {"num_channels": (self.num_channels,), "pool_size": (self.pool_size,), "hidden": hidden}
        for name, values in (single | {"widths": self.widths, "depths": self.depths}).items():
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ConfigError(f"{name} must be integers above 0, got {getattr(self, name)!r}")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} is not among {POOLINGS}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"a dropout rate lies in [0, 1), got dropout={self.dropout}")


# Simonyan and Zisserman 2014, table 1: A, B, D and E. Those with batch normalisation are torchvision's.
_DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}

VARIANTS = MappingProxyType(
    {
        f"{name}{suffix}": VggConfig(depths=depths, batch_norm=bool(suffix))
        for name, depths in _DEPTHS.items()
        for suffix in ("", "_bn")
    }
)


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> VggConfig:
    """The configuration of a checkpoint.

    Args:
      settings: the `config.json` of timm, or a configuration's own fields.
      folder: where it lies.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as timm's repvgg_a0.
    """
    del folder  # timm keeps all in one file, and transformers has no VGG
    check_overrides(VggConfig, overrides)
    if "architecture" not in settings:
        return VggConfig(**fields_from_json(VggConfig, {**settings, **overrides}))
    name = str(settings["architecture"]).partition(".")[0]
    if name not in VARIANTS:
        near = ", ".join(difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.0))
        raise ConfigError(f"config.json sets architecture={name!r}, which jtl's VGG does not have; nearest: {near}")
    # At timm's own defaults.
    chosen: dict[str, Any] = {"pooling": "sliding", "dropout": 0.0}
    for key, value in (settings.get("model_args") or {}).items():
        if key not in _TIMM_ARGUMENTS:
            raise ConfigError(f"config.json sets model_args {key}={value!r}, which jtl's VGG does not have")
        chosen[_TIMM_ARGUMENTS[key]] = value
    if settings.get("global_pool", "avg") != "avg":
        raise ConfigError(f"config.json sets global_pool={settings['global_pool']!r}; jtl's VGG has only 'avg'")
    if "pretrained_cfg" in settings or "input_size" in settings:
        chosen["input"] = image_input(settings)
    return dataclasses.replace(VARIANTS[name], **fields_from_json(VggConfig, {**chosen, **overrides}))


_TIMM_ARGUMENTS = {"in_chans": "num_channels", "drop_rate": "dropout"}

"""EfficientNet and EfficientNet-Lite, with the checkpoint layouts of transformers, timm, torchvision and lukemelas.

    stem         conv 3x3 with stride 2, norm
    stages_0 ... stages_6
                 blocks_0 ... blocks_{m-1}:  expand (conv, norm), depthwise (conv, norm),
                                             squeeze (reduce, expand), project (conv, norm)
    top          conv 1x1, norm
    head         only where there is one

The first stage has no `expand`, the Lite networks no `squeeze`.

Where this differs from transformers: in training, `drop_connect_rate` drops whole blocks for an example, as in the
paper, not single numbers; and `batch_norm_momentum` is what of the running statistics stays, which transformers
hands to PyTorch as what goes. Neither changes what a checkpoint computes.

References:
  Tan and Le, EfficientNet, 2019 (arXiv 1905.11946). The Lite networks are those of TensorFlow's repository `tpu`.
  The code of TensorFlow, transformers, timm and lukemelas' EfficientNet-PyTorch and the usual weights are under
  Apache-2.0, torchvision's under BSD-3-Clause.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jtl import heads
from jtl.errors import ConfigError
from jtl.models.efficientnet_config import VARIANTS, EfficientNetConfig, network, odd_blocks, scaled
from jtl.models.efficientnet_layouts import LAYOUTS, infer
from jtl.models.family import Family, ImageInput, check_overrides, fields_from_json
from jtl.models.inverted_residual import InvertedResidualNet, Network, depth_groups
from jtl.models.inverted_residual_layouts import parse_timm
from jtl.models.pictures import image_input, pair
from jtl.weights.json_file import read_json

_TIMM = {"in_chans": "num_channels", "drop_rate": "dropout_rate", "drop_path_rate": "drop_connect_rate"}
"""Arguments of timm's models, and the settings that they are."""


class EfficientNet(InvertedResidualNet):
    """An EfficientNet, with or without a head.

    Attributes:
      config: an `EfficientNetConfig`.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: EfficientNetConfig

    def network(self) -> Network:
        """The shape that the settings give."""
        return network(self.config)


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> EfficientNetConfig:
    """The configuration of a checkpoint.

    Args:
      settings: the `config.json` of transformers or of timm, or a configuration's own fields.
      folder: where it lies; the `preprocessor_config.json` beside it tells the input.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as timm's efficientnetv2_s.
    """
    check_overrides(EfficientNetConfig, overrides)
    if "architecture" in settings:
        return parse_timm(settings, overrides, VARIANTS, _TIMM)
    chosen = fields_from_json(EfficientNetConfig, settings)
    if "model_type" in settings and "input" not in {*chosen, *overrides}:
        chosen["input"] = _input(settings, folder)
    config = EfficientNetConfig(**fields_from_json(EfficientNetConfig, {**chosen, **overrides}))
    if "model_type" in settings:
        _check(settings, config)
    return config


def _input(settings: Mapping[str, Any], folder: Path | None) -> ImageInput:
    edges = pair(settings.get("image_size", EfficientNetConfig.input.size[0]), "image_size")
    default = ImageInput(size=edges, resize="exact", resize_to=None)
    path = folder / "preprocessor_config.json" if folder is not None else None
    found = read_json(path) if path is not None and path.is_file() else None
    return image_input(found, default, processor="EfficientNet")


def _check(settings: Mapping[str, Any], config: EfficientNetConfig) -> None:
    """Refuse what transformers' settings say twice, and otherwise."""
    expected = {
        "hidden_dim": scaled(config, config.head_channels, end=True),
        "in_channels": [scaled(config, base) for base in (config.stem_channels, *config.out_channels[:-1])],
    }
    given = {"hidden_dim": settings.get("hidden_dim"), "in_channels": settings.get("in_channels")}
    if given["in_channels"] is not None:
        given["in_channels"] = [scaled(config, base) for base in given["in_channels"]]
    for name, value in given.items():
        if value is not None and value != expected[name]:
            raise ConfigError(f"config.json sets {name}={settings[name]!r}; the other settings give {expected[name]}")


def settings(config: EfficientNetConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers.

    Args:
      config: of the model.
      outputs: of the head, or None without one.

    Raises:
      ConfigError: transformers has no such model: Lite networks, and those padded as in PyTorch.
    """
    usual = EfficientNetConfig()
    for name in ("stem_channels", "head_channels", "fixed_ends"):
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(f"transformers' EfficientNet has only {name}={getattr(usual, name)!r}")
    if not config.squeeze_expansion_ratio:
        raise ConfigError("transformers' EfficientNet has no squeeze_expansion_ratio=0")
    if config.padding == "symmetric" or network(dataclasses.replace(config, first_residual=False)) != network(config):
        raise ConfigError("transformers' EfficientNet has no padding='symmetric' and no first_residual=True")
    own = ("stem_channels", "head_channels", "fixed_ends", "first_residual", "padding", "input")
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in own}
    height, width = config.input.size
    if config.padding == "same":
        # Alike at the checkpoint's own resolution, and at others where the same maps have odd sizes.
        if height != width or height % 2:
            raise ConfigError(f"transformers pads pictures of {height} x {width} pixels otherwise than padding='same'")
        fields["depthwise_padding"] = odd_blocks(config)
    labels = {} if outputs is None else {i: f"LABEL_{i}" for i in range(outputs)}
    names = {} if outputs is None else {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    return {
        "architectures": ["EfficientNetModel" if outputs is None else "EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        **fields,
        "in_channels": (config.stem_channels, *config.out_channels[:-1]),
        "hidden_dim": scaled(config, config.head_channels),
        "image_size": height if height == width else [height, width],
        **names,
    }


def example(config: EfficientNetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    return {"images": jax.ShapeDtypeStruct((1, *config.input.size, config.num_channels), jnp.float32)}


FAMILY = Family(
    name="efficientnet",
    modality="image",
    parse=parse,
    build=lambda config, head: EfficientNet(config, head),
    example=example,
    layouts=LAYOUTS,
    depth_groups=depth_groups,
    paper="arXiv 1905.11946",
    infer=infer,
    head=lambda config, outputs: heads.Linear(outputs, config.dropout_rate),
    settings=settings,
    variants=VARIANTS,
    licence="Apache-2.0 (TensorFlow, transformers, timm, lukemelas), BSD-3-Clause (torchvision)",
)

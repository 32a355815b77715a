"""MobileNetV2, with the checkpoint layouts of transformers, timm and torchvision.

    stem         conv 3x3 with stride 2, norm
    stages_0 ... stages_6
                 blocks_0 ... blocks_{m-1}:  expand (conv, norm), depthwise (conv, norm), project (conv, norm)
    top          conv 1x1, norm
    head         only where there is one

The first stage has no `expand`.

Where this differs from transformers: batch normalisation keeps 0.997 of the running statistics, as in the original;
transformers hands that number to PyTorch as what goes. It changes nothing of what a checkpoint computes.

References:
  Sandler et al, MobileNetV2, 2018 (arXiv 1801.04381). The code of transformers and timm and their usual weights are
  under Apache-2.0, torchvision's under BSD-3-Clause.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jtl import heads
from jtl.errors import ConfigError
from jtl.models.family import Family, ImageInput, KeyLayout, check_overrides, fields_from_json
from jtl.models.inverted_residual import InvertedResidualNet, Network, depth_groups, divisible
from jtl.models.inverted_residual_layouts import (
    BlockNames,
    Found,
    Place,
    as_found,
    by_stage,
    found_blocks,
    ignored,
    network_rules,
    parse_timm,
    timm_names,
)
from jtl.models.mobilenet_v2_config import INPUT, STRIDES, MobileNetV2Config, network
from jtl.models.pictures import image_input, pair
from jtl.weights.convert import KeyRule
from jtl.weights.json_file import read_json


class MobileNetV2(InvertedResidualNet):
    """A MobileNetV2, with or without a head.

    Attributes:
      config: a `MobileNetV2Config`.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: MobileNetV2Config

    def network(self) -> Network:
        """The shape that the settings give."""
        return network(self.config)


# Names of tensors


def _transformers(place: Place) -> BlockNames:
    at = f"mobilenet_v2.layer.{place.number - 1}" if place.number else "mobilenet_v2.conv_stem"
    expand, depthwise, project = (
        (f"{at}.{part}.convolution", f"{at}.{part}.normalization") for part in ("expand_1x1", "conv_3x3", "reduce_1x1")
    )
    return BlockNames(expand, depthwise, ("", ""), project)


def _torchvision(place: Place) -> BlockNames:
    at, first = f"features.{place.number + 1}.conv", 1 if place.expands else 0
    return BlockNames(
        (f"{at}.0.0", f"{at}.0.1"),
        (f"{at}.{first}.0", f"{at}.{first}.1"),
        ("", ""),
        (f"{at}.{first + 1}", f"{at}.{first + 2}"),
    )


_NAMINGS = {"transformers": _transformers, "timm": timm_names, "torchvision": _torchvision}


def _ends(library: str, blocks: int) -> tuple[tuple[str, str], tuple[str, str], str]:
    """The names of the first and the last convolution with their normalisations, and of the classifier."""
    if library == "timm":
        return ("conv_stem", "bn1"), ("conv_head", "bn2"), "classifier"
    if library == "torchvision":
        top = f"features.{blocks + 1}"
        return ("features.0.0", "features.0.1"), (f"{top}.0", f"{top}.1"), "classifier.1"
    stem, top = "mobilenet_v2.conv_stem.first_conv", "mobilenet_v2.conv_1x1"
    return (
        (f"{stem}.convolution", f"{stem}.normalization"),
        (f"{top}.convolution", f"{top}.normalization"),
        "classifier",
    )


def transformers_name(name: str) -> str:
    """A tensor's name in `MobileNetV2ForImageClassification`, from one there or in `MobileNetV2Model`.

    >>> transformers_name("conv_stem.conv_3x3.convolution.weight")
    'mobilenet_v2.conv_stem.conv_3x3.convolution.weight'
    """
    name = name.removeprefix("module.")
    return f"mobilenet_v2.{name}" if name.startswith(("conv_stem.", "layer.", "conv_1x1.")) else name


def _layout(library: str) -> KeyLayout:
    def keys(config: MobileNetV2Config) -> Sequence[KeyRule]:
        shape = network(config)
        stem, top, head = _ends(library, len(shape.blocks))
        return network_rules(shape, stem, _NAMINGS[library], top, head)

    rename = transformers_name if library == "transformers" else lambda name: name.removeprefix("module.")
    return KeyLayout(library, keys, ignored, rename)


LAYOUTS = tuple(map(_layout, _NAMINGS))


# Configurations

_TORCH = {"tf_padding": False, "layer_norm_eps": 1e-5, "batch_norm_momentum": 0.9, "first_residual": True}
_TIMM = MobileNetV2Config(**_TORCH, classifier_dropout_prob=0.2, input=ImageInput(resize="torchvision"))
_PYTORCH = dataclasses.replace(_TIMM, input=dataclasses.replace(_TIMM.input, interpolation="bilinear"))
_STYLES = {"transformers": MobileNetV2Config(), "timm": _TIMM, "torchvision": _PYTORCH}
"""What tensors do not tell, as each library has it."""


def _deeper(width: int | float, depth: int | float) -> MobileNetV2Config:
    """Scaled in width and depth, but for the ends."""
    repeats, last = _TIMM.num_block_repeats, len(STRIDES) - 1
    widths = tuple(divisible(base * width, 8) for base in _TIMM.out_channels)
    deep = tuple(n if stage in (0, last) else math.ceil(n * depth) for stage, n in enumerate(repeats))
    return dataclasses.replace(_TIMM, out_channels=widths, num_block_repeats=deep)


# Sandler et al 2018, table 2, and its multipliers of width (table 4, section 6.1); the deeper ones are timm's own.
VARIANTS = MappingProxyType(
    {
        "mobilenetv2_035": dataclasses.replace(_TIMM, depth_multiplier=0.35),
        "mobilenetv2_050": dataclasses.replace(_TIMM, depth_multiplier=0.5),
        "mobilenetv2_075": dataclasses.replace(_TIMM, depth_multiplier=0.75),
        "mobilenetv2_100": _TIMM,
        "mobilenetv2_110d": _deeper(1.1, 1.2),
        "mobilenetv2_120d": _deeper(1.2, 1.4),
        "mobilenetv2_140": dataclasses.replace(_TIMM, depth_multiplier=1.4),
    }
)


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> MobileNetV2Config:
    """The configuration of a checkpoint.

    Args:
      settings: the `config.json` of transformers or of timm, or a configuration's own fields.
      folder: where it lies; the `preprocessor_config.json` beside it tells the input.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as timm's mobilenetv3_large_100.
    """
    check_overrides(MobileNetV2Config, overrides)
    if "architecture" in settings:
        arguments = {"in_chans": "num_channels", "drop_rate": "classifier_dropout_prob"}
        return parse_timm(settings, overrides, VARIANTS, arguments)
    chosen = fields_from_json(MobileNetV2Config, settings)
    preprocessor = folder / "preprocessor_config.json" if folder is not None else None
    if "model_type" in settings and "input" not in {*chosen, *overrides}:
        found = read_json(preprocessor) if preprocessor is not None and preprocessor.is_file() else None
        edges = pair(settings.get("image_size", 224), "image_size")
        default = dataclasses.replace(INPUT, size=edges, resize_to=min(edges) + 32)
        chosen["input"] = image_input(found, default, processor="MobileNetV2")
    return MobileNetV2Config(**fields_from_json(MobileNetV2Config, {**chosen, **overrides}))


def infer(
    shapes: Mapping[str, tuple[int, ...]], file: str, overrides: Mapping[str, Any] | None = None
) -> MobileNetV2Config | None:
    """The configuration that a checkpoint's tensors tell.

    They do not tell padding, epsilon and momentum; those are the library's own. Nor do they tell an output stride:
    taken to be 32.

    Args:
      shapes: of the tensors by name.
      file: the name of the checkpoint's file, which tells nothing more.

    Returns:
      The configuration, or None where the tensors are not of a MobileNetV2.
    """
    del overrides  # tensors and file tell all
    del file
    for layout in LAYOUTS:
        named = {layout.rename(name): shape for name, shape in shapes.items()}
        nested = layout.name == "timm"
        found = found_blocks(named, _NAMINGS[layout.name], nested=nested)
        stem, top, _ = (f"{name[0]}.weight" for name in _ends(layout.name, len(found)))
        ends = named.get(stem, ()), named.get(top, ())
        if found and len(ends[0]) == len(ends[1]) == 4 and ends[0][2:] == (3, 3):
            return _of_blocks(ends[0], found if nested else _in_stages(found), ends[1], _STYLES[layout.name])
    return None


def _in_stages(found: Sequence[Found]) -> Sequence[Found]:
    """Blocks of the usual number in the usual stages: two of a narrow network may have the same channels."""
    stages = [stage for stage, repeat in enumerate(_TIMM.num_block_repeats) for _ in range(repeat)]
    if len(found) != len(stages):
        return found
    return [block._replace(stage=stage) for block, stage in zip(found, stages, strict=True)]


def _of_blocks(
    stem: tuple[int, ...], found: Sequence[Found], top: tuple[int, ...], style: MobileNetV2Config
) -> MobileNetV2Config | None:
    stages = by_stage(found)
    if any(block.squeezed or block.kernel != 3 for block in found) or len(stages) != len(STRIDES):
        return None
    first = {"num_channels": stem[1], "first_layer_is_expansion": not found[0].expanded}
    widest = max(found, key=lambda block: block.expanded)
    explicit = {
        "depth_divisible_by": 1,
        "min_depth": 1,
        "out_channels": tuple(stage[0].features for stage in stages),
        "num_block_repeats": tuple(map(len, stages)),
        "stem_channels": stem[0],
        "head_channels": top[0],
        "expand_ratio": widest.expanded / widest.inputs,
    }
    scales = ("depth_multiplier", "out_channels", "num_block_repeats")
    known = [{name: getattr(config, name) for name in scales} for config in VARIANTS.values()]
    for fields in (*known, explicit):
        config = dataclasses.replace(style, **first, **fields)
        shape = network(config)
        if (shape.stem, as_found(shape), shape.top) == (stem[0], list(found), top[0]):
            return config
    return None


def settings(config: MobileNetV2Config, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers.

    Args:
      config: of the model.
      outputs: of the head, or None without one.

    Raises:
      ConfigError: transformers has no such model: other stages, or another first or last convolution.
    """
    usual = MobileNetV2Config()
    own = ("out_channels", "num_block_repeats", "stem_channels", "head_channels")
    for name in own:
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(f"transformers' MobileNetV2 has only {name}={getattr(usual, name)!r}")
    if network(dataclasses.replace(config, first_residual=False)) != network(config):
        raise ConfigError("transformers' MobileNetV2 has no first_residual=True")
    left_out = (*own, "batch_norm_momentum", "first_residual", "input")
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    height, width = config.input.size
    labels = {} if outputs is None else {i: f"LABEL_{i}" for i in range(outputs)}
    names = {} if outputs is None else {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    return {
        "architectures": ["MobileNetV2Model" if outputs is None else "MobileNetV2ForImageClassification"],
        "model_type": "mobilenet_v2",
        **fields,
        "image_size": height if height == width else [height, width],
        **names,
    }


def example(config: MobileNetV2Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    return {"images": jax.ShapeDtypeStruct((1, *config.input.size, config.num_channels), jnp.float32)}


FAMILY = Family(
    name="mobilenet_v2",
    modality="image",
    parse=parse,
    build=lambda config, head: MobileNetV2(config, head),
    example=example,
    layouts=LAYOUTS,
    depth_groups=depth_groups,
    paper="arXiv 1801.04381",
    infer=infer,
    head=lambda config, outputs: heads.Linear(outputs, config.classifier_dropout_prob),
    settings=settings,
    variants=VARIANTS,
    licence="Apache-2.0 (transformers, timm), BSD-3-Clause (torchvision)",
)

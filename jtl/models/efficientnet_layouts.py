"""The tensors of EfficientNet: their names in other libraries, and the settings that their shapes tell."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jtl.errors import ConfigError
from jtl.models.efficientnet_config import (
    PYTORCH,
    SCALES,
    TENSORFLOW,
    VARIANTS,
    EfficientNetConfig,
    network,
    odd_blocks,
)
from jtl.models.family import ImageInput, KeyLayout
from jtl.models.inverted_residual_layouts import (
    BlockNames,
    Found,
    Naming,
    Place,
    as_found,
    by_stage,
    found_blocks,
    ignored,
    network_rules,
    timm_names,
)


class Names(NamedTuple):
    """What a library calls the tensors of a network.

    Attributes:
      stem: convolution and normalisation.
      block: of each block.
      top: convolution and normalisation; `{}` is one above the number of stages.
      head: the linear classifier.
      nested: whether the names of blocks tell their stages.
    """

    stem: tuple[str, str]
    block: Naming
    top: tuple[str, str]
    head: str
    nested: bool


def _transformers(place: Place) -> BlockNames:
    at = f"efficientnet.encoder.blocks.{place.number}"
    return BlockNames(
        (f"{at}.expansion.expand_conv", f"{at}.expansion.expand_bn"),
        (f"{at}.depthwise_conv.depthwise_conv", f"{at}.depthwise_conv.depthwise_norm"),
        (f"{at}.squeeze_excite.reduce", f"{at}.squeeze_excite.expand"),
        (f"{at}.projection.project_conv", f"{at}.projection.project_bn"),
    )


def _torchvision(place: Place) -> BlockNames:
    at, first = f"features.{place.stage + 1}.{place.index}.block", 1 if place.expands else 0
    expand, depthwise, squeeze, project = (f"{at}.{k}" for k in (0, first, first + 1, first + 2))
    return BlockNames(
        (f"{expand}.0", f"{expand}.1"),
        (f"{depthwise}.0", f"{depthwise}.1"),
        (f"{squeeze}.fc1", f"{squeeze}.fc2"),
        (f"{project}.0", f"{project}.1"),
    )


def _lukemelas(place: Place) -> BlockNames:
    at = f"_blocks.{place.number}."
    return BlockNames(
        (f"{at}_expand_conv", f"{at}_bn0"),
        (f"{at}_depthwise_conv", f"{at}_bn1"),
        (f"{at}_se_reduce", f"{at}_se_expand"),
        (f"{at}_project_conv", f"{at}_bn2"),
    )


NAMES = {
    "transformers": Names(
        ("efficientnet.embeddings.convolution", "efficientnet.embeddings.batchnorm"),
        _transformers,
        ("efficientnet.encoder.top_conv", "efficientnet.encoder.top_bn"),
        "classifier",
        nested=False,
    ),
    "timm": Names(("conv_stem", "bn1"), timm_names, ("conv_head", "bn2"), "classifier", nested=True),
    "torchvision": Names(
        ("features.0.0", "features.0.1"), _torchvision, ("features.{}.0", "features.{}.1"), "classifier.1", nested=True
    ),
    "lukemelas": Names(("_conv_stem", "_bn0"), _lukemelas, ("_conv_head", "_bn1"), "_fc", nested=False),
}


def transformers_name(name: str) -> str:
    """A tensor's name in `EfficientNetForImageClassification`, from one there or in `EfficientNetModel`.

    >>> transformers_name("embeddings.convolution.weight")
    'efficientnet.embeddings.convolution.weight'
    """
    name = name.removeprefix("module.")
    return f"efficientnet.{name}" if name.startswith(("embeddings.", "encoder.")) else name


def _layout(library: str) -> KeyLayout:
    names = NAMES[library]

    def keys(config: EfficientNetConfig) -> Sequence[Any]:
        top = tuple(name.format(len(config.out_channels) + 1) for name in names.top)
        return network_rules(network(config), names.stem, names.block, (top[0], top[1]), names.head)

    rename = transformers_name if library == "transformers" else lambda name: name.removeprefix("module.")
    return KeyLayout(library, keys, ignored, rename)


LAYOUTS = tuple(map(_layout, NAMES))


# What shapes tell


def infer(
    shapes: Mapping[str, tuple[int, ...]], file: str, overrides: Mapping[str, Any] | None = None
) -> EfficientNetConfig | None:
    """The configuration that a checkpoint's tensors tell.

    They do not tell padding, activation, epsilon and momentum. Those are the library's own: in timm's names
    TensorFlow's if the file is named `tf_...`, otherwise PyTorch's. Networks with squeeze-and-excitation have swish,
    those without are the Lite ones, with relu6.

    Args:
      shapes: of the tensors by name.
      file: the name of the checkpoint's file.
      overrides: fields that the caller sets.

    Returns:
      The configuration, or None where the tensors are not of an EfficientNet.

    Raises:
      ConfigError: the number of stages is not that of EfficientNet, so that strides cannot be told.
    """
    del overrides  # tensors and file tell all
    for layout in LAYOUTS:
        names = NAMES[layout.name]
        named = {layout.rename(name): shape for name, shape in shapes.items()}
        found = found_blocks(named, names.block, nested=names.nested)
        stem = named.get(f"{names.stem[0]}.weight", ())
        top = named.get(f"{names.top[0].format(len(by_stage(found)) + 1)}.weight", ())
        if found and len(stem) == len(top) == 4 and stem[2:] == (3, 3):
            config = _of_blocks(stem, found, top, layout.name)
            return None if config is None else _styled(config, layout.name, file)
    return None


def _of_blocks(
    stem: tuple[int, ...], found: Sequence[Found], top: tuple[int, ...], library: str
) -> EfficientNetConfig | None:
    for config in VARIANTS.values():
        shape = network(config)
        if (shape.stem, as_found(shape), shape.top) == (stem[0], found, top[0]):
            return dataclasses.replace(config, num_channels=stem[1])
    config = _explicit(stem, found, top)
    usual = EfficientNetConfig
    if library != "transformers" and config is not None:
        # Other networks of timm have the same names: MnasNet, MobileNetV2.
        alike = config.kernel_sizes == usual.kernel_sizes and config.expand_ratios == usual.expand_ratios
        return config if alike else None
    if config is not None and len(config.out_channels) != len(usual.out_channels):
        raise ConfigError(
            f"the checkpoint has {len(config.out_channels)} stages, an EfficientNet {len(usual.out_channels)}: "
            "tensors do not tell strides; put a config.json with strides beside it"
        )
    return config


def _explicit(stem: tuple[int, ...], found: Sequence[Found], top: tuple[int, ...]) -> EfficientNetConfig | None:
    """A configuration with exactly these channels and repeats, which nothing scales."""
    stages = by_stage(found)
    kernels = [{block.kernel for block in stage} for stage in stages]
    ratios = [{block.expanded / block.inputs if block.expanded else 1 for block in stage} for stage in stages]
    if any(len(values) > 1 or min(values) % 1 for values in (*kernels, *ratios)):
        return None
    strides, widest = EfficientNetConfig.strides, max(found, key=lambda block: block.inputs)
    for ratio in (0.25, (widest.squeezed + 0.5) / widest.inputs, 0.0):
        config = EfficientNetConfig(
            num_channels=stem[1],
            width_coefficient=1.0,
            depth_coefficient=1.0,
            depth_divisor=1,
            kernel_sizes=tuple(map(min, kernels)),
            out_channels=tuple(stage[0].features for stage in stages),
            strides=strides if len(stages) == len(strides) else (1,) * len(stages),
            num_block_repeats=tuple(map(len, stages)),
            expand_ratios=tuple(int(min(values)) for values in ratios),
            squeeze_expansion_ratio=ratio,
            hidden_act="swish" if ratio else "relu6",
            stem_channels=stem[0],
            head_channels=top[0],
            input=ImageInput(),
        )
        if as_found(network(config)) == found:
            return config
    return None


_TORCHVISION = {**PYTORCH, "batch_norm_momentum": 0.9, "first_residual": True}
_STYLES = {
    "transformers": {"padding": "even", "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.99, "first_residual": False},
    "timm": _TORCHVISION,
    "torchvision": _TORCHVISION,
    "lukemelas": {**TENSORFLOW, "batch_norm_momentum": 0.99, "first_residual": True},
}
# What tensors do not tell, as each library has it.


def _styled(config: EfficientNetConfig, library: str, file: str) -> EfficientNetConfig:
    style = dict(_STYLES[library])
    if library == "timm" and file.startswith("tf_"):
        style |= TENSORFLOW
    if library == "torchvision" and config.width_coefficient >= SCALES["b5"][0]:
        # Converted from TensorFlow, though padded as in PyTorch.
        style |= {"batch_norm_eps": 1e-3, "batch_norm_momentum": 0.99}
    config = dataclasses.replace(config, **style)
    if library != "transformers":
        return config
    whole = dataclasses.replace(config.input, resize="exact", resize_to=None)
    return dataclasses.replace(config, depthwise_padding=odd_blocks(config), input=whole)

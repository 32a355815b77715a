"""Where the tensors of a ResNet are in the checkpoints of transformers, timm and torchvision.

`infer` tells the configuration of a checkpoint that comes without one.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jtl.models.convolution import conv_rules, norm_rules
from jtl.models.family import ImageInput, KeyLayout
from jtl.models.pictures import image_input
from jtl.models.resnet_config import LAYER_TYPES, REDUCTION, ResNetConfig, block_layers
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule


def transformers_rules(config: ResNetConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in transformers' `ResNetForImageClassification`."""
    del config  # the same names for every size
    block = "resnet.encoder.stages.{}.layers.{}"
    modules = {
        "stem": "resnet.embedder.embedder",
        "stages_*/blocks_*/layer_*": f"{block}.layer.{{}}",
        "stages_*/blocks_*/shortcut": f"{block}.shortcut",
    }
    rules = _head_rules("classifier.1")
    for path, name in modules.items():
        rules += _layer_rules(path, f"{name}.convolution", f"{name}.normalization")
    return rules


def torch_rules(config: ResNetConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of timm or torchvision."""
    rules = [*_layer_rules("stem", "conv1", "bn1"), *_head_rules("fc")]
    for i in range(len(config.depths)):
        path, name = f"stages_{i}/blocks_*", f"layer{i + 1}.{{}}"
        for j in range(len(block_layers(config, REDUCTION, 1))):
            rules += _layer_rules(f"{path}/layer_{j}", f"{name}.conv{j + 1}", f"{name}.bn{j + 1}")
        rules += _layer_rules(f"{path}/shortcut", f"{name}.downsample.0", f"{name}.downsample.1")
    return rules


def _layer_rules(path: str, conv: str, norm: str) -> list[KeyRule]:
    return [*conv_rules(f"{path}/conv", conv), *norm_rules(f"{path}/norm", norm)]


def _head_rules(source: str) -> list[KeyRule]:
    return [KeyRule("head/kernel", f"{source}.weight", TRANSPOSE), KeyRule("head/bias", f"{source}.bias", KEEP)]


def transformers_name(name: str) -> str:
    """A tensor's name in `ResNetForImageClassification`, from one there or in `ResNetModel`.

    >>> transformers_name("embedder.embedder.convolution.weight")
    'resnet.embedder.embedder.convolution.weight'
    """
    name = name.removeprefix("module.")
    return f"resnet.{name}" if name.startswith(("embedder.", "encoder.")) else name


def _counters(config: ResNetConfig) -> Sequence[str]:
    del config  # of any size
    return ("**/num_batches_tracked",)


LAYOUTS = (
    KeyLayout("transformers", transformers_rules, _counters, transformers_name),
    KeyLayout("timm, torchvision", torch_rules, _counters, lambda name: name.removeprefix("module.")),
)


def infer(
    shapes: Mapping[str, tuple[int, ...]], file: str, overrides: Mapping[str, Any] | None = None
) -> ResNetConfig | None:
    """The configuration that a checkpoint's tensors tell.

    They do not tell where a bottleneck has its stride, nor the activation: taken to be in the 3x3 convolution, and
    a rectifier, which is the default of all three libraries. Where the file is named as torchvision's are, such as
    `resnet50-11ad3fa6.pth`, pictures are prepared as there.

    Args:
      shapes: of the tensors by name.
      file: the name of the checkpoint's file.
      overrides: fields that the caller sets.

    Returns:
      The configuration, or None where the tensors are not of a ResNet.
    """
    del overrides  # tensors and file tell all
    for layout, stem, shortcut, pattern in _MARKS:
        named = {layout.rename(name): shape for name, shape in shapes.items()}
        kernels = {
            tuple(map(int, match.groups())): shape
            for name, shape in named.items()
            if (match := re.fullmatch(pattern, name)) and len(shape) == 4
        }
        first = named.get(stem, ())
        if len(first) == 4 and first[2:] == (7, 7) and kernels and 0 not in first:
            config = _from_kernels(first, kernels)
            if config is None:
                return None
            # A shortcut that changes no channels is there for its stride.
            strided = config.embedding_size == config.hidden_sizes[0] and shortcut in named
            return dataclasses.replace(config, downsample_in_first_stage=strided, input=_named_input(file))
    return None


# Of each layout: the stem's kernel, the first block's shortcut, and the kernels of each stage, block and layer.
_MARKS = (
    (
        LAYOUTS[0],
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight",
        r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.weight",
    ),
    (LAYOUTS[1], "conv1.weight", "layer1.0.downsample.0.weight", r"layer(\d+)\.(\d+)\.conv(\d+)\.weight"),
)


def _from_kernels(stem: tuple[int, ...], kernels: Mapping[tuple[int, ...], tuple[int, ...]]) -> ResNetConfig | None:
    """A configuration with exactly these kernels `[out, in, height, width]` by stage, block and layer."""
    stages = sorted({stage for stage, _, _ in kernels})
    layers = sorted({layer for _, _, layer in kernels})
    if len(layers) not in (2, 3):
        return None
    sizes = tuple(kernels.get((stage, 0, layers[-1]), (0,))[0] for stage in stages)
    if not all(sizes) or (len(layers) == 3 and any(size % REDUCTION for size in sizes)):
        return None
    config = ResNetConfig(
        num_channels=stem[1],
        embedding_size=stem[0],
        hidden_sizes=sizes,
        depths=tuple(1 + max(block for at, block, _ in kernels if at == stage) for stage in stages),
        layer_type=LAYER_TYPES[len(layers) - 2],
    )
    expected, width = {}, stem[0]
    for stage, size, depth in zip(stages, sizes, config.depths, strict=True):
        for block, layer in itertools.product(range(depth), range(len(layers))):
            features, kernel, _ = block_layers(config, size, 1)[layer]
            expected[stage, block, layers[layer]] = (features, width, kernel, kernel)
            width = features
    return config if kernels == expected else None


def _named_input(file: str) -> ImageInput:
    published = re.fullmatch(r"resnet\d+-([0-9a-f]{8})\.pth", file)
    if published is None:
        return ImageInput()
    crop = 0.965 if published[1] in _TORCHVISION_V2 else 0.875
    return image_input({"input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": crop})


# The weights that torchvision calls IMAGENET1K_V2 are evaluated on pictures resized to 232 pixels instead of 256.
_TORCHVISION_V2 = ("11ad3fa6", "cd907fc2", "f82ba261")

"""The settings of EfficientNet and EfficientNet-Lite, and the table of their variants."""

import dataclasses
import math
from types import MappingProxyType
from typing import Any

from jtl.errors import ConfigError
from jtl.models.convolution import Padding
from jtl.models.family import ImageInput
from jtl.models.inverted_residual import ACTS, Block, Network, divisible

PADDINGS = ("even", "same", "symmetric")
POOLS = ("mean", "max")

_INPUT = ImageInput(size=(600, 600), resize="exact", resize_to=None)


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """The settings of an EfficientNet, named as in transformers' `config.json`, with the same defaults (those of B7).

    Four things are no settings in transformers. `stem_channels` and `head_channels` are the channels of the first and
    the last convolution before they are scaled. With `fixed_ends` these two, and the repeats of the first and the last
    stage, are not scaled (the Lite networks). With `first_residual` the first block of a stage, too, adds its input
    where the shapes allow it, as timm and torchvision do; in no network of the table they do. `padding` is

    - "same": as TensorFlow pads; the odd pixel goes to the right and the bottom;
    - "symmetric": as PyTorch pads, half of the kernel on each side;
    - "even": convolutions of stride 2 as TensorFlow pads pictures of even size, whatever the size is, but for the
      blocks listed in `depthwise_padding`, which are padded on all sides. So does transformers, which lists the blocks
      where the map of features has an odd size at the resolution of the checkpoint.

    `squeeze_expansion_ratio` 0 is without squeeze-and-excitation. `batch_norm_momentum` is what of the running
    statistics stays. `drop_connect_rate` is that of stochastic depth at the last block, from 0 at the first.
    `dropout_rate` is that of the family's own head.
    """

    num_channels: int = 3
    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depthwise_padding: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    pooling_type: str = "mean"
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.99
    dropout_rate: float = 0.5
    drop_connect_rate: float = 0.2
    stem_channels: int = 32
    head_channels: int = 1280
    fixed_ends: bool = False
    first_residual: bool = False
    padding: str = "even"
    input: ImageInput = _INPUT

    def __post_init__(self):
        stages = ("kernel_sizes", "out_channels", "strides", "num_block_repeats", "expand_ratios")
        for name in stages:
            values = getattr(self, name)
            if len(values) != len(self.out_channels) or not values:
                raise ConfigError(f"{name} {values!r} and out_channels {self.out_channels!r} are of different lengths")
        for name in (*stages, "num_channels", "depth_divisor", "stem_channels", "head_channels"):
            values = getattr(self, name) if name in stages else (getattr(self, name),)
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ConfigError(f"{name} must be integers above 0, got {getattr(self, name)!r}")
        if any(size % 2 == 0 for size in self.kernel_sizes) or any(stride > 2 for stride in self.strides):
            raise ConfigError(f"kernel_sizes {self.kernel_sizes} must be odd, and strides {self.strides} 1 or 2")
        if min(self.width_coefficient, self.depth_coefficient) <= 0 or self.squeeze_expansion_ratio < 0:
            raise ConfigError(
                "width_coefficient and depth_coefficient must be above 0, squeeze_expansion_ratio not below"
            )
        choices = {"hidden_act": sorted(ACTS), "pooling_type": POOLS, "padding": PADDINGS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} is not among {known}")


def scaled(config: EfficientNetConfig, channels: int, *, end: bool = False) -> int:
    """Channels as scaled by the width; of the first and last convolution (`end`) only where those are scaled."""
    if end and config.fixed_ends:
        return channels
    return divisible(channels * config.width_coefficient, config.depth_divisor)


def repeats(config: EfficientNetConfig) -> list[int]:
    """How many blocks each stage has."""
    last = len(config.num_block_repeats) - 1
    return [
        base if config.fixed_ends and stage in (0, last) else math.ceil(config.depth_coefficient * base)
        for stage, base in enumerate(config.num_block_repeats)
    ]


def network(config: EfficientNetConfig) -> Network:
    """The shape that the settings give."""
    c, inputs, blocks = config, scaled(config, config.stem_channels, end=True), []
    count = sum(repeats(c))
    for stage, repeat in enumerate(repeats(c)):
        features, kernel, ratio = scaled(c, c.out_channels[stage]), c.kernel_sizes[stage], c.expand_ratios[stage]
        for index in range(repeat):
            stride = c.strides[stage] if index == 0 else 1
            alike = stride == 1 and inputs == features
            blocks.append(
                Block(
                    stage=stage,
                    index=index,
                    inputs=inputs,
                    expanded=inputs * ratio if ratio != 1 else 0,
                    features=features,
                    kernel=kernel,
                    stride=stride,
                    padding=_padding(c, kernel, stride, len(blocks)),
                    squeezed=max(1, int(inputs * c.squeeze_expansion_ratio)) if c.squeeze_expansion_ratio else 0,
                    residual=alike and (index > 0 or c.first_residual),
                    drop=c.drop_connect_rate * len(blocks) / count,
                )
            )
            inputs = features
    return Network(
        channels=c.num_channels,
        stem=scaled(c, c.stem_channels, end=True),
        padding={"same": "SAME", "symmetric": 1}.get(c.padding, ((0, 1), (0, 1))),
        blocks=tuple(blocks),
        top=scaled(c, c.head_channels, end=True),
        activation=c.hidden_act,
        epsilon=c.batch_norm_eps,
        momentum=c.batch_norm_momentum,
        pool=c.pooling_type,
    )


def _padding(config: EfficientNetConfig, kernel: int, stride: int, number: int) -> Padding:
    half = kernel // 2
    if config.padding == "same":
        return "SAME"
    if config.padding == "symmetric" or stride == 1 or number in config.depthwise_padding:
        return half
    return ((half - 1, half), (half - 1, half))


def odd_blocks(config: EfficientNetConfig) -> tuple[int, ...]:
    """The blocks of stride 2 whose input has an odd height at the resolution of the checkpoint.

    Padded as TensorFlow pads there, transformers' `depthwise_padding`.
    """
    size, odd = -(-config.input.size[0] // 2), []
    for number, block in enumerate(network(config).blocks):
        if block.stride == 2:
            odd += [number] if size % 2 else []
            size = -(-size // 2)
    return tuple(odd)


# Tan and Le 2019, section 3 and the table of their repository: width, depth, resolution, dropout. B8 and L2 are of
# later papers (arXiv 1911.09665, 1911.04252).
SCALES = {
    "b0": (1.0, 1.0, 224, 0.2),
    "b1": (1.0, 1.1, 240, 0.2),
    "b2": (1.1, 1.2, 260, 0.3),
    "b3": (1.2, 1.4, 300, 0.3),
    "b4": (1.4, 1.8, 380, 0.4),
    "b5": (1.6, 2.2, 456, 0.4),
    "b6": (1.8, 2.6, 528, 0.5),
    "b7": (2.0, 3.1, 600, 0.5),
    "b8": (2.2, 3.6, 672, 0.5),
    "l2": (4.3, 5.3, 800, 0.5),
}
# The table of TensorFlow's Lite networks.
LITE_SCALES = {
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
}
TENSORFLOW = {"padding": "same", "batch_norm_eps": 1e-3}
PYTORCH = {"padding": "symmetric", "batch_norm_eps": 1e-5}


def _variant(scale: tuple[float, float, int, float], **fields: Any) -> EfficientNetConfig:
    width, depth, size, dropout = scale
    return EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        dropout_rate=dropout,
        batch_norm_momentum=0.9,
        first_residual=True,
        input=ImageInput(size=(size, size), resize="torchvision", resize_to=size + 32),
        **fields,
    )


def _lite(scale: tuple[float, float, int, float], **fields: Any) -> EfficientNetConfig:
    config = _variant(scale, hidden_act="relu6", squeeze_expansion_ratio=0.0, fixed_ends=True, **fields)
    # (x - 127) / 128, for x from 0 to 255.
    given = dataclasses.replace(config.input, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return dataclasses.replace(config, input=given)


VARIANTS = MappingProxyType(
    {f"efficientnet_{name}": _variant(scale, **PYTORCH) for name, scale in SCALES.items()}
    | {f"tf_efficientnet_{name}": _variant(scale, **TENSORFLOW) for name, scale in SCALES.items()}
    | {f"efficientnet_{name}": _lite(scale, **PYTORCH) for name, scale in LITE_SCALES.items()}
    | {f"tf_efficientnet_{name}": _lite(scale, **TENSORFLOW) for name, scale in LITE_SCALES.items()}
)
"""By the names of timm: `tf_` are those padded and normalised as in TensorFlow."""

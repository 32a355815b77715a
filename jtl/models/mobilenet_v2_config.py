"""The configuration of a MobileNetV2, and the network that it describes.

References:
  Sandler et al, MobileNetV2, 2018 (arXiv 1801.04381).
"""

import dataclasses

from jtl.errors import ConfigError
from jtl.models.family import ImageInput
from jtl.models.inverted_residual import ACTS, Block, Network, divisible

STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Of the first block of each stage."""

INPUT = ImageInput(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """The settings of a MobileNetV2, named as in transformers' `config.json`, with the same defaults.

    Some things are no settings in transformers. `out_channels` and `num_block_repeats` are those of each stage,
    `stem_channels` and `head_channels` those of the first and the last convolution, all before they are scaled.
    With `first_residual` the first block, too, adds its input where the shapes allow it, as timm and torchvision do;
    they allow it in very narrow networks alone. `batch_norm_momentum` is what of the running statistics stays.

    `output_stride` is how much smaller the last map is than the picture: below 32 the last stages keep the size
    and look further, by dilated kernels. Without `tf_padding` convolutions are padded by half of the kernel on each
    side. With `finegrained_output` the last convolution is not made narrower than `head_channels`.
    """

    num_channels: int = 3
    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    output_stride: int = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = True
    hidden_act: str = "relu6"
    tf_padding: bool = True
    classifier_dropout_prob: float = 0.8
    layer_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.997
    out_channels: tuple[int, ...] = (16, 24, 32, 64, 96, 160, 320)
    num_block_repeats: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
    stem_channels: int = 32
    head_channels: int = 1280
    first_residual: bool = False
    input: ImageInput = INPUT

    def __post_init__(self):
        stages = ("out_channels", "num_block_repeats")
        counts = ("num_channels", "depth_divisible_by", "min_depth", "stem_channels", "head_channels")
        for name in (*stages, *counts):
            values = getattr(self, name) if name in stages else (getattr(self, name),)
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ConfigError(f"{name} must be integers above 0, got {getattr(self, name)!r}")
            if name in stages and len(values) != len(STRIDES):
                raise ConfigError(f"{name} must have one number for each of {len(STRIDES)} stages, got {values!r}")
        if self.depth_multiplier <= 0 or self.expand_ratio <= 0:
            raise ConfigError(
                f"depth_multiplier {self.depth_multiplier} and expand_ratio {self.expand_ratio} must be above 0"
            )
        if self.output_stride not in (2, 4, 8, 16, 32):
            raise ConfigError(f"output_stride {self.output_stride!r} is not among 2, 4, 8, 16 and 32")
        if self.hidden_act not in ACTS:
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not among {sorted(ACTS)}")


def scaled(config: MobileNetV2Config, channels: int | float) -> int:
    """Channels as scaled by the multiplier."""
    return _divisible(config, channels * config.depth_multiplier)


def _divisible(config: MobileNetV2Config, channels: int | float) -> int:
    return divisible(round(channels), config.depth_divisible_by, config.min_depth)


def network(config: MobileNetV2Config) -> Network:
    """The shape that the settings give."""
    c, inputs, blocks = config, scaled(config, config.stem_channels), []
    reduced, dilation, padding = 2, 1, "SAME" if config.tf_padding else 1
    for stage, (base, repeat) in enumerate(zip(c.out_channels, c.num_block_repeats, strict=True)):
        for index in range(repeat):
            wanted = STRIDES[stage] if index == 0 else 1
            # A stride that would reduce the map too far dilates the kernels of the blocks after it instead.
            full = reduced == c.output_stride and stage > 0
            stride, reduced = (1, reduced) if full else (wanted, reduced * wanted)
            features, expanded = scaled(c, base), _divisible(c, inputs * c.expand_ratio)
            if stage == 0 and index == 0:
                expanded = 0 if c.first_layer_is_expansion else inputs
            blocks.append(
                Block(
                    stage=stage,
                    index=index,
                    inputs=inputs,
                    expanded=expanded,
                    features=features,
                    kernel=3,
                    stride=stride,
                    padding=padding if padding == "SAME" else dilation,
                    dilation=dilation if full else 1,
                    residual=stride == 1 and inputs == features and (bool(blocks) or c.first_residual),
                )
            )
            dilation *= wanted if full else 1
            inputs = features
    wide = c.finegrained_output and c.depth_multiplier < 1
    return Network(
        channels=c.num_channels,
        stem=scaled(c, c.stem_channels),
        padding=padding,
        blocks=tuple(blocks),
        top=c.head_channels if wide else scaled(c, c.head_channels),
        activation=c.hidden_act,
        epsilon=c.layer_norm_eps,
        momentum=c.batch_norm_momentum,
    )

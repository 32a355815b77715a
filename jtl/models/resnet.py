"""ResNet: convolutions with shortcuts, with the checkpoint layouts of transformers, timm and torchvision.

    stem         conv 7x7, norm; then a maximum over 3x3
    stages_0 ... stages_{n-1}
                 blocks_0 ... blocks_{m-1}:  layer_0, layer_1, layer_2 (conv, norm each; a basic block has two),
                                             shortcut (conv, norm) where size or channels change
    head         only where there is one

The stride of a bottleneck is that of its 3x3 convolution, as torchvision, timm and transformers have it ("v1.5");
`downsample_in_bottleneck` gives it to the first 1x1 convolution, as in the paper.

References:
  He et al, Deep residual learning for image recognition, 2015 (arXiv 1512.03385). The code of transformers and timm
  and their usual weights are under Apache-2.0, torchvision's under BSD-3-Clause.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.convolution import BatchNorm, Conv, max_pool
from jtl.models.family import Family, PictureFeatures
from jtl.models.inputs import check_pictures
from jtl.models.layers import call_head
from jtl.models.resnet_config import VARIANTS, LayerShape, ResNetConfig, block_layers, parse, settings, stage_strides
from jtl.models.resnet_layouts import LAYOUTS, infer


class ConvNorm(nn.Module):
    """A convolution that keeps the size up to its stride, and a batch normalisation."""

    shape: LayerShape
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to the same with other channels."""
        features, kernel, stride = self.shape
        x = Conv(features, kernel, stride, padding=kernel // 2, dtype=self.dtype, name="conv")(x)
        return BatchNorm(dtype=self.dtype, name="norm")(x, use_running_average=deterministic)


class Block(nn.Module):
    """Two or three convolutions, and a shortcut around them."""

    config: ResNetConfig
    features: int
    stride: int = 1
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height', width', features]`."""
        c, shortcut = self.config, x
        layer = functools.partial(ConvNorm, dtype=self.dtype)
        for i, shape in enumerate(block_layers(c, self.features, self.stride)):
            x = nn.relu(x) if i else x
            x = layer(shape, name=f"layer_{i}")(x, deterministic=deterministic)
        if shortcut.shape[-1] != self.features or self.stride != 1:
            shape = LayerShape(self.features, 1, self.stride)
            shortcut = layer(shape, name="shortcut")(shortcut, deterministic=deterministic)
        return ACTIVATIONS[c.hidden_act](x + shortcut)


class Stage(nn.Module):
    """Blocks of one size."""

    config: ResNetConfig
    features: int
    depth: int
    stride: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height', width', features]`."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = Block(self.config, self.features, stride, self.dtype, name=f"blocks_{i}")(
                x, deterministic=deterministic
            )
        return x


class ResNet(nn.Module):
    """A ResNet, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: ResNetConfig
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> Any:
        """Pictures to what the head makes of them.

        Args:
          images: `[batch, height, width, channels]`, normalised as `config.input` says.
          deterministic: running statistics, as in evaluation; otherwise those of the batch.

        Returns:
          `PictureFeatures`, or what the head makes of the pooled ones.
        """
        features = self.features(images, deterministic=deterministic)
        return features if self.head is None else call_head(self.head, features, deterministic=deterministic)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the model cannot mean; see `jtl.models.inputs`."""
        check_pictures(batch)

    @nn.compact
    def features(self, images: jax.Array, *, deterministic: bool = True) -> PictureFeatures:
        """The last map of features, and its mean over positions; see `__call__`."""
        c = self.config
        if images.ndim != 4 or images.shape[-1] != c.num_channels:
            raise ConfigError(f"images must be [batch, height, width, {c.num_channels}], got {list(images.shape)}")
        x = ConvNorm(LayerShape(c.embedding_size, 7, 2), self.dtype, name="stem")(images, deterministic=deterministic)
        x = max_pool(ACTIVATIONS[c.hidden_act](x), 3, 2, padding=1)
        for i, (size, depth, stride) in enumerate(zip(c.hidden_sizes, c.depths, stage_strides(c), strict=True)):
            stage = Stage(c, size, depth, stride, self.dtype, name=f"stages_{i}")
            x = stage(x, deterministic=deterministic)
        return PictureFeatures(x, jnp.mean(x, axis=(1, 2)))


def example(config: ResNetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    return {"images": jax.ShapeDtypeStruct((1, *config.input.size, config.num_channels), jnp.float32)}


def depth_groups(model: ResNet) -> list[tuple[str, ...]]:
    """The stem, then each block, then the head."""
    depths = enumerate(model.config.depths)
    blocks = [(f"stages_{i}/blocks_{j}",) for i, depth in depths for j in range(depth)]
    return [("stem",), *blocks, () if model.head is None else ("head",)]


FAMILY = Family(
    name="resnet",
    modality="image",
    parse=parse,
    build=lambda config, head: ResNet(config, head),
    example=example,
    layouts=LAYOUTS,
    depth_groups=depth_groups,
    paper="arXiv 1512.03385",
    infer=infer,
    settings=settings,
    variants=VARIANTS,
    licence="Apache-2.0 (transformers, timm), BSD-3-Clause (torchvision)",
)

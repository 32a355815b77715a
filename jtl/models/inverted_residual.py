"""Inverted residual blocks, of which MobileNetV2 and EfficientNet are made, and the network around them.

    stem         conv, norm
    stages_0 ... stages_{n-1}
                 blocks_0 ... blocks_{m-1}:  expand (conv, norm), depthwise (conv, norm),
                                             squeeze (reduce, expand), project (conv, norm)
    top          conv, norm

A block without expansion has no `expand`, one without squeeze-and-excitation no `squeeze`.

References:
  Sandler et al, MobileNetV2, 2018 (arXiv 1801.04381). Hu et al, Squeeze-and-excitation networks, 2017
  (arXiv 1709.01507). Huang et al, Deep networks with stochastic depth, 2016 (arXiv 1603.09382).
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.convolution import BatchNorm, Conv, Padding
from jtl.models.family import PictureFeatures
from jtl.models.inputs import check_pictures
from jtl.models.layers import call_head

ACTS: dict[str, Callable[[jax.Array], jax.Array]] = {**ACTIVATIONS, "relu6": nn.relu6}
"""Activation functions by the names that checkpoints give them."""


class Block(NamedTuple):
    """The shape of one block.

    Attributes:
      stage: which stage it is in.
      index: its place there.
      inputs: channels of its input.
      expanded: channels after the expansion; 0 where there is none.
      features: channels of its output.
      kernel: height and width of the depthwise kernel.
      stride: of the depthwise convolution.
      padding: of the depthwise convolution.
      dilation: of the depthwise convolution.
      squeezed: channels between squeeze and excitation; 0 where there is none.
      residual: whether the input is added to the output.
      drop: rate at which stochastic depth drops the block for an example.
    """

    stage: int
    index: int
    inputs: int
    expanded: int
    features: int
    kernel: int
    stride: int
    padding: Padding
    dilation: int = 1
    squeezed: int = 0
    residual: bool = False
    drop: float = 0.0


class Network(NamedTuple):
    """The shape of a network.

    Attributes:
      channels: of a picture.
      stem: channels of the first convolution, 3x3 with stride 2.
      padding: of the first convolution.
      blocks: in order.
      top: channels of the last convolution, 1x1.
      pool: "mean" or "max" over the positions of the last map.
      activation: one of `ACTS`.
      epsilon: of all batch normalisations.
      momentum: of all batch normalisations; what of the running statistics stays.
    """

    channels: int
    stem: int
    padding: Padding
    blocks: tuple[Block, ...]
    top: int
    activation: str
    epsilon: float
    momentum: float
    pool: str = "mean"

    def stages(self) -> list[tuple[Block, ...]]:
        """The blocks of each stage."""
        return [tuple(blocks) for _, blocks in itertools.groupby(self.blocks, lambda block: block.stage)]


class ConvNorm(nn.Module):
    """A convolution, a batch normalisation, and the activation if there is one.

    Attributes:
      network: says which activation, and how to normalise.
      features: channels of the output.
      kernel: height and width.
      stride: in both directions.
      padding: see `Padding`.
      groups: of channels.
      dilation: of the kernel.
      activated: whether there is an activation.
      dtype: of the computation.
    """

    network: Network
    features: int
    kernel: int = 1
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    dilation: int = 1
    activated: bool = True
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to the same with `features` channels."""
        conv = Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            self.groups,
            dilation=self.dilation,
            dtype=self.dtype,
            name="conv",
        )
        norm = BatchNorm(self.network.epsilon, self.network.momentum, self.dtype, name="norm")
        x = norm(conv(x), use_running_average=deterministic)
        return ACTS[self.network.activation](x) if self.activated else x


class Squeeze(nn.Module):
    """Squeeze-and-excitation: each channel is weighed by what all positions together say."""

    features: int
    activation: str
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels]` to the same."""
        dense = functools.partial(Conv, kernel=1, padding=0, use_bias=True, dtype=self.dtype)
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = ACTS[self.activation](dense(self.features, name="reduce")(gate))
        return x * nn.sigmoid(dense(x.shape[-1], name="expand")(gate))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation and projection, around which the input may pass.

    Attributes:
      network: says which activation, and how to normalise.
      block: its own shape.
      dtype: of the computation.
    """

    network: Network
    block: Block
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, inputs]` to `[batch, height', width', features]`."""
        b, whole = self.block, x
        layer = functools.partial(ConvNorm, self.network, dtype=self.dtype)
        if b.expanded:
            x = layer(b.expanded, name="expand")(x, deterministic=deterministic)
        inner = b.expanded or b.inputs
        depthwise = layer(inner, b.kernel, b.stride, b.padding, inner, b.dilation, name="depthwise")
        x = depthwise(x, deterministic=deterministic)
        if b.squeezed:
            x = Squeeze(b.squeezed, self.network.activation, self.dtype, name="squeeze")(x)
        x = layer(b.features, activated=False, name="project")(x, deterministic=deterministic)
        if not b.residual:
            return x
        return whole + nn.Dropout(b.drop, broadcast_dims=(1, 2, 3))(x, deterministic=deterministic)


class Stage(nn.Module):
    """Blocks of one size."""

    network: Network
    blocks: tuple[Block, ...]
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height', width', features]`."""
        for i, block in enumerate(self.blocks):
            x = InvertedResidual(self.network, block, self.dtype, name=f"blocks_{i}")(x, deterministic=deterministic)
        return x


class InvertedResidualNet(nn.Module):
    """A stem, stages of blocks, and a convolution on top; with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: Any
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None

    def network(self) -> Network:
        """The shape that the settings give."""
        raise NotImplementedError

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> Any:
        """Pictures to what the head makes of them.

        Args:
          images: `[batch, height, width, channels]`, normalised as `config.input` says.
          deterministic: running statistics and no dropout, as in evaluation; otherwise the batch's statistics.

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
        """The last map of features, and what is pooled from it; see `__call__`."""
        n = self.network()
        _check_images(n, images)
        layer = functools.partial(ConvNorm, n, dtype=self.dtype)
        x = layer(n.stem, 3, 2, n.padding, name="stem")(images, deterministic=deterministic)
        for i, blocks in enumerate(n.stages()):
            x = Stage(n, blocks, self.dtype, name=f"stages_{i}")(x, deterministic=deterministic)
        x = layer(n.top, name="top")(x, deterministic=deterministic)
        # The gradient of `jnp.max` compares for equality what XLA may have computed twice, with other roundings.
        pooled = nn.max_pool(x, x.shape[1:3])[:, 0, 0] if n.pool == "max" else jnp.mean(x, axis=(1, 2))
        return PictureFeatures(x, pooled)


def _check_images(network: Network, images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != network.channels:
        raise ConfigError(f"images must be [batch, height, width, {network.channels}], got {list(images.shape)}")
    size = images.shape[1:3]
    for kernel, stride, padding in [
        (3, 2, network.padding),
        *((b.kernel, b.stride, b.padding) for b in network.blocks),
    ]:
        if isinstance(padding, tuple):
            size = tuple((n + sum(p) - kernel) // stride + 1 for n, p in zip(size, padding, strict=True))
        else:
            size = tuple(-(-n // stride) for n in size)
        if min(size) < 1:
            raise ConfigError(f"images of {images.shape[1]} x {images.shape[2]} pixels are too small: nothing is left")


def depth_groups(model: InvertedResidualNet) -> list[tuple[str, ...]]:
    """The stem, then each block, then all above."""
    blocks = [(f"stages_{block.stage}/blocks_{block.index}",) for block in model.network().blocks]
    return [("stem",), *blocks, ("top", *(() if model.head is None else ("head",)))]


# Channels


def divisible(value: int | float, divisor: int, least: int | None = None) -> int:
    """A number of channels as a multiple of a divisor, at most a tenth below the value.

    >>> divisible(33.6, 8), divisible(11.2, 8), divisible(18.0, 8)
    (32, 16, 24)
    """
    rounded = max(divisor if least is None else least, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded

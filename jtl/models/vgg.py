"""VGG: plain stacks of 3x3 convolutions, with the checkpoint layouts of torchvision, timm and Keras.

    stages_0 ... stages_{n-1}
                 conv_0, norm_0, conv_1, norm_1 ... (norms only with `batch_norm`); then a maximum over 2x2
    fc_0, fc_1   the two wide dense layers, where there are any; the first looks at a whole map of features
    head         only where there is one

References:
  Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2014 (arXiv 1409.1556);
  the convolutions retrained on edges: Xie and Tu, Holistically-nested edge detection, 2015 (arXiv 1504.06375).
  torchvision's code and its weights are under BSD-3-Clause, timm's under Apache-2.0; the authors' own weights, which
  Keras distributes, are under CC BY 4.0.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from jtl import heads
from jtl.errors import ConfigError
from jtl.models.convolution import BatchNorm, Conv, convolve, max_pool
from jtl.models.family import Family, PictureFeatures
from jtl.models.inputs import check_pictures
from jtl.models.layers import Dense, Dropout, call_head
from jtl.models.vgg_config import VARIANTS, VggConfig, parse
from jtl.models.vgg_layouts import LAYOUTS, infer
from jtl.tree import wide_dtype


class Stage(nn.Module):
    """Convolutions of one size, and a maximum that halves it."""

    features: int
    depth: int
    batch_norm: bool
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height // 2, width // 2, features]`."""
        for i in range(self.depth):
            x = Conv(self.features, use_bias=True, dtype=self.dtype, name=f"conv_{i}")(x)
            if self.batch_norm:
                x = BatchNorm(dtype=self.dtype, name=f"norm_{i}")(x, use_running_average=deterministic)
            x = nn.relu(x)
        return max_pool(x, 2, 2)


class WindowDense(nn.Module):
    """A dense layer of every square window of a map, rectified; a map of one window is one product of two matrices.

    Its dropout is its own, so that it is off where the layer is frozen.

    Attributes:
      features: the width of the output.
      size: height and width of a window.
      dropout: rate on the output, active in training.
      dtype: of the computation; by default that of inputs and parameters.
    """

    features: int
    size: int
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, height - size + 1, width - size + 1, features]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.01), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if x.shape[1:3] == shape[:2]:
            y = (x.reshape(len(x), -1) @ kernel.reshape(-1, self.features)).reshape(len(x), 1, 1, -1)
        else:
            y = convolve(x, kernel)
        y = nn.relu(y + jnp.expand_dims(bias, (0, 1, 2)))
        return Dropout(self.dropout)(y, deterministic=deterministic)


class Vgg(nn.Module):
    """A VGG, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: VggConfig
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> Any:
        """Pictures to what the head makes of them.

        Args:
          images: `[batch, height, width, channels]`, normalised as `config.input` says.
          deterministic: no dropout, and running statistics, as in evaluation.

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
        """The last map of features, and what the second dense layer makes of it; see `__call__`."""
        c = self.config
        least = 2 ** len(c.depths)
        if images.ndim != 4 or images.shape[-1] != c.num_channels or min(images.shape[1:3]) < least:
            raise ConfigError(
                f"images must be [batch, height, width, {c.num_channels}] of at least {least} x {least} pixels, "
                f"got {list(images.shape)}"
            )
        x = images
        for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            x = Stage(width, depth, c.batch_norm, self.dtype, name=f"stages_{i}")(x, deterministic=deterministic)
        return PictureFeatures(x, jnp.mean(self._dense(x, deterministic), axis=(1, 2)))

    def _dense(self, x: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        if c.hidden is None:
            return x
        least = (c.pool_size, c.pool_size)
        x = adaptive_mean(
            x, least if c.pooling == "adaptive" else (max(x.shape[1], least[0]), max(x.shape[2], least[1]))
        )
        x = WindowDense(c.hidden, c.pool_size, c.dropout, self.dtype, name="fc_0")(x, deterministic=deterministic)
        return nn.relu(Dense(c.hidden, 0.01, self.dtype, name="fc_1")(x))


def adaptive_mean(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Means over a grid of windows that cover a map and may overlap, PyTorch's `adaptive_avg_pool2d`.

    Of n places to m, window i is of those from floor(i n / m) to before ceil((i + 1) n / m).

    Args:
      x: `[batch, height, width, channels]`.
      size: height and width of the result, smaller or larger.
    """
    if x.shape[1:3] == size:
        return x
    wide = wide_dtype(x.dtype)
    rows, columns = (jnp.asarray(_windows(n, m), wide) for n, m in zip(x.shape[1:3], size, strict=True))
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x.astype(wide), columns, precision=exact).astype(x.dtype)


def _windows(places: int, size: int) -> np.ndarray:
    """`[size, places]`, the weights of the places in each window."""
    i, at = np.arange(size)[:, None], np.arange(places)[None]
    inside = (at >= i * places // size) & (at < -(-(i + 1) * places // size))
    return inside / inside.sum(1, keepdims=True)


def example(config: VggConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    return {"images": jax.ShapeDtypeStruct((1, *config.input.size, config.num_channels), jnp.float32)}


def depth_groups(model: Vgg) -> list[tuple[str, ...]]:
    """The first stage, each other stage, each dense layer, then the head."""
    stages = [(f"stages_{i}",) for i in range(len(model.config.depths))]
    dense = [] if model.config.hidden is None else [("fc_0",), ("fc_1",)]
    return [*stages, *dense, () if model.head is None else ("head",)]


FAMILY = Family(
    name="vgg",
    modality="image",
    parse=parse,
    build=lambda config, head: Vgg(config, head),
    example=example,
    layouts=LAYOUTS,
    depth_groups=depth_groups,
    paper="arXiv 1409.1556",
    infer=infer,
    head=lambda config, outputs: heads.Linear(outputs, config.dropout),
    variants=VARIANTS,
    licence="BSD-3-Clause (torchvision), Apache-2.0 (timm), CC BY 4.0 (the authors')",
)

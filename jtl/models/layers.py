"""Layers that several families share."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jtl import heads
from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.tracing import random_init


class Dense(nn.Module):
    """A dense layer, computed as one product of two matrices.

    Same parameters and values as `nn.Dense`. On CPU, XLA takes up to 1.4 times as long for the weight's
    gradient when the inputs keep several leading axes (`benchmarks/dense.py`).

    Attributes:
      features: the width of the output.
      init_scale: standard deviation of the initial kernel.
      dtype: of the computation; by default that of inputs and parameters.
      use_bias: whether a bias is added.
    """

    features: int
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., features]`."""
        init = random_init(nn.initializers.normal(self.init_scale))
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        flat = x.reshape(-1, x.shape[-1]) @ kernel
        flat = flat if bias is None else flat + jnp.expand_dims(bias, 0)
        return flat.reshape(*x.shape[:-1], self.features)


class Dropout(nn.Module):
    """Dropout that draws 16 random bits for each value, where `nn.Dropout` draws 32.

    Random bits are what dropout costs on a CPU. The rate is rounded to a multiple of 2**-16, and the values that
    stay are scaled by the rounded one, so that the mean stays.

    Attributes:
      rate: the share of values set to zero in training, in `[0, 1)`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Values of any shape, some of them zero unless `deterministic`."""
        dropped = round(self.rate * 2**16)
        if deterministic or not dropped:
            return x
        kept = _random16(self.make_rng("dropout"), x.shape) >= jnp.uint16(dropped)
        return jnp.where(kept, x * (2**16 / (2**16 - dropped)), jnp.zeros((), x.dtype))


def _random16(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if not shape or shape[-1] % 2:
        return jax.random.bits(key, shape, jnp.uint16)
    pairs = jax.random.bits(key, (*shape[:-1], shape[-1] // 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(shape)


def masked_mean(sequence: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the positions that count; zeros where none does.

    Args:
      sequence: `[batch, length, width]`.
      mask: `[batch, length]` bool.

    Returns:
      `[batch, width]`.
    """
    keep = jnp.expand_dims(mask, -1).astype(sequence.dtype)
    return jnp.sum(sequence * keep, axis=1) / jnp.maximum(jnp.sum(keep, axis=1), 1)


def last_real(sequence: jax.Array, mask: jax.Array) -> jax.Array:
    """The last position that counts of each row; the first of a row that has none.

    Args:
      sequence: `[batch, length, width]`.
      mask: `[batch, length]` bool.

    Returns:
      `[batch, width]`.
    """
    places = jnp.arange(mask.shape[1])[None]
    last = jnp.max(jnp.where(mask, places, 0), axis=1, keepdims=True)
    # A sum instead of a lookup: row b plainly depends on row b alone, so the split can cut behind it.
    return jnp.sum(jnp.where(jnp.expand_dims(places == last, -1), sequence, 0), axis=1)


def call_head(head: nn.Module, features: Any, table: jax.Array | None = None, *, deterministic: bool) -> jax.Array:
    """Apply a head to what it reads of a backbone's features.

    Args:
      head: see `jtl.heads`; one that takes no `deterministic`, such as `nn.Dense`, is called without it.
      features: with `pooled`, and `sequence` where the backbone has positions.
      table: of word embeddings, where the backbone has one.
      deterministic: no dropout.

    Raises:
      ConfigError: the head reads what this backbone does not have.
    """
    wanted = heads.reads(head)
    inputs = {"pooled": ("pooled",), "sequence": ("sequence",), "table": ("sequence",)}.get(wanted)
    if inputs is None or not hasattr(features, *inputs) or (wanted == "table" and table is None):
        raise ConfigError(f"{type(head).__name__} reads {wanted!r}, which this backbone does not give")
    given = (*(getattr(features, name) for name in inputs), *((table,) if wanted == "table" else ()))
    takes_mode = "deterministic" in inspect.signature(head.__call__).parameters
    return head(*given, deterministic=deterministic) if takes_mode else head(*given)


def layer_norm(epsilon: float, dtype: jax.typing.DTypeLike | None, name: str) -> nn.LayerNorm:
    """A layer norm in two passes: that in one loses digits which parity with other libraries needs."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Mlp(nn.Module):
    """Two dense layers with an activation between.

    Attributes:
      inner: the width between them.
      activation: by its name in `jtl.activations`.
      init_scale: standard deviation of initial kernels.
      dtype: of the computation; by default that of inputs and parameters.
    """

    inner: int
    activation: str
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        up = Dense(self.inner, self.init_scale, self.dtype, name="up")
        down = Dense(x.shape[-1], self.init_scale, self.dtype, name="down")
        return down(ACTIVATIONS[self.activation](up(x)))

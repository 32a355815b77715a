"""Layers that several families share.

Shape suffixes: B batch, S and T query and key positions, H heads, D width of a head.
"""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jtl.errors import ConfigError
from jtl.models.tracing import random_init
from jtl.tree import wide_dtype

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}
"""Activation functions by the names that checkpoints give them."""


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


class SelfAttention(nn.Module):
    """Multi-head self-attention, with the output projection.

    Attributes:
      num_heads: divides the width.
      dropout: rate on the attention weights.
      init_scale: standard deviation of initial kernels.
      dtype: of the computation; by default that of inputs and parameters. Softmax is float32 at
        least.
      qkv_bias: whether queries, keys and values have a bias.
      implementation: "xla", or "cudnn" for the fused attention of a GPU, which needs half precision, no mask and
        no dropout.

    References:
      Vaswani et al, Attention is all you need, 2017 (arXiv 1706.03762).
    """

    num_heads: int
    dropout: float = 0.0
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None
    qkv_bias: bool = True
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True) -> jax.Array:
        """Attend.

        Args:
          x: `[batch, length, width]`.
          mask: `[batch, length]` bool, True for the positions that may be attended to; by default all may.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`.
        """
        width = x.shape[-1]
        project = functools.partial(Dense, width, self.init_scale, self.dtype)
        heads = (len(x), -1, self.num_heads, width // self.num_heads)  # an adapter may add keys and values
        q_BxSxHxD, k_BxTxHxD, v_BxTxHxD = (
            project(name=n, use_bias=self.qkv_bias)(x).reshape(heads) for n in ("query", "key", "value")
        )
        if self.implementation == "cudnn":
            if mask is not None or (self.dropout and not deterministic):
                raise ConfigError("cudnn's fused attention is used without mask and dropout: set implementation='xla'")
            mixed_BxSxHxD = jax.nn.dot_product_attention(q_BxSxHxD, k_BxTxHxD, v_BxTxHxD, implementation="cudnn")
        else:
            weights_BxHxSxT = attention_weights(q_BxSxHxD, k_BxTxHxD, mask)
            weights_BxHxSxT = Dropout(self.dropout)(weights_BxHxSxT, deterministic=deterministic)
            # Not one einsum to [batch, length, heads, width]: on CPU, the product then takes twice as long.
            mixed_BxSxHxD = (weights_BxHxSxT @ v_BxTxHxD.swapaxes(1, 2)).swapaxes(1, 2)
        return project(name="output")(mixed_BxSxHxD.reshape(x.shape))


def attention_weights(q_BxSxHxD: jax.Array, k_BxTxHxD: jax.Array, mask_BxT: jax.Array | None = None) -> jax.Array:
    """Softmax of scaled dot products over the allowed positions.

    A row with no allowed position gets equal weights, never NaN.

    Args:
      q_BxSxHxD: queries.
      k_BxTxHxD: keys.
      mask_BxT: bool, True for allowed positions; by default all are.

    Returns:
      `[batch, heads, queries, keys]` in the dtype of the queries; softmax in float32 at least.
    """
    scores_BxHxSxT = jnp.einsum("bshd,bthd->bhst", q_BxSxHxD * q_BxSxHxD.shape[-1] ** -0.5, k_BxTxHxD)
    scores_BxHxSxT = scores_BxHxSxT.astype(wide_dtype(scores_BxHxSxT.dtype))
    if mask_BxT is not None:
        lowest = jnp.finfo(scores_BxHxSxT.dtype).min
        scores_BxHxSxT = jnp.where(jnp.expand_dims(mask_BxT, (1, 2)), scores_BxHxSxT, lowest)
    return jax.nn.softmax(scores_BxHxSxT, axis=-1).astype(q_BxSxHxD.dtype)


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


def call_head(head: nn.Module, pooled: jax.Array, *, deterministic: bool) -> jax.Array:
    """Apply a head; one that takes no `deterministic`, such as `nn.Dense`, is called without it."""
    takes_mode = "deterministic" in inspect.signature(head.__call__).parameters
    return head(pooled, deterministic=deterministic) if takes_mode else head(pooled)

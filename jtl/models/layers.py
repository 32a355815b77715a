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
    """

    features: int
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., features]`."""
        kernel = self.param("kernel", nn.initializers.normal(self.init_scale), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        flat = x.reshape(-1, x.shape[-1]) @ kernel + jnp.expand_dims(bias, 0)
        return flat.reshape(*x.shape[:-1], self.features)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with the output projection.

    Attributes:
      num_heads: divides the width.
      dropout: rate on the attention weights.
      init_scale: standard deviation of initial kernels.
      dtype: of the computation; by default that of inputs and parameters. Softmax is float32 at
        least.

    References:
      Vaswani et al, Attention is all you need, 2017 (arXiv 1706.03762).
    """

    num_heads: int
    dropout: float = 0.0
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Attend.

        Args:
          x: `[batch, length, width]`.
          mask: `[batch, length]` bool, True for the positions that may be attended to.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`.
        """
        width = x.shape[-1]
        project = functools.partial(Dense, width, self.init_scale, self.dtype)
        heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
        q_BxSxHxD, k_BxTxHxD, v_BxTxHxD = (project(name=n)(x).reshape(heads) for n in ("query", "key", "value"))
        weights_BxHxSxT = attention_weights(q_BxSxHxD, k_BxTxHxD, mask)
        weights_BxHxSxT = nn.Dropout(self.dropout)(weights_BxHxSxT, deterministic=deterministic)
        mixed_BxSxHxD = jnp.einsum("bhst,bthd->bshd", weights_BxHxSxT, v_BxTxHxD)
        return project(name="output")(mixed_BxSxHxD.reshape(x.shape))


def attention_weights(q_BxSxHxD: jax.Array, k_BxTxHxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Softmax of scaled dot products over the allowed positions.

    A row with no allowed position gets equal weights, never NaN.

    Args:
      q_BxSxHxD: queries.
      k_BxTxHxD: keys.
      mask_BxT: bool, True for allowed positions.

    Returns:
      `[batch, heads, queries, keys]` in the dtype of the queries; softmax in float32 at least.
    """
    scores_BxHxSxT = jnp.einsum("bshd,bthd->bhst", q_BxSxHxD * q_BxSxHxD.shape[-1] ** -0.5, k_BxTxHxD)
    scores_BxHxSxT = scores_BxHxSxT.astype(wide_dtype(scores_BxHxSxT.dtype))
    lowest = jnp.finfo(scores_BxHxSxT.dtype).min
    allowed_Bx1x1xT = jnp.expand_dims(mask_BxT, (1, 2))
    return jax.nn.softmax(jnp.where(allowed_Bx1x1xT, scores_BxHxSxT, lowest), axis=-1).astype(q_BxSxHxD.dtype)


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

"""Attention that several families share.

Shape suffixes: B batch, S and T query and key positions, H heads, D width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.models.layers import Dense, Dropout
from jtl.tree import wide_dtype

IMPLEMENTATIONS = ("xla", "cudnn")
"""Of attention; see `SelfAttention`."""


class KeyValues(NamedTuple):
    """Keys and values of an attention that are kept from call to call, while words are generated.

    Attributes:
      keys: `[batch, positions, heads, width of a head]`.
      values: likewise.
    """

    keys: jax.Array
    values: jax.Array


class SelfAttention(nn.Module):
    """Multi-head self-attention, with the output projection.

    Attributes:
      num_heads: divides the width.
      dropout: rate on the attention weights.
      init_scale: standard deviation of initial kernels.
      dtype: of the computation; by default that of inputs and parameters. Softmax is float32 at
        least.
      qkv_bias: whether queries, keys and values have a bias.
      implementation: "xla", or "cudnn" for the fused attention of a GPU: half precision, no dropout of its weights.
      scale: of the products; by default one over the root of the width of a head.

    References:
      Vaswani et al, Attention is all you need, 2017 (arXiv 1706.03762).
    """

    num_heads: int
    dropout: float = 0.0
    init_scale: float = 0.02
    dtype: jax.typing.DTypeLike | None = None
    qkv_bias: bool = True
    implementation: str = "xla"
    scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        kept: KeyValues | None = None,
        index: jax.Array | int = 0,
        deterministic: bool = True,
    ) -> Any:
        """Attend.

        Args:
          x: `[batch, length, width]`.
          mask: bool, True for the positions that may be attended to, `[batch, positions]` or, for each query,
            `[batch, length, positions]`; by default all may.
          kept: keys and values of all positions; those of `x` are written at `index`, and then all are attended to.
          index: of the first position of `x` among them.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`; with `kept`, that and the new ones.
        """
        width = x.shape[-1]
        project = functools.partial(Dense, width, self.init_scale, self.dtype)
        heads = (len(x), -1, self.num_heads, width // self.num_heads)  # an adapter may add keys and values
        q_BxSxHxD, k_BxTxHxD, v_BxTxHxD = (
            project(name=n, use_bias=self.qkv_bias)(x).reshape(heads) for n in ("query", "key", "value")
        )
        if kept is not None:
            kept = extended(kept, KeyValues(k_BxTxHxD, v_BxTxHxD), x, index)
            k_BxTxHxD, v_BxTxHxD = kept
        if self.implementation == "cudnn" and self.dropout and not deterministic:
            raise ConfigError("cudnn's fused attention is used without dropout: set implementation='xla'")
        drop = functools.partial(Dropout(self.dropout), deterministic=deterministic)
        mixed_BxSxHxD = attend(
            q_BxSxHxD, k_BxTxHxD, v_BxTxHxD, mask, scale=self.scale, drop=drop, implementation=self.implementation
        )
        y = project(name="output")(mixed_BxSxHxD.reshape(x.shape))
        return y if kept is None else (y, kept)


def attend(
    q_BxSxHxD: jax.Array,
    k_BxTxHxD: jax.Array,
    v_BxTxHxD: jax.Array,
    mask: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    implementation: str = "xla",
) -> jax.Array:
    """The values, mixed by the softmax of the products of queries and keys.

    Args:
      q_BxSxHxD: queries.
      k_BxTxHxD: keys.
      v_BxTxHxD: values.
      mask: as of `SelfAttention`.
      bias: added to the products, `[batch or 1, heads, queries, keys]`.
      scale: as of `SelfAttention`.
      drop: thins the weights, those of "xla" alone.
      implementation: as of `SelfAttention`.

    Returns:
      `[batch, queries, heads, width of a head]`.

    Raises:
      ConfigError: an unknown implementation.
    """
    if implementation == "cudnn":
        allowed = None if mask is None else _of_queries(mask)
        return jax.nn.dot_product_attention(
            q_BxSxHxD, k_BxTxHxD, v_BxTxHxD, bias, allowed, scale=scale, implementation="cudnn"
        )
    if implementation != "xla":
        raise ConfigError(f"attention {implementation!r} is not among {IMPLEMENTATIONS}")
    weights_BxHxSxT = attention_weights(q_BxSxHxD, k_BxTxHxD, mask, bias=bias, scale=scale)
    # Not one einsum to [batch, length, heads, width]: on CPU, the product then takes twice as long.
    return (drop(weights_BxHxSxT) @ v_BxTxHxD.swapaxes(1, 2)).swapaxes(1, 2)


def attention_weights(
    q_BxSxHxD: jax.Array,
    k_BxTxHxD: jax.Array,
    mask: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax of scaled dot products over the allowed positions.

    A row with no allowed position gets equal weights, never NaN.

    Args:
      q_BxSxHxD: queries.
      k_BxTxHxD: keys.
      mask: bool, True for allowed positions, `[batch, keys]` or `[batch or 1, queries, keys]`; by default all are.
      bias: added to the products, `[batch or 1, heads, queries, keys]`.
      scale: of the products; by default one over the root of the width of a head.

    Returns:
      `[batch, heads, queries, keys]` in the dtype of the queries; softmax in float32 at least.
    """
    factor: float = q_BxSxHxD.shape[-1] ** -0.5 if scale is None else scale
    queries = q_BxSxHxD if factor == 1 else q_BxSxHxD * factor
    scores_BxHxSxT = jnp.einsum("bshd,bthd->bhst", queries, k_BxTxHxD)
    scores_BxHxSxT = scores_BxHxSxT.astype(wide_dtype(scores_BxHxSxT.dtype))
    if bias is not None:
        scores_BxHxSxT = scores_BxHxSxT + bias.astype(scores_BxHxSxT.dtype)
    if mask is not None:
        scores_BxHxSxT = jnp.where(_of_queries(mask), scores_BxHxSxT, jnp.finfo(scores_BxHxSxT.dtype).min)
    return jax.nn.softmax(scores_BxHxSxT, axis=-1).astype(q_BxSxHxD.dtype)


def _of_queries(mask: jax.Array) -> jax.Array:
    """`[batch or 1, 1, queries or 1, keys]`."""
    return jnp.expand_dims(mask, (1, 2) if mask.ndim == 2 else 1)


def causal(length: int, positions: int, index: jax.Array | int = 0) -> jax.Array:
    """Bool `[1, length, positions]`: no query, the first of which is at `index`, may attend to a later position.

    >>> causal(2, 3).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 0]]]
    """
    return jnp.expand_dims(jnp.arange(positions)[None] <= jnp.arange(length)[:, None] + index, 0)


def extended(kept: KeyValues, new: KeyValues, x: jax.Array, index: jax.Array | int) -> KeyValues:
    """Kept keys and values with those of `x`, `[batch, length, width]`, written from `index` on.

    Raises:
      ConfigError: there are more of them than `x` has positions: an adapter put some in front.
    """
    if new.keys.shape[1] != x.shape[1]:
        raise ConfigError("trained keys and values have no place among those that are kept: write without prefix()")
    at = (0, index, 0, 0)
    pairs = zip(kept, new, strict=True)
    return KeyValues(*(jax.lax.dynamic_update_slice(old, part.astype(old.dtype), at) for old, part in pairs))


def key_values(
    layers: int, batch: int, positions: int, heads: int, width: int, dtype: jax.typing.DTypeLike
) -> tuple[KeyValues, ...]:
    """Zeros of each layer, for `width` of a head."""
    zeros = jnp.zeros((batch, positions, heads, width), dtype)
    return tuple(KeyValues(zeros, zeros) for _ in range(layers))

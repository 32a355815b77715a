"""The parts of a T5 below its head: distances, attention, the two dense layers of a block, and the stacks of blocks.

Shape suffixes: B batch, S and T query and key positions, H heads, D width of a head.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl.activations import ACTIVATIONS
from jtl.models.attention import KeyValues, attend, causal, extended
from jtl.models.layers import Dense, Dropout
from jtl.models.stack import stack
from jtl.models.t5_config import T5Config
from jtl.models.tracing import random_init


def buckets(distances: np.ndarray, count: int, furthest: int, *, both: bool) -> np.ndarray:
    """The bucket of each distance: near ones have one each, farther ones share, by the logarithm.

    Computed on the host, in float32 as the reference does, so that no rounding of a device's moves a boundary.

    Args:
      distances: of keys from their queries, integers, negative for keys before.
      count: of buckets.
      furthest: from this distance on, all share the last one.
      both: half of the buckets are for keys after the query; otherwise these have the distance 0.

    Returns:
      Integers in `[0, count)`, in the shape of `distances`.

    References:
      Raffel et al, 2020 (arXiv 1910.10683), section 2.1.

    >>> buckets(np.array([-9, -3, -2, -1, 0, 1]), 8, 16, both=True).tolist()
    [3, 2, 2, 1, 0, 5]
    """
    count, side = (count // 2, (distances > 0) * (count // 2)) if both else (count, np.zeros_like(distances))
    away = np.abs(distances) if both else np.maximum(-distances, 0)
    near = count // 2
    powers = np.log(np.maximum(away, near).astype(np.float32) / np.float32(near))
    steps = powers / np.float32(math.log(furthest / near)) * np.float32(count - near)
    return side + np.where(away < near, away, np.minimum(near + steps.astype(away.dtype), count - 1))


def relative_bias(
    table: nn.Embed, config: T5Config, length: int, positions: int, index: jax.Array | int = 0, *, both: bool
) -> jax.Array:
    """What distances add to the scores of attention.

    Args:
      table: of buckets, one number for each head.
      config: with the number of buckets, and the furthest distance.
      length: of queries.
      positions: of keys.
      index: the position of the first query.
      both: as of `buckets`.

    Returns:
      `[1, heads, length, positions]`.
    """
    far = config.relative_attention_max_distance
    of_distance = buckets(np.arange(-far, far + 1), config.relative_attention_num_buckets, far, both=both)
    distances = jnp.arange(positions)[None] - (jnp.arange(length)[:, None] + index)
    bias_SxTxH = table(jnp.asarray(of_distance, jnp.int32)[jnp.clip(distances, -far, far) + far])
    return jnp.expand_dims(bias_SxTxH.transpose(2, 0, 1), 0)


class Attention(nn.Module):
    """Multi-head attention without biases, of products that are not scaled; the initial queries are small instead."""

    config: T5Config
    dtype: jax.typing.DTypeLike | None = None

    def setup(self) -> None:
        """The four dense layers."""
        c = self.config
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        inner, scale = c.num_heads * c.d_kv, c.initializer_factor
        self.query = dense(inner, scale * (c.d_model * c.d_kv) ** -0.5)
        self.key = dense(inner, scale * c.d_model**-0.5)
        self.value = dense(inner, scale * c.d_model**-0.5)
        self.output = dense(c.d_model, scale * inner**-0.5)
        self.drop = Dropout(c.dropout_rate)

    def keys_and_values(self, x: jax.Array) -> KeyValues:
        """Those of `[batch, positions, width]`."""
        heads = (len(x), -1, self.config.num_heads, self.config.d_kv)  # an adapter may add keys and values
        return KeyValues(self.key(x).reshape(heads), self.value(x).reshape(heads))

    def __call__(
        self,
        x: jax.Array,
        known: KeyValues,
        mask: jax.Array,
        bias: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attend.

        Args:
          x: `[batch, length, width]`, for queries.
          known: from `keys_and_values`.
          mask: bool, True for what may be attended to, `[batch, positions]` or `[batch or 1, length, positions]`.
          bias: added to the products, `[1, heads, length, positions]`.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`.
        """
        c = self.config
        q_BxSxHxD = self.query(x).reshape(*x.shape[:2], c.num_heads, c.d_kv)
        count = known.keys.shape[1]
        mask = _in_front(mask, count, True)
        bias = None if bias is None else _in_front(bias, count, 0)
        drop = functools.partial(self.drop, deterministic=deterministic)
        mixed_BxSxHxD = attend(q_BxSxHxD, *known, mask, bias=bias, scale=1.0, drop=drop)
        return self.output(mixed_BxSxHxD.reshape(*x.shape[:2], c.num_heads * c.d_kv))


def _in_front(x: jax.Array, count: int, value: Any) -> jax.Array:
    """A mask or bias with a value for each key that an adapter put in front of the text's own, up to `count` keys."""
    missing = count - x.shape[-1]
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (missing, 0)], constant_values=value) if missing > 0 else x


class FeedForward(nn.Module):
    """Two dense layers without biases, and an activation between; with a gate, that is multiplied by a third.

    References:
      Shazeer, GLU variants improve Transformer, 2020 (arXiv 2002.05202).
    """

    config: T5Config
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        c = self.config
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        inner = functools.partial(dense, c.d_ff, c.initializer_factor * c.d_model**-0.5)
        y = ACTIVATIONS[c.activation](inner(name="gate" if c.gated else "up")(x))
        y = y * inner(name="up")(x) if c.gated else y
        y = Dropout(c.dropout_rate)(y, deterministic=deterministic)
        return dense(c.d_model, c.initializer_factor * c.d_ff**-0.5, name="down")(y)


def _norm(config: T5Config, dtype: jax.typing.DTypeLike | None) -> nn.RMSNorm:
    """A norm by the root of the mean square, in float32 at least; no mean is subtracted, and there is no bias."""
    init = nn.initializers.constant(config.initializer_factor)
    return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=dtype, scale_init=init)


class EncoderLayer(nn.Module):
    """One pre-norm block of the encoder."""

    config: T5Config
    dtype: jax.typing.DTypeLike | None = None

    def setup(self) -> None:
        """The parts of the block."""
        c = self.config
        self.attention_norm, self.attention = _norm(c, self.dtype), Attention(c, self.dtype)
        self.mlp_norm, self.mlp = _norm(c, self.dtype), FeedForward(c, self.dtype)
        self.drop = Dropout(c.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` to the same; the arguments are those of `Attention`."""
        y = self.attention_norm(x)
        known = self.attention.keys_and_values(y)
        drop = functools.partial(self.drop, deterministic=deterministic)
        x = x + drop(self.attention(y, known, mask, bias, deterministic=deterministic))
        return x + drop(self.mlp(self.mlp_norm(x), deterministic=deterministic))


class DecoderLayer(nn.Module):
    """One pre-norm block of the decoder."""

    config: T5Config
    dtype: jax.typing.DTypeLike | None = None

    def setup(self) -> None:
        """The parts of the block."""
        c = self.config
        self.attention_norm, self.attention = _norm(c, self.dtype), Attention(c, self.dtype)
        self.cross_attention_norm, self.cross_attention = _norm(c, self.dtype), Attention(c, self.dtype)
        self.mlp_norm, self.mlp = _norm(c, self.dtype), FeedForward(c, self.dtype)
        self.drop = Dropout(c.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        source: jax.Array,
        source_mask: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Whole rows.

        Args:
          x: `[batch, length, width]`.
          mask: as of `Attention`.
          bias: as of `Attention`.
          source: `[batch, positions, width]`, what the encoder gave.
          source_mask: `[batch, positions]` bool, True for real tokens.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`.
        """
        y = self.attention_norm(x)
        own, known = self.attention.keys_and_values(y), self.known(source)
        return self._attended(x, y, own, mask, bias, known, source_mask, deterministic=deterministic)

    def known(self, source: jax.Array) -> KeyValues:
        """The keys and values of what the encoder gave."""
        return self.cross_attention.keys_and_values(source)

    def step(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        known: KeyValues,
        source_mask: jax.Array,
        kept: KeyValues,
        index: jax.Array | int,
    ) -> tuple[jax.Array, KeyValues]:
        """A part of rows from `index` on, of which the earlier keys and values are kept; gives those with its own."""
        y = self.attention_norm(x)
        kept = extended(kept, self.attention.keys_and_values(y), y, index)
        return self._attended(x, y, kept, mask, bias, known, source_mask), kept

    def _attended(
        self,
        x: jax.Array,
        y: jax.Array,
        own: KeyValues,
        mask: jax.Array,
        bias: jax.Array,
        known: KeyValues,
        source_mask: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        drop = functools.partial(self.drop, deterministic=deterministic)
        x = x + drop(self.attention(y, own, mask, bias, deterministic=deterministic))
        y = self.cross_attention_norm(x)
        x = x + drop(self.cross_attention(y, known, source_mask, deterministic=deterministic))
        return x + drop(self.mlp(self.mlp_norm(x), deterministic=deterministic))


class _Stack(nn.Module):
    """Blocks, the table of distances that all of them share, and the last norm."""

    config: T5Config
    dtype: jax.typing.DTypeLike | None = None
    scan: bool = False
    remat: bool = False
    block: ClassVar[type[nn.Module]]
    size: ClassVar[str]
    """The field that says how many blocks there are."""

    def setup(self) -> None:
        """Their parts."""
        c = self.config
        init = random_init(nn.initializers.normal(c.initializer_factor * c.d_model**-0.5))
        count = c.relative_attention_num_buckets
        self.relative_bias = nn.Embed(count, c.num_heads, dtype=self.dtype, embedding_init=init)
        self.layer = [self.block(c, self.dtype) for _ in range(getattr(c, self.size))]
        self.norm, self.drop = _norm(c, self.dtype), Dropout(c.dropout_rate)

    def _whole(self, x: jax.Array, *shared: Any, deterministic: bool) -> jax.Array:
        """All blocks, one after another, of whole rows."""
        x = self.drop(x, deterministic=deterministic)
        if (self.scan or self.remat) and not self.is_initializing():
            make = functools.partial(self.block, self.config, self.dtype)
            how = {"scan": self.scan, "remat": self.remat, "deterministic": deterministic}
            x = stack(self, make, getattr(self.config, self.size), x, *shared, **how)
        else:
            for layer in self.layer:
                x = layer(x, *shared, deterministic=deterministic)
        return self.drop(self.norm(x), deterministic=deterministic)


class Encoder(_Stack):
    """The stack of blocks that reads the inputs."""

    block: ClassVar[type[nn.Module]] = EncoderLayer
    size: ClassVar[str] = "num_layers"

    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` to the same; `mask` is `[batch, length]` bool, True for real tokens."""
        bias = relative_bias(self.relative_bias, self.config, x.shape[1], x.shape[1], both=True)
        return self._whole(x, mask, bias, deterministic=deterministic)


class Decoder(_Stack):
    """The stack of blocks that predicts each next word."""

    block: ClassVar[type[nn.Module]] = DecoderLayer
    size: ClassVar[str] = "num_decoder_layers"

    def __call__(
        self, x: jax.Array, mask: jax.Array, source: jax.Array, source_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Whole rows.

        Args:
          x: `[batch, length, width]`.
          mask: `[batch, length]` bool, True for real tokens.
          source: `[batch, positions, width]`, what the encoder gave.
          source_mask: `[batch, positions]` bool, True for real tokens.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`.
        """
        length = x.shape[1]
        bias = relative_bias(self.relative_bias, self.config, length, length, both=False)
        allowed = causal(length, length) & jnp.expand_dims(mask, 1)
        return self._whole(x, allowed, bias, source, source_mask, deterministic=deterministic)

    def known(self, source: jax.Array) -> tuple[KeyValues, ...]:
        """The keys and values that each block has of what the encoder gave."""
        return tuple(layer.known(source) for layer in self.layer)

    def step(
        self,
        x: jax.Array,
        mask: jax.Array,
        known: tuple[KeyValues, ...],
        source_mask: jax.Array,
        kept: tuple[KeyValues, ...],
        index: jax.Array | int,
    ) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """A part of rows.

        Args:
          x: `[batch, length, width]`, at the positions from `index` on.
          mask: `[batch, positions]` bool, False for positions that hold padding.
          known: from `known`.
          source_mask: as of a call.
          kept: the keys and values of each block, of all positions.
          index: of the first of `x`.

        Returns:
          `[batch, length, width]`, and the keys and values with those of `x`.
        """
        length, positions = x.shape[1], mask.shape[1]
        bias = relative_bias(self.relative_bias, self.config, length, positions, index, both=False)
        allowed = causal(length, positions, index) & jnp.expand_dims(mask, 1)
        news = []
        for layer, of_source, of_text in zip(self.layer, known, kept, strict=True):
            x, new = layer.step(x, allowed, bias, of_source, source_mask, of_text, index)
            news.append(new)
        return self.norm(x), tuple(news)

"""The parts of a GPT-2 below its head: embeddings, attention, the two dense layers of a block, and the stack of blocks.

Shape suffixes: B batch, S and T query and key positions, H heads, D width of a head.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.attention import KeyValues, attend, causal, extended
from jtl.models.gpt2_config import GPT2Config
from jtl.models.layers import Dense, Dropout, layer_norm
from jtl.models.stack import stack
from jtl.models.tracing import random_init
from jtl.tree import wide_dtype


class Embeddings(nn.Module):
    """Sum of word and position embeddings."""

    config: GPT2Config
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, positions: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """`[batch, length, width]` of ids and positions `[batch, length]`, and the table of words."""
        c = self.config
        init = random_init(nn.initializers.normal(c.initializer_range))
        embed = functools.partial(nn.Embed, features=c.n_embd, dtype=self.dtype, embedding_init=init)
        word = embed(c.vocab_size, name="word")
        x = word(input_ids) + embed(c.n_positions, name="position")(positions)
        return Dropout(c.embd_pdrop)(x, deterministic=deterministic), word.embedding


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are one dense layer.

    They are one tensor in every checkpoint, one module to PEFT's adapters (`c_attn`), and one product of matrices. Kept
    as one leaf, what is read is written back bit for bit, and an adapter of PEFT's has a kernel to stand beside.
    """

    config: GPT2Config
    scale: float
    dtype: jax.typing.DTypeLike | None = None
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        kept: KeyValues | None = None,
        index: jax.Array | int = 0,
        *,
        deterministic: bool = True,
    ) -> Any:
        """Attend; see `jtl.models.attention.SelfAttention`."""
        c = self.config
        fused = Dense(3 * c.n_embd, c.initializer_range, self.dtype, name="qkv")(x)
        heads_of = (len(x), -1, c.n_head, c.n_embd // c.n_head)
        q_BxSxHxD, k_BxTxHxD, v_BxTxHxD = (part.reshape(heads_of) for part in jnp.split(fused, 3, axis=-1))
        q_BxSxHxD = q_BxSxHxD[:, q_BxSxHxD.shape[1] - x.shape[1] :]  # an adapter may add keys and values in front
        if kept is not None:
            kept = extended(kept, KeyValues(k_BxTxHxD, v_BxTxHxD), x, index)
            k_BxTxHxD, v_BxTxHxD = kept
        if c.reorder_and_upcast_attn:
            q_BxSxHxD, k_BxTxHxD, v_BxTxHxD = (
                part.astype(wide_dtype(part.dtype)) for part in (q_BxSxHxD, k_BxTxHxD, v_BxTxHxD)
            )
        self._check(deterministic)
        drop = functools.partial(Dropout(c.attn_pdrop), deterministic=deterministic)
        mixed_BxSxHxD = attend(
            q_BxSxHxD, k_BxTxHxD, v_BxTxHxD, mask, scale=self.scale, drop=drop, implementation=self.implementation
        )
        mixed = mixed_BxSxHxD.astype(fused.dtype).reshape(x.shape)
        y = Dense(c.n_embd, _residual_scale(c), self.dtype, name="output")(mixed)
        return y if kept is None else (y, kept)

    def _check(self, deterministic: bool) -> None:
        if self.implementation != "cudnn":
            return
        if self.config.attn_pdrop and not deterministic:
            raise ConfigError("cudnn's fused attention is used without dropout: set implementation='xla'")
        if self.config.reorder_and_upcast_attn:
            raise ConfigError(
                "cudnn's fused attention is of half precision, and this model's reorder_and_upcast_attn asks for "
                "float32: use attention='xla', or load it with reorder_and_upcast_attn=False"
            )


def _residual_scale(config: GPT2Config) -> float:
    """Standard deviation of kernels whose outputs are added to the stream, which each block does twice."""
    return config.initializer_range * (2 * config.n_layer) ** -0.5


class FeedForward(nn.Module):
    """Two dense layers with an activation between; the second begins smaller than that of `layers.Mlp`."""

    config: GPT2Config
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        c = self.config
        up = Dense(c.inner, c.initializer_range, self.dtype, name="up")
        down = Dense(c.n_embd, _residual_scale(c), self.dtype, name="down")
        return down(ACTIVATIONS[c.activation_function](up(x)))


class Layer(nn.Module):
    """One pre-norm Transformer block."""

    config: GPT2Config
    scale: float
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        kept: KeyValues | None = None,
        index: jax.Array | int = 0,
        *,
        deterministic: bool = True,
    ) -> Any:
        """`[batch, length, width]` to the same, with `kept` also the new ones; the arguments are `Attention`'s."""
        c = self.config
        drop = functools.partial(Dropout(c.resid_pdrop), deterministic=deterministic)
        norm = functools.partial(layer_norm, c.layer_norm_epsilon, self.dtype)
        attention = Attention(c, self.scale, self.dtype, self.attention, name="attention")
        attended = attention(norm("attention_norm")(x), mask, kept, index, deterministic=deterministic)
        attended, kept = (attended, None) if kept is None else attended
        x = x + drop(attended)
        x = x + drop(FeedForward(c, self.dtype, name="mlp")(norm("mlp_norm")(x)))
        return x if kept is None else (x, kept)


class Decoder(nn.Module):
    """The stack of blocks; `scan` and `remat` are for whole rows."""

    config: GPT2Config
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        segments: jax.Array | None = None,
        cache: tuple[KeyValues, ...] | None = None,
        index: jax.Array | int = 0,
        *,
        deterministic: bool = True,
    ) -> jax.Array | tuple[jax.Array, tuple[KeyValues, ...]]:
        """Whole rows, or a part of rows whose earlier keys and values are kept.

        Args:
          x: `[batch, length, width]`.
          mask: bool, `[batch, length]`, True for real tokens; with a cache `[batch, length, positions]`, True for what
            each query may attend to.
          segments: `[batch, length, 1]`, the text that each token is of, where a row holds several.
          cache: keys and values of all positions, of each layer; those of `x` are written at `index`.
          index: of the first position of `x` among them.
          deterministic: no dropout.

        Returns:
          `[batch, length, width]`; with a cache, that and the new one.
        """
        allowed = mask if cache is not None else _allowed(x.shape[1], mask, segments)
        if allowed.shape[1] != x.shape[1]:  # or they would be put in front of every part
            raise ConfigError(
                "a prompt's vectors have no place among kept keys and values: generate without that adapter, or with "
                "one of layers, such as LoRA"
            )
        if cache is not None:
            return self._decoded(x, allowed, cache, index)
        if not self.config.scale_attn_by_inverse_layer_idx:
            how = {"scan": self.scan, "remat": self.remat, "deterministic": deterministic}
            return stack(self, self._layer, self.config.n_layer, x, allowed, **how)
        if self.scan or self.remat:
            raise ConfigError(
                "scan and remat are for equal blocks, and those of a model with scale_attn_by_inverse_layer_idx "
                "divide by different numbers: set both to False"
            )
        for i in range(self.config.n_layer):
            x = self._layer(i, name=f"layer_{i}")(x, allowed, deterministic=deterministic)
        return x

    def _layer(self, number: int = 0, **names: Any) -> Layer:
        return Layer(self.config, self.config.scale(number), self.dtype, self.attention, **names)

    def _decoded(
        self, x: jax.Array, allowed: jax.Array, cache: tuple[KeyValues, ...], index: jax.Array | int
    ) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        news = []
        for i, kept in enumerate(cache):
            x, new = self._layer(i, name=f"layer_{i}")(x, allowed, kept, index)
            news.append(new)
        return x, tuple(news)


def _allowed(length: int, mask: jax.Array, segments: jax.Array | None) -> jax.Array:
    """What each query of whole rows may attend to, `[batch, length, length]`."""
    allowed = causal(length, length) & jnp.expand_dims(mask, 1)
    if segments is None:
        return allowed
    if segments.shape[1] != length:  # the mask is extended by a prompt's vectors, which are of no text
        raise ConfigError("rows of several texts have no place for a prompt's vectors: give one text a row")
    return allowed & (segments == segments.swapaxes(1, 2))

"""BERT: the post-norm Transformer encoder, with the checkpoint layout of Hugging Face.

    embeddings   word, position, token_type, norm
    encoder      layer_0 ... layer_{n-1}:  attention (query, key, value, output), attention_norm,
                                           mlp (up, down), mlp_norm
    pooler       only where the pooled features come from it
    head         only where there is one

References:
  Devlin et al, BERT, 2018 (arXiv 1810.04805). Wang et al, MiniLM, 2020 (arXiv 2002.10957) and
  Reimers and Gurevych, Sentence-BERT, 2019 (arXiv 1908.10084), for the small packaged checkpoint.
  Code and the original weights are under Apache-2.0.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import heads
from jtl.errors import ConfigError
from jtl.models.attention import SelfAttention
from jtl.models.bert_config import BertConfig, parse, settings
from jtl.models.bert_layouts import LAYOUT
from jtl.models.family import Family, Features
from jtl.models.inputs import check_tokens
from jtl.models.layers import Dense, Dropout, Mlp, call_head, layer_norm, masked_mean
from jtl.models.stack import stack
from jtl.models.tracing import random_init


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array | None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """`[batch, length, width]` of ids `[batch, length]`, and the table of words."""
        c, init = self.config, nn.initializers.normal(self.config.initializer_range)
        if input_ids.shape[1] > c.max_length:
            raise ConfigError(
                f"inputs of length {input_ids.shape[1]} are longer than the {c.max_length} positions that the model "
                "has: truncate them"
            )
        embed = functools.partial(nn.Embed, features=c.hidden_size, dtype=self.dtype, embedding_init=random_init(init))
        word = embed(c.vocab_size, name="word")
        x = _looked_up(word, input_ids, c.padding)
        if c.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + embed(c.type_vocab_size, name="token_type")(types)
        x = x + _looked_up(embed(c.max_position_embeddings, name="position"), *self.positions(input_ids))
        x = layer_norm(c.layer_norm_eps, self.dtype, "norm")(x)
        return Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic), word.embedding

    def positions(self, input_ids: jax.Array) -> tuple[jax.Array, int | None]:
        """The position of each id, `[batch or 1, length]`, and that of padding, where it has one of its own."""
        return jnp.arange(input_ids.shape[1])[None], None


def _looked_up(table: nn.Embed, ids: jax.Array, padding: int | None) -> jax.Array:
    """Embeddings of ids; that of padding is not trained, as in the reference implementation."""
    x = table(ids)
    return x if padding is None else jnp.where(jnp.expand_dims(ids == padding, -1), jax.lax.stop_gradient(x), x)


class Layer(nn.Module):
    """One post-norm Transformer block."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` to the same; `mask` is `[batch, length]` bool."""
        c = self.config
        drop = functools.partial(Dropout(c.hidden_dropout_prob), deterministic=deterministic)
        attention = SelfAttention(
            c.num_attention_heads,
            c.attention_probs_dropout_prob,
            c.initializer_range,
            self.dtype,
            implementation=self.attention,
            name="attention",
        )
        attended: Any = attention(x, mask, deterministic=deterministic)
        norm = functools.partial(layer_norm, c.layer_norm_eps, self.dtype)
        x = norm("attention_norm")(x + drop(attended))
        mlp = Mlp(c.intermediate_size, c.hidden_act, c.initializer_range, self.dtype, name="mlp")
        return norm("mlp_norm")(x + drop(mlp(x)))


class Encoder(nn.Module):
    """The stack of blocks."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` to the same; `mask` is `[batch, length]` bool."""
        make = functools.partial(Layer, self.config, self.dtype, self.attention)
        count, how = self.config.num_hidden_layers, {"scan": self.scan, "remat": self.remat}
        return stack(self, make, count, x, mask, **how, deterministic=deterministic)


class Bert(nn.Module):
    """A BERT encoder, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]`, or what else it reads (`jtl.heads`), to outputs.
      dtype: of the computation; by default that of the parameters.
      attention: "xla", or "cudnn" for the fused attention of a GPU: half precision, no dropout of attention.
        `model.clone(attention="cudnn", dtype=jnp.bfloat16)` switches a loaded model.
      scan: run the blocks as a loop, which is traced and compiled sooner; see `jtl.models.stack`.
      remat: compute the blocks' activations again in the backward pass: less memory, more time.
    """

    config: BertConfig
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False
    embeddings: ClassVar[type[Embeddings]] = Embeddings

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Any:
        """Encode token ids.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]`, nonzero for real tokens; by default all are.
          token_type_ids: `[batch, length]` integers; by default zeros.
          deterministic: no dropout.

        Returns:
          `Features`, or what the head makes of them.
        """
        features, words = self._encode(input_ids, attention_mask, token_type_ids, deterministic)
        return features if self.head is None else call_head(self.head, features, words, deterministic=deterministic)

    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Features:
        """What the head is given; see `__call__`."""
        return self._encode(input_ids, attention_mask, token_type_ids, deterministic)[0]

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the model cannot mean; see `jtl.models.inputs`."""
        c = self.config
        check_tokens(batch, vocabulary=c.vocab_size, longest=c.max_length, types=c.type_vocab_size or None)

    @nn.compact
    def _encode(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, token_type_ids: jax.Array | None, inference: bool
    ) -> tuple[Features, jax.Array]:
        """The features, and the table of words."""
        mask = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
        embeddings = self.embeddings(self.config, self.dtype, name="embeddings")
        x, words = embeddings(input_ids, token_type_ids, deterministic=inference)
        encoder = Encoder(self.config, self.dtype, self.attention, self.scan, self.remat, name="encoder")
        x = encoder(x, mask, deterministic=inference)
        return Features(x, self._pool(x, mask) if heads.reads(self.head) == "pooled" else None), words

    def _pool(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        if c.pool == "mean":
            return masked_mean(x, mask)
        if c.pool == "max":
            return jnp.max(jnp.where(jnp.expand_dims(mask, -1), x, jnp.finfo(x.dtype).min), axis=1)
        if c.pool in ("cls", None):  # not said, and not settled by a checkpoint's tensors
            return x[:, 0]
        return jnp.tanh(Dense(c.hidden_size, c.initializer_range, self.dtype, name="pooler")(x[:, 0]))


def example(config: BertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    ids = jax.ShapeDtypeStruct((1, min(8, config.max_length)), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids}


def depth_groups(model: Bert) -> list[tuple[str, ...]]:
    """Embeddings, then each block, then all above."""
    blocks = [(f"encoder/layer_{i}",) for i in range(model.config.num_hidden_layers)]
    pooler = ("pooler",) if model.config.pool == "pooler" and heads.reads(model.head) == "pooled" else ()
    return [("embeddings",), *blocks, (*pooler, *(() if model.head is None else ("head",)))]


FAMILY = Family(
    name="bert",
    modality="text",
    parse=parse,
    build=lambda config, head: Bert(config, head),
    example=example,
    layouts=(LAYOUT,),
    depth_groups=depth_groups,
    paper="arXiv 1810.04805",
    head=lambda config, outputs: heads.Linear(outputs, config.head_dropout),
    settings=settings,
    classes="Bert",
    needs={"Model": {"pool": ("pooler",)}, "ForSequenceClassification": {"pool": ("pooler",)}},
    licence="Apache-2.0",
)

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

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import heads
from jtl.errors import ConfigError
from jtl.models.family import Family, Features, KeyLayout, check_overrides, read_json
from jtl.models.layers import ACTIVATIONS, Dense, Dropout, SelfAttention, call_head, masked_mean
from jtl.models.tracing import random_init
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule

POOLS = ("pooler", "mean", "cls", "max")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The settings of a BERT model, named as in `config.json`, with the same defaults.

    `pool` says where pooled features come from: `pooler` (dense and tanh on the first token,
    as BERT was trained), `mean` or `max` (over unpadded positions) or `cls` (the first token).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    pool: str = "pooler"

    def __post_init__(self):
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer above 0, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not among {sorted(ACTIVATIONS)}")
        if self.pool not in POOLS:
            raise ConfigError(f"pool {self.pool!r} is not among {POOLS}")


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` of ids `[batch, length]`."""
        c = self.config
        if input_ids.shape[1] > c.max_position_embeddings:
            raise ConfigError(
                f"inputs of length {input_ids.shape[1]} are longer than the {c.max_position_embeddings} positions "
                "that the model has: truncate them"
            )
        embed = functools.partial(
            nn.Embed,
            features=c.hidden_size,
            dtype=self.dtype,
            embedding_init=random_init(nn.initializers.normal(c.initializer_range)),
        )
        words = embed(c.vocab_size, name="word")(input_ids)
        if c.pad_token_id is not None:
            # The embedding of padding is not trained, as in the reference implementation.
            is_pad = jnp.expand_dims(input_ids == c.pad_token_id, -1)
            words = jnp.where(is_pad, jax.lax.stop_gradient(words), words)
        positions = embed(c.max_position_embeddings, name="position")(jnp.arange(input_ids.shape[1])[None])
        x = words + embed(c.type_vocab_size, name="token_type")(token_type_ids) + positions
        return Dropout(c.hidden_dropout_prob)(_norm(c, self.dtype, "norm")(x), deterministic=deterministic)


class Mlp(nn.Module):
    """Two dense layers with an activation between."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        c = self.config
        dense = functools.partial(Dense, init_scale=c.initializer_range, dtype=self.dtype)
        return dense(c.hidden_size, name="down")(ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="up")(x)))


class Layer(nn.Module):
    """One post-norm Transformer block."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None

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
            name="attention",
        )
        attended = attention(x, mask, deterministic=deterministic)
        x = _norm(c, self.dtype, "attention_norm")(x + drop(attended))
        return _norm(c, self.dtype, "mlp_norm")(x + drop(Mlp(c, self.dtype, name="mlp")(x)))


class Encoder(nn.Module):
    """The stack of blocks."""

    config: BertConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, length, width]` to the same; `mask` is `[batch, length]` bool."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, name=f"layer_{i}")(x, mask, deterministic=deterministic)
        return x


class Bert(nn.Module):
    """A BERT encoder, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
    """

    config: BertConfig
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None

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
          `Features`, or what the head makes of the pooled ones.
        """
        features = self.features(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        if self.head is None:
            return features
        return call_head(self.head, features.pooled, deterministic=deterministic)

    @nn.compact
    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Features:
        """What the head is given, and each position's; see `__call__`."""
        mask = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = Embeddings(self.config, self.dtype, name="embeddings")(input_ids, types, deterministic=deterministic)
        x = Encoder(self.config, self.dtype, name="encoder")(x, mask, deterministic=deterministic)
        return Features(x, self._pool(x, mask))

    def _pool(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        if c.pool == "mean":
            return masked_mean(x, mask)
        if c.pool == "max":
            return jnp.max(jnp.where(jnp.expand_dims(mask, -1), x, jnp.finfo(x.dtype).min), axis=1)
        if c.pool == "cls":
            return x[:, 0]
        return jnp.tanh(Dense(c.hidden_size, c.initializer_range, self.dtype, name="pooler")(x[:, 0]))


def _norm(config: BertConfig, dtype: Any, name: str) -> nn.LayerNorm:
    # The one-pass variance loses digits that parity with other libraries needs.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


_DENSE = (("kernel", "weight", TRANSPOSE), ("bias", "bias", KEEP))
_NORM = (("scale", "weight", KEEP), ("bias", "bias", KEEP))
_LAYER = {
    "attention/query": ("attention.self.query", _DENSE),
    "attention/key": ("attention.self.key", _DENSE),
    "attention/value": ("attention.self.value", _DENSE),
    "attention/output": ("attention.output.dense", _DENSE),
    "attention_norm": ("attention.output.LayerNorm", _NORM),
    "mlp/up": ("intermediate.dense", _DENSE),
    "mlp/down": ("output.dense", _DENSE),
    "mlp_norm": ("output.LayerNorm", _NORM),
}


def key_rules(config: BertConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a Hugging Face checkpoint, without the prefix `bert.`."""
    del config  # the same names for every size
    rules = [
        KeyRule(f"embeddings/{kind}/embedding", f"embeddings.{kind}_embeddings.weight", KEEP)
        for kind in ("word", "position", "token_type")
    ]
    modules = {"embeddings/norm": ("embeddings.LayerNorm", _NORM), "pooler": ("pooler.dense", _DENSE)}
    modules["head"] = ("classifier", _DENSE)
    modules |= {
        f"encoder/layer_*/{path}": (f"encoder.layer.{{}}.{name}", kind) for path, (name, kind) in _LAYER.items()
    }
    for path, (name, leaves) in modules.items():
        rules += [KeyRule(f"{path}/{leaf}", f"{name}.{suffix}", layout) for leaf, suffix, layout in leaves]
    return rules


def ignored(config: BertConfig) -> Sequence[str]:
    """Source tensors without a place in the tree: buffers, and the heads of other tasks."""
    others = ("cls", "qa_outputs")
    return ("embeddings/position_ids", *others, *(() if config.pool == "pooler" else ("pooler",)))


def rename(name: str) -> str:
    """A source tensor's name without task prefix, and with today's names for LayerNorm's leaves.

    >>> rename("bert.encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    """
    name = name.removeprefix("bert.")
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }" if stem else name


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> BertConfig:
    """The configuration of a checkpoint.

    Args:
      settings: the parsed `config.json`.
      folder: where it lies; a sentence-transformers pooling layer beside it decides `pool`.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have, such as relative positions.
    """
    check_overrides(BertConfig, overrides)
    fields = {field.name for field in dataclasses.fields(BertConfig)}
    unsupported = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    for name, value in unsupported.items():
        if settings.get(name, value) != value:
            raise ConfigError(f"config.json sets {name}={settings[name]!r}; jtl's BERT has only {name}={value!r}")
    chosen = {name: value for name, value in settings.items() if name in fields}
    pooling = None if folder is None or "pool" in overrides else _sentence_pooling(folder)
    return BertConfig(**{**chosen, **({"pool": pooling} if pooling else {}), **overrides})


def _sentence_pooling(folder: Path) -> str | None:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    modes = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    # Each mode that is on counts, those that jtl lacks too: several are concatenated.
    chosen = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ConfigError(f"{path} asks for the pooling modes {chosen}; jtl has one of {sorted(modes)}: set pool=")
    return modes[chosen[0]]


def settings(config: BertConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers.

    Raises:
      ConfigError: transformers has no such pooling.
    """
    if config.pool != "pooler":
        raise ConfigError(
            f"transformers' BERT pools by its pooler alone, this model by {config.pool!r}: load it with pool='pooler'"
        )
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "pool"}
    architecture = "BertModel" if outputs is None else "BertForSequenceClassification"
    return {"architectures": [architecture], "model_type": "bert", **fields}


def example(config: BertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    ids = jax.ShapeDtypeStruct((1, min(8, config.max_position_embeddings)), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}


def depth_groups(model: Bert) -> list[tuple[str, ...]]:
    """Embeddings, then each block, then all above."""
    blocks = [(f"encoder/layer_{i}",) for i in range(model.config.num_hidden_layers)]
    pooler = ("pooler",) if model.config.pool == "pooler" else ()
    return [("embeddings",), *blocks, (*pooler, *(() if model.head is None else ("head",)))]


FAMILY = Family(
    name="bert",
    modality="text",
    parse=parse,
    build=lambda config, head: Bert(config, head),
    example=example,
    layouts=(KeyLayout("transformers", key_rules, ignored, rename),),
    depth_groups=depth_groups,
    paper="arXiv 1810.04805",
    head=lambda config, outputs: heads.Linear(outputs, config.hidden_dropout_prob),
    settings=settings,
    licence="Apache-2.0",
)

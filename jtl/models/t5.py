"""T5: a Transformer that reads one text and writes another, with the checkpoint layout of Hugging Face.

    shared    the table of words, of both stacks
    encoder   relative_bias, layer_0 ... layer_{n-1}:  attention_norm, attention (query, key, value, output),
                                                       mlp_norm, mlp (up, down; gate, where there is one)
              norm
    decoder   the same, with cross_attention_norm and cross_attention in each layer; not with `encoder_only`
    head      only where there is one, and it has parameters: `heads.Tied` has none

Version 1.0, version 1.1, FLAN-T5 and mT5 are of this family. Positions are told by the distance of two tokens alone,
which all layers of a stack share. A head that reads words or positions is given the decoder's. The pooled features are
the decoder's at the last real token, as `T5ForSequenceClassification` has them, and with `encoder_only` the mean of the
encoder's real tokens. To classify texts or tokens without the decoder, `jtl.load(source, head, key=key,
encoder_only=True)`. In float16 the activations of the large checkpoints overflow: take bfloat16.

References:
  Raffel et al, Exploring the limits of transfer learning with a unified text-to-text transformer, JMLR 2020
  (arXiv 1910.10683). Shazeer, GLU variants improve Transformer, 2020 (arXiv 2002.05202), for version 1.1. Xue et al,
  mT5, NAACL 2021 (arXiv 2010.11934). Chung et al, Scaling instruction-finetuned language models, 2022
  (arXiv 2210.11416), for FLAN-T5. Ni et al, Sentence-T5, 2022 (arXiv 2108.08877), for the mean of the encoder.
  Code and weights are under Apache-2.0.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl import heads
from jtl.errors import ConfigError
from jtl.labels import IGNORED
from jtl.models.attention import KeyValues, key_values
from jtl.models.family import Family, Features
from jtl.models.inputs import check_tokens
from jtl.models.layers import call_head, last_real, masked_mean
from jtl.models.t5_blocks import Decoder, Encoder
from jtl.models.t5_config import CLASSES, T5Config, parse, settings, settle
from jtl.models.t5_layouts import LAYOUT, gives_words
from jtl.models.tracing import random_init


class Cache(NamedTuple):
    """What is kept while words are generated; every array leads with the batch.

    Attributes:
      source: keys and values of each layer of what the encoder gave.
      source_mask: `[batch, length]` bool, True for real tokens of the inputs.
      kept: keys and values of each layer of the words so far.
    """

    source: tuple[KeyValues, ...]
    source_mask: jax.Array
    kept: tuple[KeyValues, ...]


class T5(nn.Module):
    """A T5, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]`, or what else it reads (`jtl.heads`), to outputs. Those of
        words are `heads.Tied()`, and `heads.Tokens(config.vocab_size, use_bias=False)` where the table is not shared.
      dtype: of the computation; by default that of the parameters.
      scan: run the blocks as a loop, which is traced and compiled sooner; see `jtl.models.stack`.
      remat: compute the blocks' activations again in the backward pass: less memory, more time.
    """

    config: T5Config
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None
    scan: bool = False
    remat: bool = False
    prompted: ClassVar[bool] = False
    """What is generated begins with `config.decoder_start_token_id`."""

    def setup(self) -> None:
        """The parts below the head."""
        c = self.config
        init = random_init(nn.initializers.normal(c.initializer_factor))
        self.shared = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, embedding_init=init)
        self.encoder = Encoder(c, self.dtype, self.scan, self.remat)
        if not c.encoder_only:
            self.decoder = Decoder(c, self.dtype, self.scan, self.remat)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Any:
        """Read a text, and what is to be written.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]`, nonzero for real tokens; by default all are.
          decoder_input_ids: `[batch, words]` integers, such as `shift_right` makes of labels. By default the inputs,
            shifted likewise; a head of words has no default.
          decoder_attention_mask: `[batch, words]`, nonzero for real tokens; by default all are.
          deterministic: no dropout.

        Returns:
          `Features`, or what the head makes of them.

        Raises:
          ConfigError: words for a model without a decoder, or none for a head that predicts the next.
        """
        given = (input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        features = self.features(*given, deterministic=deterministic)
        if self.head is None:
            return features
        return call_head(self.head, features, self.shared.embedding, deterministic=deterministic)

    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Features:
        """What the head is given; see `__call__`."""
        self._check(decoder_input_ids)
        mask = _real(input_ids, attention_mask)
        pooled = heads.reads(self.head) == "pooled"
        source = self.encoder(self.shared(input_ids), mask, deterministic=deterministic)
        if self.config.encoder_only:
            return Features(source, masked_mean(source, mask) if pooled else None)
        if decoder_input_ids is None:
            words, seen, real = *self._shifted(input_ids, mask), mask
        else:
            words, seen = decoder_input_ids, _real(decoder_input_ids, decoder_attention_mask)
            real = seen
        x = self.decoder(self.shared(words), seen, source, mask, deterministic=deterministic)
        return Features(self._scaled(x), last_real(x, real) if pooled else None)

    def start(self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, positions: int) -> Cache:
        """Read the inputs, and make room for the words to come.

        Args:
          input_ids: `[batch, length]`.
          attention_mask: `[batch, length]`, nonzero for real tokens; by default all are.
          positions: of words.

        Returns:
          What `decode` is given.

        Raises:
          ConfigError: the model has no decoder, or its head gives no words.
        """
        c = self.config
        self._words_head()
        mask = _real(input_ids, attention_mask)
        source = self.decoder.known(self.encoder(self.shared(input_ids), mask))
        sizes = (c.num_heads, c.d_kv, source[0].keys.dtype)
        return Cache(source, mask, key_values(len(source), len(input_ids), positions, *sizes))

    def decode(
        self,
        ids: jax.Array,
        cache: Cache,
        *,
        index: jax.Array | int,
        mask: jax.Array,
        position_ids: jax.Array | None = None,
        last: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Logits of the words that follow some ids, given those before.

        Args:
          ids: `[batch, words]`, at the positions from `index` on of the cache.
          cache: from `start`, or an earlier call.
          index: a whole number, traced or not.
          mask: `[batch, positions]` bool, False for positions of the cache that hold padding.
          position_ids: not needed, as distances are those of the cache.
          last: of the last id alone.

        Returns:
          Logits `[batch, words or 1, vocabulary]`, and the cache with the keys and values of `ids`.

        Raises:
          ConfigError: as of `start`.
        """
        del position_ids
        head = self._words_head()
        x, kept = self.decoder.step(self.shared(ids), mask, cache.source, cache.source_mask, cache.kept, index)
        features = Features(self._scaled(x[:, -1:] if last else x), None)
        logits = call_head(head, features, self.shared.embedding, deterministic=True)
        return logits, cache._replace(kept=kept)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the model cannot mean; see `jtl.models.inputs`."""
        vocabulary = self.config.vocab_size
        check_tokens(batch, vocabulary=vocabulary)
        check_tokens(batch, vocabulary=vocabulary, ids="decoder_input_ids", mask="decoder_attention_mask")

    def _check(self, words: jax.Array | None) -> None:
        if self.config.encoder_only and words is not None:
            raise ConfigError("decoder_input_ids for a model with encoder_only=True: leave them out")
        if words is None and not self.config.encoder_only and gives_words(self.config, self.head):
            raise ConfigError(
                "a head that predicts each next word needs decoder_input_ids: jtl.models.t5.shift_right makes them of "
                "labels, and jtl.generate writes without any"
            )

    def _words_head(self) -> nn.Module:
        if self.config.encoder_only:
            raise ConfigError("a model with encoder_only=True writes nothing: load it without")
        if self.head is None or not gives_words(self.config, self.head):
            raise ConfigError(
                f"generating needs a head that gives the next word, this model has {type(self.head).__name__}: load it "
                "without head= from a checkpoint that has one, or with head=jtl.heads.language_model()"
            )
        return self.head

    def _shifted(self, input_ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inputs one position later, after the start, and where the decoder sees them.

        Padding on the left moves the start with the text, so that it changes nothing.
        """
        seen = jnp.cumsum(mask, axis=1) > 0
        follows = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)))
        return jnp.where(follows, jnp.roll(input_ids, 1, axis=1), self.config.decoder_start_token_id or 0), seen

    def _scaled(self, x: jax.Array) -> jax.Array:
        scaled = self.config.scale_decoder_outputs and gives_words(self.config, self.head)
        return x * self.config.d_model**-0.5 if scaled else x


def _real(ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.ones_like(ids, bool) if mask is None else mask.astype(bool)


def shift_right(labels: Any, start: int, pad: int) -> Any:
    """What a decoder reads while it is to write `labels`: the start, then all of them but the last.

    Args:
      labels: `[batch, words]` integers, of numpy or jax; `jtl.labels.IGNORED` where there is none.
      start: `config.decoder_start_token_id`.
      pad: `config.pad_token_id`, in the place of those ignored. No mask is needed: they stand after all others.

    Returns:
      `[batch, words]`, of the same kind.

    >>> shift_right(np.array([[7, 8, 1], [9, 1, -100]]), 0, 0).tolist()
    [[0, 7, 8], [0, 9, 1]]
    """
    xp = jnp if isinstance(labels, jax.Array) else np
    before = xp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return xp.where(before == IGNORED, pad, before)


def example(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    inputs = {"input_ids": ids, "attention_mask": ids}
    return inputs if config.encoder_only else {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": ids}


def depth_groups(model: T5) -> list[tuple[str, ...]]:
    """The table of words, the encoder's blocks, the decoder's, then all above.

    The encoder's last norm is with its last block, so that a frozen encoder is one prefix, and the distances of the
    decoder are with its first.
    """
    c = model.config
    below: tuple[str, ...] = ("shared", "encoder/relative_bias")
    encoder: list[tuple[str, ...]] = [(f"encoder/layer_{i}",) for i in range(c.num_layers)]
    head = () if model.head is None or isinstance(model.head, heads.Tied) else ("head",)
    if c.encoder_only:
        return [below, *encoder, ("encoder/norm", *head)]
    encoder[-1] = (*encoder[-1], "encoder/norm")
    decoder: list[tuple[str, ...]] = [(f"decoder/layer_{i}",) for i in range(c.num_decoder_layers or 0)]
    decoder[0] = ("decoder/relative_bias", *decoder[0])
    return [below, *encoder, *decoder, ("decoder/norm", *head)]


FAMILY = Family(
    name="t5",
    modality="text",
    parse=parse,
    build=lambda config, head: T5(config, head),
    example=example,
    layouts=(LAYOUT,),
    depth_groups=depth_groups,
    paper="arXiv 1910.10683",
    head=lambda config, outputs: heads.Linear(outputs, config.classifier_dropout),
    settings=settings,
    settle=settle,
    classes=CLASSES,
    bare=lambda config: "EncoderModel" if config.encoder_only else "Model",
    backbone="",
    licence="Apache-2.0",
)

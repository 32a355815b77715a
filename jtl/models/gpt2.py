"""GPT-2: the pre-norm Transformer decoder that predicts each next word, with the checkpoint layout of Hugging Face.

    embeddings   word, position
    decoder      layer_0 ... layer_{n-1}:  attention_norm, attention (qkv, output), mlp_norm, mlp (up, down)
    norm         the last one
    head         only where there is one, and it has parameters: `heads.Tied` has none

The pooled features are those of the last real token, the only one that has seen all others. The classifier of
transformers has no bias: `heads.Linear(outputs, use_bias=False)` is the head that can be saved in its format.

References:
  Radford et al, Language models are unsupervised multitask learners, 2019. Sanh et al, DistilBERT, 2019
  (arXiv 1910.01108), for the smaller one distilled in the same way. OpenAI's code and weights are under a modified MIT
  licence, DistilGPT-2 is under Apache-2.0.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl import heads
from jtl.errors import ConfigError, DataError
from jtl.models.attention import KeyValues, causal, key_values
from jtl.models.family import Family, Features
from jtl.models.gpt2_blocks import Decoder, Embeddings
from jtl.models.gpt2_config import VARIANTS, GPT2Config, parse, settings, settle
from jtl.models.gpt2_layouts import LAYOUT
from jtl.models.inputs import check_tokens
from jtl.models.layers import call_head, last_real, layer_norm


class GPT2(nn.Module):
    """A GPT-2 decoder, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]`, or what else it reads (`jtl.heads`), to outputs.
      dtype: of the computation; by default that of the parameters.
      attention: "xla", or "cudnn" for the fused attention of a GPU: half precision, no dropout of attention.
        `model.clone(attention="cudnn", dtype=jnp.bfloat16)` switches a loaded model.
      scan: run the blocks as a loop, which is traced and compiled sooner; see `jtl.models.stack`.
      remat: compute the blocks' activations again in the backward pass: less memory, more time.
    """

    config: GPT2Config
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False
    prompted: ClassVar[bool] = True
    """What is generated goes on from the inputs."""

    def setup(self) -> None:
        """The parts below the head."""
        self.embeddings = Embeddings(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype, self.attention, self.scan, self.remat)
        self.norm = layer_norm(self.config.layer_norm_epsilon, self.dtype, "norm")

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Any:
        """Read token ids; padding may stand on either side.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]`, nonzero for real tokens; by default all are.
          segment_ids: `[batch, length]` integers, for rows that hold several texts one after the other: the text of
            each token, from 1 on, and 0 for padding, as `jtl.data.pack` makes them. Tokens attend within their text.
          position_ids: `[batch, length]` integers; by default how many real tokens of its text each has before it.
          deterministic: no dropout.

        Returns:
          `Features`, or what the head makes of them.
        """
        given = (input_ids, attention_mask, segment_ids, position_ids)
        features, words = self._read(*given, inference=deterministic)
        return features if self.head is None else call_head(self.head, features, words, deterministic=deterministic)

    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Features:
        """What the head is given; see `__call__`."""
        return self._read(input_ids, attention_mask, segment_ids, position_ids, inference=deterministic)[0]

    def start(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, positions: int
    ) -> tuple[KeyValues, ...]:
        """An empty cache for `decode`, which is given the inputs themselves as its first ids.

        Args:
          input_ids: `[batch, length]`.
          attention_mask: `[batch, length]`; not needed here.
          positions: of inputs and outputs together, padding too: they may be more than the model has, real tokens not.

        Returns:
          Keys and values of each layer, all zero.

        Raises:
          ConfigError: the head gives no words.
        """
        del attention_mask
        c = self.config
        _of_words(self.head, c)
        dtype = self.dtype or self.variables["params"]["embeddings"]["word"]["embedding"].dtype
        return key_values(c.n_layer, len(input_ids), positions, c.n_head, c.n_embd // c.n_head, dtype)

    def decode(
        self,
        ids: jax.Array,
        cache: tuple[KeyValues, ...],
        *,
        index: jax.Array | int,
        mask: jax.Array,
        position_ids: jax.Array,
        last: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """Logits of the words that follow some ids, given those before.

        Args:
          ids: `[batch, length]`, at the positions from `index` on of the cache.
          cache: from `start`, or an earlier call.
          index: a whole number, traced or not.
          mask: `[batch, positions]` bool, False for positions of the cache that hold padding.
          position_ids: `[batch, length]`, how many real tokens each id has before it.
          last: of the last id alone.

        Returns:
          Logits `[batch, length or 1, vocabulary]`, and the cache with the keys and values of `ids`.

        Raises:
          ConfigError: the head gives no words.
        """
        head = _of_words(self.head, self.config)
        allowed = causal(ids.shape[1], mask.shape[1], index) & jnp.expand_dims(mask, 1)
        x, words = self.embeddings(ids, position_ids)
        x, cache = self.decoder(x, allowed, cache=cache, index=index)
        features = Features(self.norm(x[:, -1:] if last else x), None)
        return call_head(head, features, words, deterministic=True), cache

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the model cannot mean; see `jtl.models.inputs`."""
        check_tokens(batch, vocabulary=self.config.vocab_size, longest=self.config.max_length)
        _check_beside(batch, self.config.n_positions)

    def _read(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        segments: jax.Array | None,
        positions: jax.Array | None,
        *,
        inference: bool,
    ) -> tuple[Features, jax.Array]:
        """The features, and the table of words."""
        if input_ids.shape[1] > self.config.max_length:
            raise ConfigError(
                f"inputs of length {input_ids.shape[1]} are longer than the {self.config.max_length} positions that "
                "the model has: truncate them"
            )
        mask = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
        mask = mask if segments is None else mask & (segments != 0)
        positions = positions_of(mask, segments) if positions is None else positions
        x, words = self.embeddings(input_ids, positions, deterministic=inference)
        texts = None if segments is None else jnp.expand_dims(segments, 2)
        x = self.norm(self.decoder(x, mask, texts, deterministic=inference))
        return Features(x, last_real(x, mask) if heads.reads(self.head) == "pooled" else None), words


def positions_of(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """How many real tokens of its text stand before each token.

    Args:
      mask: `[batch, length]` bool, True for real tokens.
      segments: `[batch, length]`, the text of each token, where a row holds several.

    Returns:
      `[batch, length]` int32.

    >>> positions_of(jnp.array([[False, True, True, True]]), jnp.array([[0, 1, 2, 2]])).tolist()
    [[0, 0, 0, 1]]
    """
    count = mask.astype(jnp.int32)
    before = jnp.cumsum(count, axis=1) - count
    if segments is None:
        return before
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return before - jax.lax.cummax(jnp.where(same, 0, before), axis=1)


def _of_words(head: nn.Module | None, config: GPT2Config) -> nn.Module:
    """A head, refused unless it gives logits of words."""
    if isinstance(head, heads.Tied) or (isinstance(head, heads.Tokens) and head.outputs == config.vocab_size):
        return head
    raise ConfigError(
        f"generating needs a head that gives the next word, this model has {type(head).__name__}: load it with "
        "head=jtl.heads.language_model()"
    )


def _check_beside(batch: Mapping[str, Any], positions: int) -> None:
    """Refuse what stands beside the ids, but not one for each, positions that there are not, and texts in pieces."""
    beside = {name: np.asarray(batch[name]) for name in ("segment_ids", "position_ids") if name in batch}
    for name, values in beside.items():
        if values.shape != np.shape(batch.get("input_ids", values)):
            shape = list(np.shape(batch["input_ids"]))
            raise DataError(f"{name} have shape {list(values.shape)}, input_ids {shape}: expected one for each")
    places = beside.get("position_ids", np.zeros(1, int))
    if places.size and not 0 <= places.min() <= places.max() < positions:
        raise DataError(
            f"position_ids lie in [{places.min()}, {places.max()}]: expected those from 0 to {positions - 1} that the "
            "model has; split longer texts"
        )
    for row, texts in enumerate(beside.get("segment_ids", ())):
        begins = texts[np.flatnonzero(np.diff(texts, prepend=0))]
        again = [text for text in begins if text and np.count_nonzero(begins == text) > 1]
        if again:
            raise DataError(
                f"segment_ids of row {row} come back to {again[0]} after another text: number each text of a row anew"
            )


def example(config: GPT2Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    ids = jax.ShapeDtypeStruct((1, min(8, config.max_length)), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids}


def depth_groups(model: GPT2) -> list[tuple[str, ...]]:
    """Embeddings, then each block, then all above; a tied head's table is among the embeddings."""
    blocks = [(f"decoder/layer_{i}",) for i in range(model.config.n_layer)]
    has_leaves = model.head is not None and not isinstance(model.head, heads.Tied)
    return [("embeddings",), *blocks, ("norm", "head") if has_leaves else ("norm",)]


FAMILY = Family(
    name="gpt2",
    modality="text",
    parse=parse,
    build=lambda config, head: GPT2(config, head),
    example=example,
    layouts=(LAYOUT,),
    depth_groups=depth_groups,
    paper="Radford et al 2019",
    head=lambda config, outputs: heads.Linear(outputs, use_bias=False),
    settings=settings,
    settle=settle,
    classes="GPT2",
    backbone="transformer.",
    variants=VARIANTS,
    licence="MIT",
)

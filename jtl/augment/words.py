"""Masked words: what a language model that reads both ways learns to guess."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.errors import ConfigError, DataError
from jtl.labels import IGNORED
from jtl.typing import Batch, Collections, Key, Params


def mask_words(
    ids: jax.Array, special: jax.Array, *, key: Key, mask_id: int, vocab_size: int, rate: float = 0.15
) -> tuple[jax.Array, jax.Array]:
    """Hide words at random, and say which they were.

    Each word is chosen with the same chance, whatever happens to the others: a row has `rate` of its words chosen on
    average, and a short one may have none. Of the chosen ones, 80% become the mask, 10% a word drawn from the whole
    vocabulary, and 10% stay as they are.

    Args:
      ids: `[batch, length]`, integers.
      special: `[batch, length]` bool, of padding and special tokens, which are never chosen.
      key: a random key.
      mask_id: of the token that hides a word.
      vocab_size: words are drawn from 0 to this.
      rate: the share of words that are chosen.

    Returns:
      `(ids, labels)`, both `[batch, length]`; labels are int32, the words that were chosen, `jtl.labels.IGNORED`
      elsewhere.

    References:
      Devlin et al, BERT, 2018 (arXiv 1810.04805), where a fixed number of each text's words is chosen.
    """
    place, word = jax.random.split(key)
    share = jax.random.uniform(place, ids.shape) / rate  # below 1 with the chance `rate`, and evenly so
    chosen = ~special & (share < 1)
    drawn = jax.random.randint(word, ids.shape, 0, vocab_size, jnp.int32).astype(ids.dtype)
    changed = jnp.where(share < 0.8, jnp.full_like(ids, mask_id), jnp.where(share < 0.9, drawn, ids))
    return jnp.where(chosen, changed, ids), jnp.where(chosen, ids.astype(jnp.int32), IGNORED)


def masked(
    loss_fn: Any,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    rate: float = 0.15,
    ids: str = "input_ids",
    mask: str = "attention_mask",
) -> "Masked":
    """The loss of hidden words, of a loss function that `jtl.supervised` made of a model with a head for them.

        loss_fn = jtl.supervised(model, jtl.losses.per_token())
        loss_fn = jtl.augment.masked(loss_fn, mask_id=103, vocab_size=30522, special_ids=(0, 100, 101, 102, 103))

    Words are hidden inside of the training step, by its key, so that each epoch hides others. In evaluation, when there
    is no key, a fixed one is used: a batch has the same words hidden each time. The labels are made here; a batch needs
    none, and one that it has is not read.

    Args:
      loss_fn: of `jtl.supervised`, with `jtl.losses.per_token`.
      mask_id: of the token that hides a word, `tokenizer.mask_token_id`.
      vocab_size: words are drawn from 0 to this, `len(tokenizer)`.
      special_ids: tokens that are never hidden, `tokenizer.all_special_ids`.
      rate: the share of words that are chosen; see `mask_words`.
      ids: the batch's entry of ids.
      mask: the batch's entry that is zero at padding; a batch may lack it.

    Raises:
      ConfigError: a rate or ids that cannot be, or another kind of loss function.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"rate={rate}: expected a share above 0, up to 1")
    special = tuple(int(number) for number in special_ids)
    wrong = [number for number in (mask_id, *special) if not 0 <= number < vocab_size]
    if wrong:
        raise ConfigError(f"the ids {wrong} are outside of the vocabulary: expected 0 to {vocab_size - 1}")
    if not all(hasattr(loss_fn, name) for name in ("loss", "target", "checker")):
        raise ConfigError(f"masked needs a loss function of jtl.supervised; got {type(loss_fn).__name__}")
    return Masked(loss_fn, mask_id, vocab_size, special, rate, ids, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """A loss function of hidden words; `masked` makes it."""

    loss_fn: Any
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    rate: float
    ids: str
    mask: str

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Any]:
        """As the loss function that it was made of, of words hidden by the key."""
        masking, rest = (jax.random.key(0), None) if key is None else jax.random.split(key)
        ids, labels = mask_words(
            jnp.asarray(batch[self.ids]),
            self._special(batch, jnp),
            key=masking,
            mask_id=self.mask_id,
            vocab_size=self.vocab_size,
            rate=self.rate,
        )
        return self.loss_fn(params, collections, {**batch, self.ids: ids, self.loss_fn.target: labels}, key=rest)

    def checker(self, params: Params, collections: Collections) -> Callable[[Batch], None]:
        """As that of the loss function that it was made of, with every word that may be hidden for a label."""
        inner = self.loss_fn.checker(params, collections)

        def check(batch: Batch) -> None:
            if not isinstance(batch, Mapping) or self.ids not in batch:
                found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(f"the batch lacks {self.ids!r}; it has {found}")
            special = self._special({name: np.asarray(value) for name, value in batch.items()}, np)
            inner({**batch, self.loss_fn.target: np.where(special, IGNORED, np.asarray(batch[self.ids]))})

        return check

    def _special(self, batch: Batch, of: Any) -> Any:
        """Bools `[batch, length]`: padding and special tokens; `of` is numpy's or jax's."""
        special = of.isin(batch[self.ids], of.asarray(self.special_ids, batch[self.ids].dtype))
        return special | ~batch[self.mask].astype(bool) if self.mask in batch else special

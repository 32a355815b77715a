"""One text for each row, token after token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl.generation.choosing import choose, is_end
from jtl.generation.decoding import begin, follow
from jtl.generation.settings import Generated, Settings
from jtl.typing import PyTree, Variables


class Texts(NamedTuple):
    """What has been written.

    Attributes:
      step: how many tokens were chosen.
      last: `[batch]`, the last of each row; of ended rows any.
      ended: `[batch]` bool.
      generated: what `generate` returns, so far.
    """

    step: jax.Array
    last: jax.Array
    ended: jax.Array
    generated: Generated


def write(
    model: Any, variables: Variables, ids: jax.Array, mask: jax.Array, keys: jax.Array | None, settings: Settings
) -> Generated:
    """The likeliest token at each step, or one drawn; see `generate`.

    Args:
      model: one that generates.
      variables: its variables.
      ids: `[batch, length]`.
      mask: `[batch, length]` bool.
      keys: `[batch]`, or None.
      settings: of the generation.
    """
    logits, cache, decoder = begin(model, variables, ids, mask, settings)

    def unfinished(carry: tuple[Texts, PyTree]) -> jax.Array:
        return (carry[0].step < settings.max_new_tokens) & ~jnp.all(carry[0].ended)

    def more(carry: tuple[Texts, PyTree]) -> tuple[Texts, PyTree]:
        texts, cache = carry
        logits, cache = follow(decoder, texts.last, cache, texts.step - 1)
        return _extended(texts, logits, keys, settings), cache

    first = _extended(_empty(len(ids), settings), logits, keys, settings)
    texts, _ = jax.lax.while_loop(unfinished, more, (first, cache))
    return texts.generated


def _empty(batch: int, settings: Settings) -> Texts:
    tokens = jnp.full((batch, settings.max_new_tokens), settings.padding, jnp.int32)
    none = jnp.zeros(batch, jnp.int32)
    return Texts(
        jnp.zeros((), jnp.int32), none, none.astype(bool), Generated(tokens, none, jnp.zeros(batch, jnp.float32))
    )


def _extended(texts: Texts, logits: jax.Array, keys: jax.Array | None, settings: Settings) -> Texts:
    """The texts with one more token, those that have ended with padding."""
    step, _, ended, (tokens, lengths, scores) = texts
    chosen, gained = choose(logits, keys, step, settings)
    tokens = tokens.at[:, step].set(jnp.where(ended, settings.padding, chosen))
    scores = scores + jnp.where(ended, 0.0, gained)
    lengths = lengths + (~ended).astype(lengths.dtype)
    return Texts(step + 1, chosen, ended | is_end(chosen, settings), Generated(tokens, lengths, scores))

"""A model in the middle of texts: logits of the next tokens from the last ones and what was kept of those before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl.generation.settings import Settings
from jtl.typing import PyTree, Variables


class Decoder(NamedTuple):
    """What stays the same from token to token.

    Attributes:
      model: the model.
      variables: its variables.
      allowed: `[rows, positions]` bool, the positions of the cache that hold real tokens, now or later.
      lengths: `[rows]` int32, the real tokens before the first new one.
      first: the position of the first new token.
    """

    model: Any
    variables: Variables
    allowed: jax.Array
    lengths: jax.Array
    first: int


def begin(
    model: Any, variables: Variables, ids: jax.Array, mask: jax.Array, settings: Settings
) -> tuple[jax.Array, PyTree, Decoder]:
    """Read the inputs.

    Args:
      model: one that generates.
      variables: its variables.
      ids: `[batch, length]`.
      mask: `[batch, length]` bool, True for real tokens.
      settings: of the generation. The last of the new tokens is never read.

    Returns:
      The logits of the first new token, `[batch, vocabulary]`, what is kept, and the decoder.
    """
    prompt, real = ids, mask
    if settings.start is not None:
        prompt = jnp.full((len(ids), 1), settings.start, jnp.int32)
        real = jnp.ones_like(prompt, bool)
    new = settings.max_new_tokens
    allowed = jnp.concatenate([real, jnp.ones((len(ids), new - 1), bool)], axis=1)
    cache = model.apply(variables, ids, mask, positions=allowed.shape[1], method="start")
    places = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
    logits, cache = model.apply(
        variables, prompt, cache, index=0, mask=allowed, position_ids=places, last=True, method="decode"
    )
    return _wide(logits), cache, Decoder(model, variables, allowed, places[:, -1] + 1, prompt.shape[1])


def follow(decoder: Decoder, tokens: jax.Array, cache: PyTree, step: jax.Array) -> tuple[jax.Array, PyTree]:
    """Read one more token of each row.

    Args:
      decoder: from `begin`.
      tokens: `[rows]`.
      cache: what is kept of those before.
      step: which of the new tokens they are, from 0.

    Returns:
      The logits of the next, `[rows, vocabulary]`, and what is kept.
    """
    logits, cache = decoder.model.apply(
        decoder.variables,
        jnp.expand_dims(tokens, 1),
        cache,
        index=decoder.first + step,
        mask=decoder.allowed,
        position_ids=jnp.expand_dims(decoder.lengths + step, 1),
        method="decode",
    )
    return _wide(logits), cache


def repeated(decoder: Decoder, cache: PyTree, times: int) -> tuple[Decoder, PyTree]:
    """Each row several times, one after another."""
    allowed, lengths, cache = jax.tree.map(
        lambda x: jnp.repeat(x, times, axis=0), (decoder.allowed, decoder.lengths, cache)
    )
    return decoder._replace(allowed=allowed, lengths=lengths), cache


def _wide(logits: jax.Array) -> jax.Array:
    """Those of the last position, in float32: sums of logarithms in half precision would lose their order."""
    return logits[:, -1].astype(jnp.float32)

"""The next token of each row: the likeliest, or one drawn.

Logits are `[rows, vocabulary]`, float32; what cannot be drawn has the logit minus infinity.
"""

import jax
import jax.numpy as jnp

from jtl.generation.settings import Settings


def choose(
    logits: jax.Array, keys: jax.Array | None, step: jax.Array | int, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """Choose a token for each row.

    Args:
      logits: of the model.
      keys: one for each row of the whole generation; None takes the likeliest.
      step: which of the new tokens it is, from 0.
      settings: of the generation.

    Returns:
      Tokens `[rows]` int32, and the logarithms of their probabilities among all, `[rows]`.
    """
    allowed = without_early_ends(logits, step, settings)
    if keys is None:
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        tokens = draw(keys, shaped(allowed, settings))
    chosen = jnp.take_along_axis(logits, jnp.expand_dims(tokens, 1), axis=1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def shaped(logits: jax.Array, settings: Settings) -> jax.Array:
    """The logits that are drawn from: temperature, then top-k, then top-p of what is left.

    References:
      Ackley et al, A learning algorithm for Boltzmann machines, 1985, for the temperature; `top_k` and `top_p` below.
    """
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = top_k(logits, settings.top_k)
    return logits if settings.top_p == 1 else top_p(logits, settings.top_p)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """The k likeliest tokens, and those as likely as the last of them.

    References:
      Fan et al, Hierarchical neural story generation, ACL 2018 (arXiv 1805.04833).

    >>> top_k(jnp.array([[1.0, 3.0, 2.0, 0.0]]), 2).tolist()
    [[-inf, 3.0, 2.0, -inf]]
    """
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """The fewest tokens that have together the probability p, and those as likely as the last of them.

    References:
      Holtzman et al, The curious case of neural text degeneration, ICLR 2020 (arXiv 1904.09751).

    >>> top_p(jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]])), 0.7)[0, 2:].tolist()
    [-inf, -inf]
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def without_early_ends(scores: jax.Array, step: jax.Array | int, settings: Settings) -> jax.Array:
    """Scores `[rows, vocabulary]` in which no text ends before it has `min_new_tokens`."""
    if not settings.ends or not settings.min_new_tokens:
        return scores
    going_on = scores.at[:, jnp.array(settings.ends)].set(-jnp.inf)
    return jnp.where(step < settings.min_new_tokens, going_on, scores)


def is_end(tokens: jax.Array, settings: Settings) -> jax.Array:
    """Bool of the same shape: the tokens that end a text."""
    found = jnp.zeros_like(tokens, bool)
    for end in settings.ends:
        found = found | (tokens == end)
    return found

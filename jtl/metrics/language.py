"""Metrics of positions and of spans."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtl.labels import IGNORED
from jtl.losses.tokens import compared, per_token
from jtl.metrics.core import Mean, mean


class Perplexity(NamedTuple):
    """The exponential of a weighted mean.

    Attributes:
      total: the weighted sum of the tokens' losses, nats.
      weight: the sum of weights.
    """

    total: jax.Array
    weight: jax.Array

    def compute(self) -> jax.Array:
        """The perplexity over all tokens, NaN if no weight was seen."""
        return jnp.exp(self.total / self.weight)


def token_accuracy(logits: jax.Array, labels: jax.Array, weight: jax.Array, *, shift: bool = False) -> Mean:
    """The share of positions whose largest logit is their label, of those that have one.

    Args:
      logits: `[batch, length, classes]`.
      labels: `[batch, length]`, integers; `jtl.labels.IGNORED` does not count.
      weight: `[batch]`.
      shift: compare with the next position's label; see `jtl.losses.per_token`.

    >>> logits = jnp.array([[[0.0, 1], [0, 1], [1, 0]]])
    >>> token_accuracy(logits, jnp.array([[1, 0, IGNORED]]), jnp.ones(1)).compute().item()
    0.5
    """
    labels = compared(labels, shift=shift)
    counted = jnp.where(labels != IGNORED, jnp.expand_dims(weight, 1), 0)
    return Mean(jnp.sum(jnp.where(jnp.argmax(logits, axis=-1) == labels, counted, 0)), jnp.sum(counted))


def perplexity(logits: jax.Array, labels: jax.Array, weight: jax.Array, *, shift: bool = False) -> Perplexity:
    r"""The perplexity of a language model, or of one of masked words: of as many equal guesses is its mean loss.

    .. math:: \exp \left( -\frac{1}{n} \sum \log \mathrm{softmax}(z)_y \right)

    Args:
      logits: `[batch, length, vocabulary]`.
      labels: `[batch, length]`, integers; `jtl.labels.IGNORED` does not count.
      weight: `[batch]`.
      shift: compare with the next position's label; see `jtl.losses.per_token`.

    >>> print(round(perplexity(jnp.zeros((1, 2, 4)), jnp.array([[3, 1]]), jnp.ones(1)).compute().item(), 3))
    4.0
    """
    loss = per_token(shift=shift)
    values, counts = loss(logits, labels), loss.weigh(labels)
    return Perplexity(jnp.sum(values.astype(weight.dtype) * weight), jnp.sum(counts.astype(weight.dtype) * weight))


def span_accuracy(logits: jax.Array, spans: jax.Array, weight: jax.Array) -> Mean:
    """The share of examples whose largest logits are at both the begin and the end of the span.

    The two are chosen each for itself, so that an end may lie before its begin. That is then wrong.

    Args:
      logits: `[batch, 2, length]`.
      spans: `[batch, 2]`, integers: the first position and the last.
      weight: `[batch]`.
    """
    return mean(jnp.all(jnp.argmax(logits, axis=-1) == spans, axis=1).astype(weight.dtype), weight)

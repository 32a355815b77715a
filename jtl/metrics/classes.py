"""Metrics of classes and of labels that may be right or wrong each."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.metrics.core import Mean, mean


class Recalls(NamedTuple):
    """Hits and totals of every class, for balanced accuracy.

    Attributes:
      hits: `[num_classes]`, weight of the examples given their own class.
      totals: `[num_classes]`, weight of the examples of each class.
    """

    hits: jax.Array
    totals: jax.Array

    def compute(self) -> jax.Array:
        """The mean recall over the classes that occur, NaN if none does."""
        seen = self.totals > 0
        recalls = jnp.where(seen, self.hits / jnp.where(seen, self.totals, 1), 0)
        return jnp.sum(recalls) / jnp.sum(seen, dtype=recalls.dtype)


class F1(NamedTuple):
    """What was found and what there is, for the F1 score.

    Attributes:
      true_positives: weight of what was found and is there.
      false_positives: of what was found and is not there.
      false_negatives: of what is there and was not found.
    """

    true_positives: jax.Array
    false_positives: jax.Array
    false_negatives: jax.Array

    def compute(self) -> jax.Array:
        """The harmonic mean of precision and recall, NaN if nothing is there and nothing was found."""
        return _harmonic(*self)


class MacroF1(NamedTuple):
    """The same of every class, each field `[num_classes]`."""

    true_positives: jax.Array
    false_positives: jax.Array
    false_negatives: jax.Array

    def compute(self) -> jax.Array:
        """The mean over the classes that occur or were found, NaN if none."""
        return jnp.nanmean(_harmonic(*self))


def _harmonic(found: jax.Array, wrong: jax.Array, missed: jax.Array) -> jax.Array:
    return 2 * found / (2 * found + wrong + missed)


def accuracy(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> Mean:
    """The share of examples whose largest logit is their label.

    Args:
      logits: `[batch, num_classes]`.
      labels: `[batch]`, integers.
      weight: `[batch]`.

    >>> accuracy(jnp.array([[0.0, 1], [1, 0]]), jnp.array([1, 1]), jnp.ones(2)).compute().item()
    0.5
    """
    return mean((jnp.argmax(logits, axis=-1) == labels).astype(weight.dtype), weight)


def balanced_accuracy(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> Recalls:
    """The mean of the recalls of all classes: chance is `1 / num_classes`, whatever their shares.

    Args:
      logits: `[batch, num_classes]`.
      labels: `[batch]`, integers.
      weight: `[batch]`.

    References:
      Brodersen et al, The balanced accuracy and its posterior distribution, ICPR 2010.
    """
    members = jax.nn.one_hot(labels, logits.shape[-1], dtype=weight.dtype) * jnp.expand_dims(weight, 1)
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(weight.dtype)
    return Recalls(jnp.sum(members * jnp.expand_dims(hits, 1), axis=0), jnp.sum(members, axis=0))


def multilabel_accuracy(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> Mean:
    """The share of examples with every label right.

    Args:
      logits: `[batch, num_labels]`; above 0 a label is given.
      targets: `[batch, num_labels]`, each 0 or 1.
      weight: `[batch]`.

    >>> multilabel_accuracy(jnp.array([[1.0, -1], [1, 1]]), jnp.array([[1, 0], [0, 1]]), jnp.ones(2)).compute().item()
    0.5
    """
    found, actual = _decided(logits, targets)
    return mean(jnp.all(found == actual, axis=1).astype(weight.dtype), weight)


def f1(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> F1:
    """The F1 score of one class among two, or of all labels together ("micro").

    Args:
      logits: `[batch, 2]`, or of labels `[batch, num_labels]`; above 0 a label is given.
      targets: integers `[batch]`, of which 1 is the class that is looked for; or `[batch, num_labels]`, each 0 or 1.
      weight: `[batch]`.

    Raises:
      ConfigError: more than two classes, of each of which `macro_f1` takes the score.

    >>> f1(jnp.array([[0.0, 1], [0, 1], [1, 0]]), jnp.array([1, 0, 0]), jnp.ones(3)).compute().item()
    0.6666666865348816
    """
    found, actual = _decided(logits, targets)
    if targets.ndim < logits.ndim:
        if logits.shape[-1] != 2:
            raise ConfigError(f"f1 of labels takes logits [batch, 2], got {logits.shape}: use metrics.macro_f1")
        found, actual = found[:, 1:], actual[:, 1:]
    return F1(*(jnp.sum(sums) for sums in _matches(found, actual, weight)))


def macro_f1(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> MacroF1:
    """The mean of the classes' F1 scores.

    Args:
      logits: `[batch, num_classes]`.
      targets: integers `[batch]`, or `[batch, num_classes]` of labels, each 0 or 1.
      weight: `[batch]`.
    """
    return MacroF1(*_matches(*_decided(logits, targets), weight))


def _decided(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What was found and what is there, bools `[batch, num_labels]`."""
    if targets.ndim < logits.ndim:
        hot = functools.partial(jax.nn.one_hot, num_classes=logits.shape[-1], dtype=bool)
        return hot(jnp.argmax(logits, axis=-1)), hot(targets)
    return logits > 0, targets.astype(jnp.float32) > 0.5


def _matches(found: jax.Array, actual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def total(chosen: jax.Array) -> jax.Array:
        return jnp.sum(chosen.astype(weight.dtype) * jnp.expand_dims(weight, 1), axis=0)

    return total(found & actual), total(found & ~actual), total(~found & actual)

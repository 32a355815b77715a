"""Losses whose examples weigh as their classes do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.errors import ConfigError, DataError
from jtl.losses.checks import check_count, check_labels, check_targets, name_of, takes_labels
from jtl.losses.examples import Loss


def class_weights(labels: np.ndarray, num_classes: int, *, beta: float = 1.0) -> np.ndarray:
    r"""Weights of classes, the inverse of their effective numbers of examples.

    .. math:: w_c \propto (1 - \beta) / (1 - \beta^{n_c})

    They are scaled to a mean of 1 over the examples. With beta 1 they are scikit-learn's "balanced", the inverse of the
    class's share; with 0 all are 1. The paper scales them to a sum of `num_classes` instead, which is
    the same in the mean of `weighted`.

    Args:
      labels: integers `[N]`, of the training data.
      num_classes: of the model.
      beta: in `[0, 1]`; the paper has 0.9 to 0.9999.

    Returns:
      float32 `[num_classes]`.

    Raises:
      ConfigError: beta is outside of its range.
      DataError: labels that are not integers of the classes, or a class without any example.

    References:
      Cui et al, Class-balanced loss based on effective number of samples, CVPR 2019 (arXiv 1901.05555).

    >>> class_weights(np.array([0, 0, 0, 1]), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta}: expected 0 to 1")
    labels = np.asarray(labels)
    check_labels((labels.size, num_classes), labels)
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise DataError(f"classes {np.flatnonzero(counts == 0)[:5].tolist()} have no example: they can have no weight")
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    return (labels.size / (np.sum(counts / effective) * effective)).astype(np.float32)


def weighted(loss: Loss, weights: Sequence[float] | np.ndarray) -> "Weighted":
    """A loss of labels, in which each example weighs as its class does.

    By itself it gives each example's loss times its weight. The mean that `jtl.supervised` takes of it is divided by
    the sum of the weights, so that it is PyTorch's `CrossEntropyLoss(weight=weights)`, over any number of batches. The
    metrics do not change. With label smoothing, the whole loss of an example has the weight of its
    own class, where PyTorch weighs the share of each class.

    Args:
      loss: `(outputs, labels) -> [batch]`, such as `cross_entropy` or a partial of it.
      weights: `[num_classes]`, not negative; see `class_weights`.

    Raises:
      ConfigError: weights of another shape, or negative or not finite, or a loss that has some, or whose targets are
        no labels.

    >>> from jtl.losses import cross_entropy
    >>> loss = weighted(cross_entropy, [1.0, 3.0])
    >>> print(loss(jnp.zeros((2, 2)), jnp.array([0, 1])))
    [0.6931472 2.0794415]
    """
    values = np.asarray(weights, np.float32)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or np.any(values < 0) or not values.any():
        raise ConfigError(f"weights are {values}: expected [num_classes] numbers of 0 or more, not all of them 0")
    if hasattr(loss, "weigh"):
        raise ConfigError("the loss has weights already; multiply them, or put them inside of per_token")
    if takes_labels(loss) is False:
        raise ConfigError(f"{name_of(loss)} has no labels to weigh by; expected cross_entropy, focal or the like")
    return Weighted(loss, values)


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """A loss whose examples weigh as their classes do; made by `weighted`."""

    loss: Loss
    weights: np.ndarray

    def __call__(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """Each example's loss times its weight."""
        per_example = self.loss(outputs, labels)
        return per_example * self.weigh(labels).astype(per_example.dtype)

    def weigh(self, labels: jax.Array) -> jax.Array:
        """The weight of each example, float32 `[batch]`."""
        return jnp.asarray(self.weights)[labels]

    def check(self, output_shape: tuple[int, ...] | None, labels: Any) -> None:
        """As the loss inside, and whether the weights are those of the model's classes."""
        check_targets(self.loss, output_shape, labels)
        if output_shape is not None and takes_labels(self.loss):
            check_count("weights", self.weights, output_shape[-1])

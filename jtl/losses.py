"""Losses of single examples: pure functions `(outputs, targets) -> [batch]`.

The mean over a batch, and the weights of its examples, are `jtl.supervised`'s business.
`check_targets` is what each loss demands of its targets, decided on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import tree as jtree
from jtl.errors import ConfigError, DataError

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    r"""Softmax cross-entropy with integer labels.

    .. math:: -\log \mathrm{softmax}(z)_y

    Args:
      logits: `[batch, num_classes]`, floats; the loss is computed in float32 or wider.
      labels: `[batch]`, integers in `[0, num_classes)`.
      label_smoothing: share of the target spread evenly over all classes.

    Returns:
      `[batch]`, nats.

    References:
      Szegedy et al, Rethinking the Inception architecture, 2016 (label smoothing).

    >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])))
    [1.3862944]
    """
    logits = _wide(logits)
    if not label_smoothing:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over the labels of an example: multi-label classification.

    Args:
      logits: `[batch, num_labels]`.
      targets: `[batch, num_labels]`, in `[0, 1]`.

    Returns:
      `[batch]`, nats.
    """
    logits = _wide(logits)
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype)), axis=-1)


def focal(
    logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0, alpha: Sequence[float] | np.ndarray | None = None
) -> jax.Array:
    r"""Softmax focal loss: cross-entropy that turns from examples which are right already.

    .. math:: -\alpha_y (1 - p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(z)

    Args:
      logits: `[batch, num_classes]`, floats; the loss is computed in float32 or wider.
      labels: `[batch]`, integers in `[0, num_classes)`.
      gamma: 0 for cross-entropy.
      alpha: `[num_classes]`, a factor for each class; by default 1. Unlike the weights of `weighted`, it does not
        count in a batch's mean, as in the paper.

    Returns:
      `[batch]`, nats.

    References:
      Lin et al, Focal loss for dense object detection, ICCV 2017 (arXiv 1708.02002).
    """
    logits = _wide(logits)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, jnp.finfo(logits.dtype).min, logits), axis=-1)
    loss = _focal(jnp.sum(jnp.where(own, logits, 0), axis=-1) - others, gamma)
    return loss if alpha is None else loss * jnp.asarray(alpha, loss.dtype)[labels]


def binary_focal(logits: jax.Array, targets: jax.Array, *, gamma: float = 2.0, alpha: float | None = None) -> jax.Array:
    r"""Sigmoid focal loss, summed over the labels of an example: multi-label classification.

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t

    with p the sigmoid of z for a target of 1, and one minus it for 0.

    Args:
      logits: `[batch, num_labels]`, floats; the loss is computed in float32 or wider.
      targets: `[batch, num_labels]`, each 0 or 1.
      gamma: 0 for `binary_cross_entropy`.
      alpha: the factor of targets of 1; that of 0 is `1 - alpha`. None for no factors. The paper's best is 0.25.

    Returns:
      `[batch]`, nats.

    References:
      Lin et al, Focal loss for dense object detection, ICCV 2017 (arXiv 1708.02002).
    """
    logits = _wide(logits)
    targets = targets.astype(logits.dtype)
    loss = _focal((2 * targets - 1) * logits, gamma)
    loss = loss if alpha is None else loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return jnp.sum(loss, axis=-1)


def _focal(margin: jax.Array, gamma: float) -> jax.Array:
    """Of the log-odds of the truth. A power of `1 - p` would have no finite slope at 0, and lose digits near it."""
    nats = jax.nn.softplus(-margin)
    return nats * jnp.exp(gamma * jax.nn.log_sigmoid(-margin)) if gamma else nats


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error, averaged over the outputs of an example: regression.

    Args:
      outputs: `[batch]` or `[batch, num_outputs]`; one output may keep its axis.
      targets: `[batch]` or `[batch, num_outputs]`.

    Returns:
      `[batch]`, squared units of the targets.
    """
    outputs = _wide(outputs)
    errors = jnp.square(outputs.reshape(targets.shape) - targets.astype(outputs.dtype))
    return errors if errors.ndim == 1 else jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


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
    _check_labels((labels.size, num_classes), labels)
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

    >>> loss = weighted(cross_entropy, [1.0, 3.0])
    >>> print(loss(jnp.zeros((2, 2)), jnp.array([0, 1])))
    [0.6931472 2.0794415]
    """
    values = np.asarray(weights, np.float32)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or np.any(values < 0) or not values.any():
        raise ConfigError(f"weights are {values}: expected [num_classes] numbers of 0 or more, not all of them 0")
    if isinstance(loss, Weighted):
        raise ConfigError("the loss has weights already; multiply them")
    if _inner(loss) in _CHECKS and _CHECKS[_inner(loss)] is not _check_labels:
        raise ConfigError(
            f"{_inner(loss).__name__} has no labels to weigh by; expected cross_entropy, focal or the like"
        )
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


def _named(loss: Loss) -> Loss:
    """A loss of this module, or a partial of it, without its weights."""
    return loss.loss if isinstance(loss, Weighted) else loss


def _inner(loss: Loss) -> Any:
    """The loss that partials and weights are around."""
    loss = _named(loss)
    return loss.func if isinstance(loss, functools.partial) else loss


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jtree.wide_dtype(x.dtype))


def check_targets(loss: Loss, output_shape: tuple[int, ...] | None, targets: Any) -> None:
    """Refuse targets that a loss would silently turn into nonsense.

    Args:
      loss: a loss of this module, or a partial of one, or `weighted`. Others are not checked.
      output_shape: the shape of the model's outputs for the batch, `None` if they are not one array.
      targets: the batch's targets, on the host or concrete.

    Raises:
      DataError: says what was given and what was expected.

    >>> check_targets(cross_entropy, (2, 3), np.array([0, 3]))
    Traceback (most recent call last):
      ...
    jtl.errors.DataError: label 3 of example 1 is outside the model's 3 classes: expected 0 to 2
    """
    inner = _inner(loss)
    check = _CHECKS.get(inner)
    if check is not None:
        if output_shape is None:
            raise DataError(f"{inner.__name__} takes one array of outputs, this model gives several: has it a head?")
        _check_classes(loss, output_shape[-1])
        check(output_shape, np.asarray(targets))


def _check_classes(loss: Loss, classes: int) -> None:
    """Whether its weights are those of the model's classes: a lookup past the last would give the last."""
    named = _named(loss)
    alpha: Any = named.keywords.get("alpha") if isinstance(named, functools.partial) else None
    weights: Any = loss.weights if isinstance(loss, Weighted) else None
    for name, values in {"weights": weights, "alpha": alpha}.items():
        if np.ndim(values) == 1 and len(values) != classes:
            raise DataError(f"{name} has {len(values)} numbers, the model {classes} classes: expected one for each")


def _check_labels(output_shape: tuple[int, ...], labels: np.ndarray) -> None:
    classes = output_shape[-1]
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels have dtype {labels.dtype}: expected integers from 0 to {classes - 1}")
    if labels.shape != output_shape[:-1]:
        raise DataError(f"labels have shape {labels.shape}, the outputs {output_shape}: expected {output_shape[:-1]}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        label = labels.flat[wrong[0]]
        raise DataError(
            f"label {label} of example {wrong[0]} is outside the model's {classes} classes: expected 0 to {classes - 1}"
        )


def _check_binary(output_shape: tuple[int, ...], targets: np.ndarray) -> None:
    if targets.shape != output_shape:
        raise DataError(f"targets have shape {targets.shape}: expected that of the outputs, {output_shape}")
    if targets.size and not (targets.min() >= 0 and targets.max() <= 1):
        raise DataError(f"targets lie in [{targets.min()}, {targets.max()}]: expected [0, 1]")


def _check_hard(output_shape: tuple[int, ...], targets: np.ndarray) -> None:
    _check_binary(output_shape, targets)
    between = targets[(targets != 0) & (targets != 1)]
    if between.size:
        raise DataError(f"a target is {between[0]}: binary_focal is defined for 0 and 1 alone")


def _check_regression(output_shape: tuple[int, ...], targets: np.ndarray) -> None:
    if _without_lone_axis(targets.shape) != _without_lone_axis(output_shape):
        raise DataError(f"targets have shape {targets.shape}, the model's outputs {output_shape}")
    if not np.all(np.isfinite(targets.astype(np.float64))):
        raise DataError(f"{int((~np.isfinite(targets.astype(np.float64))).sum())} targets are not finite")


def _without_lone_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


_CHECKS: dict[Any, Callable[[tuple[int, ...], np.ndarray], None]] = {
    cross_entropy: _check_labels,
    focal: _check_labels,
    binary_cross_entropy: _check_binary,
    binary_focal: _check_hard,
    squared_error: _check_regression,
}

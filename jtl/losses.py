"""Losses of single examples: pure functions `(outputs, targets) -> [batch]`.

The mean over a batch, and the weights of its examples, are `jtl.supervised`'s business.
`check_targets` is what each loss demands of its targets, decided on the host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import tree as jtree
from jtl.errors import DataError

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


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jtree.wide_dtype(x.dtype))


def check_targets(loss: Loss, output_shape: tuple[int, ...] | None, targets: Any) -> None:
    """Refuse targets that a loss would silently turn into nonsense.

    Args:
      loss: a loss of this module, or a partial of one. Others are not checked.
      output_shape: the shape of the model's outputs for the batch, `None` if they are not one array.
      targets: the batch's targets, on the host or concrete.

    Raises:
      DataError: says what was given and what was expected.

    >>> check_targets(cross_entropy, (2, 3), np.array([0, 3]))
    Traceback (most recent call last):
      ...
    jtl.errors.DataError: label 3 of example 1 is outside the model's 3 classes: expected 0 to 2
    """
    inner = loss.func if isinstance(loss, functools.partial) else loss
    check = _CHECKS.get(inner)
    if check is not None:
        if output_shape is None:
            raise DataError(f"{inner.__name__} takes one array of outputs, this model gives several: has it a head?")
        check(output_shape, np.asarray(targets))


def _check_labels(output_shape: tuple[int, ...], labels: np.ndarray) -> None:
    classes = output_shape[-1]
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels have dtype {labels.dtype}: cross_entropy takes integers from 0 to {classes - 1}")
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
        raise DataError(f"targets have shape {targets.shape}: binary_cross_entropy expects {output_shape}")
    if targets.size and not (targets.min() >= 0 and targets.max() <= 1):
        raise DataError(f"targets lie in [{targets.min()}, {targets.max()}]: binary_cross_entropy expects [0, 1]")


def _check_regression(output_shape: tuple[int, ...], targets: np.ndarray) -> None:
    if _without_lone_axis(targets.shape) != _without_lone_axis(output_shape):
        raise DataError(f"targets have shape {targets.shape}, the model's outputs {output_shape}")
    if not np.all(np.isfinite(targets.astype(np.float64))):
        raise DataError(f"{int((~np.isfinite(targets.astype(np.float64))).sum())} targets are not finite")


def _without_lone_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


_CHECKS: dict[Any, Callable[[tuple[int, ...], np.ndarray], None]] = {
    cross_entropy: _check_labels,
    binary_cross_entropy: _check_binary,
    squared_error: _check_regression,
}

"""What each loss demands of its targets, decided on the host."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jtl.errors import DataError
from jtl.losses.examples import (
    Loss,
    binary_cross_entropy,
    binary_focal,
    cross_entropy,
    focal,
    span_cross_entropy,
    squared_error,
)


def check_targets(loss: Loss, output_shape: tuple[int, ...] | None, targets: Any) -> None:
    """Refuse targets that a loss would silently turn into nonsense.

    Args:
      loss: a loss of this module, or a partial of one, or an object with a `check` of its own, as `weighted` and
        `per_token` make. Others are not checked.
      output_shape: the shape of the model's outputs for the batch, `None` if they are not one array.
      targets: the batch's targets, on the host or concrete.

    Raises:
      DataError: says what was given and what was expected.

    >>> check_targets(cross_entropy, (2, 3), np.array([0, 3]))
    Traceback (most recent call last):
      ...
    jtl.errors.DataError: label 3 of example 1 is outside the model's 3 classes: expected 0 to 2
    """
    own = getattr(loss, "check", None)
    if own is not None:
        own(output_shape, targets)
        return
    plain, settings = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    check = _CHECKS.get(plain)
    if check is None:
        return
    if output_shape is None:
        raise DataError(f"{name_of(loss)} takes one array of outputs, this model gives several: has it a head?")
    check_count("alpha", settings.get("alpha"), output_shape[-1])
    check(output_shape, np.asarray(targets))


def check_entries(batch: Mapping[str, Any], target: str) -> None:
    """Refuse entries of a batch that are no numbers, and inputs or weights with which nothing can be learnt.

    What lies on a device is not looked into: it would have to be copied.

    Args:
      batch: arrays that lead with the batch axis.
      target: the entry that is not looked into either; the loss has a check of its own.

    Raises:
      DataError: names the entry, the example and the place in it.

    >>> check_entries({"x": np.array([[1.0], [np.nan]]), "label": np.array([0, 1])}, "label")
    Traceback (most recent call last):
      ...
    jtl.errors.DataError: 'x' of example 1 has nan at [0]: expected finite numbers; leave the example out, or fill it in
    """
    weight = batch.get("weight")
    counted = np.asarray(weight) != 0 if isinstance(weight, np.ndarray) and weight.ndim == 1 else None
    for name, value in batch.items():
        given = value if hasattr(value, "dtype") else np.asarray(value)
        if not (jnp.issubdtype(given.dtype, np.number) or given.dtype == bool):
            raise DataError(f"{name!r} is {given.dtype}{list(np.shape(given))}: expected numbers; encode it first")
        if name != target and isinstance(given, np.ndarray) and jnp.issubdtype(given.dtype, np.floating):
            _check_finite(name, given, counted if name != "weight" else None)
    if isinstance(weight, np.ndarray):
        _check_weight(weight)


def _check_finite(name: str, values: np.ndarray, counted: np.ndarray | None) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(values)):  # one pass; sums may overflow, so the other answer proves nothing
            return
    wrong = ~np.isfinite(values)
    if counted is not None:  # filler may hold anything
        wrong &= counted.reshape(-1, *(1,) * (values.ndim - 1))
    if wrong.any():
        row, *place = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"{name!r} of example {row} has {values[(row, *place)]}{f' at {place}' if place else ''}: expected finite "
            "numbers; leave the example out, or fill it in"
        )


def _check_weight(weight: np.ndarray) -> None:
    if weight.ndim != 1:
        raise DataError(f"'weight' has the shape {list(weight.shape)}: expected [batch], one weight of each example")
    if weight.size and weight.min() < 0:
        row = int(weight.argmin())
        raise DataError(f"'weight' of example {row} is {weight[row]}: expected 0 or more; 0 leaves an example out")


def takes_labels(loss: Loss) -> bool | None:
    """Whether the targets of a loss are labels; None of one that is not known."""
    plain = loss.func if isinstance(loss, functools.partial) else loss
    return _CHECKS[plain] is check_labels if plain in _CHECKS else None


def name_of(loss: Loss) -> str:
    """The name of a loss, or of what it is a partial of."""
    plain = loss.func if isinstance(loss, functools.partial) else loss
    return getattr(plain, "__name__", type(plain).__name__)


def check_count(name: str, values: Any, classes: int) -> None:
    """Whether numbers are those of the model's classes: a lookup past the last would give the last."""
    if np.ndim(values) == 1 and len(values) != classes:
        raise DataError(f"{name} has {len(values)} numbers, the model {classes} classes: expected one for each")


def check_labels(output_shape: tuple[int, ...], labels: np.ndarray) -> None:
    """Whether labels `[batch]` are those of classes."""
    classes = output_shape[-1]
    if len(output_shape) > 2:
        raise DataError(f"the outputs have shape {output_shape}: for a label at each position, see losses.per_token")
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
    wrong = np.argwhere(~np.isfinite(targets.astype(np.float64)))
    if len(wrong):
        raise DataError(
            f"the target of example {wrong[0][0]} is {targets[tuple(wrong[0])]}: {len(wrong)} targets are not finite; "
            "leave their examples out"
        )


def _without_lone_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _check_spans(output_shape: tuple[int, ...], spans: np.ndarray) -> None:
    if len(output_shape) != 3 or output_shape[1] != 2:
        raise DataError(f"the outputs have shape {output_shape}: expected [batch, 2, length], as heads.span gives them")
    if spans.shape != output_shape[:2] or not np.issubdtype(spans.dtype, np.integer):
        raise DataError(f"spans are {spans.dtype}{list(spans.shape)}: expected integers {list(output_shape[:2])}")
    length = output_shape[2]
    wrong = np.flatnonzero(((spans < 0) | (spans >= length)).any(1) | (spans[:, 0] > spans[:, 1]))
    if wrong.size:
        span = spans[wrong[0]].tolist()
        raise DataError(
            f"the span of example {wrong[0]} is {span}: expected 0 <= begin <= end <= {length - 1}; "
            "give a span that was cut off the place that stands for none, such as [0, 0]"
        )


_CHECKS: dict[Any, Callable[[tuple[int, ...], np.ndarray], None]] = {
    cross_entropy: check_labels,
    focal: check_labels,
    binary_cross_entropy: _check_binary,
    binary_focal: _check_hard,
    squared_error: _check_regression,
    span_cross_entropy: _check_spans,
}

"""Metrics of numbers that a model predicts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtl.losses import squared_error
from jtl.metrics.core import Mean, mean


class Explained(NamedTuple):
    """Sums for the coefficient of determination.

    Attributes:
      weight: the sum of weights.
      targets: `[num_outputs]`, of targets less the centre.
      squares: `[num_outputs]`, of their squares.
      errors: `[num_outputs]`, of squared errors.
    """

    weight: jax.Array
    targets: jax.Array
    squares: jax.Array
    errors: jax.Array

    def compute(self) -> jax.Array:
        """The mean over outputs, not finite where targets do not vary."""
        return jnp.mean(1 - self.errors / (self.squares - jnp.square(self.targets) / self.weight))


class Correlation(NamedTuple):
    """Sums for the correlation of two columns, each less the centre.

    Attributes:
      weight: the sum of weights.
      outputs: `[num_outputs]`, of outputs.
      targets: `[num_outputs]`, of targets.
      output_squares: `[num_outputs]`, of squares.
      target_squares: `[num_outputs]`, of squares.
      products: `[num_outputs]`, of outputs times targets.
    """

    weight: jax.Array
    outputs: jax.Array
    targets: jax.Array
    output_squares: jax.Array
    target_squares: jax.Array
    products: jax.Array

    def compute(self) -> jax.Array:
        """The mean over outputs, NaN where one of the two does not vary."""
        covariance = self.products - self.outputs * self.targets / self.weight
        left = self.output_squares - jnp.square(self.outputs) / self.weight
        right = self.target_squares - jnp.square(self.targets) / self.weight
        return jnp.mean(covariance / jnp.sqrt(left * right))


def mean_squared_error(outputs: jax.Array, targets: jax.Array, weight: jax.Array) -> Mean:
    """The mean squared error, over outputs and examples.

    Args:
      outputs: `[batch]` or `[batch, num_outputs]`; one output may keep its axis.
      targets: `[batch]` or `[batch, num_outputs]`.
      weight: `[batch]`.
    """
    return mean(squared_error(outputs, targets).astype(weight.dtype), weight)


def r_squared(outputs: jax.Array, targets: jax.Array, weight: jax.Array, *, centre: float = 0.0) -> Explained:
    """The share of the targets' variance that the outputs explain, averaged over outputs.

    Args:
      outputs: `[batch]` or `[batch, num_outputs]`; one output may keep its axis.
      targets: `[batch]` or `[batch, num_outputs]`.
      weight: `[batch]`.
      centre: a number near the targets' mean. It changes nothing but digits: sums of float32 squares lose them where
        the mean is some hundred times the standard deviation.
    """
    predicted, actual, by_row = _columns(outputs, targets, weight)
    offset = actual - centre
    errors = jnp.square(predicted - actual)
    return Explained(jnp.sum(weight), *(jnp.sum(x * by_row, axis=0) for x in (offset, jnp.square(offset), errors)))


def pearson(outputs: jax.Array, targets: jax.Array, weight: jax.Array, *, centre: float = 0.0) -> Correlation:
    """The correlation of outputs and targets, averaged over outputs.

    Args:
      outputs: `[batch]` or `[batch, num_outputs]`; one output may keep its axis.
      targets: `[batch]` or `[batch, num_outputs]`.
      weight: `[batch]`.
      centre: a number near both means, as for `r_squared`.
    """
    predicted, actual, by_row = _columns(outputs, targets, weight)
    x, y = predicted - centre, actual - centre
    sums = (jnp.sum(values * by_row, axis=0) for values in (x, y, jnp.square(x), jnp.square(y), x * y))
    return Correlation(jnp.sum(weight), *sums)


def _columns(outputs: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs, targets and weight, `[batch, num_outputs or 1]` in the weight's dtype."""
    outputs = outputs.reshape(targets.shape)  # one output may keep its axis

    def rows(values: jax.Array) -> jax.Array:
        return values.astype(weight.dtype).reshape(weight.shape[0], -1)

    return rows(outputs), rows(targets), rows(weight)

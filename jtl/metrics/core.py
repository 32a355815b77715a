"""Accumulators: the weighted mean, how plain scalars become one, adding up, and what comes of the sums."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A weighted mean.

    Attributes:
      total: the weighted sum.
      weight: the sum of weights.
    """

    total: jax.Array
    weight: jax.Array

    def compute(self) -> jax.Array:
        """The mean, NaN if no weight was seen."""
        return self.total / self.weight


def mean(values: jax.Array, weight: jax.Array) -> Mean:
    """The mean of per-example values.

    Args:
      values: `[batch]`.
      weight: `[batch]`.
    """
    return Mean(jnp.sum(values * weight), jnp.sum(weight))


def _is_accumulator(node: Any) -> bool:
    return hasattr(node, "compute")


def accumulators(values: dict[str, Any], weight: jax.Array | None = None) -> dict[str, Any]:
    """Plain scalars become means of a weight, by default one; accumulators stay."""
    return {k: v if _is_accumulator(v) else _mean_of(_float(v), weight) for k, v in values.items()}


def _mean_of(value: jax.Array, weight: jax.Array | None) -> Mean:
    return Mean(value, jnp.ones(())) if weight is None else Mean(scaled(value, weight), weight)


def scaled(value: jax.Array, weight: jax.Array) -> jax.Array:
    """A value times its weight; 0 for a weight of 0, also where the value is NaN, as the mean over nothing is."""
    return jnp.where(weight > 0, value * weight.astype(value.dtype), 0)


def _float(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32)


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    """The accumulators of several batches added up.

    >>> merge({"loss": Mean(2.0, 1.0)}, {"loss": Mean(4.0, 2.0)})
    {'loss': Mean(total=6.0, weight=3.0)}
    """
    return functools.reduce(functools.partial(jax.tree.map, operator.add), parts)


def compute(values: dict[str, Any]) -> dict[str, Any]:
    """The values of all accumulators; anything else stays as it is."""
    return {k: v.compute() if _is_accumulator(v) else v for k, v in values.items()}


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of the t interval of independent runs, such as seeds; NaN for the width of one value.

    >>> mean, half = interval([0.70, 0.72, 0.71])
    >>> round(mean, 2), round(half, 3)
    (0.71, 0.025)
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, math.nan
    from scipy import stats

    return mean, float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))

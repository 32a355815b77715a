"""Averages of the trained leaves along a run: exponential, and over equal steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtl.errors import ConfigError
from jtl.state import TrainState
from jtl.typing import Params


class AverageState(NamedTuple):
    """The state of a transform that averages.

    Attributes:
      inner: of the transform inside.
      average: of the trained leaves.
      count: values in it, int32 scalar.
      step: updates done, int32 scalar.
    """

    inner: optax.OptState
    average: Params
    count: jax.Array
    step: jax.Array


def exponential_average(
    tx: optax.GradientTransformation, decay: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""A transform that also keeps :math:`\bar w_t = d_t \bar w_{t-1} + (1 - d_t) w_t` of the trained leaves.

    With :math:`d_t = \min(d, n / (n + 9))` after n values, so that the start is forgotten early.

    Args:
      tx: the transform.
      decay: d.

    Raises:
      ConfigError: `decay` is not from 0 to below 1.

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"decay={decay}: expected a number from 0 to below 1")

    def keep(count: jax.Array) -> jax.Array:
        return jnp.minimum(decay, count / (count + 9))

    return _averaging(tx, keep, 0, 1)


def stochastic_average(
    tx: optax.GradientTransformation, *, start: int, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """A transform that also keeps the mean of the trained leaves over some of the steps.

    Running statistics of batch normalisation belong to the weights that they were gathered with: where trained
    modules have some, gather them again for the average, by `jtl.fit(loss_fn, optax.set_to_zero(), ...)` from it.

    Args:
      tx: the transform.
      start: the number of the first update whose result counts.
      every: from one that counts to the next.

    Raises:
      ConfigError: `start` or `every` is below 1.

    References:
      Izmailov et al, Averaging weights leads to wider optima and better generalization, 2018 (arXiv 1803.05407).
    """
    if start < 1 or every < 1:
        raise ConfigError(f"start={start}, every={every}: expected 1 or more")
    return _averaging(tx, lambda count: count / (count + 1), start, every)


def _averaging(
    tx: optax.GradientTransformation, keep: Any, start: int, every: int
) -> optax.GradientTransformationExtraArgs:
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> AverageState:
        return AverageState(
            tx.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        )

    def update(updates: Any, state: Any, params: Params | None = None, **extra: Any) -> Any:
        if params is None:
            raise ConfigError("an average needs the params: tx.update(grads, state, params)")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        step = state.step + 1
        counts = (step >= start) & ((step - start) % every == 0)
        share = keep(state.count.astype(jnp.float32))

        def moved(average: jax.Array, value: jax.Array) -> jax.Array:
            part = share.astype(average.dtype)
            return jnp.where(counts, part * average + (1 - part) * value.astype(average.dtype), average)

        average = jax.tree.map(moved, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(inner, average, state.count + counts, step)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(state: TrainState) -> TrainState:
    """The state with the average of its trained leaves in their place, for evaluation and export.

    Args:
      state: of a run whose transform averages.

    Raises:
      ConfigError: it does not.
    """
    is_average = lambda node: isinstance(node, AverageState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state.opt_state, is_leaf=is_average) if is_average(node)]
    if len(found) != 1:
        raise ConfigError(
            f"the optimizer's state holds {len(found)} averages, expected one: "
            "wrap the transform in exponential_average or stochastic_average"
        )
    return state._replace(params=jax.tree.map(jnp.array, found[0].average))

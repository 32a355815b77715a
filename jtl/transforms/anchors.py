"""Pulling trained leaves towards the point that training started from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.masks import nothing
from jtl.typing import MaskLike, Params, PyTree


class PullState(NamedTuple):
    """What `pull_to_start` remembers.

    Attributes:
      start: the leaves as they were when the transform first saw them; absent where they are pulled to zero.
    """

    start: Params


def pull_to_start(
    rate: float, *, new: MaskLike | None = None, new_rate: float | None = None
) -> optax.GradientTransformation:
    r"""Add :math:`\alpha (w - w_0)` to the updates, and :math:`\beta w` for leaves that were not pretrained.

    Before the optimizer in a chain this is L2-SP: the gradient of
    :math:`\frac{\alpha}{2} \|w - w_0\|^2 + \frac{\beta}{2} \|v\|^2`. Between `optax.scale_by_adam` and the
    learning rate it is decoupled weight decay towards the pretrained point.

    Args:
      rate: alpha.
      new: a mask of the leaves, such as the head's, that have no pretrained values.
      new_rate: beta; by default alpha.

    Returns:
      A transform whose state holds a copy of the trained leaves that have a start.

    Raises:
      ConfigError: a rate is negative.

    References:
      Li et al, Explicit inductive bias for transfer learning with convolutional networks, 2018 (arXiv 1802.01483).
    """
    beta = rate if new_rate is None else new_rate
    if not (rate >= 0 and beta >= 0):
        raise ConfigError(f"pull_to_start has rates {rate} and {beta}; expected none below 0")
    new = nothing() if new is None else new

    def init(params: Params) -> PullState:
        return PullState(jax.tree.map(jnp.array, jtree.partition(params, new)[1]))

    def update(updates: PyTree, state: Any, params: Params | None = None) -> tuple[PyTree, PullState]:
        if params is None:
            raise ConfigError("pull_to_start needs the params: tx.update(grads, state, params)")
        start = dict(jtree.leaves_with_paths(state.start))
        places = dict(jtree.leaves_with_paths(params))

        def pulled(path: str, update: jax.Array) -> jax.Array:
            value = places[path]
            offset = rate * (value - start[path]) if path in start else beta * value
            return update + offset.astype(update.dtype)

        return jtree.map_with_paths(pulled, updates), state

    return optax.GradientTransformation(init, update)

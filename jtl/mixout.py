"""Mixout: dropout towards the pretrained weights instead of towards zero."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.step import Aux, LossFn
from jtl.typing import Batch, Collections, Key, MaskLike, Params, Variables

START = "mixout"
"""The collection that holds the pretrained values of the leaves that are mixed."""


def with_start(variables: Variables, leaves: MaskLike) -> dict[str, Any]:
    """Variables with a collection of the values that `mixout` goes back to.

    Args:
      variables: `{"params": ..., **collections}`, pretrained.
      leaves: a mask of the leaves to mix: trained ones that were pretrained, so not a new head.

    Returns:
      The same, and the collection `mixout`; leaves are shared, not copied.
    """
    return {**variables, START: jtree.partition(variables["params"], leaves)[0]}


def mixout(loss_fn: LossFn, rate: float) -> LossFn:
    r"""A loss whose parameters are mixed with their start in training.

    Each value is the start's with probability p, and the others are moved so that the mean stays:
    :math:`(m w_0 + (1 - m) w - p w_0) / (1 - p)`, m Bernoulli.

    Args:
      loss_fn: the loss.
      rate: p, from 0 to below 1.

    Returns:
      A loss for variables that `with_start` made. In evaluation it is `loss_fn`.

    Raises:
      ConfigError: `rate` is out of range.

    References:
      Lee et al, Mixout, 2019 (arXiv 1909.11299).
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"rate={rate}: expected a number from 0 to below 1")
    return _Mixout(loss_fn, rate)


@dataclasses.dataclass(frozen=True, eq=False)
class _Mixout:
    loss_fn: LossFn
    rate: float

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Aux]:
        if START not in collections:
            raise ConfigError(
                f"mixout needs the collection {START!r}: init with jtl.mixout.with_start(variables, mask)"
            )
        rest = {name: value for name, value in collections.items() if name != START}
        if key is None:
            return self.loss_fn(params, rest, batch, key=None)
        draws, key = jax.random.split(key)
        loss, aux = self.loss_fn(self._mixed(params, collections[START], draws), rest, batch, key=key)
        return loss, aux._replace(collections={**aux.collections, START: collections[START]})

    def checker(self, params: Params, collections: Collections) -> Callable[[Batch], None]:
        """The check of the loss inside, if it has one."""
        make = getattr(self.loss_fn, "checker", None)
        rest = {name: value for name, value in collections.items() if name != START}
        return (lambda batch: None) if make is None else make(params, rest)

    def _mixed(self, params: Params, start: Params, key: Key) -> Params:
        origin = dict(jtree.leaves_with_paths(start))
        keys = dict(zip(origin, jax.random.split(key, max(len(origin), 1)), strict=False))

        def mix(path: str, value: jax.Array) -> jax.Array:
            if path not in origin:
                return value
            first = origin[path].astype(value.dtype)
            back = jax.random.bernoulli(keys[path], self.rate, value.shape)
            # The start plus what is left of the difference: exact where the difference is zero.
            return first + jnp.where(back, jnp.zeros((), value.dtype), (value - first) / (1 - self.rate))

        return jtree.map_with_paths(mix, params)

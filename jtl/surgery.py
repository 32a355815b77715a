"""Which groups of layers a data set asks to change: the relative norm of their gradients."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import masks, rules
from jtl import tree as jtree
from jtl.errors import DataError
from jtl.state import init
from jtl.step import LossFn, call_loss
from jtl.typing import Batch, Key, Params, Variables


def gradient_norms(
    loss_fn: LossFn,
    variables: Variables,
    batches: Iterable[Batch],
    groups: Sequence[Sequence[str]],
    *,
    key: Key,
) -> np.ndarray:
    r"""The relative gradient norm of each group of leaves, :math:`\|\nabla_w L\| / \|w\|`, a mean over batches.

    Args:
      loss_fn: the loss.
      variables: the pretrained model, better with a trained head: the gradient below a random one is of its noise.
      batches: some batches of the data.
      groups: patterns, as `jtl.strategies.depth_groups` gives them.
      key: for dropout.

    Returns:
      float64 `[groups]`; 0 for a group whose leaves are all zero.

    Raises:
      DataError: there is no batch.

    References:
      Lee et al, 2022 (arXiv 2210.11466), Auto-RGN.
    """
    state, frozen = init(variables, optax.identity(), trainable=masks.everything(), key=key)
    rules.require_matches([pattern for group in groups for pattern in group], state.params)

    @jax.jit
    def norms(batch: Batch, key: Key) -> list[jax.Array]:
        def loss(params: Params) -> jax.Array:
            return call_loss(loss_fn, state._replace(params=params), frozen, batch, key, False)[0]

        pairs = [_parts(tree, groups) for tree in (jax.grad(loss)(state.params), state.params)]
        sizes = [[optax.tree.norm(part) for part in parts] for parts in pairs]
        return [jnp.where(w > 0, g / jnp.where(w > 0, w, 1), 0) for g, w in zip(*sizes, strict=True)]

    found = [norms(batch, jax.random.fold_in(key, number)) for number, batch in enumerate(batches)]
    if not found:
        raise DataError("there is no batch to take gradients of")
    return np.asarray(found, np.float64).mean(axis=0)


def _parts(tree: object, groups: Sequence[Sequence[str]]) -> list[object]:
    return [jtree.partition(tree, masks.select(*group))[0] for group in groups]

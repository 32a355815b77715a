"""`mixed_precision`: a loss computed in bfloat16, over weights that are trained in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jtl import modes
from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.state import Frozen, standard_promotion
from jtl.step import Aux, LossFn
from jtl.typing import Batch, Collections, Key, Params, PyTree


def cast(tree: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    """The tree with its floats in a dtype; those that have it, and what is no float, are not touched.

    Args:
      tree: arrays, or shapes.
      dtype: of floats.

    >>> [leaf.dtype.name for leaf in jax.tree.leaves(cast({"a": jnp.ones(2), "b": jnp.arange(2)}, jnp.bfloat16))]
    ['bfloat16', 'int32']
    """

    def one(leaf: Any) -> Any:
        narrow = jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jnp.result_type(leaf) != dtype
        return jnp.asarray(leaf).astype(dtype) if narrow else leaf

    return jax.tree.map(one, tree)


def half(frozen: Frozen, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Frozen:
    """The frozen half with its weights stored in bfloat16: half of their memory, and nothing to cast in a step.

        state, frozen = jtl.init(variables, tx, trainable=mask, key=key)
        frozen = jtl.precision.half(frozen)

    `jtl.load(..., dtype=jnp.bfloat16)` gives the same without ever holding them in float32: `jtl.init` makes float32
    of the trained leaves. Statistics stay as they are.

    Args:
      frozen: the frozen half.
      dtype: of its floats.
    """
    return frozen._replace(params=cast(frozen.params, dtype))


def mixed_precision(loss_fn: LossFn, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> LossFn:
    """The loss with weights and inputs in bfloat16, and so the model's arithmetic.

        loss_fn = jtl.mixed_precision(jtl.supervised(model, jtl.losses.cross_entropy))

    Trained leaves, their gradients and the optimizer stay float32: what is cast is what the loss sees of them. The
    losses of `jtl.losses` compute in float32, of outputs in bfloat16. Running statistics stay as they are, and so do
    the batch's weights and targets, and all that is no float. Which modules train is decided by the mask, as ever.

    The models of jtl have a field for the same, `model.clone(dtype=jnp.bfloat16)`, which keeps each layer's own rule on
    what to compute in float32; prefer it to the wrapper where there is one.

    Args:
      loss_fn: any loss function. It needs no change.
      dtype: bfloat16. float16 has too small a range for gradients that are not scaled, and is refused.

    Returns:
      A loss function. Make it once: compiled steps are found by it.

    Raises:
      ConfigError: another dtype than bfloat16, float32 or float64.

    References:
      Micikevicius et al, Mixed precision training, ICLR 2018 (arXiv 1710.03740), for the float32 copy of weights.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ConfigError(f"dtype={jnp.dtype(dtype).name}: expected bfloat16; float16 would need its loss to be scaled")
    kept = {"weight", getattr(loss_fn, "target", "label")}

    def loss(params: Params, collections: Collections, batch: Batch, *, key: Key | None) -> tuple[jax.Array, Aux]:
        given = cast(params, dtype)
        policy = modes.current()
        if policy is not None:
            policy.recognise(given)
        entries = cast(batch, dtype)
        if isinstance(batch, Mapping):
            entries = {name: batch[name] if name in kept else value for name, value in entries.items()}
        with standard_promotion():  # of half-precision values and float32 statistics
            value, aux = loss_fn(given, collections, entries, key=key)
        return value.astype(jtree.wide_dtype(value.dtype)), aux._replace(
            collections=_as_before(aux.collections, collections)
        )

    make = getattr(loss_fn, "checker", None)
    if make is not None:
        setattr(loss, "checker", _checking(make))  # noqa: B010
    return loss


def _as_before(after: Collections, before: Collections) -> Collections:
    """Statistics in the dtypes that they had."""
    dtypes = {path: leaf.dtype for path, leaf in jtree.leaves_with_paths(before)}
    return jtree.map_with_paths(lambda path, leaf: leaf.astype(dtypes.get(path, leaf.dtype)), after)


def _checking(make: Callable[..., Callable[[Batch], None]]) -> Callable[..., Callable[[Batch], None]]:
    """The checker of a loss, which traces the model with whatever dtypes its leaves are stored in."""

    def checker(params: Params, collections: Collections) -> Callable[[Batch], None]:
        check = make(params, collections)

        def checked(batch: Batch) -> None:
            with standard_promotion():
                check(batch)

        return checked

    return checker

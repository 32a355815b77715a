"""What a training step evolves, and what it only reads."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import quantized, schedule
from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError
from jtl.modes import Modes
from jtl.schedule import Phase, Strategy
from jtl.typing import Collections, Key, MaskLike, Params, PyTree, Variables


class TrainState(NamedTuple):
    """What evolves: trained leaves alone, `None` in the place of frozen ones.

    Attributes:
      step: number of batches consumed, those whose update a guard skipped too: the place in the data; int32 scalar.
      params: the trained leaves, float32 or wider.
      collections: the statistics that the mask lets move.
      opt_state: the optimizer's state, for trained leaves only.
      key: the random key of the next step.
    """

    step: jax.Array
    params: Params
    collections: Collections
    opt_state: optax.OptState
    key: Key


class Frozen(NamedTuple):
    """What a step only reads: never differentiated, never donated, never returned.

    Attributes:
      params: the frozen leaves in their storage dtype, `None` in the place of trained ones.
      collections: the statistics that the mask holds still.
    """

    params: Params
    collections: Collections


def init(
    variables: Variables,
    tx: optax.GradientTransformation | Strategy,
    *,
    trainable: MaskLike | None = None,
    key: Key,
) -> tuple[TrainState, Frozen]:
    """Cut a model's variables in two by a mask, and start the optimizer on the trained half.

        variables                 state.params        frozen.params
        {head: w, stem: v}   ->   {head: w, stem: -}  {head: -, stem: v}

    The trained half is copied, so that a step may donate it while `variables` stays usable;
    low-precision floats in it become float32. The frozen half is not copied.

    Args:
      variables: `{"params": params, **collections}`, as `module.init` or `jtl.load` gives it.
      tx: any optax transform, without masks: it only ever sees trained leaves. Or a strategy, whose first phase
        gives transform and mask.
      trainable: the mask. True means trained.
      key: the random key that the run consumes.

    Returns:
      `(state, frozen)`.

    Raises:
      ConfigError: `variables` has no params, `key` is not a typed key, or there is no mask, or one beside a strategy's.
      MaskError: the mask does not fit, selects nothing, or selects a leaf that is not a float.
      PatternError: a pattern of the mask matches nothing.

    >>> variables = {"params": {"head": jnp.ones(2), "stem": jnp.ones(3)}}
    >>> state, frozen = init(variables, optax.sgd(0.1), trainable={"head": True, "stem": False},
    ...                      key=jax.random.key(0))
    >>> jtree.paths(state.params), jtree.paths(frozen.params)
    (['head'], ['stem'])
    """
    _check_key(key)
    tx, trainable = _first_phase(tx, trainable)
    params, collections = _take_apart(variables)
    mask = jtree.as_bools(trainable, params)
    _check_trainable(params, mask, trainable)
    trained, still = jtree.partition(params, mask)
    moving, resting = jtree.partition(collections, Modes(params, mask).moving)
    trained = jax.tree.map(_master, trained)
    with standard_promotion():
        opt_state = jax.tree.map(_owner(trained), tx.init(trained))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        collections=jax.tree.map(jnp.array, moving),
        opt_state=opt_state,
        key=jnp.array(key),
    )
    return state, Frozen(jax.tree.map(jnp.asarray, still), jax.tree.map(jnp.asarray, resting))


def change(state: TrainState, frozen: Frozen, phase: Phase) -> tuple[TrainState, Frozen]:
    """Go on with another mask or transform: step and key stay, and values, and statistics.

    Of the optimizer's state, what belongs to leaves that stay trained is kept, and so is what belongs to none, such as
    the count of a schedule, where both transforms have it in the same place. The rest starts anew.

    Args:
      state: the trained half.
      frozen: the frozen half.
      phase: what comes.

    Returns:
      `(state, frozen)` in the structure that the phase needs. Leaves that are no longer trained are copied, so that
      the state given may be donated.

    Raises:
      MaskError, PatternError: as `init`.
    """
    whole = variables(state, frozen)
    new, held = init(whole, phase.tx, trainable=phase.trainable, key=state.key)
    evolved = {id(leaf) for leaf in jax.tree.leaves(state)}
    held = jax.tree.map(lambda leaf: jnp.array(leaf) if id(leaf) in evolved else leaf, held)
    opt_state = new.opt_state if phase.fresh else _kept(state.opt_state, new.opt_state)
    return new._replace(step=jnp.array(state.step), opt_state=opt_state), held


def _owner(trained: PyTree) -> Callable[[Any], Any]:
    """A function that copies the leaves of an optimizer's state which are not its own: a step will donate them.

    Some transforms keep the params they are given, have one zero for all their counts, or one for all their states.
    """
    seen = {id(leaf) for leaf in jax.tree.leaves(trained)}

    def own(leaf: Any) -> Any:
        fresh = id(leaf) not in seen and np.size(leaf) > 1
        seen.add(id(leaf))
        return leaf if fresh else jnp.array(leaf)

    return own


def _kept(before: optax.OptState, after: optax.OptState) -> optax.OptState:
    old = dict(jtree.leaves_with_paths(before))

    def keep(path: str, leaf: jax.Array) -> jax.Array:
        found = old.get(path)
        alike = found is not None and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        return jnp.array(found) if alike else leaf

    return jtree.map_with_paths(keep, after)


def _first_phase(tx: Any, trainable: MaskLike | None) -> tuple[optax.GradientTransformation, MaskLike]:
    if not isinstance(tx, Strategy):
        if trainable is None:
            raise ConfigError("init needs a mask: trainable=jtl.select(...), or a strategy in the place of tx")
        return tx, trainable
    if trainable is not None:
        raise ConfigError(f"the strategy {tx.name!r} has masks of its own; leave trainable= out")
    return schedule.check(tx).tx, tx.trainable


def variables(state: TrainState, frozen: Frozen) -> dict[str, PyTree]:
    """The whole tree again, for inference, export, or a loop of one's own.

    Args:
      state: the trained half.
      frozen: the frozen half.

    Returns:
      `{"params": params, **collections}`; leaves are shared, not copied.
    """
    collections = jtree.combine(state.collections, frozen.collections)
    return {"params": jtree.combine(state.params, frozen.params), **collections}


def freeze(state: TrainState, frozen: Frozen) -> tuple[TrainState, Frozen]:
    """The same model with every leaf frozen and no optimizer.

    An evaluation step takes it as it takes any state. Runs with different masks then share one
    compiled evaluation.

    Args:
      state: the trained half.
      frozen: the frozen half.

    Returns:
      `(state, frozen)`; leaves are shared, not copied.
    """
    whole = variables(state, frozen)
    params, collections = _take_apart(whole)
    empty_params, empty_collections = (jax.tree.map(lambda _: None, tree) for tree in (params, collections))
    hollow = state._replace(params=empty_params, collections=empty_collections, opt_state=())
    return hollow, Frozen(params, collections)


def standard_promotion() -> contextlib.AbstractContextManager[None]:
    """JAX's standard dtype promotion, which optax counts on, also where a user's program is strict."""
    return jax.numpy_dtype_promotion("standard")


def _check_key(key: Any) -> None:
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ConfigError(f"key must be a typed random key such as jax.random.key(0), got {type(key).__name__}")


def _take_apart(variables: Variables) -> tuple[Params, Collections]:
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ConfigError(f"variables must be {{'params': ..., **collections}}, as module.init gives it; got {found}")
    return variables["params"], {name: value for name, value in variables.items() if name != "params"}


def _check_trainable(params: Params, mask: PyTree, trainable: MaskLike) -> None:
    chosen = [
        (path, leaf)
        for (path, leaf), keep in zip(jtree.leaves_with_paths(params), jax.tree.leaves(mask), strict=True)
        if keep
    ]
    if not chosen:
        raise MaskError(f"the mask {trainable!r} trains none of the {len(jtree.paths(params))} leaves")
    quantized.require_frozen(params, mask)
    for path, leaf in chosen:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise MaskError(f"the mask trains {path}, of dtype {jnp.result_type(leaf)}: only floats can be trained")


def _master(leaf: Any) -> jax.Array:
    return jnp.array(leaf, dtype=jtree.wide_dtype(jnp.result_type(leaf)), copy=True)

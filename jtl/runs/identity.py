"""What makes a run this run: what must be the same for it to go on in its folder."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jtl import tree as jtree
from jtl.schedule import Phase, Strategy
from jtl.state import Frozen, TrainState, standard_promotion, variables
from jtl.typing import PyTree


def identity(
    config: Mapping[str, Any],
    strategy: Strategy,
    state: TrainState,
    frozen: Frozen,
    batches: Any,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run's folder is compared by, as JSON values.

    Args:
      config: what the user names it by.
      strategy: its phases.
      state: the trained half at its start.
      frozen: the frozen half at its start.
      batches: the run's data; those of `jtl.data.batches` have a fingerprint.
      options: of `jtl.fit`, as far as they change numbers.
    """
    whole = variables(state, frozen)
    return {
        "config": dict(config),
        "data": getattr(batches, "fingerprint", None),
        "start": {"step": int(state.step), "key": _key(state.key), "leaves": _digests(whole)},
        "phases": [_phase(phase, whole["params"]) for phase in strategy.phases],
        "options": dict(options),
    }


def _key(key: Any) -> str:
    return " ".join(map(str, jax.random.key_data(key).ravel().tolist()))


def _digests(tree: PyTree) -> dict[str, str]:
    return {path: jtree.digest(leaf)[:16] for path, leaf in jtree.leaves_with_paths(tree)}


def _phase(phase: Phase, params: PyTree) -> dict[str, Any]:
    mask = jtree.as_bools(phase.trainable, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), _master(leaf)), params)
    trained = jtree.partition(shapes, mask)[0]
    until = phase.until if phase.until is None or isinstance(phase.until, int) else list(phase.until)
    return {
        "trained": f"{jtree.size(trained)} in {len(jtree.paths(trained))} leaves, {_hash(jtree.paths(trained))}",
        "until": until,
        "optimizer": _computes(phase, trained),
    }


def _master(leaf: Any) -> Any:
    return jtree.wide_dtype(jnp.result_type(leaf))


def _computes(phase: Phase, trained: PyTree) -> str:
    """A digest of what a transform computes, with its rates and schedules: of its jaxpr."""
    tx = optax.with_extra_args_support(phase.tx)

    def update(grads: PyTree, params: PyTree, value: jax.Array) -> Any:
        return tx.update(grads, tx.init(params), params, value=value)

    with standard_promotion():
        try:
            closed = jax.make_jaxpr(update)(trained, trained, jax.ShapeDtypeStruct((), jnp.float32))
        except Exception:  # a transform that needs more than a step gives it here is not compared
            return "unknown"
    text = re.sub(r" at 0x[0-9a-f]+", "", str(closed.jaxpr))
    return _hash([text, *(jtree.digest(const) for const in closed.consts)])


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

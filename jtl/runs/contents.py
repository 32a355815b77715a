"""What of a run is stored, and how a state comes out of it again."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import tree as jtree
from jtl.errors import CheckpointError
from jtl.runs.steps import Restored
from jtl.schedule import Progress, Strategy
from jtl.state import Frozen, TrainState, init, variables
from jtl.typing import PyTree, Variables

MODEL, REST = "model", "optimizer"
"""The items of a checkpoint: what inference needs, and what only training does."""


class Evolved(NamedTuple):
    """Paths of leaves that a run has trained so far, or whose statistics moved, in this phase or an earlier one."""

    params: frozenset[str] = frozenset()
    collections: frozenset[str] = frozenset()

    def with_(self, state: TrainState) -> "Evolved":
        """And those of a state."""
        found = frozenset(jtree.paths(state.params)), frozenset(jtree.paths(state.collections))
        return Evolved(self.params | found[0], self.collections | found[1])


def items(state: TrainState, frozen: Frozen, evolved: Evolved) -> dict[str, PyTree]:
    """What a checkpoint holds: all that is not as it was at the start, and nothing of the frozen base.

    A leaf that an earlier phase trained and this one holds still is no longer the base's, so it is stored.

    Args:
      state: the trained half.
      frozen: the frozen half.
      evolved: what the run has trained so far.
    """
    model = {
        "params": {**_by_path(state.params), **_those(frozen.params, evolved.params)},
        "collections": {**_by_path(state.collections), **_those(frozen.collections, evolved.collections)},
    }
    named = {f"{part}/{path}": leaf for part, leaves in model.items() for path, leaf in leaves.items()}
    return {MODEL: named, REST: {"opt_state": state.opt_state, "step": state.step, "key": state.key}}


def part(items: Mapping[str, Mapping[str, Any]], item: str, name: str) -> dict[str, Any]:
    """The leaves below a name, by their paths from there."""
    return {path.removeprefix(f"{name}/"): leaf for path, leaf in items[item].items() if path.startswith(f"{name}/")}


def rebuild(stored: Restored, strategy: Strategy, state: TrainState, frozen: Frozen) -> tuple[TrainState, Frozen]:
    """The two halves as they were when a checkpoint was written.

    Args:
      stored: the checkpoint.
      strategy: of the run.
      state: the trained half at the run's start.
      frozen: the frozen half at the run's start.

    Raises:
      CheckpointError: a leaf is missing, is not one of the model's, or has another shape or dtype; it is named.
    """
    phase, rest = strategy.phases[progress(stored).phase], stored.items[REST]
    whole = fill(variables(state, frozen), stored.items)
    new, held = init(whole, phase.tx, trainable=phase.trainable, key=rest["key"])
    known = evolved(stored).params
    absent = [path for path in jtree.paths(new.params) if path not in known]
    if absent:
        raise CheckpointError(f"the checkpoint of step {stored.step} lacks params {absent[:3]}, which are trained")
    opt_state = _filled(new.opt_state, part(stored.items, REST, "opt_state"), "opt_state", partly=False)
    return new._replace(opt_state=opt_state, step=jnp.asarray(rest["step"])), held


def evolved(stored: Restored) -> Evolved:
    """What a run had trained when a checkpoint was written."""
    found = (frozenset(part(stored.items, MODEL, name)) for name in ("params", "collections"))
    return Evolved(*found)


def progress(stored: Restored) -> Progress:
    """Where in its strategy a run was."""
    phase, began, best, waited = stored.notes["progress"]
    return Progress(phase, began, math.inf if best is None else best, waited)


def plain_progress(progress: Progress) -> list[Any]:
    """As JSON, which has no infinity."""
    return [progress.phase, progress.began, progress.best if math.isfinite(progress.best) else None, progress.waited]


def fill(variables: Variables, items: Mapping[str, Mapping[str, Any]]) -> dict[str, PyTree]:
    """A model's variables with all leaves of a checkpoint in their places.

    Raises:
      CheckpointError: a leaf has no place, or another shape or dtype there; it is named.
    """
    rest = {name: value for name, value in variables.items() if name != "params"}
    moved = _filled(rest, part(items, MODEL, "collections"), "collections", partly=True)
    return {"params": replaced(variables["params"], part(items, MODEL, "params")), **moved}


def replaced(params: PyTree, found: Mapping[str, Any]) -> PyTree:
    """Params with those found in their places; errors as of `fill`."""
    return _filled(params, found, "params", partly=True)


def _by_path(tree: PyTree) -> dict[str, Any]:
    return dict(jtree.leaves_with_paths(tree))


def _those(tree: PyTree, paths: frozenset[str]) -> dict[str, Any]:
    return {path: leaf for path, leaf in jtree.leaves_with_paths(tree) if path in paths}


def _filled(tree: PyTree, found: Mapping[str, Any], where: str, *, partly: bool) -> PyTree:
    known = dict(jtree.leaves_with_paths(tree))
    strange = [path for path in found if path not in known]
    absent = [] if partly else [path for path in known if path not in found]
    if strange or absent:
        what = f"{where} of the checkpoint that have no place here: {strange[:3]}" if strange else ""
        what += f"{'; ' if strange and absent else ''}{where} that it lacks: {absent[:3]}" if absent else ""
        raise CheckpointError(f"{what}. It was written by another model, strategy or optimizer")
    for path, leaf in found.items():
        like = known[path]
        # What is stored in half precision is trained in single.
        fits = leaf.dtype == like.dtype or (where == "params" and leaf.dtype == jtree.wide_dtype(like.dtype))
        if jnp.shape(leaf) != jnp.shape(like) or not fits:
            raise CheckpointError(
                f"{where}/{path} is {leaf.dtype}{list(jnp.shape(leaf))} in the checkpoint; "
                f"expected {like.dtype}{list(jnp.shape(like))}"
            )
    return jtree.map_with_paths(lambda path, leaf: _placed(found[path], leaf) if path in found else leaf, tree)


def _placed(value: Any, like: Any) -> jax.Array:
    """On the devices where the leaf was that it replaces."""
    if isinstance(value, jax.Array):
        return value
    spread = isinstance(like, jax.Array) and len(like.sharding.device_set) > 1
    return jax.device_put(np.asarray(value), like.sharding) if spread else jnp.asarray(value)

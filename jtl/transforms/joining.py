"""One optimizer for leaves that begin to be trained at different times."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.typing import MaskLike, Params, PyTree


class JoinedState(NamedTuple):
    """The state of `joining`.

    Attributes:
      groups: of each group of leaves that joined together: the transform's state, with its own leaves alone.
    """

    groups: tuple[optax.OptState, ...]


def joining(tx: optax.GradientTransformation, masks: Sequence[MaskLike]) -> optax.GradientTransformationExtraArgs:
    """The transform, as if the age of a leaf counted from when it joined.

    A bias correction such as Adam's divides by what a moment can have gathered in `count` steps. A leaf that joins at
    step 1,000 with moments of zero would get updates about three times too large if it shared the count of the
    others. So each group of leaves has counts of its own: those that stand beside moments, by optax's name for
    them. All else is common: a clipped norm is over all leaves, and a schedule goes on.

    Args:
      tx: any optax transform.
      masks: of the leaves that are trained from each phase on, the first phase's first. A leaf belongs to
        the first mask that has it.

    Raises:
      ConfigError: there is no mask.
    """
    if not masks:
        raise ConfigError("joining needs at least one mask")
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> JoinedState:
        return JoinedState(tuple(tx.init(part) for part in _groups(params, masks)))

    def update(updates: PyTree, state: Any, params: Params | None = None, **extra: Any) -> Any:
        parts, groups = [], []
        template = jax.eval_shape(tx.init, updates)
        local = _counts(template, jax.tree.structure(updates))
        for number, part in enumerate(_groups(updates, masks)):
            whole = _whole(template, state.groups, number, local)
            new, whole = tx.update(updates, whole, params, **extra)
            parts.append(_like(part, new))
            groups.append(_like(state.groups[number], whole))
        return jtree.combine(*parts), JoinedState(tuple(groups))

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(tree: PyTree, masks: Sequence[MaskLike]) -> list[PyTree]:
    """The leaves of each group, absent elsewhere."""
    groups, rest = [], tree
    for mask in masks:
        chosen = dict(jtree.leaves_with_paths(jtree.as_bools(mask, tree)))
        group = jtree.map_with_paths(lambda path, _, chosen=chosen: chosen[path], rest)
        part, rest = jtree.partition(rest, group)
        groups.append(part)
    left = jtree.paths(rest)
    if left:
        raise ConfigError(f"joining: none of the {len(masks)} masks has the leaves {left[:3]}")
    return groups


def _whole(template: PyTree, groups: Sequence[PyTree], number: int, local: set[str]) -> PyTree:
    """A state for all leaves as one group needs it: with its own counts."""
    found: dict[str, Any] = {}
    for group in reversed(groups):  # what is common is the first group's
        found |= dict(jtree.leaves_with_paths(group))
    own = dict(jtree.leaves_with_paths(groups[number]))
    found |= {path: own[path] for path in local}
    return jtree.map_with_paths(lambda path, _: found[path], template)


def _like(part: PyTree, whole: PyTree) -> PyTree:
    """The leaves of a whole tree at the places of a part."""
    values = dict(jtree.leaves_with_paths(whole))
    return jtree.map_with_paths(lambda path, _: values[path], part)


def _counts(state: PyTree, params: Any) -> set[str]:
    """The paths of counts that stand beside a tree of the params' structure."""
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: jax.tree.structure(node) == params)
    beside = {path[:-1] for path, node in nodes if jax.tree.structure(node) == params}
    names = {jtree.path_str(path): path for path, _ in nodes}
    return {name for name, path in names.items() if path[:-1] in beside and name.split("/")[-1] == "count"}

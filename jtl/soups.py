"""Averages of models that began at the same pretrained point: WiSE-FT and soups."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.typing import Variables


def interpolate(start: Variables, end: Variables, alpha: float) -> Variables:
    r"""The point :math:`(1 - \alpha) w_0 + \alpha w_1` on the line between two models.

    Between the pretrained and the fine-tuned weights it often keeps the accuracy of both, on shifted data and on
    that of the task.

    Args:
      start: variables at alpha 0.
      end: variables at alpha 1, of the same shapes.
      alpha: from 0 to 1; a little outside extrapolates.

    Returns:
      Variables. Statistics of batch normalisation are interpolated too; leaves that are not floats are the end's.

    Raises:
      ConfigError: the trees differ in structure or shapes, or leaves that are not floats differ in value.

    References:
      Wortsman et al, Robust fine-tuning of zero-shot models, 2021 (arXiv 2109.01903).

    >>> interpolate({"params": jnp.zeros(1)}, {"params": jnp.ones(1)}, 0.25)["params"].tolist()
    [0.25]
    """
    return _weighted([start, end], [1 - alpha, alpha])


def uniform_soup(members: Sequence[Variables]) -> Variables:
    """The mean of models.

    Args:
      members: variables of the same shapes, fine-tuned from the same weights.

    Raises:
      ConfigError: there is none, or they differ as `interpolate` says.

    References:
      Wortsman et al, Model soups, 2022 (arXiv 2203.05482).
    """
    if not members:
        raise ConfigError("a soup needs at least one member")
    return _weighted(members, [1 / len(members)] * len(members))


class Soup(NamedTuple):
    """What `greedy_soup` found.

    Attributes:
      variables: the mean of the chosen members.
      chosen: their numbers, in the order they were taken.
      score: of the mean.
    """

    variables: Variables
    chosen: tuple[int, ...]
    score: float


def greedy_soup(members: Sequence[Variables], score: Callable[[Variables], float]) -> Soup:
    """Add members from the best on, and keep each that does not make the mean worse.

    Args:
      members: variables of the same shapes, fine-tuned from the same weights.
      score: of variables on held-out data that is not the test set; higher is better.

    Raises:
      ConfigError: there is none, or they differ as `interpolate` says.

    References:
      Wortsman et al, 2022 (arXiv 2203.05482), recipe 1.
    """
    if not members:
        raise ConfigError("a soup needs at least one member")
    scores = [float(score(member)) for member in members]
    first, *others = sorted(range(len(members)), key=lambda number: -scores[number])
    soup = Soup(members[first], (first,), scores[first])
    for number in others:
        chosen = (*soup.chosen, number)
        mean = uniform_soup([members[each] for each in chosen])
        value = float(score(mean))
        if value >= soup.score:
            soup = Soup(mean, chosen, value)
    return soup


def _weighted(members: Sequence[Variables], weights: Sequence[float]) -> Variables:
    shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), dict(m)) for m in members]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ConfigError(f"members 0 and {number} differ in structure, shapes or dtypes; they must be one model's")

    def mean(path: str, *leaves: jax.Array) -> jax.Array:
        if all(leaf is leaves[0] for leaf in leaves):
            return leaves[0]
        if jnp.issubdtype(leaves[0].dtype, jnp.floating):
            wide = jtree.wide_dtype(leaves[0].dtype)
            total = sum(jnp.asarray(w, wide) * leaf.astype(wide) for w, leaf in zip(weights, leaves, strict=True))
            return jnp.asarray(total).astype(leaves[0].dtype)
        if any(not np.array_equal(leaf, leaves[0]) for leaf in leaves):
            raise ConfigError(f"{path} is {leaves[0].dtype} and differs between the members: it has no mean")
        return leaves[-1]

    trees = [dict(member) for member in members]
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: mean(jtree.path_str(path), *leaves), *trees)

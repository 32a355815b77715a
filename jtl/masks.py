"""Masks: functions from params to a pytree of bools, with an algebra. True means trained.

A mask is exactly what optax calls a mask, so the same object goes into `jtl.init`,
`optax.masked`, `optax.partition`, `optax.freeze(~mask)` and
`optax.add_decayed_weights(mask=mask)`:

    trainable = select("head") | select("encoder/layer_5") - biases()
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jtl import rules
from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError, PatternError
from jtl.typing import MaskLike, PyTree


class Mask:
    """A function from a tree to bools, closed under `|`, `&`, `-` and `~`.

    Operands may also be plain functions or pytrees of bools. On a partitioned tree, absent
    leaves stay absent in the result, and patterns may still name them: a mask inside an optax
    chain means the same whether the chain sees the whole tree or its trained half.

    Args:
      fn: from a tree to Python bools in its structure.
      text: what `repr` shows.
      parts: of a union, for those who report on each.

    >>> mask = select("head") | select("**/bias")
    >>> mask({"head": {"kernel": 0}, "stem": {"bias": 0, "kernel": 0}})
    {'head': {'kernel': True}, 'stem': {'bias': True, 'kernel': False}}
    >>> ~mask
    ~(select('head') | select('**/bias'))
    """

    def __init__(self, fn: Callable[[PyTree], PyTree], text: str, parts: Sequence["Mask"] = ()):
        self._fn, self._text, self._parts = fn, text, tuple(parts)

    @property
    def parts(self) -> tuple["Mask", ...]:
        """The masks that this one is the union of; of one that is no union, itself."""
        return self._parts or (self,)

    def __call__(self, tree: PyTree) -> PyTree:
        """Bools in the structure of `tree`."""
        return self._fn(tree)

    def __repr__(self) -> str:
        return self._text

    def __or__(self, other: MaskLike) -> "Mask":
        return _binary(operator.or_, "|", self, other)

    def __ror__(self, other: MaskLike) -> "Mask":
        return _binary(operator.or_, "|", other, self)

    def __and__(self, other: MaskLike) -> "Mask":
        return _binary(operator.and_, "&", self, other)

    def __rand__(self, other: MaskLike) -> "Mask":
        return _binary(operator.and_, "&", other, self)

    def __sub__(self, other: MaskLike) -> "Mask":
        return _binary(lambda a, b: a and not b, "-", self, other)

    def __rsub__(self, other: MaskLike) -> "Mask":
        return _binary(lambda a, b: a and not b, "-", other, self)

    def __invert__(self) -> "Mask":
        return Mask(lambda tree: jax.tree.map(operator.not_, self(tree)), f"~{self._text}")


def _binary(op: Callable[[bool, bool], bool], sign: str, left: MaskLike, right: MaskLike) -> Mask:
    for side in (left, right):
        if isinstance(side, str):
            raise MaskError(f"cannot combine a mask with the string {side!r}: use select({side!r})")

    def apply(tree: PyTree) -> PyTree:
        return jax.tree.map(op, jtree.as_bools(left, tree), jtree.as_bools(right, tree))

    parts = [part for side in (left, right) for part in _parts(side)] if sign == "|" else []
    return Mask(apply, f"({_name(left)} {sign} {_name(right)})", parts)


def _parts(mask: MaskLike) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, Mask) else (Mask(lambda tree: jtree.as_bools(mask, tree), _name(mask)),)


def _name(mask: MaskLike) -> str:
    return repr(mask) if isinstance(mask, Mask) else getattr(mask, "__name__", "<mask>")


def select(*patterns: str) -> Mask:
    """The leaves under any of the patterns; see `jtl.rules` for their grammar.

    Args:
      *patterns: each must match at least one leaf of any tree the mask is called on.

    Returns:
      A mask. Calling it raises `PatternError`, listing the nearest paths, when a pattern
      matches nothing.

    Raises:
      PatternError: no pattern is given, or one is malformed.

    >>> select("head")({"head": {"kernel": 0}, "headline": 0})
    {'head': {'kernel': True}, 'headline': False}
    """
    if not patterns:
        raise PatternError("select() needs at least one pattern; nothing() selects no leaf, everything() all")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PatternError(f"select() takes patterns one by one, select('a', 'b'); got {pattern!r}")
        rules.compile_pattern(pattern)

    def apply(tree: PyTree) -> PyTree:
        rules.require_matches(patterns, tree)
        return jtree.map_with_paths(lambda path, _: any(rules.matches(p, path) for p in patterns), tree)

    parts = [select(pattern) for pattern in patterns] if len(patterns) > 1 else []
    return Mask(apply, f"select({', '.join(map(repr, patterns))})", parts)


def where(predicate: Callable[[str, Any], bool], text: str = "") -> Mask:
    """The leaves for which `predicate(path, leaf)` holds.

    >>> where(lambda path, leaf: leaf > 1)({"a": 1, "b": 2})
    {'a': False, 'b': True}
    """
    name = text or f"where({getattr(predicate, '__name__', predicate)})"
    return Mask(lambda tree: jtree.map_with_paths(lambda path, leaf: bool(predicate(path, leaf)), tree), name)


def everything() -> Mask:
    """Every leaf: full fine-tuning."""
    return where(lambda path, leaf: True, "everything()")


def nothing() -> Mask:
    """No leaf. `jtl.init` refuses it, but it is the zero of the algebra."""
    return where(lambda path, leaf: False, "nothing()")


def biases() -> Mask:
    """Leaves named `bias`, of every kind of layer.

    References:
      Ben Zaken et al, BitFit, 2021 (arXiv 2106.10199), trains these alone.
    """
    return where(lambda path, leaf: path.rpartition("/")[2] == "bias", "biases()")


def kernels() -> Mask:
    """Leaves of two or more axes: what weight decay is usually meant for.

    Neither biases nor the scales of normalisation layers are among them.
    """
    return where(lambda path, leaf: len(np.shape(leaf)) >= 2, "kernels()")


def norms() -> Mask:
    """Scale and bias of normalisation layers: a leaf named `scale`, and the `bias` beside one."""

    def apply(tree: PyTree) -> PyTree:
        owners = {path.rpartition("/")[0] for path in jtree.paths(tree, absent=True) if _leaf_name(path) == "scale"}

        def is_norm(path: str, _: Any) -> bool:
            return path.rpartition("/")[0] in owners and _leaf_name(path) in ("scale", "bias")

        return jtree.map_with_paths(is_norm, tree)

    return Mask(apply, "norms()")


def _leaf_name(path: str) -> str:
    return path.rpartition("/")[2]


def depth(groups: Sequence[Sequence[str]], start: int | None = None, stop: int | None = None) -> Mask:
    """The leaves of a range of depth groups, counted like a slice.

    Args:
      groups: patterns of each group, ordered from the input to the output, as
        `jtl.models.depth_groups` gives them.
      start: first group taken; negative counts from the output.
      stop: first group not taken.

    Returns:
      The union of the groups' patterns.

    Raises:
      ConfigError: the range holds no group.

    >>> depth([["stem"], ["block_0"], ["block_1"]], -2)
    select('block_0', 'block_1')
    """
    chosen = [pattern for group in list(groups)[start:stop] for pattern in group]
    if not chosen:
        raise ConfigError(f"no depth group in [{start}:{stop}]: there are {len(groups)} groups")
    return select(*chosen)

"""Paths of leaves, and the two halves of a tree.

A path is the `/`-joined names from the root to a leaf: `encoder/layer_0/query/kernel`.
An absent leaf is `None`, so both halves of a partition keep the structure of the whole.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.errors import MaskError
from jtl.typing import MaskLike, PyTree

KeyPath = tuple[Any, ...]


def path_str(path: KeyPath) -> str:
    """The `/`-joined form of a JAX key path.

    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path({"head": {"bias": 0, "kernel": 1}})]
    ['head/bias', 'head/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_placeholder(node: PyTree) -> bool:
    # Only childless nodes: a dict of absent leaves must still be walked for its paths.
    return node is None or (isinstance(node, tuple | list | dict) and not node)


def leaves_with_paths(tree: PyTree, *, absent: bool = False) -> list[tuple[str, Any]]:
    """Every leaf with its path, in the order of `jax.tree.leaves`.

    Args:
      tree: any pytree.
      absent: also list the places of absent leaves, with their placeholder as value.

    >>> leaves_with_paths({"head": {"kernel": 3.0}, "stem": None}, absent=True)
    [('head/kernel', 3.0), ('stem', None)]
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_placeholder if absent else None)
    return [(path_str(path), leaf) for path, leaf in pairs]


def paths(tree: PyTree, *, absent: bool = False) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`.

    >>> paths({"head": {"bias": 0, "kernel": 1}, "stem": {"kernel": 2}})
    ['head/bias', 'head/kernel', 'stem/kernel']
    """
    return [path for path, _ in leaves_with_paths(tree, absent=absent)]


def map_with_paths(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Map `fn(path, leaf)` over a tree; absent leaves stay absent.

    >>> map_with_paths(lambda path, leaf: len(path), {"head": 1, "stem": None})
    {'head': 4, 'stem': None}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), tree)


def as_bools(mask: MaskLike, tree: PyTree) -> PyTree:
    """A mask as a pytree of bools with the structure of `tree`.

    Args:
      mask: booleans with the structure of `tree`, or a function returning them.
      tree: the tree that the mask is for.

    Returns:
      Python bools, with `None` where the tree has absent leaves.

    Raises:
      MaskError: the structures differ, or a leaf of the mask is not a bool.
    """
    if isinstance(mask, str):
        raise MaskError(f"a mask is a pytree of bools or a function, got the string {mask!r}: use select({mask!r})")
    values = mask(tree) if callable(mask) else mask
    expected, got = jax.tree.structure(tree), jax.tree.structure(values)
    if expected != got:
        raise MaskError(_structure_message(tree, values))
    for path, value in leaves_with_paths(values):
        if not isinstance(value, bool | np.bool_):
            raise MaskError(f"the mask's leaf {path} is {value!r} of type {type(value).__name__}, expected a bool")
    return jax.tree.map(bool, values)


def _structure_message(tree: PyTree, values: PyTree) -> str:
    wanted, given = set(paths(tree)), set(paths(values))
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    details = [f"missing {missing[:3]}" if missing else "", f"not in the tree {extra[:3]}" if extra else ""]
    found = "; ".join(d for d in details if d) or f"{jax.tree.structure(values)} against {jax.tree.structure(tree)}"
    return f"the mask has {len(given)} leaves, the tree {len(wanted)}, and their structures differ: {found}"


def partition(tree: PyTree, mask: MaskLike) -> tuple[PyTree, PyTree]:
    """Split a tree into its selected leaves and the rest.

    Absent leaves become `None`, so `combine(*partition(tree, mask))` is `tree`.

    Args:
      tree: any pytree of arrays.
      mask: booleans with the structure of `tree`, or a function returning them.

    Returns:
      `(selected, rest)`.

    Raises:
      MaskError: the mask's structure differs from the tree's.

    >>> partition({"head": 1, "stem": 2}, {"head": True, "stem": False})
    ({'head': 1, 'stem': None}, {'head': None, 'stem': 2})
    """
    bools = as_bools(mask, tree)
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, bools, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, bools, tree)
    return selected, rest


def combine(*trees: PyTree) -> PyTree:
    """Put the parts of a partitioned tree together again.

    Args:
      *trees: trees of one structure; at each place at most one of them has a leaf.

    Returns:
      One tree with every leaf that any of the trees has.

    Raises:
      ValueError: the structures differ, or two trees have the same leaf.

    >>> combine({"head": 1, "stem": None}, {"head": None, "stem": 2})
    {'head': 1, 'stem': 2}
    """

    def pick(path: KeyPath, *leaves: Any) -> Any:
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) > 1:
            raise ValueError(f"combine: {len(present)} of {len(leaves)} trees have a leaf at {path_str(path)}")
        return present[0] if present else None

    first, *others = (jax.tree.structure(tree, is_leaf=lambda x: x is None) for tree in trees)
    for other in others:
        if other != first:
            raise ValueError(f"combine: the trees' structures differ: {first} against {other}")
    return jax.tree_util.tree_map_with_path(pick, *trees, is_leaf=lambda x: x is None)


def mask_of(selected: PyTree, whole: PyTree) -> PyTree:
    """The bools that tell which leaves of `whole` are present in `selected`.

    >>> mask_of({"head": 1, "stem": None}, {"head": 1, "stem": 2})
    {'head': True, 'stem': False}
    """
    present = set(paths(selected))
    return map_with_paths(lambda path, _: path in present, whole)


def size(tree: PyTree) -> int:
    """The number of scalars in all leaves.

    >>> size({"head": np.zeros((2, 3)), "stem": None})
    6
    """
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """The number of bytes in all leaves, from their shapes and dtypes.

    >>> nbytes({"head": np.zeros((2, 3), np.float32)})
    24
    """
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    leaf = plain(leaf)
    dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    return int(np.prod(np.shape(leaf))) * dtype.itemsize


def plain(leaf: Any) -> Any:
    """The data of an array of random keys; anything else as it is."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def digest(tree: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of all leaves: equal iff bit-identical.

    >>> digest({"a": np.zeros(2)}) == digest({"a": -np.zeros(2)})
    False
    """
    out = hashlib.sha256()
    for path, leaf in leaves_with_paths(tree):
        array = np.asarray(plain(leaf))
        out.update(f"{path} {array.shape} {array.dtype}\n".encode())
        out.update(np.ascontiguousarray(array).tobytes())
    return out.hexdigest()


def wide_dtype(dtype: Any) -> Any:
    """float32 for narrower floats, any other dtype as it is; also under strict promotion.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(jnp.float64), wide_dtype(jnp.int8)
    (dtype('float32'), dtype('float64'), dtype('int8'))
    """
    dtype = jnp.dtype(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def ancestors(path: str) -> Iterator[str]:
    """The enclosing subtrees of a path, nearest first, ending with the root `""`.

    >>> list(ancestors("encoder/layer_0/norm"))
    ['encoder/layer_0', 'encoder', '']
    """
    while path:
        path = path.rpartition("/")[0]
        yield path

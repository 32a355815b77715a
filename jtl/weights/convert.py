"""From the tensors of another library's checkpoint to a tree of parameters, strict both ways.

Every leaf is filled by a rule or listed as newly initialised, every tensor is used or listed as
ignored; anything else is an error that names it. Nothing is left random without being said.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import rules
from jtl import tree as jtree
from jtl.errors import WeightsError
from jtl.typing import Params


class Layout(NamedTuple):
    """How a tensor's axes lie on each side.

    Attributes:
      read: from the checkpoint's array to the tree's.
      write: the inverse.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


KEEP = Layout(lambda x: x, lambda x: x)
"""The same axes: vectors, embedding tables."""

TRANSPOSE = Layout(np.transpose, np.transpose)
"""PyTorch's linear weights `[out, in]` against `[in, out]`."""


class KeyRule(NamedTuple):
    """Where the tensor of a leaf is.

    Attributes:
      path: a pattern over the tree's paths.
      source: the tensor's name, with `{}` for each wildcard of the pattern.
      layout: how its axes lie.
    """

    path: str
    source: str
    layout: Layout


def convert(
    target: Params,
    tensors: Mapping[str, np.ndarray],
    keys: Sequence[KeyRule],
    *,
    new: Sequence[str] = (),
    ignored: Sequence[str] = (),
    name: str = "the checkpoint",
) -> Params:
    """Fill a tree from a checkpoint's tensors.

    Args:
      target: the tree of shapes to fill; dtypes are the checkpoint's own.
      tensors: the checkpoint, by name.
      keys: the family's key rules; the first match wins.
      new: patterns of leaves that the checkpoint does not hold, such as a new head.
      ignored: patterns over tensor names, with `/` for `.`, that have no place in the tree.
      name: what errors call the checkpoint.

    Returns:
      Arrays in the structure of `target`, `None` for new leaves.

    Raises:
      WeightsError: a leaf without tensor, a tensor without leaf, or a wrong shape; lists them all
        with path, expected and got.
    """
    used: set[str] = set()
    faults: list[str] = []

    def fill(path: str, leaf: Any) -> np.ndarray | None:
        if any(rules.matches(pattern, path) for pattern in new):
            return None
        source, layout = locate(path, keys)
        if source not in tensors:
            faults.append(f"{path} needs the tensor {source} {_source_shape(leaf, layout)}, which is missing")
            return None
        used.add(source)
        array = layout.read(tensors[source])
        if array.shape != leaf.shape:
            expected = _source_shape(leaf, layout)
            faults.append(f"{source} has shape {tensors[source].shape}, {path} expects {expected}")
        return array

    filled = jtree.map_with_paths(fill, target)
    unused = [t for t in tensors if t not in used and not _is_ignored(t, ignored)]
    faults += [f"the tensor {tensor} {tensors[tensor].shape} has no place in the model" for tensor in sorted(unused)]
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise WeightsError(f"{name} does not fit the model:\n  " + "\n  ".join(shown))
    return filled


def renamed(tensors: Mapping[str, Any], rename: Callable[[str], str], name: str) -> dict[str, Any]:
    """The tensors under their normalised names.

    Args:
      tensors: by the names in the checkpoint.
      rename: from such a name to the normalised one.
      name: of the checkpoint, for messages.

    Raises:
      WeightsError: two tensors have the same normalised name.
    """
    sources: dict[str, str] = {}
    for tensor in tensors:
        twin = sources.setdefault(rename(tensor), tensor)
        if twin != tensor:
            raise WeightsError(f"{name} holds {twin} and {tensor}, two spellings of {rename(tensor)}: remove one")
    return {new: tensors[old] for new, old in sources.items()}


def locate(path: str, keys: Sequence[KeyRule]) -> tuple[str, Layout]:
    """The name of a leaf's tensor, and its layout.

    Raises:
      WeightsError: no rule covers the leaf.

    >>> locate("layer_3/kernel", [KeyRule("layer_*/kernel", "layer.{}.weight", TRANSPOSE)])[0]
    'layer.3.weight'
    """
    for rule in keys:
        captured = rules.match(rule.path, path)
        if captured is not None:
            return rule.source.format(*captured), rule.layout
    raise WeightsError(f"no key rule covers the leaf {path}")


def _source_shape(leaf: Any, layout: Layout) -> tuple[int, ...]:
    return layout.write(np.broadcast_to(np.float32(0), leaf.shape)).shape


def _is_ignored(tensor: str, ignored: Sequence[str]) -> bool:
    return any(rules.matches(pattern, tensor.replace(".", "/")) for pattern in ignored)


def as_dtype(tree: Params, dtype: Any) -> Params:
    """Device arrays of one float dtype; integers keep theirs.

    Args:
      tree: arrays, `None` where leaves are absent.
      dtype: of the floats; `None` keeps the checkpoint's own.
    """

    def cast(leaf: np.ndarray | jax.Array) -> jax.Array:
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.numpy.asarray(leaf, dtype=dtype if floating and dtype is not None else leaf.dtype)

    return jax.tree.map(cast, tree)

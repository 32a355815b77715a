"""From the tensors of another library's checkpoint to a tree of parameters, strict both ways.

Every leaf is filled by a rule or listed as newly initialised, every tensor is used or listed as
ignored; anything else is an error that names it. Nothing is left random without being said.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import rules
from jtl import tree as jtree
from jtl.errors import WeightsError
from jtl.typing import Params
from jtl.weights.reading import Memory, rows_last


class Layout(NamedTuple):
    """How a tensor's axes lie on each side.

    Attributes:
      read: from the checkpoint's array to the tree's.
      write: the inverse.
      turn: where the tensor's rows become the leaf's last axis, `read` of some of them, so that a tensor need not be
        held whole: `read(x)[..., a:b]` is `turn(rows[a:b])`. None in all other cases.
      part: `(k, n)`, the leaf has the k-th of n equal parts of the tensor's rows; with `turn`.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    turn: Callable[[np.ndarray], np.ndarray] | None = None
    part: tuple[int, int] = (0, 1)


KEEP = Layout(lambda x: x, lambda x: x)
"""The same axes: vectors, embedding tables."""

TRANSPOSE = Layout(np.transpose, np.transpose, np.transpose)
"""PyTorch's linear weights `[out, in]` against `[in, out]`."""


def _hwio(x: np.ndarray) -> np.ndarray:
    return np.transpose(x, (2, 3, 1, 0))


HWIO = Layout(_hwio, lambda x: np.transpose(x, (3, 2, 0, 1)), _hwio)
"""PyTorch's kernels of two dimensions `[out, in, height, width]` against `[height, width, in, out]`."""


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
    adapt: Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray] = lambda path, array, shape: array,
    finish: Callable[[str, np.ndarray], Any] = lambda path, array: array,
    memory: Memory | None = None,
) -> Params:
    """Fill a tree from a checkpoint's tensors.

    Args:
      target: the tree of shapes to fill; dtypes are the checkpoint's own.
      tensors: the checkpoint, by name; each is read once, after all shapes were compared.
      keys: the family's key rules; the first match wins.
      new: patterns of leaves that the checkpoint does not hold, such as a new head.
      ignored: patterns over tensor names, with `/` for `.`, that have no place in the tree.
      name: what errors call the checkpoint.
      adapt: `(path, array, shape)` to an array of the shape that a leaf needs, where the family can change it.
      finish: `(path, array)` to the leaf that is kept, so that no more than one is held twice. The array is its own:
        nothing else reads or writes its memory.
      memory: for the arrays.

    Returns:
      Arrays in the structure of `target`, `None` for new leaves.

    Raises:
      WeightsError: a leaf without tensor, a tensor without leaf, a wrong shape, or values that are not finite;
        lists them all with path, expected and got.
    """
    leaves = {
        path: (leaf, *locate(path, keys))
        for path, leaf in jtree.leaves_with_paths(target)
        if not any(rules.matches(pattern, path) for pattern in new)
    }
    faults = [
        f"{path} needs the tensor {source} {_source_shape(leaf, layout)}, which is missing"
        for path, (leaf, source, layout) in leaves.items()
        if source not in tensors
    ]
    used = {source for _, source, _ in leaves.values()}
    unused = [t for t in tensors if t not in used and not _is_ignored(t, ignored)]
    faults += [
        f"the tensor {tensor} {shape_of(tensors, tensor)} has no place in the model" for tensor in sorted(unused)
    ]
    for path, (leaf, source, layout) in leaves.items():
        if source in tensors and not _fits(path, leaf, layout, shape_of(tensors, source), adapt):
            got, expected = shape_of(tensors, source), _source_shape(leaf, layout)
            faults.append(f"{source} has shape {got}, {path} expects {expected}")
    _raise(name, faults)
    place = memory or Memory()

    def fill(path: str) -> tuple[Any, bool]:
        leaf, source, layout = leaves[path]
        array = _streamed(place, path, leaf, tensors, source, layout, adapt)
        if array is None:
            array = place.copy(adapt(path, layout.read(tensors[source]), leaf.shape))
        return finish(path, array), _finite(array)

    # Reading, turning and checking release the lock of the interpreter; other kinds of files are read by one thread.
    with ThreadPoolExecutor(2 if getattr(tensors, "stream", None) else 1) as pool:
        filled = dict(zip(leaves, pool.map(fill, leaves), strict=True))
    faults += [
        f"{leaves[path][1]} holds values that are not finite"
        for path, (_, is_finite) in filled.items()
        if not is_finite
    ]
    _raise(name, faults)
    return jtree.map_with_paths(lambda path, _: filled.get(path, (None,))[0], target)


def shape_of(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read for it if the checkpoint is one of `weights.tensors`."""
    signatures = getattr(tensors, "signatures", None)
    return tuple((tensors if signatures is None else signatures)[name].shape)


_COMPARED = 1 << 20
"""Bytes of each of two tensors that are held while they are compared."""


def equal(tensors: Mapping[str, np.ndarray], first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint hold the same values, read only as far as it takes to tell.

    >>> equal({"a": np.zeros(2), "b": np.zeros(2), "c": np.ones(2)}, "a", "b")
    True
    """
    shape, stream = shape_of(tensors, first), getattr(tensors, "stream", None)
    if shape != shape_of(tensors, second):
        return False
    if stream is None:
        return bool(np.array_equal(tensors[first], tensors[second]))

    def blocks(name: str) -> Iterator[np.ndarray]:
        dtype = np.dtype(tensors.signatures[name].dtype)  # pyright: ignore[reportAttributeAccessIssue]
        step = max(1, _COMPARED // max(1, math.prod(shape[1:]) * dtype.itemsize))
        starts = range(0, shape[0], step)
        return stream(name, 0, (np.empty((min(step, shape[0] - start), *shape[1:]), dtype) for start in starts))

    return all(map(np.array_equal, blocks(first), blocks(second)))


def _fits(path: str, leaf: Any, layout: Layout, shape: tuple[int, ...], adapt: Callable[..., np.ndarray]) -> bool:
    stand_in = np.broadcast_to(np.float32(0), shape)
    try:
        return adapt(path, layout.read(stand_in), leaf.shape).shape == tuple(leaf.shape)
    except (ValueError, IndexError):  # not even as many axes
        return False


def _streamed(
    memory: Memory,
    path: str,
    leaf: Any,
    tensors: Mapping[str, np.ndarray],
    source: str,
    layout: Layout,
    adapt: Callable[..., np.ndarray],
) -> np.ndarray | None:
    """A leaf straight from the file; None where its tensor has to be held whole."""
    stream = getattr(tensors, "stream", None)
    if stream is None or (layout.turn is None and layout is not KEEP):
        return None
    shape, dtype = tensors.signatures[source]  # pyright: ignore[reportAttributeAccessIssue]
    seen = layout.read(np.broadcast_to(np.float32(0), shape))
    if adapt(path, seen, leaf.shape) is not seen:
        return None
    array = memory.empty(leaf.shape, dtype)
    if layout.turn is None:
        deque(stream(source, 0, [array]), maxlen=0)
    else:
        first = layout.part[0] * (shape[0] // layout.part[1])
        rows_last(stream, source, first, array, shape[1:], layout.turn)
    return array


def _finite(array: np.ndarray) -> bool:
    # A sum of finite values may overflow, so it only says that all is well; it takes a tenth of the time.
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(array, dtype=np.float32))) or bool(np.isfinite(array).all())


def _raise(name: str, faults: Sequence[str]) -> None:
    if faults:
        shown = [*faults[:8], *([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])]
        raise WeightsError(f"{name} does not fit the model:\n  " + "\n  ".join(shown))


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


def as_dtype(leaf: np.ndarray | jax.Array, dtype: Any) -> jax.Array:
    """A device array of a float dtype; integers keep theirs.

    Args:
      leaf: an array.
      dtype: of floats; `None` keeps the array's own.
    """
    floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    return jax.numpy.asarray(leaf, dtype=dtype if floating and dtype is not None else leaf.dtype)


def owned(array: np.ndarray, dtype: Any) -> jax.Array:
    """A device array as `as_dtype` makes it, of an array that nobody else will write: the CPU shares its memory.

    XLA does not write it either: a step to which the array is donated has its result elsewhere.

    Args:
      array: of `reading.Memory`; one that is not aligned is copied.
      dtype: of floats; `None` keeps the array's own.
    """
    floating = jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
    wanted = np.dtype(dtype) if floating and dtype is not None else array.dtype
    if wanted != array.dtype or jax.dtypes.canonicalize_dtype(wanted) != wanted:
        return as_dtype(array, dtype)
    placed = jax.device_put(array)
    if placed.devices().pop().platform != "cpu":
        placed.block_until_ready()  # or all of the checkpoint waits in the host's memory to be copied
    return placed

"""Leaves stored in few bits, as nodes of the tree that linen opens where a layer reads them.

A `Quantized` is one of Flax's boxes (`flax.core.meta.AxisMetadata`): `self.param` of any linen module gets the float
array that it stands for, and `nn.scan` and `nn.remat` carry it along. So a model with stored kernels is applied as it
is, and a kernel is float no longer than its layer needs it.

    query                        query
    ├── bias                     ├── bias
    └── kernel [in, out]  ->     └── kernel
                                     ├── absmax [blocks] float32
                                     └── values [blocks, 32] uint8
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError
from jtl.typing import Params, PyTree

# fmt: off
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "int4": tuple(k / 7 for k in range(-7, 8)),
}
# fmt: on
"""What four bits stand for, in shares of a block's largest absolute value. NF4 is the table of QLoRA's appendix E."""

FORMATS = ("bfloat16", "int8", *CODES)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "absmax"], meta_fields=["format", "tail", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class Quantized(meta.AxisMetadata):
    """A float array in few bits; `jtl.peft.quantize` makes them.

    Attributes:
      values: bfloat16 or int8 in the array's shape; or two codes to a byte, `[*stack, blocks, block / 2]` uint8.
      absmax: float32, the largest absolute value of each channel, with axes of one, or of each block,
        `[*stack, blocks]`; None of bfloat16.
      format: one of `FORMATS`.
      tail: the array's shape without its stack, of four-bit formats; any leading axis of the leaves may be sliced away.
      dtype: of the array.
    """

    values: Any
    absmax: Any
    format: str
    tail: tuple[int, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (*np.shape(self.values)[:-2], *self.tail) if self.format in CODES else np.shape(self.values)

    @property
    def ndim(self) -> int:
        """Of the array."""
        return len(self.shape)

    def unbox(self) -> jax.Array:
        """The array. It has no derivative by its leaves: what is stored is frozen."""
        return jax.lax.stop_gradient(_decode(self).astype(self.dtype))

    def replace_boxed(self, val: Any) -> Any:
        """What replaces the array is an array."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        """The same: no axis is named here."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        """The same: no axis is named here."""
        del index, params
        return self


def encode(array: jax.Array, format: str, *, stack: int, inputs: int, block: int) -> Quantized:
    """Store an array.

    Args:
      array: floats, finite.
      format: one of `FORMATS`.
      stack: how many leading axes run over layers.
      inputs: how many axes after them are contracted; int8 has a scale for each place on the others.
      block: consecutive values that share a scale, in four-bit formats.
    """
    wide, dtype = array.astype(jnp.float32), array.dtype
    if format == "bfloat16":
        return Quantized(array.astype(jnp.bfloat16), None, format, (), dtype)
    if format == "int8":
        absmax = jnp.max(jnp.abs(wide), tuple(range(stack, stack + inputs)), keepdims=True)
        values = jnp.round(_shares(wide, absmax) * 127)
        return Quantized(values.astype(jnp.int8), absmax, format, (), dtype)
    lead, tail = array.shape[:stack], array.shape[stack:]
    flat = wide.reshape(*lead, math.prod(tail))
    flat = jnp.pad(flat, [(0, 0)] * stack + [(0, -math.prod(tail) % block)]).reshape(*lead, -1, block)
    absmax = jnp.max(jnp.abs(flat), -1)
    codes = _nearest(_shares(flat, jnp.expand_dims(absmax, -1)), CODES[format])
    low, high = jnp.split(codes, 2, -1)
    return Quantized(low | high << 4, absmax, format, tail, dtype)


def _shares(values: jax.Array, absmax: jax.Array) -> jax.Array:
    # Zeros stay zeros where a block or channel has nothing else.
    return values / jnp.where(absmax > 0, absmax, jnp.ones((), absmax.dtype))


def _nearest(shares: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """The place of the nearest entry of a rising table."""
    between = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    return functools.reduce(jnp.add, [(shares > bound).astype(jnp.uint8) for bound in between])


def _decode(box: Quantized) -> jax.Array:
    if box.format == "bfloat16":
        return box.values.astype(jnp.float32)
    if box.format == "int8":
        return box.values.astype(jnp.float32) * (box.absmax / 127)
    codes = jnp.concatenate([box.values & 15, box.values >> 4], -1)
    table = jnp.array(CODES[box.format], jnp.float32)
    flat = jnp.take(table, codes.astype(jnp.int32), mode="clip") * jnp.expand_dims(box.absmax, -1)
    lead = flat.shape[:-2]
    return flat.reshape(*lead, -1)[..., : math.prod(box.tail)].reshape(*lead, *box.tail)


def is_box(node: Any) -> bool:
    """Whether a node of a tree is a stored leaf."""
    return isinstance(node, Quantized)


def leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf with its path, a stored one as one leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [(jtree.path_str(path), leaf) for path, leaf in pairs]


def boxes(tree: PyTree) -> dict[str, Quantized]:
    """The stored leaves, by path."""
    return {path: leaf for path, leaf in leaves(tree) if is_box(leaf)}


def plain(leaf: Any) -> Any:
    """A stored leaf as an array; anything else as it is."""
    return leaf.unbox() if is_box(leaf) else leaf


def plainly(tree: PyTree, chosen: Callable[[str], bool] = lambda path: True) -> PyTree:
    """A tree with stored leaves as arrays.

    Args:
      tree: any pytree.
      chosen: which, by path.
    """

    def opened(path: Any, leaf: Any) -> Any:
        return plain(leaf) if chosen(jtree.path_str(path)) else leaf

    return jax.tree_util.tree_map_with_path(opened, tree, is_leaf=is_box)


def require_plain(tree: PyTree, doing: str) -> None:
    """Refuse stored leaves.

    Args:
      tree: any pytree.
      doing: what needs floats, for the message.

    Raises:
      ConfigError: names one.
    """
    for path, box in boxes(tree).items():
        raise ConfigError(f"{doing} needs floats, and {path} is stored as {box.format}: call peft.dequantize first")


def require_frozen(params: Params, mask: PyTree) -> None:
    """Refuse a mask that trains a stored leaf.

    Args:
      params: the whole tree.
      mask: bools in its structure.

    Raises:
      MaskError: names one.
    """
    kinds = boxes(params)
    for path, trained in boxes(mask).items():
        if any(jax.tree.leaves(trained)):
            raise MaskError(
                f"the mask trains {path}, which is stored as {kinds[path].format}: only floats can be trained. "
                "Leave it out of the mask, or keep it as it is: peft.quantize(..., trainable=mask)"
            )

"""A frozen base in few bits: bfloat16, int8, or four bits in blocks.

variables = peft.quantize(variables, "nf4", trainable=jtl.select("head"))
variables = peft.attach(adapter, variables, key=key)
loss_fn = jtl.supervised(peft.adapted(model, adapter), ...)   # or peft.quantized(model), without an adapter
...
merged = peft.merge(adapter, peft.dequantize(jtl.variables(state, frozen)))

Why not qwix (0.1.8), which has QLoRA for linen: it keeps every kernel that it dequantizes until the backward pass (a
step over 12 layers took the temporary memory of 12 float kernels), its four-bit values take a whole byte each on CPU,
its blocks must divide an axis, and its adapters have names and settings of their own beside `jtl.peft`'s.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import quantized as stored
from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError, WeightsError
from jtl.peft import kernels
from jtl.peft.reopening import reopening
from jtl.quantized import FORMATS, Quantized
from jtl.rules import Rules
from jtl.typing import MaskLike, Variables

_NAMES = ("**/kernel", "**/embedding")


def quantize(
    variables: Variables,
    format: str,
    *,
    targets: Sequence[str] = (),
    trainable: MaskLike | None = None,
    block: int = 64,
    input_axes: Rules = (),
    stacked: Sequence[str] = (),
) -> dict[str, Any]:
    r"""Variables whose kernels are stored in few bits, for a base that stays frozen.

    - "bfloat16": rounded, 16 bits a value.
    - "int8": :math:`\mathrm{round}(127 w / m)` for the largest absolute value m of each output; 8 bits.
    - "nf4", "int4": the nearest of 16 points, in shares of the largest absolute value of each `block` values;
      4 bits, and 32 for each block. NF4's points are quantiles of a normal distribution, int4's even steps.

    A stored kernel is one node of the tree, `jtl.quantized.Quantized`, with leaves `values` and `absmax`. Where a linen
    module reads it, it opens to the array, in its own dtype; it has no gradient. The largest absolute values are
    float32; QLoRA quantizes those again, which is not done here.

    Args:
      variables: `{"params": params, **collections}`. What is not stored is shared, not copied.
      format: "bfloat16", "int8", "int4" or "nf4".
      targets: patterns of modules or kernels. By default all leaves named `kernel` or `embedding`. Leaves with fewer
        than two axes, and those named `bias` or `scale`, stay as they are.
      trainable: the mask of what will be trained, which stays as it is.
      block: an even number of values, for the four-bit formats.
      input_axes: rules for how many of a kernel's first axes are inputs, as in `peft.lora`.
      stacked: patterns of leaves whose first axis runs over layers, as in `peft.lora`.

    Raises:
      ConfigError: an unknown format, an odd block, or a leaf that is stored already.
      MaskError: nothing is left to store, or a target is not of floats.
      PatternError: a pattern matches nothing.
      WeightsError: a leaf has values that are not finite.

    References:
      Dettmers et al, QLoRA, 2023 (arXiv 2305.14314); Dettmers et al, LLM.int8(), 2022 (arXiv 2208.07339).
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if block < 2 or block % 2:
        raise ConfigError(f"block={block}: expected an even number, for two values share a byte")
    params = variables["params"]
    chosen = kernels.targets(targets or _present(params), input_axes, stacked)
    found = kernels.kernels(chosen, params)
    if trainable is not None:
        trained = dict(jtree.leaves_with_paths(jtree.as_bools(trainable, params)))
        found = {path: leaf for path, leaf in found.items() if not trained.get(path, False)}
    if not found:
        raise MaskError(f"the mask {trainable!r} trains all that could be stored")
    parts = {path: _encoded(chosen, path, leaf, format, block) for path, leaf in found.items()}
    return {**variables, "params": jtree.map_with_paths(lambda path, leaf: parts.get(path, leaf), params)}


def _present(params: Any) -> list[str]:
    found = {path.rpartition("/")[2] for path, _ in stored.leaves(params)}
    return [pattern for pattern in _NAMES if pattern.rpartition("/")[2] in found] or list(_NAMES)


def _encoded(chosen: kernels.Targets, path: str, leaf: Any, format: str, block: int) -> Quantized:
    if stored.is_box(leaf):
        raise ConfigError(f"{path} is stored as {leaf.format} already: call peft.dequantize first")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise MaskError(f"{path} is of dtype {leaf.dtype}: only floats can be stored as {format}")
    shape = kernels.shape_of(chosen, path, leaf)
    box, finite = _encode(jnp.asarray(leaf), format, len(shape.stack), len(shape.inputs), block)
    if not finite:
        raise WeightsError(f"{path} has values that are not finite, or beyond {format}'s range: it cannot be stored")
    return box


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _encode(leaf: jax.Array, format: str, stack: int, inputs: int, block: int) -> tuple[Quantized, jax.Array]:
    box = stored.encode(leaf, format, stack=stack, inputs=inputs, block=block)
    return box, jnp.isfinite(box.values if box.absmax is None else box.absmax).all()


def dequantize(variables: Variables) -> dict[str, Any]:
    """Variables with every stored leaf as an array again, for merging, saving and export; others are shared.

    Args:
      variables: as `quantize` gives them.
    """
    return {**variables, "params": stored.plainly(variables["params"])}


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model of stored variables; made by `quantized`."""

    model: Any

    @property
    def __call__(self) -> Callable[..., Any]:
        """The model's own, so that its mode arguments are found by their names."""
        return self.model.__call__

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Call the model; as `apply` of linen."""
        if not isinstance(self.model, nn.Module):
            return self.model.apply(dequantize(variables), *args, **kwargs)
        with reopening():
            return self.model.apply(variables, *args, **kwargs)


def quantized(model: Any) -> QuantizedModel:
    """A model for `jtl.supervised` that takes variables from `quantize`, for training without an adapter.

    A linen model takes them by itself; this makes its dense layers and convolutions open a kernel a second time in the
    backward pass, rather than keep it, and gives up derivatives in forward mode for that. Other modules keep what they
    opened. A model that is not linen's gets all arrays at the start of each call. `peft.adapted` does the same for its
    model.

    Args:
      model: a linen module, or what `jtl.from_nnx` or `jtl.from_function` made.
    """
    return QuantizedModel(model)

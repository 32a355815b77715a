"""(IA)^3: one learned factor for each output, or input, of a layer."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import rules
from jtl import tree as jtree
from jtl.peft import kernels
from jtl.peft.adapter import Adapter, Layer
from jtl.peft.kernels import Shape, Targets
from jtl.rules import Rules
from jtl.typing import Key, Params, PyTree


class _Settings(NamedTuple):
    """What `ia3` was given."""

    targets: Targets
    inputs: tuple[str, ...]


def ia3(
    targets: Sequence[str],
    *,
    inputs: Sequence[str] = (),
    input_axes: Rules = (),
    stacked: Sequence[str] = (),
) -> Adapter:
    r"""Layers whose outputs, :math:`l \odot (W x + b)`, or inputs, :math:`W (l \odot x) + b`, are scaled.

    The paper scales the outputs of keys and values, and the inputs of the second dense layer of each block.

    Args:
      targets: patterns of modules or kernels, as in `lora`.
      inputs: those of them whose inputs are scaled.
      input_axes: as in `lora`.
      stacked: as in `lora`.

    Raises:
      PatternError: a pattern is malformed.

    References:
      Liu et al, Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning, 2022
      (arXiv 2205.05638).
    """
    settings = _Settings(kernels.targets([*targets, *inputs], input_axes, stacked), tuple(inputs))
    init, merge, call = (functools.partial(function, settings) for function in (_init, _merge, _call))
    return Adapter("ia3", init, merge, call, settings=settings)


def _init(settings: _Settings, params: Params, key: Key) -> Params:
    del key  # all factors begin at one

    def new(path: str, leaf: Any) -> dict[str, jax.Array]:
        shape = kernels.shape_of(settings.targets, path, leaf)
        if not any(rules.matches(pattern, path) for pattern in settings.inputs):
            return {"outputs": jnp.ones((*shape.stack, *shape.outputs), kernels.dtype_of(leaf))}
        # Of a convolution, its channels.
        inputs = shape.inputs[-1:] if len(shape.inputs) == 3 else shape.inputs
        return {"inputs": jnp.ones((*shape.stack, *inputs), kernels.dtype_of(leaf))}

    found = kernels.kernels(settings.targets, params)
    return kernels.built("ia3", {path: new(path, leaf) for path, leaf in found.items()})


def _merge(settings: _Settings, params: Params, delta: Params) -> Params:
    parts = kernels.by_kernel(delta)
    kernels.require_kernels(parts, params)
    # A layer's bias is a part of its outputs.
    biases = {f"{path.rpartition('/')[0]}/bias": part["outputs"] for path, part in parts.items() if "outputs" in part}

    def changed(path: str, leaf: Any) -> Any:
        if path in biases:
            return (leaf * biases[path]).astype(leaf.dtype)
        if path not in parts:
            return leaf
        shape = kernels.shape_of(settings.targets, path, leaf)
        return (leaf * _spread(parts[path], shape)).astype(leaf.dtype)

    return jtree.map_with_paths(changed, params)


def _spread(part: PyTree, shape: Shape) -> jax.Array:
    """The factors, in the axes of a kernel."""
    ones = (1,) * len(shape.inputs), (1,) * len(shape.outputs)
    if "outputs" in part:
        return part["outputs"].reshape(*shape.stack, *ones[0], *shape.outputs)
    given = part["inputs"].shape[len(shape.stack) :]
    return part["inputs"].reshape(*shape.stack, *ones[0][len(given) :], *given, *ones[1])


def _call(settings: _Settings, layer: Layer, part: PyTree, key: Key | None) -> jax.Array:
    del settings, key
    (factors,) = part.values()
    if "inputs" in factors:
        scale = factors["inputs"].astype(jnp.result_type(layer.inputs))
        return layer.apply(layer.inputs * jnp.expand_dims(scale, tuple(range(layer.inputs.ndim - scale.ndim))))
    outputs = layer.apply(layer.inputs)
    scale = factors["outputs"].astype(outputs.dtype)
    return outputs * jnp.expand_dims(scale, tuple(range(outputs.ndim - scale.ndim)))

"""Bottleneck adapters: a small network beside the output of a layer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.peft import kernels
from jtl.peft.adapter import Adapter, Layer, unmergeable
from jtl.peft.kernels import Targets
from jtl.rules import Rules
from jtl.typing import Key, Params


class _Settings(NamedTuple):
    """What `bottleneck` was given."""

    targets: Targets
    width: int
    activation: Callable[[jax.Array], jax.Array]


def bottleneck(
    targets: Sequence[str],
    *,
    width: int = 64,
    activation: Callable[[jax.Array], jax.Array] = nn.gelu,
    input_axes: Rules = (),
    stacked: Sequence[str] = (),
) -> Adapter:
    r"""Layers whose outputs h become :math:`h + f(h D + c) U + d`.

    The paper puts one behind each of a block's two halves: `["**/attention/output", "**/mlp/down"]`. D is uniform
    within :math:`1/\sqrt{n}`, the rest zero, so that nothing changes at first. It is no change of the params: `merge`
    refuses it once it is trained, and inference runs through `adapted`.

    Args:
      targets: patterns of dense layers of linen, or of their kernels.
      width: of the bottleneck.
      activation: f.
      input_axes: as in `lora`.
      stacked: as in `lora`.

    Raises:
      ConfigError: `width` is below 1.
      PatternError: a pattern is malformed.

    References:
      Houlsby et al, Parameter-efficient transfer learning for NLP, 2019 (arXiv 1902.00751).
    """
    if width < 1:
        raise ConfigError(f"width={width}: expected a whole number from 1 on")
    settings = _Settings(kernels.targets(targets, input_axes, stacked), width, activation)
    init, call = functools.partial(_init, settings), functools.partial(_call, settings)
    return Adapter("bottleneck", init, _merge, call, needs_call=True, settings=settings)


def _init(settings: _Settings, params: Params, key: Key) -> Params:
    found = kernels.kernels(settings.targets, params)

    def new(path: str, leaf: Any, key: Key) -> dict[str, jax.Array]:
        shape, dtype, width = kernels.shape_of(settings.targets, path, leaf), kernels.dtype_of(leaf), settings.width
        bound = 1 / math.sqrt(math.prod(shape.outputs))
        return {
            "down": jax.random.uniform(key, (*shape.stack, *shape.outputs, width), dtype, -bound, bound),
            "down_bias": jnp.zeros((*shape.stack, width), dtype),
            "up": jnp.zeros((*shape.stack, width, *shape.outputs), dtype),
            "up_bias": jnp.zeros((*shape.stack, *shape.outputs), dtype),
        }

    keys = jax.random.split(key, len(found))
    leaves = {path: new(path, leaf, key) for (path, leaf), key in zip(found.items(), keys, strict=True)}
    return kernels.built("bottleneck", leaves)


def _merge(params: Params, delta: Params) -> Params:
    kernels.require_kernels(kernels.by_kernel(delta), params)
    return unmergeable("bottleneck", params, delta, lambda path: path.rpartition("/")[2] in ("up", "up_bias"))


def _call(settings: _Settings, layer: Layer, part: Params, key: Key | None) -> jax.Array:
    del key
    outputs, (small,) = layer.apply(layer.inputs), part.values()
    small = {name: leaf.astype(outputs.dtype) for name, leaf in small.items()}
    axes = small["up"].ndim - 1
    inner = jnp.tensordot(outputs, small["down"], axes)
    inner = settings.activation(inner + _behind(small["down_bias"], inner))
    return outputs + jnp.tensordot(inner, small["up"], 1) + _behind(small["up_bias"], outputs)


def _behind(bias: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(bias, tuple(range(x.ndim - bias.ndim)))

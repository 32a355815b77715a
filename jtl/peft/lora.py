"""LoRA and DoRA: a kernel's change as a product of two thin matrices."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import quantized
from jtl import tree as jtree
from jtl.errors import ConfigError, PatternError
from jtl.peft import kernels
from jtl.peft.adapter import Adapter, Layer
from jtl.peft.kernels import Shape, Targets
from jtl.rules import Rules
from jtl.typing import Key, Params, PyTree


class _Settings(NamedTuple):
    """What `lora` was given."""

    name: str
    targets: Targets
    rank: int | Rules
    alpha: float | Rules | None
    rank_stabilized: bool
    dropout: float


def lora(
    targets: Sequence[str],
    *,
    rank: int | Rules = 8,
    alpha: float | Rules | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    input_axes: Rules = (),
    stacked: Sequence[str] = (),
) -> Adapter:
    r"""Low-rank adaptation, :math:`W + \frac{\alpha}{r} A B`.

    A, `[*inputs, r]`, is uniform within :math:`1/\sqrt{n}` for n inputs, B, `[r, *outputs]`, zero; of an embedding A is
    zero, and B normal. That is PEFT's convention too.

    Args:
      targets: patterns of modules or kernels. Of a module, leaves with two or more axes are adapted, but for biases.
      rank: r, or `(pattern, r)` rules; the first match wins.
      alpha: the numerator of the scale, or rules; by default r, so that the scale is 1.
      rank_stabilized: divide by the root of r instead of r.
      dropout: rate on the inputs of A, in training. Only dense layers of linen have it.
      input_axes: rules for how many of a kernel's first axes are contracted. By default one of two axes, three of four
        (a convolution's), and of three two in a module named `out`, otherwise one, as in linen's attention.
      stacked: patterns of leaves whose first axis runs over the layers of an `nn.scan`.

    Raises:
      ConfigError: a rank, a rate or a number of axes that cannot be.

    References:
      Hu et al, LoRA, 2021 (arXiv 2106.09685); Kalajdzievski, rsLoRA, 2023 (arXiv 2312.03732).
    """
    chosen = kernels.targets(targets, input_axes, stacked)
    return _adapter("lora", chosen, rank, alpha, rank_stabilized, dropout)


def dora(
    targets: Sequence[str],
    *,
    rank: int | Rules = 8,
    alpha: float | Rules | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    input_axes: Rules = (),
    stacked: Sequence[str] = (),
) -> Adapter:
    r"""LoRA of a kernel's direction, beside its magnitude :math:`m`, one number an output.

    :math:`m \frac{W + s A B}{\|W + s A B\|}`, the norm over the inputs, and without a gradient as in the paper.

    Args:
      targets: as in `lora`; the arguments are the same.
      rank: as in `lora`.
      alpha: as in `lora`.
      rank_stabilized: as in `lora`.
      dropout: as in `lora`.
      input_axes: as in `lora`.
      stacked: as in `lora`.

    References:
      Liu et al, DoRA, 2024 (arXiv 2402.09353).
    """
    chosen = kernels.targets(targets, input_axes, stacked)
    return _adapter("dora", chosen, rank, alpha, rank_stabilized, dropout)


def _adapter(
    name: str, chosen: Targets, rank: int | Rules, alpha: float | Rules | None, stabilized: bool, dropout: float
) -> Adapter:
    for value in [rank] if isinstance(rank, int) else [value for _, value in rank]:
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"a rank is {value!r}; expected a whole number from 1 on")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout}: expected a number from 0 to below 1")
    settings = _Settings(name, chosen, rank, alpha, stabilized, dropout)
    init, merge, call = (functools.partial(function, settings) for function in (_init, _merge, _call))
    return Adapter(name, init, merge, call, needs_call=dropout > 0, settings=settings)


def _init(settings: _Settings, params: Params, key: Key) -> Params:
    found = kernels.kernels(settings.targets, params)
    keys = jax.random.split(key, len(found))
    leaves = zip(found.items(), keys, strict=True)
    return kernels.built(settings.name, {path: _new(settings, path, leaf, key) for (path, leaf), key in leaves})


def _new(settings: _Settings, path: str, leaf: Any, key: Key) -> dict[str, jax.Array]:
    shape, rank = kernels.shape_of(settings.targets, path, leaf), _rank(settings, path)
    dtype = kernels.dtype_of(leaf)
    a, b = (*shape.stack, *shape.inputs, rank), (*shape.stack, rank, *shape.outputs)
    if path.endswith("embedding"):
        part = {"a": jnp.zeros(a, dtype), "b": jax.random.normal(key, b, dtype)}
    else:
        bound = 1 / math.sqrt(math.prod(shape.inputs))
        part = {"a": jax.random.uniform(key, a, dtype, -bound, bound), "b": jnp.zeros(b, dtype)}
    return {**part, "magnitude": _norm(quantized.plain(leaf).astype(dtype), shape)} if settings.name == "dora" else part


def _rank(settings: _Settings, path: str) -> int:
    rank = settings.rank if isinstance(settings.rank, int) else kernels.first(settings.rank, path)
    if rank is None:
        raise PatternError(f"no rule of ranks covers {path}")
    return rank


def _scale(settings: _Settings, path: str, rank: int) -> float:
    alpha = settings.alpha
    if alpha is not None and not isinstance(alpha, int | float):
        alpha = kernels.first(alpha, path)
    if alpha is None:
        alpha = float(rank)
    return float(alpha) / (math.sqrt(rank) if settings.rank_stabilized else rank)


def scale_of(adapter: Adapter, path: str, rank: int) -> float:
    """What a kernel's thin product is multiplied by.

    Args:
      adapter: LoRA or DoRA.
      path: of the kernel.
      rank: of its thin matrices.
    """
    return _scale(adapter.settings, path, rank)


def _norm(kernel: jax.Array, shape: Shape) -> jax.Array:
    axes = tuple(range(len(shape.stack), len(shape.stack) + len(shape.inputs)))
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axes))


def _factor(magnitude: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """The magnitude over a norm that has no gradient; 1 for an output whose kernel is zero."""
    norm = jax.lax.stop_gradient(_norm(jax.lax.stop_gradient(kernel), shape))
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), jnp.ones((), norm.dtype))


def _merge(settings: _Settings, params: Params, delta: Params) -> Params:
    parts = kernels.by_kernel(delta)
    kernels.require_kernels(parts, params)

    def changed(path: str, leaf: Any) -> Any:
        return _merged(settings, path, leaf, parts[path]) if path in parts else leaf

    return jtree.map_with_paths(changed, params)


def _merged(settings: _Settings, path: str, kernel: jax.Array, part: Mapping[str, jax.Array]) -> jax.Array:
    shape = kernels.shape_of(settings.targets, path, kernel)
    wide = kernel.astype(part["a"].dtype)
    whole = wide + _product(part, shape, _scale(settings, path, part["a"].shape[-1]))
    if "magnitude" in part:
        whole = whole * _spread(_factor(part["magnitude"], whole, shape), shape)
    return whole.astype(kernel.dtype)


def _product(part: Mapping[str, jax.Array], shape: Shape, scale: float) -> jax.Array:
    rank, stack = part["a"].shape[-1], shape.stack
    a = part["a"].reshape(*stack, math.prod(shape.inputs), rank)
    b = part["b"].reshape(*stack, rank, math.prod(shape.outputs))
    return (scale * (a @ b)).reshape(*stack, *shape.inputs, *shape.outputs)


def _spread(outputs: jax.Array, shape: Shape) -> jax.Array:
    """`[*stack, *outputs]` with axes of one for the inputs."""
    return outputs.reshape(*shape.stack, *(1 for _ in shape.inputs), *shape.outputs)


def _call(settings: _Settings, layer: Layer, part: PyTree, key: Key | None) -> jax.Array:
    (name,) = part
    outputs, thin = layer.apply(layer.inputs), part[name]
    scale, *others = {_scale(settings, f"{path}/{name}", thin["a"].shape[-1]) for path in layer.paths}
    if others:
        raise ConfigError(f"{layer.paths} run as one loop, and have several alphas: set scan=False")
    inputs = _dropped(jnp.asarray(layer.inputs), settings.dropout, key)
    dtype = outputs.dtype
    # The inner product has the rank as its last axis.
    change = scale * jnp.tensordot(layer.product(inputs, thin["a"].astype(dtype)), thin["b"].astype(dtype), 1)
    if "magnitude" not in thin:
        return outputs + change
    kernel = layer.params[name]
    shape = Shape((), kernel.shape[: thin["a"].ndim - 1], kernel.shape[thin["a"].ndim - 1 :])
    whole = kernel.astype(thin["a"].dtype) + _product(thin, shape, scale)
    factor = _factor(thin["magnitude"], whole, shape).astype(dtype)
    factor = jnp.expand_dims(factor, tuple(range(outputs.ndim - factor.ndim)))
    # What of the layer's output is its kernel's: of the inputs that were dropped, where they are.
    base = layer.product(inputs, kernel.astype(dtype))
    return outputs + (factor - 1) * base + factor * change


def _dropped(inputs: jax.Array, rate: float, key: Key | None) -> jax.Array:
    if key is None or not rate:
        return inputs
    kept = jax.random.bernoulli(key, 1 - rate, inputs.shape)
    return jnp.where(kept, inputs / (1 - rate), jnp.zeros((), inputs.dtype))

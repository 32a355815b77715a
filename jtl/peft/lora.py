"""LoRA and DoRA: a kernel's change as a product of two thin matrices."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import rules
from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError, PatternError
from jtl.peft.adapter import Adapter, Layer
from jtl.rules import Rules
from jtl.typing import Key, Params, PyTree


class _Settings(NamedTuple):
    """What `lora` was given."""

    targets: tuple[str, ...]
    rank: int | Rules
    alpha: float | Rules | None
    rank_stabilized: bool
    dropout: float
    input_axes: Rules
    stacked: tuple[str, ...]
    name: str = "lora"


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
    settings = _checked(targets, rank, alpha, rank_stabilized, dropout, input_axes, stacked)
    return Adapter(
        "lora",
        functools.partial(_init, settings),
        functools.partial(_merge, settings),
        functools.partial(_call, settings),
        needs_call=dropout > 0,
        settings=settings,
    )


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
    settings = _checked(targets, rank, alpha, rank_stabilized, dropout, input_axes, stacked)._replace(name="dora")
    return Adapter(
        "dora",
        functools.partial(_init, settings),
        functools.partial(_merge, settings),
        functools.partial(_call, settings),
        needs_call=dropout > 0,
        settings=settings,
    )


def _checked(
    targets: Sequence[str], rank: Any, alpha: Any, stabilized: bool, dropout: float, input_axes: Rules, stacked: Any
) -> _Settings:
    if isinstance(targets, str) or not targets:
        raise PatternError(f"targets are a list of patterns, such as ['**/query']; got {targets!r}")
    for pattern in (*targets, *stacked):
        rules.compile_pattern(pattern)
    for value in [rank] if isinstance(rank, int) else [value for _, value in rank]:
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"a rank is {value!r}; expected a whole number from 1 on")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout}: expected a number from 0 to below 1")
    return _Settings(tuple(targets), rank, alpha, stabilized, dropout, input_axes, tuple(stacked))


class _Shape(NamedTuple):
    """A kernel's axes: over stacked layers, inputs and outputs."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _shape(settings: _Settings, path: str, leaf: Any) -> _Shape:
    shape = tuple(np.shape(leaf))
    stack = int(any(rules.matches(pattern, path) for pattern in settings.stacked))
    axes = shape[stack:]
    given = _first(settings.input_axes, path)
    if given is None:
        given = {3: 2 if path.split("/")[-2:-1] == ["out"] else 1, 4: 3}.get(len(axes), 1)
    if not 1 <= given < len(axes):
        raise ConfigError(f"{path} has the axes {axes}: {given} of them cannot be its inputs")
    return _Shape(shape[:stack], axes[:given], axes[given:])


def _first(table: Rules, path: str) -> Any:
    return next((value for pattern, value in table if rules.matches(pattern, path)), None)


def _kernels(settings: _Settings, params: Params) -> dict[str, Any]:
    """The leaves to adapt, by path."""
    rules.require_matches(settings.targets, params)
    found = {}
    for path, leaf in jtree.leaves_with_paths(params):
        stack = int(any(rules.matches(pattern, path) for pattern in settings.stacked))
        if path.rpartition("/")[2] in ("bias", "scale"):
            continue  # those of linen's DenseGeneral have as many axes as its outputs
        if np.ndim(leaf) >= 2 + stack and any(rules.matches(pattern, path) for pattern in settings.targets):
            found[path] = leaf
    for pattern in settings.targets:
        if not any(rules.matches(pattern, path) for path in found):
            raise MaskError(f"the pattern {pattern!r} names no leaf of two or more axes that could be adapted")
    return found


def _init(settings: _Settings, params: Params, key: Key) -> Params:
    kernels = _kernels(settings, params)
    keys = jax.random.split(key, len(kernels))
    delta: dict[str, Any] = {}
    for (path, leaf), leaf_key in zip(kernels.items(), keys, strict=True):
        *module, name = path.split("/")
        place = delta
        for segment in [*module, settings.name]:
            place = place.setdefault(segment, {})
        place[name] = _new(settings, path, leaf, leaf_key)
    return delta


def _new(settings: _Settings, path: str, leaf: Any, key: Key) -> dict[str, jax.Array]:
    shape, rank = _shape(settings, path, leaf), _rank(settings, path)
    dtype = jtree.wide_dtype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    a, b = (*shape.stack, *shape.inputs, rank), (*shape.stack, rank, *shape.outputs)
    if path.endswith("embedding"):
        part = {"a": jnp.zeros(a, dtype), "b": jax.random.normal(key, b, dtype)}
    else:
        bound = 1 / math.sqrt(math.prod(shape.inputs))
        part = {"a": jax.random.uniform(key, a, dtype, -bound, bound), "b": jnp.zeros(b, dtype)}
    return {**part, "magnitude": _norm(leaf.astype(dtype), shape)} if settings.name == "dora" else part


def _rank(settings: _Settings, path: str) -> int:
    rank = settings.rank if isinstance(settings.rank, int) else _first(settings.rank, path)
    if rank is None:
        raise PatternError(f"no rule of ranks covers {path}")
    return rank


def _scale(settings: _Settings, path: str, rank: int) -> float:
    alpha = settings.alpha
    if alpha is not None and not isinstance(alpha, int | float):
        alpha = _first(alpha, path)
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


def _norm(kernel: jax.Array, shape: _Shape) -> jax.Array:
    axes = tuple(range(len(shape.stack), len(shape.stack) + len(shape.inputs)))
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axes))


def _factor(magnitude: jax.Array, kernel: jax.Array, shape: _Shape) -> jax.Array:
    """The magnitude over a norm that has no gradient; 1 for an output whose kernel is zero."""
    norm = jax.lax.stop_gradient(_norm(jax.lax.stop_gradient(kernel), shape))
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), jnp.ones((), norm.dtype))


def _merge(settings: _Settings, params: Params, delta: Params) -> Params:
    parts = _parts(settings, delta)
    known = set(jtree.paths(params))
    strange = sorted(set(parts) - known)
    if strange:
        raise ConfigError(f"the adapter has leaves for {strange[:3]}, which the params do not have")

    def changed(path: str, leaf: Any) -> Any:
        return _merged(settings, path, leaf, parts[path]) if path in parts else leaf

    return jtree.map_with_paths(changed, params)


def _parts(settings: _Settings, delta: Params) -> dict[str, dict[str, jax.Array]]:
    """The adapter's leaves of each kernel, by the kernel's path."""
    parts: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jtree.leaves_with_paths(delta):
        *module, _, kernel, name = path.split("/")
        parts.setdefault("/".join([*module, kernel]), {})[name] = leaf
    return parts


def _merged(settings: _Settings, path: str, kernel: jax.Array, part: Mapping[str, jax.Array]) -> jax.Array:
    shape = _shape(settings, path, kernel)
    wide = kernel.astype(part["a"].dtype)
    whole = wide + _product(part, shape, _scale(settings, path, part["a"].shape[-1]))
    if "magnitude" in part:
        whole = whole * _spread(_factor(part["magnitude"], whole, shape), shape)
    return whole.astype(kernel.dtype)


def _product(part: Mapping[str, jax.Array], shape: _Shape, scale: float) -> jax.Array:
    rank, stack = part["a"].shape[-1], shape.stack
    a = part["a"].reshape(*stack, math.prod(shape.inputs), rank)
    b = part["b"].reshape(*stack, rank, math.prod(shape.outputs))
    return (scale * (a @ b)).reshape(*stack, *shape.inputs, *shape.outputs)


def _spread(outputs: jax.Array, shape: _Shape) -> jax.Array:
    """`[*stack, *outputs]` with axes of one for the inputs."""
    return outputs.reshape(*shape.stack, *(1 for _ in shape.inputs), *shape.outputs)


def _call(settings: _Settings, layer: Layer, part: PyTree, key: Key | None) -> jax.Array:
    (name,) = part
    outputs, thin = layer.apply(layer.inputs), part[name]
    path = f"{layer.path}/{name}"
    scale = _scale(settings, path, thin["a"].shape[-1])
    inputs = _dropped(jnp.asarray(layer.inputs), settings.dropout, key)
    dtype = outputs.dtype
    # The inner product has the rank as its last axis.
    change = scale * jnp.tensordot(layer.product(inputs, thin["a"].astype(dtype)), thin["b"].astype(dtype), 1)
    if "magnitude" not in thin:
        return outputs + change
    kernel = layer.params[name]
    shape = _Shape((), kernel.shape[: thin["a"].ndim - 1], kernel.shape[thin["a"].ndim - 1 :])
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

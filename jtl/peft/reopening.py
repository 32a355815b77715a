"""Layers that open a stored kernel where they multiply, and once more in the backward pass, and keep none between.

Left to itself, XLA shares one float kernel between both passes, so that all of them are held at once. On CPU it does so
under `jax.checkpoint` too, and opens all before the first product. A conditional that it cannot see through stops that:
what a branch opens lives as long as the branch. On other devices an optimization barrier is enough.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jtl import quantized
from jtl.models.convolution import Conv
from jtl.models.layers import Dense

_AFFINE = (Dense, Conv, nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal)
"""Layers that are affine in inputs and bias, without random bits, statistics or modules inside."""


def reopening() -> contextlib.AbstractContextManager[None]:
    """Make affine layers of linen that are called inside open stored kernels twice; to be entered last."""
    return nn.intercept_methods(_reopened)


def _reopened(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    # A product of one's own (`dot_general_cls`) may be a module.
    affine = type(module) in _AFFINE and getattr(module, "dot_general_cls", None) is None
    if not affine or context.method_name != "__call__" or module.scope is None or len(args) != 1 or kwargs:
        return next_fun(*args, **kwargs)
    boxes = quantized.boxes(dict(module.scope.variables().get("params", {})))
    if not boxes or not jnp.issubdtype(jnp.result_type(*args), jnp.floating):
        return next_fun(*args)
    return _affine(next_fun, jnp.asarray(args[0]), jax.tree.leaves(boxes))


def _affine(layer: Callable[[jax.Array], jax.Array], inputs: jax.Array, stored: list[jax.Array]) -> jax.Array:
    """The layer's outputs, with a derivative by inputs and by what else it closes over."""
    closed: Any = jax.make_jaxpr(layer)(inputs)
    jaxpr, consts = getattr(closed, "jaxpr", closed), [jnp.asarray(const) for const in closed.consts]
    # Hidden in the closure, they would be of another trace in the backward pass of a loop.
    opened = set(map(id, stored))
    held = [id(const) in opened or not jnp.issubdtype(const.dtype, jnp.floating) for const in consts]
    shape, dtype = inputs.shape, inputs.dtype

    def outputs(inputs: jax.Array, free: list[jax.Array], fixed: list[jax.Array]) -> jax.Array:
        frees, fixeds = iter(free), iter(fixed)
        values = [next(fixeds) if one else next(frees) for one in held]
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, values))(inputs)[0]

    def value(inputs: jax.Array, free: list[jax.Array], fixed: list[jax.Array]) -> jax.Array:
        return _alone(outputs, inputs, free, fixed)

    def forward(inputs: jax.Array, free: list[jax.Array], fixed: list[jax.Array]) -> tuple[jax.Array, Any]:
        return value(inputs, free, fixed), (free, fixed)

    def backward(saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        def pulled(cotangent: jax.Array, free: list[jax.Array], fixed: list[jax.Array]) -> Any:
            # The inputs themselves do not matter to an affine layer's derivative.
            _, pull = jax.vjp(lambda x, free: outputs(x, free, fixed), jnp.zeros(shape, dtype), free)
            return pull(cotangent)

        # Behind the barrier, opening waits for the cotangent.
        cotangent, (free, fixed) = lax.optimization_barrier((cotangent, saved))
        return *_alone(pulled, cotangent, free, fixed), None

    run = jax.custom_vjp(value)
    run.defvjp(forward, backward)
    pairs = list(zip(consts, held, strict=True))
    return run(inputs, [const for const, one in pairs if not one], [const for const, one in pairs if one])


def _alone(fn: Callable[..., Any], given: jax.Array, free: list[jax.Array], fixed: list[jax.Array]) -> Any:
    """The same values, computed where XLA on CPU neither shares nor moves what they are computed from."""
    probe = next(leaf for leaf in fixed if jnp.issubdtype(leaf.dtype, jnp.floating)).ravel()[0]
    # Of finite values always true; XLA cannot know. A constant condition leaves no conditional behind.
    true = lax.platform_dependent(probe, cpu=lambda x: jnp.isfinite(x), default=lambda x: jnp.array(True))
    shapes = jax.eval_shape(fn, given, free, fixed)

    def never(*_: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return lax.cond(true, fn, never, given, free, fixed)

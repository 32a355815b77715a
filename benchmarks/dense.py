"""Dense layers with two against three axes: the gradient of the weights on CPU.

Command: python benchmarks/dense.py
Why: `jtl.models.layers.Dense` flattens the leading axes; this says what that buys, by shape.

Prints the ratio of the medians, three axes over two, for the forward pass and for value and gradient.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SHAPES = ((32, 32, 384, 384), (32, 32, 384, 1536), (32, 32, 1536, 384), (32, 128, 384, 1536), (16, 128, 768, 3072))


def median_ms(fn: Callable[..., Any], *arguments: Any, iterations: int = 40) -> float:
    """Median milliseconds of a compiled call, after ten to warm up."""
    compiled = jax.jit(fn)
    times = []
    for _ in range(10 + iterations):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[10:])


def three_axes(x: jax.Array, w: jax.Array) -> jax.Array:
    """`[B, S, I] @ [I, O]`."""
    return x @ w


def two_axes(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same, through `[B * S, I]`."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Gradients of inputs and weights."""
    return jax.grad(lambda x, w: jnp.sum(jnp.square(fn(x, w))), argnums=(0, 1))


def main() -> None:
    """Print the table."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'B, S, I, O':24s} {'forward':>10s} {'gradient':>10s}")
    for batch, length, inputs, outputs in SHAPES:
        x = jax.random.normal(jax.random.key(0), (batch, length, inputs))
        w = jax.random.normal(jax.random.key(1), (inputs, outputs))
        forward = median_ms(three_axes, x, w) / median_ms(two_axes, x, w)
        backward = median_ms(gradient(three_axes), x, w) / median_ms(gradient(two_axes), x, w)
        print(f"{f'{batch}, {length}, {inputs}, {outputs}':24s} {forward:10.2f} {backward:10.2f}", flush=True)


if __name__ == "__main__":
    main()

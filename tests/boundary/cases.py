"""What the laws of a split are checked on: a law, small losses, and random networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtl
from jtl import tree
from jtl.state import Frozen, TrainState
from jtl.step import call_loss

from ..conformance.cases import QUICK  # noqa: TID252

TX = optax.sgd(0.1)
KEY = jax.random.key(3, impl="unsafe_rbg")  # quick to compile


def ready(variables: Any, trainable: Any) -> tuple[TrainState, Frozen]:
    """A state and the frozen half, for a mask or patterns of one."""
    mask = jtl.select(*trainable) if isinstance(trainable, tuple) else trainable
    return jtl.init(variables, TX, trainable=mask, key=KEY)


def differentiated(loss_fn: Any, state: TrainState, frozen: Frozen, batch: Any, key: Any) -> Any:
    """Loss, report and gradients, as a step computes them."""

    def of(params: Any) -> Any:
        return call_loss(loss_fn, state._replace(params=params), frozen, batch, key, False)

    return jax.value_and_grad(of, has_aux=True)(state.params)


def assert_near(got: Any, expected: Any, rtol: float = 1e-6) -> None:
    """Equal structures, and leaves that differ by no more than a share of their largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, one), other in zip(tree.leaves_with_paths(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), path
        size = np.max(np.abs(other), initial=0.0)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * max(size, 1e-3), err_msg=path)


def assert_exact(loss_fn: Any, variables: Any, trainable: Any, *batches: Any, **options: Any) -> Any:
    """Both halves together give loss, metrics, collections and gradients of the whole loss.

    The split is made for the first batch, and used for all. Returns the split.
    """
    state, frozen = ready(variables, trainable)
    cut = jtl.split(loss_fn, state, frozen, batches[0], **options)

    def both(loss_fn: Any) -> Any:
        return lambda s, f, b: [differentiated(loss_fn, s, f, b, key) for key in (KEY, None)]

    for batch in batches:
        cached = compiled(cut.prefix)(frozen, frozen.collections, batch)
        assert {np.shape(value)[0] for value in cached.values()} == {len(jax.tree.leaves(batch)[0])}
        assert_near(compiled(both(cut.suffix))(state, frozen, cached), compiled(both(loss_fn))(state, frozen, batch))
    return cut


def compiled(function: Any) -> Any:
    """Under jit, compiled fast rather than to run fast."""
    return jax.jit(function, compiler_options=QUICK)


def shapes(cut: Any) -> list[tuple[int, ...]]:
    """What is stored of an example, by shape."""
    return sorted(value.shape for value in cut.report.stored)


def mean_loss(outputs: jax.Array, label: jax.Array) -> jax.Array:
    """A loss of outputs `[batch, classes]`."""
    return jnp.mean(jtl.losses.cross_entropy(outputs, label))


def leaf(seed: int, *shape: int, scale: float = 0.5) -> jax.Array:
    """A random array."""
    return scale * jax.random.normal(jax.random.key(seed), shape)


def vectors(size: int = 6, width: int = 4, seed: int = 0) -> dict[str, jax.Array]:
    """A batch of vectors `x` with labels of three classes."""
    return {"x": leaf(seed, size, width, scale=1.0), "label": jnp.arange(size) % 3}


def sequences(size: int = 6, length: int = 5, width: int = 4, seed: int = 0) -> dict[str, jax.Array]:
    """A batch of sequences `x`, with labels of three classes."""
    return {"x": leaf(seed, size, length, width, scale=1.0), "label": jnp.arange(size) % 3}


def loss(forward: Any) -> Any:
    """A loss of `forward(params, batch, key) -> outputs`."""

    def loss_fn(params: Any, collections: Any, batch: Any, *, key: Any) -> Any:
        outputs = forward(params, batch, key)
        value = mean_loss(outputs, batch["label"])
        return value, jtl.Aux({"loss": value, "largest": jnp.max(outputs)}, {})

    return loss_fn

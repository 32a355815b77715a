"""Batch normalisation and pooling: every order and mode of derivative is that of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jtl.models.convolution import batch_normalised, max_pool

EPSILON = 1e-3


def by_definition(x, scale, bias):
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    factor = scale * jax.lax.rsqrt(var + EPSILON)
    y = (x - jnp.expand_dims(mean, (0, 1, 2))) * jnp.expand_dims(factor, (0, 1, 2)) + jnp.expand_dims(bias, (0, 1, 2))
    return y, mean, var


def inputs(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def weighted(fn, *arguments):
    """A scalar that depends on every output in its own way, the statistics among them."""
    return sum(jnp.sum(jnp.sin(value) * (i + 1)) for i, value in enumerate(fn(*arguments)))


def test_batch_normalisation_has_the_derivatives_of_its_definition():
    with jax.enable_x64(True):
        given = inputs(0, (2, 3, 4, 2), (2,), (2,))
        ours = lambda *a: weighted(lambda *b: batch_normalised(*b, EPSILON), *a)  # noqa: E731
        theirs = lambda *a: weighted(by_definition, *a)  # noqa: E731
        for derivative in (jax.grad, jax.hessian):
            found, expected = (jax.jit(derivative(one, (0, 1, 2)))(*given) for one in (ours, theirs))
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)
        check_grads(jax.jit(lambda *a: batch_normalised(*a, EPSILON)), given, order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)])
def test_pooling_has_derivatives_in_every_mode(window, stride, padding):
    with jax.enable_x64(True):
        (x,) = inputs(1, (2, 7, 6, 2))
        check_grads(jax.jit(lambda x: max_pool(x, window, stride, padding)), (x,), order=2, modes=("fwd", "rev"))


@pytest.mark.torch
@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_of_equal_values_the_first_has_the_gradient_as_in_torch(window, stride, padding):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(2).integers(0, 3, (2, 9, 8, 3)).astype(np.float32)
    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    out = torch.nn.functional.max_pool2d(pixels, window, stride, padding)
    weights = torch.arange(out.numel(), dtype=torch.float32).reshape(out.shape)
    (out * weights).sum().backward()

    def loss(x):
        return jnp.sum(max_pool(x, window, stride, padding) * jnp.asarray(weights.permute(0, 2, 3, 1).numpy()))

    value, found = jax.value_and_grad(loss)(jnp.asarray(x))
    np.testing.assert_allclose(value, (out * weights).sum().detach(), rtol=1e-6)
    np.testing.assert_array_equal(found, pixels.grad.permute(0, 2, 3, 1).numpy())

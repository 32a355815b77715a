"""Layers that several families share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.layers import Dropout


@pytest.mark.parametrize("shape", [(64, 30, 26), (200, 251), (50000,), (50001,)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(shape, rate):
    x = jnp.ones(shape)
    y = np.asarray(Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}))
    dropped = np.mean(y == 0)
    assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / y.size) + 2**-16
    np.testing.assert_allclose(np.unique(y[y != 0]), 1 / (1 - rate), rtol=1e-4)


def test_values_are_dropped_apart_from_each_other():
    y = Dropout(0.5).apply({}, jnp.ones((400, 250)), deterministic=False, rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(y != 0, float)
    for other in (np.roll(kept, 1, axis=1), np.roll(kept, 1, axis=0), np.roll(kept, 2, axis=1)):
        assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 0.02


def test_dropout_is_off_without_training_or_rate():
    x = jnp.arange(6.0)
    for layer, deterministic in ((Dropout(0.5), True), (Dropout(0.0), False)):
        np.testing.assert_array_equal(layer.apply({}, x, deterministic=deterministic), x)


def test_half_precision_stays():
    y = Dropout(0.3).apply({}, jnp.ones((4, 8), jnp.bfloat16), deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert y.dtype == jnp.bfloat16

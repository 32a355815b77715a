"""Heads: their parameters, their dropout, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import errors, heads

FEATURES = jax.random.normal(jax.random.key(0), (5, 6))


def test_a_classifier_is_an_affine_map_with_parameters_directly_below_it():
    head = heads.classifier(3)
    variables = head.init(jax.random.key(1), FEATURES)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (6, 3), "bias": (3,)}}
    kernel, bias = variables["params"]["kernel"], jnp.arange(3.0)
    found = head.apply({"params": {"kernel": kernel, "bias": bias}}, FEATURES)
    np.testing.assert_allclose(found, np.asarray(FEATURES) @ np.asarray(kernel) + np.arange(3.0), rtol=1e-5)


def test_scale_zero_starts_from_equal_logits():
    head = heads.classifier(3, scale=0.0)
    assert not np.any(head.apply(head.init(jax.random.key(1), FEATURES), FEATURES))


def test_dropout_acts_on_the_features_in_training_only():
    head = heads.classifier(2, dropout=0.5)
    variables = head.init(jax.random.key(1), FEATURES)
    keys = jax.random.split(jax.random.key(2))
    training = [head.apply(variables, FEATURES, deterministic=False, rngs={"dropout": key}) for key in keys]
    assert not np.allclose(*training)
    plain = nn.Dense(2).apply(variables, FEATURES)
    np.testing.assert_allclose(head.apply(variables, FEATURES), plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.classifier(1), "at least 2 classes, got 1"),
        (lambda: heads.regressor(0), "at least 1 output, got 0"),
        (lambda: heads.classifier(2, dropout=1.0), r"\[0, 1\), got 1.0"),
        (lambda: heads.regressor(1, dropout=-0.1), "got -0.1"),
    ],
)
def test_impossible_heads_are_refused(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()

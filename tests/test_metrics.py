"""Metrics against scikit-learn, over batches of unequal size and weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(37, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 37).astype(np.int32)  # the last class never occurs
WEIGHT = np.concatenate([RNG.uniform(0.5, 2, 30), np.zeros(7)]).astype(np.float32)
PARTS = [slice(0, 5), slice(5, 29), slice(29, 37)]

REFERENCES = {
    metrics.accuracy: sklearn_metrics.accuracy_score,
    metrics.balanced_accuracy: sklearn_metrics.balanced_accuracy_score,
}


@pytest.mark.parametrize("metric", REFERENCES)
def test_merged_over_uneven_batches_it_equals_scikit_learn(metric):
    parts = [{"m": metric(*(jnp.array(a[part]) for a in (LOGITS, LABELS, WEIGHT)))} for part in PARTS]
    found = metrics.compute(metrics.merge(*parts))["m"]
    # Of the 37 rows scikit-learn sees those that count; it warns of a class that is only predicted.
    real, predicted = WEIGHT > 0, LOGITS[:, :3].argmax(-1)
    reference = REFERENCES[metric](LABELS[real], predicted[real], sample_weight=WEIGHT[real])
    whole = metric(jnp.array(LOGITS[:, :3]), jnp.array(LABELS), jnp.array(WEIGHT)).compute()
    np.testing.assert_allclose(whole, reference, rtol=1e-6)
    if (LOGITS.argmax(-1) == predicted).all():
        np.testing.assert_allclose(found, reference, rtol=1e-6)
    assert found == pytest.approx(float(metric(jnp.array(LOGITS), jnp.array(LABELS), jnp.array(WEIGHT)).compute()))


def test_a_class_that_does_not_occur_does_not_count():
    logits, labels = jnp.eye(4), jnp.array([0, 1, 2, 2])
    assert float(metrics.balanced_accuracy(logits, labels, jnp.ones(4)).compute()) == pytest.approx((1 + 1 + 0.5) / 3)


def test_filler_rows_weigh_nothing():
    logits, labels = jnp.eye(2), jnp.array([0, 0])
    assert float(metrics.accuracy(logits, labels, jnp.array([1.0, 0.0])).compute()) == 1.0


def test_without_weight_the_value_is_nan_not_zero():
    nothing = jnp.zeros(2)
    assert np.isnan(metrics.mean(jnp.ones(2), nothing).compute())
    assert np.isnan(metrics.balanced_accuracy(jnp.eye(2), jnp.array([0, 1]), nothing).compute())


def test_plain_scalars_average_over_batches_and_other_values_stay():
    merged = metrics.merge(*(metrics.accumulators({"f1": jnp.float32(value)}) for value in (1.0, 2.0, 6.0)))
    assert float(metrics.compute(merged)["f1"]) == 3.0
    assert metrics.compute({"plain": 3}) == {"plain": 3}


def test_accumulators_pass_through_jit():
    step = jax.jit(lambda logits: {"a": metrics.accuracy(logits, jnp.array([0, 1]), jnp.ones(2))})
    assert float(metrics.compute(step(jnp.eye(2)))["a"]) == 1.0


def test_counts_average_under_strict_promotion_too():
    merged = metrics.merge(*(metrics.accumulators({"tokens": jnp.int32(value)}) for value in (1, 4)))
    assert float(metrics.compute(merged)["tokens"]) == 2.5

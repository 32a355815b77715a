"""Losses against PyTorch and formulas worked out by hand; the checks of their targets."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jtl import errors, losses

LOGITS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3
LABELS = np.array([0, 3, 1, 1, 2, 0], np.int32)


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    shifted = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
    expected = -np.log((shifted / shifted.sum(-1, keepdims=True))[np.arange(6), LABELS])
    np.testing.assert_allclose(losses.cross_entropy(jnp.array(LOGITS), jnp.array(LABELS)), expected, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_torch(smoothing):
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(LABELS).long(), reduction="none", label_smoothing=smoothing
    )
    found = losses.cross_entropy(jnp.array(LOGITS), jnp.array(LABELS), label_smoothing=smoothing)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.torch
def test_binary_cross_entropy_equals_torch():
    torch = pytest.importorskip("torch")
    targets = (LOGITS > 1).astype(np.float32)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(targets), reduction="none"
    ).sum(-1)
    found = losses.binary_cross_entropy(jnp.array(LOGITS), jnp.array(targets))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.torch
def test_squared_error_equals_torch():
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.mse_loss(
        torch.tensor(LOGITS), torch.tensor(LOGITS.T.reshape(6, 4)), reduction="none"
    )
    found = losses.squared_error(jnp.array(LOGITS), jnp.array(LOGITS.T.reshape(6, 4)))
    np.testing.assert_allclose(found, expected.mean(-1).numpy(), rtol=1e-5)


def test_half_precision_logits_give_a_float32_loss():
    wide = losses.cross_entropy(jnp.array(LOGITS).astype(jnp.bfloat16), jnp.array(LABELS))
    assert wide.dtype == jnp.float32


def test_squared_error_averages_over_outputs_and_takes_a_lone_output_axis():
    outputs, targets = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(losses.squared_error(outputs, targets), [2.0, 12.5])
    np.testing.assert_allclose(losses.squared_error(outputs[:, :1], targets[:, 0]), [0.0, 9.0])


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "message"),
    [
        (losses.cross_entropy, (2, 3), np.array([0, 3]), "label 3 of example 1 .* 3 classes: expected 0 to 2"),
        (losses.cross_entropy, (2, 3), np.array([-1, 0]), "label -1 of example 0"),
        (losses.cross_entropy, (2, 3), np.array([0.0, 1.0]), "dtype float64"),
        (losses.cross_entropy, (2, 3), np.array([[0], [1]]), r"shape \(2, 1\)"),
        (losses.binary_cross_entropy, (2, 3), np.zeros((2, 2)), r"shape \(2, 2\)"),
        (losses.binary_cross_entropy, (1, 2), np.array([[0.0, 1.5]]), r"\[0.0, 1.5\]"),
        (losses.squared_error, (2, 1), np.array([0.0, np.nan]), "1 targets are not finite"),
        (losses.squared_error, (2, 1), np.zeros((2, 2)), r"shape \(2, 2\)"),
        (losses.squared_error, (2, 3), np.zeros((3, 2)), r"shape \(3, 2\)"),
        (losses.cross_entropy, None, np.array([0, 1]), "several"),
    ],
)
def test_bad_targets_are_refused(loss, shape, targets, message):
    with pytest.raises(errors.DataError, match=message):
        losses.check_targets(loss, shape, targets)


def test_a_partial_of_a_loss_is_checked_like_the_loss():
    smooth = functools.partial(losses.cross_entropy, label_smoothing=0.1)
    with pytest.raises(errors.DataError, match="label 9"):
        losses.check_targets(smooth, (1, 3), np.array([9]))


def test_good_targets_and_foreign_losses_pass():
    losses.check_targets(losses.cross_entropy, (2, 3), np.array([0, 2]))
    losses.check_targets(losses.squared_error, (2, 1), np.array([0.5, -1.0]))
    losses.check_targets(lambda outputs, targets: outputs, (2, 3), np.array([99, -99]))

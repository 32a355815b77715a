"""Losses against PyTorch and formulas worked out by hand; the checks of their targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
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


def by_hand(gamma, alpha):
    """The paper's formula in float64."""
    p = np.exp(LOGITS.astype(np.float64))
    p = (p / p.sum(-1, keepdims=True))[np.arange(6), LABELS]
    return -np.asarray(alpha)[LABELS] * (1 - p) ** gamma * np.log(p)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, [0.1, 2.0, 0.0, 1.0]])
def test_focal_is_the_formula_of_the_paper(gamma, alpha):
    found = losses.focal(jnp.array(LOGITS), jnp.array(LABELS), gamma=gamma, alpha=alpha)
    np.testing.assert_allclose(found, by_hand(gamma, alpha or [1.0] * 4), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal_is_the_formula_of_the_paper(gamma, alpha):
    targets = (LOGITS > 1).astype(np.int32)
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    right = np.where(targets, p, 1 - p)
    factor = 1.0 if alpha is None else np.where(targets, alpha, 1 - alpha)
    expected = (-factor * (1 - right) ** gamma * np.log(right)).sum(-1)
    found = losses.binary_focal(jnp.array(LOGITS), jnp.array(targets), gamma=gamma, alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_gradients_of_focal_losses_equal_torch(gamma):
    torch = pytest.importorskip("torch")
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS).long(), reduction="none")
    ((1 - torch.exp(-nats)) ** gamma * nats).sum().backward()
    found = jax.grad(lambda z: losses.focal(z, jnp.array(LABELS), gamma=gamma).sum())(jnp.array(LOGITS))
    np.testing.assert_allclose(found, logits.grad.numpy(), rtol=1e-4, atol=1e-6)
    logits.grad, targets = None, torch.tensor(LOGITS > 1).double()
    nats = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    ((1 - torch.exp(-nats)) ** gamma * nats).sum().backward()
    found = jax.grad(lambda z: losses.binary_focal(z, jnp.array(LOGITS > 1), gamma=gamma).sum())(jnp.array(LOGITS))
    np.testing.assert_allclose(found, logits.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_focal_losses_without_a_focus_are_cross_entropies():
    logits, labels, targets = jnp.array(LOGITS), jnp.array(LABELS), jnp.array(LOGITS > 1)
    plain = losses.focal(logits, labels, gamma=0.0)
    np.testing.assert_allclose(plain, losses.cross_entropy(logits, labels), rtol=1e-6)
    binary = losses.binary_focal(logits, targets, gamma=0.0)
    np.testing.assert_allclose(binary, losses.binary_cross_entropy(logits, targets), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_focal_losses_of_huge_logits_have_finite_gradients(gamma, size, dtype):
    signs = np.array([[1, -1], [-1, 1], [1, 1]])
    logits, labels, targets = jnp.asarray(signs * size, dtype), jnp.array([0, 0, 1]), jnp.array([[1, 0]] * 3)
    for loss, given in ((losses.focal, labels), (losses.binary_focal, targets)):
        value, gradient = jax.value_and_grad(lambda z, loss=loss, given=given: loss(z, given, gamma=gamma).mean())(
            logits
        )
        assert value.dtype == jnp.float32
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient.astype(jnp.float32)))
        if size:  # the second example is as wrong as it can be: its loss falls towards its label
            assert gradient[1, 0] < 0 < gradient[1, 1]


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [1, 0, 2], list(range(5)) * 3 + [4] * 40])
def test_class_weights_are_sklearns_balanced_ones_in_the_limit(labels):
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array(labels)
    classes = labels.max() + 1
    expected = compute_class_weight("balanced", classes=np.arange(classes), y=labels)
    np.testing.assert_allclose(losses.class_weights(labels, int(classes)), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.class_weights(labels, int(classes), beta=1 - 1e-7), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.class_weights(labels, int(classes), beta=0.0), np.ones(classes), rtol=1e-6)


def test_class_weights_are_inverse_effective_numbers():
    """Of 1 and 3 examples with beta 1/2: 1 and 1 + 1/2 + 1/4; scaled so that w_0 + 3 w_1 = 4."""
    found = losses.class_weights(np.array([0, 1, 1, 1]), 2, beta=0.5)
    np.testing.assert_allclose(found, np.array([1, 1 / 1.75]) * 4 / (1 + 3 / 1.75), rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "beta", "kind", "message"),
    [
        ([0, 0, 2], 1.0, errors.DataError, r"classes \[1\] have no example"),
        ([0, 3], 1.0, errors.DataError, "label 3 of example 1"),
        ([0.5, 1.5], 1.0, errors.DataError, "dtype float64"),
        ([[0, 1, 2]], 1.0, errors.DataError, r"shape \(1, 3\)"),
        ([0, 1, 2], 1.5, errors.ConfigError, r"beta=1.5"),
        ([0, 1, 2], float("nan"), errors.ConfigError, "beta=nan"),
    ],
)
def test_labels_without_weights_are_refused(labels, beta, kind, message):
    with pytest.raises(kind, match=message):
        losses.class_weights(np.array(labels), 3, beta=beta)


class Passing:
    """A model whose outputs are its inputs."""

    def apply(self, variables, logits, **settings):
        return (logits + variables["params"]["shift"], {}) if settings["mutable"] is not False else logits

    def __call__(self, logits):
        raise NotImplementedError


WEIGHTS = [0.2, 3.0, 1.0, 0.0]


@pytest.mark.torch
def test_the_mean_of_a_weighted_loss_is_torchs():
    torch = pytest.importorskip("torch")
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS))(
        torch.tensor(LOGITS), torch.tensor(LABELS).long()
    )
    loss_fn = jtl.supervised(Passing(), losses.weighted(losses.cross_entropy, WEIGHTS))
    # Two filler rows, which weigh nothing whatever their class.
    logits, labels = np.concatenate([LOGITS, LOGITS[:2]]), np.concatenate([LABELS, [1, 1]]).astype(np.int32)
    weight = np.array([1] * 6 + [0] * 2, np.float32)
    batch = {"logits": logits, "label": labels, "weight": weight}
    params = {"shift": jnp.zeros(())}
    for key in (None, jax.random.key(0)):
        found = loss_fn(params, {}, jax.tree.map(jnp.asarray, batch), key=key)[0]
        np.testing.assert_allclose(found, expected.item(), rtol=1e-6)
    # Of several batches, of unequal weights, the metric is the mean over all.
    state, frozen = jtl.init({"params": params}, optax.identity(), trainable={"shift": True}, key=jax.random.key(0))
    step = jtl.eval_step(loss_fn)
    total = [step(state, frozen, {n: jnp.asarray(v[i::3]) for n, v in batch.items()}) for i in range(3)]
    np.testing.assert_allclose(jtl.metrics.compute(jtl.metrics.merge(*total))["loss"], expected.item(), rtol=1e-6)


def test_an_example_weighs_as_its_class_and_partials_may_be_weighted():
    smooth = functools.partial(losses.cross_entropy, label_smoothing=0.1)
    found = losses.weighted(smooth, WEIGHTS)(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_allclose(
        found, smooth(jnp.array(LOGITS), jnp.array(LABELS)) * np.array(WEIGHTS)[LABELS], rtol=1e-6
    )


FOCAL = functools.partial(losses.focal, alpha=np.ones(3))


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "message"),
    [
        (losses.focal, (2, 3), np.array([0, 3]), "label 3 of example 1"),
        (FOCAL, (2, 3), np.array([0.0, 1.0]), "dtype float64"),
        (FOCAL, (2, 4), np.array([0, 1]), "alpha has 3 numbers, the model 4 classes"),
        (losses.binary_focal, (2, 3), np.zeros((2, 2)), r"shape \(2, 2\)"),
        (losses.binary_focal, (1, 2), np.array([[0.0, 0.5]]), "a target is 0.5"),
        (losses.binary_focal, (1, 2), np.array([[0.0, 2.0]]), r"\[0.0, 2.0\]"),
        (losses.weighted(losses.cross_entropy, WEIGHTS), (2, 4), np.array([0, 4]), "label 4 of example 1"),
        (losses.weighted(losses.cross_entropy, WEIGHTS), (2, 5), np.array([0, 4]), "weights has 4 numbers"),
        (losses.weighted(FOCAL, WEIGHTS), (2, 4), np.array([0, 1]), "alpha has 3 numbers"),
        (losses.weighted(FOCAL, [1.0] * 3), (2, 3), np.array([0, 3]), "label 3"),
        (losses.weighted(losses.focal, WEIGHTS), None, np.array([0, 1]), "focal takes one array"),
    ],
)
def test_bad_targets_of_losses_for_imbalance_are_refused(loss, shape, targets, message):
    with pytest.raises(errors.DataError, match=message):
        losses.check_targets(loss, shape, targets)


@pytest.mark.parametrize(
    ("loss", "weights", "message"),
    [
        (losses.cross_entropy, np.ones((1, 2)), "num_classes"),
        (losses.cross_entropy, [1.0, -2.0], "0 or more"),
        (losses.cross_entropy, [1.0, float("nan")], "0 or more"),
        (losses.cross_entropy, [0.0, 0.0], "not all of them 0"),
        (losses.squared_error, [1.0, 2.0], "squared_error has no labels"),
        (functools.partial(losses.binary_focal, gamma=1.0), [1.0, 2.0], "binary_focal has no labels"),
        (losses.weighted(losses.focal, [1.0, 2.0]), [1.0, 2.0], "weights already"),
    ],
)
def test_weights_that_mean_nothing_are_refused(loss, weights, message):
    with pytest.raises(errors.ConfigError, match=message):
        losses.weighted(loss, weights)

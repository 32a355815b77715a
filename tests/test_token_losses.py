"""Losses and metrics of positions, spans, several labels and numbers: against PyTorch, transformers and sklearn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, losses, metrics
from jtl.labels import IGNORED

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5, 4)).astype(np.float32) * 3
LABELS = RNG.integers(0, 4, (6, 5)).astype(np.int32)
LABELS[RNG.random((6, 5)) < 0.4] = IGNORED
LABELS[1] = IGNORED  # an example that has none
LABELS[2] = [3, 1, 0, 2, 2]
WEIGHT = np.array([1, 1, 1, 1, 0, 0], np.float32)
REAL = slice(0, 4)  # the rows that are no filler
WEIGHTS = [0.2, 3.0, 1.0, 0.5]
MODEL = jtl.from_function(lambda params, logits: logits + params["offset"])
BATCH = {"logits": jnp.array(LOGITS), "label": jnp.array(LABELS), "weight": jnp.array(WEIGHT)}

smooth = functools.partial(losses.cross_entropy, label_smoothing=0.1)


def value_and_gradient(loss_fn, batch):
    """Of the mean that `jtl.supervised` takes, by the logits."""
    params = {"offset": jnp.zeros_like(batch["logits"])}
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, {}, batch, key=None)[0]))(params)
    return value, grads["offset"]


def over_batches(loss_fn, parts):
    """The metrics over batches of other numbers of positions."""
    state, frozen = jtl.init(
        {"params": {"offset": jnp.zeros(())}}, optax.identity(), trainable={"offset": True}, key=jax.random.key(0)
    )
    step = jtl.eval_step(loss_fn)
    total = [step(state, frozen, {name: value[part] for name, value in BATCH.items()}) for part in parts]
    return metrics.compute(metrics.merge(*total))


@pytest.mark.torch
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (losses.cross_entropy, {}),
        (smooth, {"label_smoothing": 0.1}),
        (losses.weighted(losses.cross_entropy, WEIGHTS), {"weight": WEIGHTS}),
    ],
    ids=["plain", "smooth", "weighted"],
)
def test_the_mean_over_positions_is_torchs(loss, settings, shift):
    torch = pytest.importorskip("torch")
    settings = {**settings, **({"weight": torch.tensor(WEIGHTS)} if "weight" in settings else {})}
    logits = torch.tensor(LOGITS[REAL], requires_grad=True)
    labels = torch.tensor(LABELS[REAL]).long()
    outputs, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    expected = torch.nn.CrossEntropyLoss(ignore_index=-100, **settings)(outputs.reshape(-1, 4), targets.reshape(-1))
    expected.backward()
    loss_fn = jtl.supervised(MODEL, losses.per_token(loss, shift=shift))
    value, gradient = value_and_gradient(loss_fn, BATCH)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient[REAL], logits.grad.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[4:], 0)
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    np.testing.assert_allclose(over_batches(loss_fn, parts)["loss"], expected.item(), rtol=1e-6)


@pytest.mark.torch
def test_shifted_it_is_the_loss_of_causal_models_of_transformers():
    torch = pytest.importorskip("torch")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    expected = loss_utils.ForCausalLMLoss(torch.tensor(LOGITS), torch.tensor(LABELS).long(), vocab_size=4)
    loss = losses.per_token(shift=True)
    labels = jnp.array(LABELS)
    found = jnp.sum(loss(jnp.array(LOGITS), labels)) / jnp.sum(loss.weigh(labels))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-6)


def test_focal_losses_of_positions_are_the_formula_of_the_paper():
    p = np.exp(LOGITS.astype(np.float64))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), np.maximum(LABELS, 0)[..., None], -1)[..., 0]
    expected = np.where(LABELS == IGNORED, 0, -((1 - p) ** 2) * np.log(p)).sum(1)
    found = losses.per_token(losses.focal)(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [losses.cross_entropy, smooth, losses.focal])
def test_what_does_not_count_has_no_gradient_whatever_it_is(loss):
    logits = jnp.where(
        (LABELS == IGNORED)[..., None], jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e38]).reshape(1, 1, 4), 1.0
    )
    value, gradient = value_and_gradient(jtl.supervised(MODEL, losses.per_token(loss)), {**BATCH, "logits": logits})
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[LABELS == IGNORED], 0)


def test_microbatches_count_by_their_positions():
    loss_fn = jtl.supervised(jtl.from_function(lambda params, x: x @ params["w"]), losses.per_token())
    batch = {"x": jnp.array(LOGITS), "label": jnp.array(LABELS), "weight": jnp.array(WEIGHT)}
    tx = optax.sgd(1.0)
    start = {"params": {"w": jnp.array(RNG.normal(size=(4, 4)).astype(np.float32))}}
    found = []
    for count in (1, 3):
        state, frozen = jtl.init(start, tx, trainable={"w": True}, key=jax.random.key(0))
        state, report = jax.jit(jtl.train_step(loss_fn, tx, accumulate=count))(state, frozen, batch)
        found.append((report["loss"], state.params["w"]))
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "message"),
    [
        (
            losses.per_token(),
            (2, 3, 4),
            [[0, 1, IGNORED], [2, 4, 0]],
            "label 4 of example 1 at position 1 .* 4 classes",
        ),
        (losses.per_token(), (2, 3, 4), [[0, 1, 2], [-1, 0, 0]], "label -1 of example 1 at position 0"),
        (losses.per_token(), (1, 3, 4), [[0.0, 1.0, 2.0]], r"float64\[1, 3\]: expected integers \[1, 3\]"),
        (losses.per_token(), (2, 3, 4), [0, 1], r"int64\[2\]"),
        (losses.per_token(), (2, 4), [0, 1], r"shape \(2, 4\).*token_classifier"),
        (losses.per_token(), None, [[0, 1]], "shape None"),
        (losses.per_token(), (1, 2, 4), [[IGNORED, IGNORED]], "no label of the batch counts: every one is -100"),
        (losses.per_token(shift=True), (1, 2, 4), [[1, IGNORED]], "every one but the first"),
        (losses.per_token(smooth), (1, 2, 4), [[1, 9]], "label 9"),
        (losses.per_token(functools.partial(losses.focal, alpha=np.ones(3))), (1, 2, 4), [[1, 2]], "alpha has 3"),
        (losses.per_token(losses.weighted(smooth, WEIGHTS)), (1, 2, 3), [[1, 2]], "weights has 4 numbers"),
        (losses.cross_entropy, (2, 3, 4), [[0, 1, 2]] * 2, "losses.per_token"),
        (losses.span_cross_entropy, (2, 2, 7), [[0, 6], [3, 7]], r"example 1 is \[3, 7\]: expected .* end <= 6"),
        (losses.span_cross_entropy, (1, 2, 7), [[-1, 6]], r"\[-1, 6\]"),
        (losses.span_cross_entropy, (1, 2, 7), [[4, 3]], r"\[4, 3\]"),
        (losses.span_cross_entropy, (1, 2, 7), [[0.0, 1.0]], r"float64\[1, 2\]"),
        (losses.span_cross_entropy, (2, 2, 7), [0, 1], r"int64\[2\]: expected integers \[2, 2\]"),
        (losses.span_cross_entropy, (2, 7), [[0, 1]] * 2, "heads.span"),
    ],
)
def test_bad_targets_of_positions_are_refused(loss, shape, targets, message):
    with pytest.raises(errors.DataError, match=message):
        losses.check_targets(loss, shape, np.array(targets))


def test_good_targets_of_positions_pass():
    losses.check_targets(losses.per_token(), (2, 2, 4), np.array([[0, 3], [IGNORED, IGNORED]]))
    losses.check_targets(losses.per_token(shift=True), (1, 2, 4), np.array([[IGNORED, 3]]))
    losses.check_targets(losses.per_token(lambda z, y: z[:, 0]), (1, 1, 4), np.array([[3]], np.int8))
    losses.check_targets(losses.span_cross_entropy, (2, 2, 7), np.array([[0, 0], [2, 6]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.per_token(losses.squared_error), "squared_error has no single labels"),
        (lambda: losses.per_token(losses.per_token()), "PerToken has no single labels"),
        (lambda: losses.weighted(losses.per_token(), WEIGHTS), "inside of per_token"),
        (lambda: losses.weighted(losses.span_cross_entropy, WEIGHTS), "span_cross_entropy has no labels"),
    ],
)
def test_losses_that_cannot_be_put_together_are_refused(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()


SPANS = np.array([[0, 0], [1, 4], [2, 3], [0, 3], [4, 4], [1, 1]], np.int32)


@pytest.mark.torch
def test_the_loss_of_spans_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits = LOGITS.transpose(0, 2, 1)[:, :2]
    begin, end = (torch.tensor(logits[:, i]) for i in range(2))
    expected = loss_utils.ForQuestionAnsweringLoss(begin, end, *(torch.tensor(SPANS[:, i]).long() for i in range(2)))
    found = losses.span_cross_entropy(jnp.array(logits), jnp.array(SPANS))
    assert found.shape == (6,)
    np.testing.assert_allclose(found.mean(), expected.item(), rtol=1e-6)


# Metrics. Each is merged over batches of unequal size, and compared over the rows that are no filler.

ROWS = RNG.normal(size=(37, 3)).astype(np.float32)
CLASSES = RNG.integers(0, 3, 37).astype(np.int32)
FLAGS = (RNG.random((37, 3)) < 0.4).astype(np.int32)
NUMBERS = (ROWS + RNG.normal(size=ROWS.shape)).astype(np.float32)
BY_ROW = np.concatenate([RNG.uniform(0.5, 2, 30), np.zeros(7)]).astype(np.float32)
PARTS = [slice(0, 5), slice(5, 29), slice(29, 37)]
KEPT = BY_ROW > 0


def merged(metric, outputs, targets, weight=BY_ROW, parts=PARTS):
    arrays = [jnp.array(values) for values in (outputs, targets, weight)]
    found = [{"m": jax.jit(metric)(*(values[part] for values in arrays))} for part in parts]
    return metrics.compute(metrics.merge(*found))["m"]


def sklearn(name, targets, predicted, **settings):
    module = pytest.importorskip("sklearn.metrics")
    return getattr(module, name)(targets[KEPT], predicted[KEPT], sample_weight=BY_ROW[KEPT], **settings)


def test_f1_is_that_of_scikit_learn():
    binary = merged(metrics.f1, ROWS[:, :2], CLASSES % 2)
    np.testing.assert_allclose(binary, sklearn("f1_score", CLASSES % 2, ROWS[:, :2].argmax(1)), rtol=1e-5)
    micro = merged(metrics.f1, ROWS, FLAGS)
    np.testing.assert_allclose(micro, sklearn("f1_score", FLAGS, ROWS > 0, average="micro"), rtol=1e-5)
    macro = merged(metrics.macro_f1, ROWS, CLASSES)
    np.testing.assert_allclose(macro, sklearn("f1_score", CLASSES, ROWS.argmax(1), average="macro"), rtol=1e-5)
    several = merged(metrics.macro_f1, ROWS, FLAGS)
    np.testing.assert_allclose(several, sklearn("f1_score", FLAGS, ROWS > 0, average="macro"), rtol=1e-5)


def test_f1_of_nothing_is_not_a_number_and_of_three_classes_is_refused():
    nothing = metrics.f1(jnp.array([[1.0, 0]]), jnp.array([0]), jnp.ones(1)).compute()
    assert np.isnan(nothing)
    # Of two classes that occur, one found each time and one never: the third, neither there nor found, does not count.
    macro = metrics.macro_f1(jnp.array([[1.0, 0, 0]] * 2), jnp.array([0, 1]), jnp.ones(2)).compute()
    assert float(macro) == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(errors.ConfigError, match="macro_f1"):
        metrics.f1(jnp.array(ROWS), jnp.array(CLASSES), jnp.array(BY_ROW))


def test_multilabel_accuracy_is_that_of_scikit_learn():
    flags = np.where(RNG.random(37) < 0.5, FLAGS.T, ROWS.T > 0).T  # so that some are right
    found = merged(metrics.multilabel_accuracy, ROWS, flags.astype(np.float32))
    np.testing.assert_allclose(found, sklearn("accuracy_score", flags, ROWS > 0), rtol=1e-6)


@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 3)])
def test_metrics_of_numbers_are_those_of_scikit_learn_and_numpy(columns):
    outputs, targets = ROWS[:, columns], NUMBERS[:, columns]
    given = targets[:, 0] if columns.stop == 1 else targets  # one output keeps its axis, its targets do not
    error = merged(metrics.mean_squared_error, outputs, given)
    np.testing.assert_allclose(error, sklearn("mean_squared_error", targets, outputs), rtol=1e-5)
    np.testing.assert_allclose(
        merged(metrics.r_squared, outputs, given), sklearn("r2_score", targets, outputs), rtol=1e-4
    )
    pairs = (np.stack(pair)[:, KEPT] for pair in zip(outputs.T, targets.T, strict=True))
    covariances = [np.cov(pair, aweights=BY_ROW[KEPT]) for pair in pairs]
    expected = np.mean([c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]) for c in covariances])
    np.testing.assert_allclose(merged(metrics.pearson, outputs, given), expected, rtol=1e-4)


def test_numbers_far_from_zero_keep_their_digits_with_a_centre():
    outputs, targets = ROWS[:, 0] + 5000, NUMBERS[:, 0] + 5000
    found = merged(functools.partial(metrics.r_squared, centre=5000.0), outputs, targets)
    np.testing.assert_allclose(found, sklearn("r2_score", targets, outputs), rtol=1e-4)
    near = merged(functools.partial(metrics.pearson, centre=5000.0), outputs, targets)
    np.testing.assert_allclose(near, merged(metrics.pearson, ROWS[:, 0], NUMBERS[:, 0]), rtol=1e-2)


@pytest.mark.parametrize("shift", [False, True])
def test_metrics_of_positions_are_over_those_that_count(shift):
    weight = np.array([1, 1, 2, 0.5, 1, 0], np.float32)
    logits, labels = (LOGITS[:, :-1], LABELS[:, 1:]) if shift else (LOGITS, LABELS)
    counted, by_token = labels != IGNORED, np.broadcast_to(weight[:, None], labels.shape)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    accuracy = merged(functools.partial(metrics.token_accuracy, shift=shift), LOGITS, LABELS, weight, parts)
    hits = (logits.argmax(-1) == labels)[counted]
    np.testing.assert_allclose(accuracy, np.average(hits, weights=by_token[counted]), rtol=1e-6)
    logs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    found = merged(functools.partial(metrics.perplexity, shift=shift), LOGITS, LABELS, weight, parts)
    np.testing.assert_allclose(found, np.exp(np.average(nats[counted], weights=by_token[counted])), rtol=1e-5)


def test_the_metric_of_spans_asks_for_both_ends():
    logits = jax.nn.one_hot(jnp.array(SPANS), 5)
    wrong = jnp.array(SPANS).at[0, 1].set(2).at[1, 0].set(0).at[2].set(4)
    found = metrics.span_accuracy(logits, wrong, jnp.array([1.0, 1, 1, 1, 1, 0])).compute()
    assert float(found) == pytest.approx(2 / 5)


def test_metrics_of_positions_go_with_supervised():
    loss_fn = jtl.supervised(
        MODEL, losses.per_token(), metrics={"right": metrics.token_accuracy, "perplexity": metrics.perplexity}
    )
    found = over_batches(loss_fn, [slice(0, 3), slice(3, 6)])
    np.testing.assert_allclose(found["perplexity"], np.exp(found["loss"]), rtol=1e-6)
    counted = LABELS[REAL] != IGNORED
    np.testing.assert_allclose(found["right"], (LOGITS[REAL].argmax(-1) == LABELS[REAL])[counted].mean(), rtol=1e-6)

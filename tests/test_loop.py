"""`fit` and `evaluate`: what they refuse, what they report, what they leave alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import data, errors, loop
from jtl.data.text import ragged
from jtl.models.inputs import check_tokens
from jtl.step import eval_step

TX = optax.adam(1e-2)


class Net(nn.Module):
    """One hidden layer; `traces` counts how often its call was traced."""

    traces = 0

    @nn.compact
    def __call__(self, x):
        Net.traces += 1
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(4, name="stem")(x)))


METRICS = {"accuracy": jtl.metrics.accuracy, "balanced": jtl.metrics.balanced_accuracy}
LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy, metrics=METRICS)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 5)).astype(np.float32), RNG.integers(0, 3, 20).astype(np.int32)


def start(mask=None):
    variables = Net().init(jax.random.key(0), X[:1])
    return jtl.init(variables, TX, trainable=mask or jtl.everything(), key=jax.random.key(1))


def batch(x=X, y=Y):
    return {"x": x, "label": y}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (batch(y=np.where(np.arange(20) == 7, 3, Y)), "label 3 of example 7 is outside the model's 3 classes"),
        (batch(y=Y.astype(np.float32)), "dtype float32"),
        ({"x": X}, r"lacks \['label'\]; it has \['x'\]"),
        (batch(y=Y[:-1]), "different lengths"),
        (batch(X[:0], Y[:0]), "no example"),
    ],
    ids=["label", "dtype", "missing", "lengths", "empty"],
)
def test_a_bad_first_batch_is_refused_before_the_step_is_compiled(bad, message, monkeypatch):
    calls = []
    step = jtl.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: lambda *b: calls.append(b) or step(*a)(*b))
    loop.compiled_train.cache_clear()
    with pytest.raises(errors.DataError, match=message):
        next(jtl.fit(LOSS, TX, *start(), [bad]))
    loop.compiled_train.cache_clear()
    assert not calls


def test_a_bad_label_in_a_later_batch_is_refused_too():
    run = jtl.fit(LOSS, TX, *start(), [batch(), batch(y=Y + 1)])
    next(run)
    with pytest.raises(errors.DataError, match="label 3"):
        list(run)


@pytest.mark.parametrize("row", [0, 7, 18, 19])
def test_a_bad_row_of_data_in_memory_is_named_before_the_first_step(row, monkeypatch):
    monkeypatch.setattr(loop, "compiled_train", lambda *args: pytest.fail("compiled a training step"))
    bad = np.where(np.arange(20) == row, 5, Y)
    run = data.batches({"x": X}, bad, batch_size=3, seed=0, epochs=2)
    with pytest.raises(errors.DataError, match=f"row {row} of the data, by itself in a batch: label 5"):
        next(jtl.fit(LOSS, TX, *start(), run))


class Short(nn.Module):
    """Of texts of at most four tokens."""

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        del attention_mask
        return nn.Dense(3, name="head")(jax.nn.one_hot(input_ids, 9).mean(1))

    @nn.nowrap
    def check_batch(self, batch):
        check_tokens(batch, vocabulary=9, longest=4)


@pytest.mark.parametrize(
    ("lengths", "bad", "buckets", "message"),
    [
        ([2, 4, 5, 7, 1], 0, None, "row 3 of the data, by itself in a batch: input_ids are 7 long"),
        ([2, 4, 3, 1, 1], 0, (8,), "all rows of the data are padded to 8: input_ids are 8 long"),
        ([2, 4, 3, 1, 1], 5, None, "row 2 of the data, by itself in a batch: label 5"),
    ],
)
def test_a_row_is_not_refused_for_the_length_of_another(lengths, bad, buckets, message):
    labels = np.where(np.arange(5) == 2, bad, 0)
    run = data.batches({"input_ids": ragged([[1] * n for n in lengths])}, labels, batch_size=2, buckets=buckets)
    ids = jnp.ones((1, 4), jnp.int32)
    state, frozen = jtl.init(
        Short().init(jax.random.key(0), ids, ids), TX, trainable=jtl.everything(), key=jax.random.key(1)
    )
    with pytest.raises(errors.DataError, match=message):
        next(jtl.fit(jtl.supervised(Short(), jtl.losses.cross_entropy), TX, state, frozen, run))


def test_a_bad_held_out_label_is_refused_and_not_averaged_into_nan():
    with pytest.raises(errors.DataError, match="label 3"):
        list(jtl.fit(LOSS, TX, *start(), [batch()], held_out=lambda: [batch(y=Y + 1)]))


def test_no_batch_is_refused():
    with pytest.raises(errors.DataError, match="no batch to train on"):
        list(jtl.fit(LOSS, TX, *start(), []))
    with pytest.raises(errors.DataError, match="no held-out batch"):
        jtl.evaluate(jax.jit(eval_step(LOSS)), *start(), [])


def test_the_state_given_stays_usable_and_equal_runs_give_equal_states():
    state, frozen = start(jtl.select("head"))
    first, second = (list(jtl.fit(LOSS, TX, state, frozen, [batch()] * 3))[-1].state for _ in range(2))
    assert jtl.tree.digest(first) == jtl.tree.digest(second)
    assert int(first.step) == int(state.step) + 3


def test_fit_is_the_loop_over_a_step():
    state, frozen = start()
    *_, report = jtl.fit(LOSS, TX, state, frozen, [batch(X[i::4], Y[i::4]) for i in range(4)])
    step = jax.jit(jtl.train_step(LOSS, TX))
    for i in range(4):
        state, metrics = step(state, frozen, batch(X[i::4], Y[i::4]))
    assert jtl.tree.digest(report.state) == jtl.tree.digest(state)
    assert float(report.metrics["loss"]) == float(metrics["loss"])


def test_a_second_run_with_the_same_loss_and_transform_traces_no_step_again():
    list(jtl.fit(LOSS, TX, *start(), [batch()]))
    compiled = loop.compiled_train(LOSS, TX)
    before = compiled._cache_size()
    list(jtl.fit(LOSS, TX, *start(), [batch()] * 2))
    assert loop.compiled_train(LOSS, TX) is compiled
    assert compiled._cache_size() == before


def test_held_out_batches_are_evaluated_when_due_and_after_the_last_step():
    reports = jtl.fit(LOSS, TX, *start(), [batch()] * 5, held_out=lambda: [batch()], evaluate_every=2)
    evaluated = [report.step for report in reports if report.evaluation is not None]
    assert evaluated == [2, 4, 5]


def test_filler_rows_change_no_metric():
    state, frozen = start()
    step = jax.jit(eval_step(LOSS))
    padded = jtl.evaluate(step, state, frozen, data.batches({"x": X}, Y, batch_size=8))
    whole = jtl.evaluate(step, state, frozen, [batch()])
    assert padded == pytest.approx(whole, rel=1e-6)


def test_evaluation_matches_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics")
    state, frozen = start()
    found = jtl.evaluate(jax.jit(eval_step(LOSS)), state, frozen, data.batches({"x": X}, Y, batch_size=8))
    predicted = np.argmax(Net().apply(jtl.variables(state, frozen), X), axis=-1)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(Y, predicted))
    assert found["balanced"] == pytest.approx(reference.balanced_accuracy_score(Y, predicted))


def test_a_loss_without_a_checker_trains_as_well():
    def loss_fn(params, collections, batch, *, key):
        return jnp.mean(jnp.square(batch["x"] @ params["w"])), jtl.Aux({}, {})

    tx = optax.sgd(0.1)
    state, frozen = jtl.init({"params": {"w": jnp.ones(5)}}, tx, trainable=jtl.everything(), key=jax.random.key(0))
    *_, report = jtl.fit(loss_fn, tx, state, frozen, [{"x": X}] * 3)
    assert float(report.metrics["loss"]) < float(np.mean(np.square(X @ np.ones(5))))

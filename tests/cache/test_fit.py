"""`fit` from a cache is the same training."""

import inspect

import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import errors
from jtl.cache import auto
from jtl.data import batches
from jtl.data.text import ragged

from ..models import checkpoints  # noqa: TID252
from .cases import Case


def trained(case, run, **options):
    said = []
    reports = list(jtl.fit(case.loss_fn, case.tx, case.state, case.frozen, run, say=said.append, **options))
    return reports, said


def test_the_same_steps_and_the_same_result(case):
    whole, silent = trained(case, case.run(), cache="off")
    cached, (line,) = trained(case, case.run())
    assert not silent
    assert "cache: " in line
    assert "head/kernel" in line
    assert [report.step for report in cached] == [report.step for report in whole] == list(range(1, 19))
    for a, b in zip(whole, cached, strict=True):
        np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"], rtol=1e-5)
        assert a.metrics["accuracy"] == b.metrics["accuracy"]
    chex_close(whole[-1].state.params, cached[-1].state.params)


def chex_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


def test_a_run_that_resumes_follows_its_own_order(case):
    whole, _ = trained(case, case.run(), cache="off")
    first, _ = trained(case, case.run())
    assert first[6].step == 7
    resumed = list(jtl.fit(case.loss_fn, case.tx, case.state, case.frozen, case.run().at(6), say=lambda line: None))
    again = list(jtl.fit(case.loss_fn, case.tx, case.state, case.frozen, case.run().at(6), cache="off"))
    chex_close(resumed[-1].state.params, again[-1].state.params)
    assert len(whole) == len(resumed) + 6


def test_evaluation_is_of_the_whole_model(case):
    def held_out():
        return case.run(epochs=1)

    whole, _ = trained(case, case.run(), cache="off", held_out=held_out, evaluate_every=5)
    cached, _ = trained(case, case.run(), held_out=held_out, evaluate_every=5)
    assert [r.evaluation is None for r in whole] == [r.evaluation is None for r in cached]
    assert cached[-1].evaluation["loss"] == pytest.approx(whole[-1].evaluation["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"epochs": 1}, ""),
        ({"limit": 100}, "would take"),
        ({"listed": True}, ""),
    ],
)
def test_auto_stays_out_where_a_cache_does_not_pay(case, options, reason):
    run = case.run(epochs=options.get("epochs", 3))
    run = list(run) if options.get("listed") else run
    prepared = auto.prepare(case.loss_fn, case.state, case.frozen, run, limit=options.get("limit"))
    assert prepared.cache is None
    assert prepared.loss_fn is case.loss_fn
    assert prepared.batches is run
    assert reason in prepared.why


def test_auto_stays_out_where_everything_is_trained():
    case = Case(trainable=jtl.everything())
    assert auto.prepare(case.loss_fn, case.state, case.frozen, case.run()).cache is None
    with pytest.raises(errors.SplitError, match="nothing can be cached"):
        auto.prepare(case.loss_fn, case.state, case.frozen, case.run(), mode="require")


def test_require_raises_with_the_reason(case):
    with pytest.raises(errors.CacheError, match="would take"):
        trained(case, case.run(), cache="require", cache_limit=10)
    with pytest.raises(errors.ConfigError, match=r"jtl\.data\.batches"):
        trained(case, list(case.run()), cache="require")
    with pytest.raises(errors.ConfigError, match="'maybe'"):
        inspect.unwrap(auto.prepare)(case.loss_fn, case.state, case.frozen, case.run(), mode="maybe")


def test_an_inexact_loss_is_said_and_not_cached(case):
    inner = case.loss_fn

    def noisy(params, collections, batch, *, key):
        if key is not None:
            batch = {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}
        return inner(params, collections, batch, key=key)

    prepared = auto.prepare(noisy, case.state, case.frozen, case.run())
    assert prepared.cache is None
    assert "no cache: a random key" in prepared.why
    with pytest.raises(errors.SplitError, match="random key"):
        auto.prepare(noisy, case.state, case.frozen, case.run(), mode="require")


def test_labels_are_checked_before_anything_is_compiled(case):
    case.y = case.y + 1
    with pytest.raises(errors.DataError, match="outside the model's 3 classes"):
        trained(case, case.run())


def test_a_second_run_has_the_same_loss_and_so_compiles_nothing_again(case):
    first = auto.prepare(case.loss_fn, case.state, case.frozen, case.run())
    second = auto.prepare(case.loss_fn, *case.init(case.variables, seed=2), case.run(seed=4, epochs=5))
    assert first.cache is not None
    assert first.loss_fn is second.loss_fn


@pytest.mark.parametrize(("blocks", "directory", "balance"), [(0, True, False), (1, False, False), (0, False, True)])
def test_length_buckets_are_followed_exactly(tmp_path, blocks, directory, balance):
    """Rows left over in one bucket move up into the next, in balanced epochs others each time."""
    rng = np.random.default_rng(1)
    checkpoints.write(tmp_path / "model")
    model, variables = jtl.load(tmp_path / "model", jtl.heads.classifier(2), key=jax.random.key(0))
    tokens = [rng.integers(3, 20, rng.integers(2, 13)).tolist() for _ in range(37)]
    labels, settings = rng.integers(0, 2, 37), {"seed": 3, "epochs": 4, "buckets": (4, 8, 12), "balance": balance}
    run = batches({"input_ids": ragged(tokens)}, labels, batch_size=4, **settings)
    # Not Adam: the gradient of a key's bias is zero but for rounding, and Adam would make steps of it.
    loss_fn, tx = jtl.supervised(model, jtl.losses.cross_entropy), optax.sgd(0.1)
    mask = jtl.select("head", *["encoder/layer_1"][:blocks])
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    options = {"cache": "require", "cache_directory": tmp_path / "cache" if directory else None}
    *_, whole = jtl.fit(loss_fn, tx, state, frozen, run, cache="off")
    *_, cached = jtl.fit(loss_fn, tx, state, frozen, run, say=lambda line: None, **options)
    assert cached.step == whole.step == len(run)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole.state.params, cached.state.params)


@pytest.mark.parametrize("settings", [{}, {"remainder": "keep"}, {"epochs": 5, "seed": 3}])
def test_rows_that_a_balanced_epoch_draws_several_times_are_served_right(case, settings):
    case.y = np.array([0] * 17 + [1] * 4 + [2])
    run = case.run(balance=True, **settings)
    assert any(len(set(run.plan(step).rows)) < len(run.plan(step).rows) for step in range(len(run)))
    whole, _ = trained(case, run, cache="off")
    cached, _ = trained(case, run, cache="require")
    for a, b in zip(whole, cached, strict=True):
        np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"], rtol=1e-5)
        assert a.metrics["accuracy"] == b.metrics["accuracy"]
    chex_close(whole[-1].state.params, cached[-1].state.params)

"""The range test: suggestions on curves worked out by hand, and a test run that leaves no trace."""

import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, rates

from .cache.cases import Case

POWERS = 10.0 ** np.arange(-6, 14)  # the k-th rate of a curve is 10 ** (k - 6)


def power(rate):
    return round(np.log10(rate)) + 6


@pytest.mark.parametrize(
    ("losses", "place"),
    [
        # 5 4 3 2 1 fall to place 5: from 5 - 5 = 0, and half of the way, in whole thirds and sixths: 0 + 1 + 0.
        ([5, 5, 4, 3, 2, 1, 2, 4], 1),
        # 9 8 7 6 5 4 3 2 1 fall to place 10: from 1, 1 + 3 + 1.
        ([9, 9, 8, 7, 6, 5, 4, 3, 5, 2, 1, 7, 8], 5),
        # 6 5 4 and 6 3 2 are as long; the one that ends first counts: to place 2 from -1, -1 + 1 + 0.
        ([6, 5, 4, 7, 3.5, 9], 1),
        # Nothing falls.
        ([1, 2, 3, 4], 0),
        # Three apart, with rises between them: to place 6 from 6 - 4 = 2, 2 + 1 + 0.
        ([8, 9, 7, 9, 6, 9, 5, 9], 3),
    ],
)
def test_the_valley_is_the_middle_of_the_longest_descent(losses, place):
    assert power(rates.valley(POWERS[: len(losses)], np.array(losses, float))) == place


def longest(losses):
    """The length of the longest falling subsequence and its first end, from all subsequences."""
    best, end = 1, 0
    for count in range(2, len(losses) + 1):
        chosen = [c for c in itertools.combinations(range(len(losses)), count) if falls(losses, c)]
        best, end = (count, min(c[-1] for c in chosen)) if chosen else (best, end)
    return best, end


def falls(losses, chosen):
    return all(losses[a] > losses[b] for a, b in itertools.pairwise(chosen))


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_descent_is_the_longest_of_all(seed):
    losses = np.random.default_rng(seed).permutation(8).astype(float)
    length, end = longest(losses)
    start = end - length if end else 0
    third = (end - start) / 3
    assert power(rates.valley(POWERS[:8], losses)) == max(start + int(third) + int(third / 2), 0)


def test_the_slide_stops_where_the_slope_is_alike_at_both_ends():
    # Slopes by hand: 0 up to place 2, 0.5 at the corner, 1 after it. Intervals reach from place l to l + 15.
    losses = np.maximum(np.arange(20.0) - 3, 0)
    # At l = 4 both slopes are 1: the first interval, from the right, is alike already.
    assert power(rates.slide(POWERS, losses)) == 4
    # Falling by 1 up to place 3, then flat: only l = 4 is alike; with a rise at the end l = 4 is not, nor any other.
    bowl = np.maximum(3 - np.arange(20.0), 0)
    assert power(rates.slide(POWERS, bowl)) == 4
    assert power(rates.slide(POWERS, bowl + 5 * np.maximum(np.arange(20) - 15, 0))) == 0
    # A rise at the last place alone: slopes of 5 and 2.5 there, so that l = 4 and l = 3 are not alike, and l = 2 is.
    flat = np.zeros(20)
    flat[19] = 5
    assert power(rates.slide(POWERS, flat)) == 3
    assert power(rates.slide(POWERS, flat, threshold=10.0)) == 4
    with pytest.raises(errors.ConfigError, match="16 points or more, this curve has 15"):
        rates.slide(POWERS[:15], losses[:15])


def test_minimum_and_steep():
    losses = np.array([5.0, 4.9, 4.0, 1.5, 1.0, 3.0])
    assert power(rates.minimum(POWERS[:6], losses)) == 3  # a tenth of the rate at place 4
    assert power(rates.steep(POWERS[:6], losses)) == 2  # from 4.0 to 1.5


def test_the_average_has_no_bias_at_its_beginning():
    # After two losses: (0.98 * 0.02 * 4 + 0.02 * 1) / (1 - 0.98 ** 2) = 0.0984 / 0.0396
    np.testing.assert_allclose(rates.smooth([4.0, 1.0]), [4.0, 0.0984 / 0.0396], rtol=1e-12)


def quadratic(params, collections, batch, *, key):
    """w squared over 2, with the batch's number beside it: SGD multiplies w by (1 - rate)."""
    return jnp.sum(jnp.square(params["w"])) / 2, jtl.Aux({"row": jnp.sum(batch["x"])}, {})


START = {"params": {"w": jnp.array([2.0]), "still": jnp.array([1.0])}}
MASK = {"w": True, "still": False}
ONES = [{"x": jnp.ones((2, 1))}] * 7


def begin():
    return jtl.init(START, optax.sgd(0.0), trainable=MASK, key=jax.random.key(0))


def test_each_update_has_its_rate_and_the_test_ends_at_four_times_the_best():
    state, frozen = begin()
    found = jtl.find_rate(quadratic, optax.sgd, state, frozen, ONES, low=1e-3, high=1e3, steps=60)
    w, losses, best = 2.0, [], np.inf
    for rate in np.geomspace(1e-3, 1e3, 60):
        losses.append(w * w / 2)
        average = rates.smooth(losses)[-1]
        best = min(best, average)
        if average > 4 * best:
            break
        w *= 1 - rate
    np.testing.assert_allclose(found.rates, np.geomspace(1e-3, 1e3, 60)[: len(losses)])
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.smoothed, rates.smooth(losses), rtol=1e-4)
    assert 20 < len(losses) < 60
    assert set(found.suggestions) == {"valley", "slide", "minimum", "steep"}
    assert all(1e-3 < rate < 2 for rate in found.suggestions.values())  # 2 is where SGD diverges on it


class Net(nn.Module):
    """A frozen stem, dropout and batch normalisation."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="stem")(x))
        return nn.Dense(3, name="head")(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


def test_the_state_and_the_frozen_half_stay_bit_for_bit():
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(16, 5)).astype(np.float32), "label": rng.integers(0, 3, 16).astype(np.int32)}
    loss_fn = jtl.supervised(Net(), jtl.losses.cross_entropy)
    mask = jtl.select("head", "norm")
    state, frozen = jtl.init(
        Net().init(jax.random.key(0), batch["x"]), optax.adam(1e-3), trainable=mask, key=jax.random.key(1)
    )
    before = jtl.tree.digest((state, frozen))
    found = jtl.find_rate(loss_fn, optax.adamw, state, frozen, [batch], steps=40)
    assert jtl.tree.digest((state, frozen)) == before
    assert found.smoothed.min() < found.smoothed[0]
    again = jtl.find_rate(loss_fn, optax.adamw, state, frozen, [batch], steps=40)
    np.testing.assert_array_equal(found.losses, again.losses)


def test_all_rates_share_one_compilation():
    traced = []

    def make_tx(learning_rate):
        traced.append(1)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))

    state, frozen = begin()
    jtl.find_rate(quadratic, make_tx, state, frozen, ONES, steps=20)
    assert len(traced) == 2  # the optimizer's start, and the step


def test_a_cached_run_gives_the_same_curve():
    case = Case()
    plain = jtl.find_rate(case.loss_fn, optax.adam, case.state, case.frozen, case.run(), low=1e-5, steps=30)
    prepared = jtl.cache.prepare(case.loss_fn, case.state, case.frozen, case.run(), mode="require")
    assert prepared.cache is not None
    cached = jtl.find_rate(prepared.loss_fn, optax.adam, case.state, case.frozen, prepared.batches, low=1e-5, steps=30)
    np.testing.assert_allclose(plain.losses, cached.losses, rtol=1e-4)
    assert len(plain.rates) > len(case.run())  # the run was gone through again


def test_a_loss_that_is_not_finite_ends_the_test():
    def exploding(params, collections, batch, *, key):
        loss, aux = quadratic(params, collections, batch, key=key)
        return jnp.where(batch["x"][0, 0] > 5, jnp.nan, loss), aux

    state, frozen = begin()
    numbered = [{"x": jnp.full((2, 1), float(i > 19) * 9)} for i in range(40)]
    found = jtl.find_rate(exploding, optax.sgd, state, frozen, numbered, high=1e-2, steps=40)
    assert len(found.rates) == 20
    assert np.isfinite(found.losses).all()
    with pytest.raises(errors.ConfigError, match="after 0 of 40 updates"):
        jtl.find_rate(exploding, optax.sgd, state, frozen, numbered[30:], steps=40)


def test_a_short_run_ends_with_its_batches():
    state, frozen = begin()
    found = jtl.find_rate(quadratic, optax.sgd, state, frozen, iter(ONES * 2), steps=40)
    assert len(found.rates) == 14
    assert set(found.suggestions) == {"valley", "minimum", "steep"}


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"low": 0.0}, errors.ConfigError, "0 < low < high"),
        ({"low": 1.0, "high": 0.1}, errors.ConfigError, "0 < low < high"),
        ({"high": float("inf")}, errors.ConfigError, "0 < low < high"),
        ({"steps": 9}, errors.ConfigError, "10 or more"),
        ({"batches": []}, errors.DataError, "no batch"),
        ({"batches": ONES[:3], "steps": 1000, "one_pass": True}, errors.ConfigError, "after 3 of 1000"),
    ],
)
def test_what_gives_no_curve_is_refused(settings, kind, message):
    state, frozen = begin()
    batches = settings.pop("batches", ONES)
    batches = iter(batches) if settings.pop("one_pass", False) else batches
    with pytest.raises(kind, match=message):
        jtl.find_rate(quadratic, optax.sgd, state, frozen, batches, **settings)


def test_bad_labels_are_refused_before_training():
    case = Case()
    wrong = [{"x": case.x[:4], "label": np.full(4, 7)}]
    with pytest.raises(errors.DataError, match="label 7"):
        jtl.find_rate(case.loss_fn, optax.adam, case.state, case.frozen, wrong)


CURVE = rates.RangeTest(POWERS, np.linspace(3, 1, 20), np.linspace(3, 1, 20), {"valley": 1e-3, "slide": 1e-2})


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_is_a_file_of_its_format(tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    path = CURVE.plot(tmp_path / f"curve.{suffix}")
    assert path.read_bytes().startswith(start)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    if suffix == "svg":
        assert "valley: 0.001" in path.read_text()


def test_a_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[plots\]"):
        CURVE.plot(tmp_path / "curve.png")


def test_a_layer_wise_rate_is_a_function_of_the_rate():
    case = Case()

    def make_tx(learning_rate):
        groups = {"kernel": optax.sgd(learning_rate), "bias": optax.sgd(learning_rate / 10)}
        return optax.multi_transform(
            groups, lambda params: jtl.label(params, [("**/kernel", "kernel"), ("**", "bias")])
        )

    found = jtl.find_rate(case.loss_fn, make_tx, case.state, case.frozen, case.run())
    assert found.smoothed.min() < found.smoothed[20]  # before, averages of few batches

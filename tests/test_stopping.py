"""Early stopping: where it stops, what it keeps, and that what it keeps are the weights of that step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, strategies
from jtl.schedule import Progress

NAN = float("nan")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)).astype(np.float32), RNG.integers(0, 3, 40).astype(np.int32)
HELD_OUT = [{"x": X, "label": Y}]


class Net(nn.Module):
    """A stem, batch normalisation and a head."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(16, name="stem")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})
TX = optax.adam(1e-2)
EVALUATE = jax.jit(jtl.eval_step(LOSS))


def batches(count=30):
    order = np.random.default_rng(1)
    for _ in range(count):
        rows = order.permutation(40)[:16]
        yield {"x": X[rows], "label": Y[rows]}


def fit(tx=TX, count=30, **settings):
    mask = None if isinstance(tx, jtl.Strategy) else jtl.everything()
    state, frozen = jtl.init(Net().init(jax.random.key(0), X), tx, trainable=mask, key=jax.random.key(1))
    settings = {"held_out": lambda: HELD_OUT, "evaluate_every": 2, "cache": "off", **settings}
    return jtl.fit(LOSS, tx, state, frozen, batches(count), **settings)


def replay(values, criterion):
    """Reports of a run with these evaluations, None where there is none, through the criterion."""
    state, frozen = jtl.init({"params": {"w": jnp.zeros(2)}}, TX, trainable={"w": True}, key=jax.random.key(0))
    reports = (
        jtl.Report(
            step,
            state._replace(step=jnp.int32(step), params={"w": jnp.full(2, step)}),
            {},
            None if value is None else {"loss": value, "accuracy": value},
            frozen,
            Progress(),
        )
        for step, value in enumerate(values, 1)
    )
    found = list(jtl.early_stopping(reports, criterion))
    assert [report.step for report, _ in found] == list(range(1, len(found) + 1))
    return len(found), found[-1][1]


@pytest.mark.parametrize(
    ("values", "criterion", "stops", "best"),
    [
        ([3, 2, 1, 1.5, 1.2, 0.5], jtl.Plateau("loss", 2), 5, 3),
        ([3, 2, 1, 1.5, 0.9, 1.2, 1.3], jtl.Plateau("loss", 2), 7, 5),
        ([1, 2, 3, 4], jtl.Plateau("loss", 3), 4, 1),
        ([0.5, 0.7, 0.6, 0.9, 0.8], jtl.Plateau("accuracy", 1, higher_is_better=True), 3, 2),
        ([3, None, None, 2, None, None, 5, None, 6, None], jtl.Plateau("loss", 2), 9, 4),
        ([NAN, 3, NAN, 2, NAN, NAN], jtl.Plateau("loss", 2), 6, 4),
        ([float("-inf"), 3, 4], jtl.Plateau("loss", 2), 3, 2),
        ([0.5, float("inf"), 0.6], jtl.Plateau("accuracy", 2, higher_is_better=True), 3, 3),
        ([3, 2.95, 2.91, 2.5], jtl.Plateau("loss", 2, by=0.1), 3, 1),
        ([3, 2, 1], jtl.Plateau("loss", 2), 3, 3),
        ([3, 4], None, 2, 1),
    ],
)
def test_where_it_stops_and_what_is_best(values, criterion, stops, best):
    values = [None if value is None else float(value) for value in values]
    steps, kept = replay(values, criterion)
    assert (steps, kept.step) == (stops, best)
    assert kept.evaluation["loss"] == values[best - 1]
    np.testing.assert_array_equal(kept.state.params["w"], np.full(2, best))


def test_without_a_finite_value_nothing_is_best():
    assert replay([NAN, NAN, NAN], jtl.Plateau("loss", 2)) == (2, None)


def best_of(tx):
    *found, (report, best) = jtl.early_stopping(fit(tx), jtl.Plateau("loss", 100))
    assert report.step == 30
    seen = {r.step: r.evaluation["loss"] for r, _ in [*found, (report, best)] if r.evaluation}
    assert best.step == min(seen, key=seen.get)
    assert best.evaluation["loss"] == seen[best.step] < seen[30]
    # After all the steps that were given donated buffers.
    assert int(best.state.step) == best.step
    assert jtl.evaluate(EVALUATE, *jtl.state.freeze(best.state, best.frozen), HELD_OUT) == best.evaluation
    return best


def climbing(after):
    """Adam whose rate changes sign, so that the loss rises again after so many updates."""
    return optax.adam(lambda count: jnp.where(count < after, 1e-2, -1e-2))


@pytest.mark.parametrize("after", [0, 15])
def test_the_best_are_the_weights_of_a_run_that_ended_there(after):
    best = best_of(climbing(after))
    assert best.step == 2 if after == 0 else 8 < best.step < 24
    again = [report for report in fit(climbing(after), best.step)][-1]
    kept, expected = (jtl.variables(one.state, one.frozen) for one in (best, again))
    assert jtl.tree.digest(kept) == jtl.tree.digest(expected)


@pytest.mark.parametrize("phase", [0, 1])
def test_the_best_of_a_strategy_is_whole_whichever_phase_it_was_in(phase):
    probe, whole = (climbing(8), optax.adam(-1e-2)) if phase == 0 else (optax.adam(-1e-4), climbing(14))
    best = best_of(strategies.lp_ft(probe, whole, steps=8))
    assert (best.step <= 8) == (phase == 0)
    assert (jtl.tree.paths(best.state.params) == ["head/bias", "head/kernel"]) == (phase == 0)
    assert jtl.tree.paths(jtl.variables(best.state, best.frozen)) == jtl.tree.paths(Net().init(jax.random.key(0), X))


def test_it_stops_training():
    steps = [report.step for report, _ in jtl.early_stopping(fit(optax.adam(-3e-2)), jtl.Plateau("loss", 2))]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_bad_settings_are_refused():
    with pytest.raises(errors.ConfigError, match="patience=0"):
        jtl.early_stopping(iter(()), jtl.Plateau("loss", 0))
    with pytest.raises(errors.ConfigError, match=r"'f1': the loss reports \['accuracy', 'loss'\]"):
        list(jtl.early_stopping(fit(), jtl.Plateau("f1")))
    with pytest.raises(errors.ConfigError, match="nothing was evaluated; give"):
        list(jtl.early_stopping(fit(count=3, held_out=None, evaluate_every=None)))

"""A member of a sweep is the run that it would have been alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors

from .cache.cases import Case


def members(case, count=4):
    """States that differ in head and key."""
    found = []
    for number in range(count):
        fresh = case.model.init(jax.random.key(number), case.x)["params"]["head"]
        start = {**case.variables, "params": {**case.variables["params"], "head": fresh}}
        found.append(case.init(start, seed=number)[0])
    return found


def alone(case, tx, state, run, steps=None):
    state = state._replace(opt_state=tx.init(state.params))
    for report in jtl.fit(case.loss_fn, tx, state, case.frozen, run, cache="off"):
        if report.step == steps:
            break
    return report


RATES = np.array([1e-3, 1e-2, 3e-2, 1e-1], np.float32)
DECAYS = np.array([0.0, 0.1, 0.0, 1e-3], np.float32)


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("mask", [jtl.select("head"), jtl.select("head", "middle/bias"), jtl.everything()])
def test_members_are_the_runs_they_stand_for(mask, cache):
    case = Case(trainable=mask)
    states, before = members(case), jtl.tree.digest(case.frozen)
    result = jtl.sweep(
        case.loss_fn,
        optax.adamw,
        states,
        case.frozen,
        case.run(),
        hyperparameters={"learning_rate": RATES, "weight_decay": DECAYS},
        held_out=lambda: case.run(epochs=1),
        cache=cache,
        say=lambda line: None,
    )
    assert jtl.tree.digest(case.frozen) == before
    assert result.steps.tolist() == [18] * 4
    for number, state in enumerate(states):
        tx = optax.adamw(float(RATES[number]), weight_decay=float(DECAYS[number]))
        report = alone(case, tx, state, case.run())
        mine = result.state(number)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), report.state.params, mine.params)
        assert int(mine.step) == 18
        assert result.metrics["loss"][number] == pytest.approx(float(report.metrics["loss"]), abs=1e-5)
        scores = jtl.evaluate(jax.jit(jtl.eval_step(case.loss_fn)), mine, case.frozen, case.run(epochs=1))
        assert result.evaluation["loss"][number] == pytest.approx(scores["loss"], abs=1e-5)
        assert result.evaluation["accuracy"][number] == pytest.approx(scores["accuracy"])


def test_a_stopped_member_stays_as_it_was():
    case = Case()
    states = members(case)
    rates = np.array([0.0, 1e-2, 0.0, 3e-2], np.float32)  # a rate of zero never improves
    result = jtl.sweep(
        case.loss_fn,
        optax.sgd,
        states,
        case.frozen,
        case.run(),
        hyperparameters={"learning_rate": rates},
        held_out=lambda: case.run(epochs=1),
        evaluate_every=3,
        stopping=jtl.Stopping("loss", patience=2),
        say=lambda line: None,
    )
    # The first evaluation sets the best; the second and the third are no better.
    assert result.steps[[0, 2]].tolist() == [9, 9]
    assert result.state(0).step == 9
    assert jtl.tree.digest(result.state(0).params) == jtl.tree.digest(states[0].params)
    for number in (1, 3):
        report = alone(case, optax.sgd(float(rates[number])), states[number], case.run(), int(result.steps[number]))
        mine = result.state(number).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), report.state.params, mine)


def test_the_sweep_ends_when_all_are_stopped():
    case = Case()
    rates = np.zeros(4, np.float32)
    result = jtl.sweep(
        case.loss_fn,
        optax.sgd,
        members(case),
        case.frozen,
        case.run(epochs=50),
        hyperparameters={"learning_rate": rates},
        held_out=lambda: case.run(epochs=1),
        evaluate_every=2,
        stopping=jtl.Stopping("accuracy", higher_is_better=True),
        say=lambda line: None,
    )
    assert result.steps.tolist() == [4] * 4


def test_masking_compiles_nothing_again():
    case, traced = Case(), []

    def make_tx(learning_rate):
        traced.append(1)
        return optax.sgd(learning_rate)

    jtl.sweep(
        case.loss_fn,
        make_tx,
        members(case),
        case.frozen,
        case.run(),
        hyperparameters={"learning_rate": np.array([0.0, 0.0, 0.1, 0.1], np.float32)},
        held_out=lambda: case.run(epochs=1),
        evaluate_every=2,
        stopping=jtl.Stopping(),
        say=lambda line: None,
    )
    assert len(traced) == 2  # the optimizer's start, and the step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": []}, "at least one state"),
        ({"hyperparameters": {"learning_rate": np.ones(3, np.float32)}}, r"'learning_rate' has shape \(3,\)"),
        ({"stopping": jtl.Stopping()}, "needs held_out"),
    ],
)
def test_bad_settings_are_refused(change, message):
    case = Case()
    options = {"states": members(case), **change}
    run = functools.partial(jtl.sweep, case.loss_fn, optax.sgd, options.pop("states"), case.frozen, case.run())
    with pytest.raises(errors.ConfigError, match=message):
        run(**{"hyperparameters": {"learning_rate": RATES}, **options})


def test_members_of_different_shapes_are_refused():
    case, other = Case(), Case(trainable=jtl.select("head", "stem"))
    with pytest.raises(errors.ConfigError, match="states 0 and 1 differ"):
        jtl.sweep(case.loss_fn, optax.sgd, [case.state, other.state], case.frozen, case.run())


def test_an_unknown_metric_is_refused():
    case = Case()
    with pytest.raises(errors.ConfigError, match="'f1': the loss reports"):
        jtl.sweep(
            case.loss_fn,
            optax.sgd,
            members(case),
            case.frozen,
            case.run(),
            hyperparameters={"learning_rate": jnp.asarray(RATES)},
            held_out=lambda: case.run(epochs=1),
            evaluate_every=1,
            stopping=jtl.Stopping("f1"),
            say=lambda line: None,
        )

"""Strategies of several phases: what a change keeps, what it starts anew, and what it must not touch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import data, errors, loop, strategies
from jtl.schedule import Phase, Plateau, Progress, Strategy
from jtl.state import change

GROUPS = [("stem",), ("block_0",), ("block_1",), ("head",)]
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)).astype(np.float32), RNG.integers(0, 3, 40).astype(np.int32)


class Net(nn.Module):
    """Three hidden layers with batch normalisation and dropout."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("stem", "block_0", "block_1"):
            x = nn.relu(Layer(name=name)(x, train))
        return nn.Dense(3, name="head")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dropout(0.2, deterministic=not train)(x)


LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})
VARIABLES = Net().init(jax.random.key(0), X[:1])


def run(strategy, batches, state=None, frozen=None, **settings):
    if state is None:
        state, frozen = jtl.init(VARIABLES, strategy, key=jax.random.key(1))
    settings.setdefault("cache", "off")
    return [
        report._replace(state=jax.tree.map(jnp.array, report.state))
        for report in jtl.fit(LOSS, strategy, state, frozen, batches, say=lambda line: None, **settings)
    ]


def batches(epochs=4, **settings):
    return data.batches({"x": X}, Y, batch_size=10, seed=3, epochs=epochs, **settings)


ADAM = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(1e-2, 16)))
GRADUAL = strategies.gradual_unfreezing(ADAM, GROUPS, every=3)
LP_FT = strategies.lp_ft(optax.adam(1e-2), optax.sgd(1e-2, momentum=0.9), steps=5)
PLATEAU = strategies.gradual_unfreezing(ADAM, GROUPS, every=Plateau("loss", 1, by=0.05))
HELD_OUT = {"held_out": lambda: [{"x": X, "label": Y}], "evaluate_every": 2}


def digest(report):
    variables = jtl.variables(report.state, report.frozen)
    return jtl.tree.digest((variables, report.state.opt_state, report.state.key, report.state.step))


@pytest.mark.parametrize(
    ("strategy", "settings"), [(GRADUAL, {}), (LP_FT, {}), (PLATEAU, HELD_OUT)], ids=["gradual", "lp_ft", "plateau"]
)
def test_a_run_that_stops_after_any_step_goes_on_bit_for_bit(strategy, settings):
    whole = run(strategy, batches(), **settings)
    assert [report.step for report in whole] == list(range(1, 17))
    assert len({report.progress.phase for report in whole}) > 1
    for report in whole[:-1]:
        rest = run(
            strategy, batches().at(report.step), report.state, report.frozen, progress=report.progress, **settings
        )
        assert digest(rest[-1]) == digest(whole[-1])
        assert rest[-1].evaluation == whole[-1].evaluation


def test_progress_is_known_from_the_number_of_steps():
    whole = run(GRADUAL, batches())
    rest = run(GRADUAL, batches().at(6), whole[5].state, whole[5].frozen)
    assert digest(rest[-1]) == digest(whole[-1])
    with pytest.raises(errors.ConfigError, match="pass the last report's progress="):
        run(PLATEAU, batches().at(6), whole[5].state, whole[5].frozen, **HELD_OUT)


def test_any_iterable_of_batches_serves():
    expected = run(GRADUAL, batches())[-1]
    assert digest(run(GRADUAL, list(batches()))[-1]) == digest(expected)
    assert digest(run(GRADUAL, iter(batches()))[-1]) == digest(expected)


@pytest.mark.parametrize("strategy", [GRADUAL, LP_FT], ids=["gradual", "lp_ft"])
def test_phases_train_from_caches_of_their_own(strategy):
    plain, cached = run(strategy, batches()), run(strategy, batches(), cache="auto")
    for one, other in zip(plain, cached, strict=True):
        np.testing.assert_allclose(one.metrics["loss"], other.metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        plain[-1].state.params,
        cached[-1].state.params,
    )


@pytest.mark.parametrize("strategy", [GRADUAL, LP_FT], ids=["gradual", "lp_ft"])
def test_each_phase_trains_its_leaves_and_no_other(strategy):
    state, frozen = jtl.init(VARIABLES, strategy, key=jax.random.key(1))
    before = jtl.variables(state, frozen)
    for report in run(strategy, batches()):
        mask = strategy.phases[report.progress.phase].trainable(VARIABLES["params"])
        after = jtl.variables(report.state, report.frozen)
        assert jtl.tree.mask_of(report.state.params, after["params"]) == mask
        held = [jtl.tree.partition(tree["params"], mask)[1] for tree in (before, after)]
        assert jtl.tree.digest(held[0]) == jtl.tree.digest(held[1])
        before = after


@pytest.mark.parametrize("strategy", [GRADUAL, LP_FT], ids=["gradual", "lp_ft"])
def test_one_compile_a_phase(strategy):
    counts, original = [], loop.train_step

    def counting(loss_fn, tx):
        step = original(loss_fn, tx)

        def traced(*args):
            counts.append(1)
            return step(*args)

        return traced

    loop.compiled_train.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", counting)
        run(strategy, batches())
    loop.compiled_train.cache_clear()
    assert len(counts) == len(strategy.phases)


def test_lp_ft_is_a_probe_and_a_fine_tuning_from_its_head():
    report = run(LP_FT, batches())[-1]
    probe = strategies.feature_extraction(optax.adam(1e-2))
    first = run(probe, list(batches())[:5])[-1]
    second = strategies.full(LP_FT.phases[1].tx)
    state, frozen = jtl.init(jtl.variables(first.state, first.frozen), second, key=first.state.key)
    expected = run(second, list(batches())[5:], state, frozen)[-1]
    np.testing.assert_array_equal(
        jtl.tree.digest(jtl.variables(report.state, report.frozen)),
        jtl.tree.digest(jtl.variables(expected.state, expected.frozen)),
    )


def test_the_state_given_may_be_donated_after_a_change():
    state, frozen = jtl.init(VARIABLES, optax.adam(1e-2), trainable=jtl.everything(), key=jax.random.key(0))
    value = np.asarray(state.params["stem"]["Dense_0"]["kernel"])
    new, held = change(state, frozen, Phase(jtl.select("head"), optax.adam(1e-2)))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    np.testing.assert_array_equal(held.params["stem"]["Dense_0"]["kernel"], value)
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (Strategy("none", ()), {}, "has no phase"),
        (Strategy("x", (Phase(jtl.select("head"), ADAM), Phase(jtl.everything(), ADAM))), {}, "has no end"),
        (strategies.lp_ft(ADAM, ADAM, steps=0), {}, "0 updates"),
        (strategies.lp_ft(ADAM, ADAM, steps=16), {}, "16 more updates before its last phase, and the run 16"),
        (strategies.lp_ft(ADAM, ADAM, steps=Plateau(patience=0)), HELD_OUT, "patience=0"),
        (PLATEAU, {}, "needs held_out and evaluate_every"),
        (strategies.lp_ft(ADAM, ADAM, steps=Plateau("f1")), HELD_OUT, "the loss reports"),
        (GRADUAL, {"progress": Progress(9)}, "progress is in phase 9"),
    ],
)
def test_a_strategy_that_cannot_be_run_is_refused(strategy, settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        run(strategy, batches(), **settings)


def test_init_takes_a_mask_or_a_strategy():
    with pytest.raises(errors.ConfigError, match="init needs a mask"):
        jtl.init(VARIABLES, ADAM, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match="masks of its own"):
        jtl.init(VARIABLES, GRADUAL, trainable=jtl.everything(), key=jax.random.key(0))

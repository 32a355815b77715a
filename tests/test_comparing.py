"""Comparing strategies: shared work changes no value, and the table says what single runs say."""

import dataclasses
import functools
import io
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import comparing, errors, peft, report, strategies
from jtl.comparing import Comparison, Trial

RNG = np.random.default_rng(0)
GROUPS = [("stem",), ("block_0",), ("block_1",), ("head",)]


class Net(nn.Module):
    """Wide enough for its blocks not to be light."""

    @nn.compact
    def __call__(self, x):
        for name in ("stem", "block_0", "block_1"):
            x = nn.tanh(nn.Dense(1500, name=name)(x))
        return nn.Dense(2, name="head")(x)


MODEL = Net()


def data(rows):
    x = RNG.normal(size=(rows, 6)).astype(np.float32)
    return jtl.data.batches({"x": x}, (x[:, 0] > 0).astype(np.int32), batch_size=4, prefetch=0)


TRAIN, CHOOSE, REPORT = data(12), data(8), data(10)


@functools.cache
def pretrained():
    return jax.jit(MODEL.init)(jax.random.key(9), jnp.ones((1, 6)))


@functools.cache
def loss_of(model):
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})


def start(key, adapter=None):
    head = {"kernel": 0.02 * jax.random.normal(key, (1500, 2)), "bias": jnp.zeros(2)}
    variables = {"params": {**pretrained()["params"], "head": head}}
    return variables if adapter is None else peft.attach(adapter, variables, key=key)


def arms(factors=(1.0, 3.0)):
    tx, adapter = optax.adamw(1e-4), peft.lora(["block_1"], rank=1)
    lora = strategies.fine_tune(tx, jtl.select("**/lora", "head"), "LoRA")
    plain = strategies.feature_extraction(tx), strategies.last_blocks(tx, GROUPS, 1), strategies.lp_ft(tx, tx, steps=3)
    return [
        *(comparing.Arm(strategy, loss_of(MODEL), start, 2, factors) for strategy in plain),
        comparing.Arm(lora, loss_of(peft.adapted(MODEL, adapter)), lambda key: start(key, adapter), 2, factors),
    ]


def compare(chosen, **settings):
    return jtl.compare(chosen, TRAIN, CHOOSE, REPORT, **{"seeds": (0, 1), "metric": "accuracy", **settings})


def test_shared_runs_have_the_values_of_single_ones():
    found = {share: compare(arms(), share=share) for share in (True, False)}
    assert len(found[True].trials) == len(found[False].trials) == 4 * 2 * 2
    for one, other in zip(found[True].trials, found[False].trials, strict=True):
        assert one[:5] == other[:5]
        for scores in ("chosen", "scores"):
            for name, value in getattr(one, scores).items():
                assert value == pytest.approx(getattr(other, scores)[name], abs=1e-5)
    assert len({trial.scores["loss"] for trial in found[True].trials}) == 16


def test_a_factor_is_a_learning_rate_and_a_run_is_what_fit_does():
    found = compare(arms()[1:2], seeds=(3,))
    loss = loss_of(MODEL)
    for trial, rate in zip(found.trials, (1e-4, 3e-4), strict=True):
        strategy = strategies.last_blocks(optax.adamw(rate), GROUPS, 1)
        start_key, run_key = jax.random.split(jax.random.key(3))
        state, frozen = jtl.init(start(start_key), strategy, key=run_key)
        run = jtl.data.batches(TRAIN.columns, TRAIN.labels, batch_size=4, seed=3, epochs=2)
        *_, last = jtl.fit(loss, strategy, state, frozen, run, cache="off", held_out=lambda: REPORT)
        assert trial.scores == pytest.approx(last.evaluation, abs=1e-5)
        assert trial.trained == jtl.tree.size(state.params)
        assert trial.share == trial.trained / jtl.tree.size(pretrained()["params"])


def test_each_seed_may_have_examples_of_its_own():
    arm, samples = arms((1.0,))[1], {seed: data(12) for seed in (0, 1)}
    together = jtl.compare([arm], samples.get, CHOOSE, REPORT, seeds=(0, 1), metric="accuracy")
    for trial in together.trials:
        alone = jtl.compare([arm], samples[trial.seed], CHOOSE, REPORT, seeds=(trial.seed,), metric="accuracy")
        assert trial.scores == pytest.approx(alone.trials[0].scores, abs=1e-6)
    flipped = dataclasses.replace(samples[0], labels=1 - samples[0].labels)  # the very same inputs
    other = jtl.compare([arm], {0: samples[0], 1: flipped}.get, CHOOSE, REPORT, seeds=(0, 1), metric="accuracy")
    alone = jtl.compare([arm], flipped, CHOOSE, REPORT, seeds=(1,), metric="accuracy")
    assert other.trials[1].scores == pytest.approx(alone.trials[0].scores, abs=1e-6)
    with pytest.raises(errors.DataError, match=r"\[1, 3\] steps an epoch"):
        jtl.compare([arm], {0: data(12), 1: data(4)}.get, CHOOSE, REPORT, seeds=(0, 1), metric="accuracy")


def test_a_phase_compiles_once_for_all_seeds_and_factors():
    traced = []

    def counted(params, collections, batch, *, key):
        traced.append(key is not None)
        return loss_of(MODEL)(params, collections, batch, key=key)

    arm = arms(factors=(0.5, 1.0, 2.0))[2]._replace(loss_fn=counted)  # full at last: nothing to cache
    compare([arm])
    shared = traced.count(True)
    traced.clear()
    compare([arm], share=False)
    assert shared <= 4  # the split, and a step for each phase; of the probe one that is vectorised
    assert traced.count(True) == 2 * 2 * 3


def trials(**scores):
    """Trials of made-up scores: name to trained parameters, and by factor (chosen, reported) of each seed."""
    return tuple(
        Trial(name, seed, factor, trained, trained / 1000, {"accuracy": chosen}, {"accuracy": reported}, 1.0)
        for name, (trained, by_factor) in scores.items()
        for factor, pairs in by_factor.items()
        for seed, (chosen, reported) in enumerate(pairs)
    )


def test_one_half_chooses_the_factor_and_the_other_is_reported():
    made = trials(
        full=(1000, {1.0: [(0.7, 0.90), (0.9, 0.80)]}),
        head=(10, {1.0: [(0.9, 0.5), (0.7, 0.5)], 3.0: [(0.8, 0.60), (0.9, 0.64)]}),
    )
    head, full = Comparison("accuracy", True, made, (), 0.0, 0.0).rows
    assert (head.arm, head.factor, head.scores, head.mean) == ("head", 3.0, (0.60, 0.64), pytest.approx(0.62))
    assert head.half == pytest.approx(12.706 * 0.02, rel=1e-3)  # t of one degree of freedom, times the standard error
    assert (full.arm, full.share) == ("full", 1.0)


@pytest.mark.parametrize(("head", "spot"), [(0.839, "full"), (0.841, "head"), (0.9, "head")])
def test_the_sweet_spot_is_within_one_standard_error(head, spot):
    """Of the best, whose scores .9 and .8 have a mean of .85 and a standard error of .05; and with loss, mirrored."""
    made = trials(full=(1000, {1.0: [(0.0, 0.86), (0.0, 0.84)]}), head=(10, {1.0: [(0.0, head), (0.0, head)]}))
    assert Comparison("accuracy", True, made, (), 0.0, 0.0).spot.arm == spot
    mirrored = tuple(
        trial._replace(scores={"accuracy": -trial.scores["accuracy"]}, chosen=trial.chosen) for trial in made
    )
    assert Comparison("accuracy", False, mirrored, (), 0.0, 0.0).spot.arm == spot


def test_what_does_not_fit_the_budget_is_left_out_and_named(monkeypatch):
    """By a clock that only runs move: by 10 seconds with a head alone, by 30 otherwise."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(comparing.comparison, "time", clock)
    both = arms((1.0,))[:2]
    probe, last = both
    trials_of = comparing.runner.Runner.trials

    def costing(self, seed):
        now[0] += {probe.name: 10.0, last.name: 30.0}[self.arm.name]
        return trials_of(self, seed)

    monkeypatch.setattr(comparing.runner.Runner, "trials", costing)
    found = compare(both, seeds=(0, 1, 2), budget=65.0)
    assert [trial.arm for trial in found.trials] == [probe.name, last.name, probe.name, probe.name]
    assert [trial.seed for trial in found.trials] == [0, 0, 1, 2]
    assert found.left_out == ((last.name, 1), (last.name, 2))
    assert found.seconds == 60.0
    with pytest.raises(errors.ConfigError, match="leaves no run"):
        compare(both, budget=-1.0)


def test_preparing_does_not_use_the_budget_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(comparing.comparison, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    prepared = []

    def ahead(self, seed, pool):
        prepared.append(self.arm.name)
        now[0] += 100.0

    monkeypatch.setattr(comparing.runner.Runner, "ahead", ahead)
    probe, last = arms((1.0,))[:2]
    found = compare([probe, last], seeds=(0,), budget=60.0)
    assert prepared == [probe.name]  # a quarter of the budget is over
    assert [trial.arm for trial in found.trials] == [probe.name]
    assert found.left_out == ((last.name, 0),)


def test_the_table_and_the_picture_show_every_arm(tmp_path):
    from rich.console import Console

    made = trials(full=(1000, {1.0: [(0.0, 0.86), (0.0, 0.84)]}), head=(10, {2.0: [(0.0, 0.8), (0.0, 0.7)]}))
    found = Comparison("accuracy", True, made, (), 0.0, 0.0)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report.comparison_table(found))
    rows = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line.split()}
    assert rows["full"][:3] == ["full", "*", "1,000"]
    assert rows["head"][1:5] == ["10", "1.00%", "2", "2"]
    assert "0.850" in rows["full"]
    for name, magic in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        report.comparison_picture(found, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert all(f"<!-- {name} -->" in (tmp_path / "a.svg").read_text() for name in ("full", "head"))
    alone = Comparison("accuracy", True, made[:1], (), 0.0, 0.0)
    assert math.isnan(alone.rows[0].half)
    report.comparison_picture(alone, tmp_path / "b.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chosen": []}, "needs seeds, and arms"),
        ({"seeds": ()}, "needs seeds, and arms"),
        ({"chosen": lambda arms: [arms[0], arms[0]]}, "names that differ"),
        ({"metric": "f1"}, r"metric='f1': the loss reports \['accuracy', 'loss'\]"),
        ({"chosen": lambda arms: [arms[0]._replace(factors=())]}, "factors above 0"),
        ({"chosen": lambda arms: [arms[0]._replace(epochs=0)]}, "epochs"),
        ({"chosen": lambda arms: [arms[2]._replace(epochs=1)]}, "give it more epochs"),
        ({"chosen": lambda arms: [_waiting(arms[0])]}, "only jtl.fit does"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, message):
    chosen = settings.pop("chosen", lambda arms: arms[:1])
    with pytest.raises(errors.JtlError, match=message):
        compare(chosen(arms((1.0,))) if callable(chosen) else chosen, **settings)


def _waiting(arm):
    strategy = strategies.lp_ft(optax.sgd(0.1), optax.sgd(0.1), steps=jtl.Plateau())
    return arm._replace(strategy=strategy)

"""What a run's folder tells of steps that were skipped, and of those that do not end."""

import time

import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, runs

from . import victim

TX = jtl.transforms.guard(optax.adam(1e-2))


def unchecked(params, collections, batch, *, key):
    """A loss that refuses no input on the host."""
    return victim.LOSS(params, collections, batch, key=key)


def poisoned(rows):
    """The victim's data, with rows that are not finite."""
    x, y = victim.arrays()
    x[rows, 1] = np.nan
    return jtl.data.batches({"x": x}, y, batch_size=8, seed=1, epochs=2)


def train(folder, data, said=None, **settings):
    whole = jtl.variables(*victim.start("full")[2:])
    state, frozen = jtl.init(whole, TX, trainable=jtl.everything(), key=jax.random.key(0))
    run = jtl.Run(folder, **settings)
    said = [] if said is None else said
    return list(jtl.fit(unchecked, TX, state, frozen, data, run=run, cache="off", say=said.append))


def test_skipped_steps_are_listed_with_batch_and_rows(tmp_path):
    said = []
    data = poisoned([5])
    reports = train(tmp_path / "run", data, said)
    lines = runs.metrics(tmp_path / "run")
    skipped = [line for line in lines if line["skipped"]]
    hit = [step for step in range(len(data)) if 5 in data.plan(step).rows]
    assert [line["batch"] for line in skipped] == hit
    assert len(hit) == 2
    assert all(5 in line["rows"] and len(line["rows"]) == 8 for line in skipped)
    assert [line["loss"] for line in skipped] == [None, None]  # JSON has no NaN
    assert sum(line.startswith("step") and "skipped" in line for line in said) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reports[-1].state.params))


def test_a_run_that_skips_all_ends_with_a_checkpoint(tmp_path):
    with pytest.raises(errors.DivergedError, match=r"3 steps in a row were skipped, .*; saved after step \d+"):
        train(tmp_path / "run", poisoned(np.arange(victim.ROWS)), give_up=3)
    stored = runs.Steps(tmp_path / "run" / "checkpoints").restore()
    assert 3 <= stored.step < 16
    start = jtl.variables(*victim.start("full")[2:])["params"]
    for path, leaf in jtl.tree.leaves_with_paths(start):
        np.testing.assert_array_equal(stored.items["model"][f"params/{path}"], leaf)


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_one_batch_in_a_hundred_is_poisoned_and_each_is_named_once(tmp_path, steps):
    """Through an end in the middle, too: what was found after the last checkpoint is found again, not twice."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * steps, 4)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int64)
    settings = {"batch_size": 4, "seed": 3, "epochs": 1, "prefetch": 0}
    order = jtl.data.batches({"x": x.copy()}, y, **settings)
    hit = sorted(rng.choice(steps, steps // 100, replace=False).tolist())
    for number, step in enumerate(hit):
        x[order.plan(step).rows[number % 4], number % 3] = (np.nan, np.inf, -np.inf, 3e38)[number % 4]
    data = jtl.data.batches({"x": x}, y, **settings)
    whole = jtl.variables(*victim.start("full")[2:])
    for stop in (steps // 2 + 3, None):
        state, frozen = jtl.init(whole, TX, trainable=jtl.everything(), key=jax.random.key(0))
        for report in jtl.fit(unchecked, TX, state, frozen, data, run=tmp_path / "run", say=lambda line: None):
            if report.step == stop:
                break
    lines = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["batch"] for line in lines if line["skipped"]] == hit
    assert all(line["rows"] == order.plan(line["batch"]).rows.tolist() for line in lines if line["skipped"])
    assert int(report.state.opt_state.skipped) == len(hit)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(report.state.params))
    assert max(line["loss"] for line in lines if not line["skipped"]) < 20


def test_stacks_are_written_where_no_step_ends(tmp_path):
    def on_step(step):
        if step == 2:
            time.sleep(1.5)

    victim.train(tmp_path / "run", "full", stop=3, on_step=on_step, run={"watchdog": 0.5})
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert "on_step" in stacks
    assert "test_watching.py" in stacks


def test_leaves_of_a_run_are_grafted_into_another_model(tmp_path):
    victim.train(tmp_path / "run", "last blocks", run={"every": 60})
    trained = runs.Steps(tmp_path / "run" / "checkpoints").restore().items["model"]
    fresh = jtl.variables(*victim.start("full")[2:])
    grafted = jtl.graft(fresh, tmp_path / "run", "head/kernel")
    np.testing.assert_array_equal(grafted["params"]["head"]["kernel"], trained["params/head/kernel"])
    assert grafted["params"]["head"]["bias"] is fresh["params"]["head"]["bias"]
    whole = jtl.graft(fresh, tmp_path / "run")
    np.testing.assert_array_equal(whole["params"]["head"]["bias"], trained["params/head/bias"])
    assert whole["params"]["stem"]["kernel"] is fresh["params"]["stem"]["kernel"]
    with pytest.raises(errors.CheckpointError, match=r"lacks 2 of the leaves that stem match, such as \['stem/bias'"):
        jtl.graft(fresh, tmp_path / "run", "stem")
    narrow = {**fresh, "params": {**fresh["params"], "head": {"bias": np.zeros(3, np.float32)}}}
    with pytest.raises(errors.CheckpointError, match=r"params/head/bias is float32\[2\] .*; expected float32\[3\]"):
        jtl.graft(narrow, tmp_path / "run", "head/bias")
    with pytest.raises(errors.CheckpointError, match="not the folder of a run"):
        jtl.graft(fresh, tmp_path / "nowhere")

"""A run that is interrupted goes on as if it had not been: bit for bit, from every step, in every phase."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, runs, strategies

from . import resuming, victim

several = pytest.mark.skipif(jax.device_count() < 8, reason="needs several devices: JTL_TEST_DEVICES=8")
SOME = (1, 19, 20, 21, 40, 41, 59, 60)


@pytest.mark.parametrize("name", ["LoRA", "gradual", "switch"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(name, tmp_path):
    assert not resuming.wrong_steps(tmp_path, name, SOME)


@pytest.mark.parametrize("cache", ["require", "off"])
def test_so_does_one_that_trains_from_a_cache(cache, tmp_path):
    """In the last epoch, too, for which a cache alone would not pay."""
    assert not resuming.wrong_steps(tmp_path, "feature extraction", (1, 30, 55), cache=cache)


@pytest.mark.long
@pytest.mark.parametrize("name", victim.STRATEGIES)
def test_from_every_step(name, tmp_path):
    assert not resuming.wrong_steps(tmp_path, name, range(1, victim.STEPS + 1))


@pytest.mark.long
@several
@pytest.mark.parametrize("name", victim.STRATEGIES)
def test_from_every_step_on_eight_devices(name, tmp_path):
    assert not resuming.wrong_steps(tmp_path, name, range(1, victim.STEPS + 1), mesh=resuming.mesh(8))


@several
@pytest.mark.parametrize("name", ["feature extraction", "gradual"])
def test_so_does_one_on_eight_devices(name, tmp_path):
    assert not resuming.wrong_steps(tmp_path, name, (7, 40, 60), mesh=resuming.mesh(8))


@several
@pytest.mark.parametrize("name", ["full", "LoRA"])
def test_devices_may_become_fewer(name, tmp_path):
    """The same batches in the same order; sums in another order."""
    victim.train(tmp_path / "whole", name, mesh=resuming.mesh(8))
    for devices, stop in ((8, 20), (4, 40), (1, None)):
        victim.train(tmp_path / "run", name, stop=stop, mesh=resuming.mesh(devices), run={"every": 1})
    whole, parts = (runs.metrics(tmp_path / folder) for folder in ("whole", "run"))
    assert [line["step"] for line in parts] == [line["step"] for line in whole] == list(range(1, 61))
    np.testing.assert_allclose([x["loss"] for x in parts], [x["loss"] for x in whole], rtol=1e-5)


def test_every_step_stands_once_in_the_metrics(tmp_path):
    victim.train(tmp_path / "whole", "gradual")
    for stop in (9, 30, None):
        victim.train(tmp_path / "run", "gradual", stop=stop, run={"every": 8})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    victim.train(tmp_path / "run", "gradual", run={"every": 8})
    whole, parts = (runs.metrics(tmp_path / folder) for folder in ("whole", "run"))
    assert parts == whole
    assert [line["step"] for line in parts] == list(range(1, 61))


def test_a_run_that_has_ended_reports_its_end_again(tmp_path):
    first, loss_fn, state, frozen = victim.start("full")
    reports = list(jtl.fit(loss_fn, first, state, frozen, victim.data(), run=tmp_path / "run"))
    again = list(jtl.fit(loss_fn, first, state, frozen, victim.data(), run=tmp_path / "run"))
    assert len(reports) == 60
    assert [report.step for report in again] == [60]
    assert victim.digest(again[0]) == victim.digest(reports[-1])
    assert again[0].metrics["loss"] == float(reports[-1].metrics["loss"])


def test_a_run_that_is_given_more_epochs_goes_on(tmp_path):
    tx = optax.adam(1e-2)
    more = victim.data().at(0).until(64)
    state, frozen = jtl.init(_variables(), tx, trainable=jtl.everything(), key=jax.random.key(0))
    list(jtl.fit(victim.LOSS, tx, state, frozen, victim.data(), run=tmp_path / "run"))
    reports = list(jtl.fit(victim.LOSS, tx, state, frozen, more, run=tmp_path / "run"))
    whole = list(jtl.fit(victim.LOSS, tx, state, frozen, more))
    assert [report.step for report in reports] == [61, 62, 63, 64]
    assert victim.digest(reports[-1]) == victim.digest(whole[-1])


def test_batches_that_cannot_be_sliced_are_drawn_up_to_there(tmp_path):
    def train(stop=None, folder=None):
        tx, taken = optax.adam(1e-2), []
        state, frozen = jtl.init(_variables(), tx, trainable=jtl.everything(), key=jax.random.key(0))
        given = (taken.append(0) or batch for batch in victim.data())
        for report in jtl.fit(victim.LOSS, tx, state, frozen, given, run=folder):
            if report.step == stop:
                break
        return victim.digest(report), len(taken)

    train(10, jtl.Run(tmp_path / "run", every=1))
    assert train(folder=tmp_path / "run") == train()


def test_the_frozen_base_is_not_stored(tmp_path):
    strategy, loss_fn, state, frozen = victim.start("feature extraction")
    for report in jtl.fit(loss_fn, strategy, state, frozen, victim.data(), run=tmp_path / "run"):
        state = report.state
    stored = runs.Steps(tmp_path / "run" / "checkpoints").restore()
    assert {path for path in stored.items["model"]} == {f"params/{path}" for path in jtl.tree.paths(state.params)}
    assert stored.notes["consumed"] == 60
    assert stored.notes["fingerprint"] == victim.data().fingerprint


def test_a_checkpoint_of_bfloat16_keys_and_empty_leaves_comes_back(tmp_path):
    import jax.numpy as jnp

    from jtl import checkpoint

    tree = {
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "none": jnp.zeros((0, 3)),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "count": jnp.int32(3),
        "flag": jnp.array(True),
        "deep": {"a": {"b": jnp.ones(2, jnp.int8)}},
    }
    checkpoint.write(tmp_path / "00000001", {"tree": tree, "nothing": {}}, {"x": [1, None]})
    items, notes = checkpoint.read(tmp_path / "00000001")
    assert notes == {"x": [1, None]}
    assert items["nothing"] == {}
    assert jtl.tree.digest(items["tree"]) == jtl.tree.digest(dict(sorted(jtl.tree.leaves_with_paths(tree))))
    assert items["tree"]["half"].dtype == jnp.bfloat16
    assert jax.random.key_impl(items["tree"]["keys"]) == jax.random.key_impl(tree["keys"])


# Another run in the same folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    victim.train(folder, "gradual", stop=25, run={"every": 1})
    return folder


def fit(folder, *, name="gradual", config=None, strategy=None, data=None, key=3, **settings):
    given, loss_fn, state, frozen = victim.start(name)
    strategy = strategy or given
    state, frozen = jtl.init(jtl.variables(state, frozen), strategy, key=jax.random.key(key))
    run = jtl.Run(folder, {"of": "a victim"} if config is None else config)
    return list(jtl.fit(loss_fn, strategy, state, frozen, data or victim.data(), run=run, **settings))


SLOWER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 1e-3, victim.STEPS)))

SLOWLY = strategies.gradual_unfreezing(SLOWER, victim.GROUPS, every=20)
EARLIER = strategies.gradual_unfreezing(victim.TX, victim.GROUPS, every=19)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"of": "another", "rate": 1}}, ["config.of: a victim -> another", "config.rate: nothing -> 1"]),
        ({"data": victim.data(seed=2)}, ["data: rows=64 batch=8 seed=1", "seed=2"]),
        ({"data": victim.data(batch_size=16, epochs=16)}, ["batch=8", "batch=16"]),
        ({"key": 4}, ["start.key: 0 3 -> 0 4"]),
        ({"strategy": SLOWLY}, ["phases[0].optimizer: "]),
        (
            {"strategy": strategies.gradual_unfreezing(victim.TX, victim.GROUPS, every=19)},
            ["phases[0].until: 20 -> 19"],
        ),
        ({"strategy": victim.STRATEGIES["full"]}, ["phases[0].trained: ", "phases[1].trained: "]),
        ({"name": "LoRA"}, ["lora"]),
        ({"accumulate": 2}, ["options.accumulate: 1 -> 2"]),
    ],
    ids=["config", "data", "batch", "key", "rate", "length", "mask", "model", "accumulate"],
)
def test_another_run_in_the_folder_is_refused_with_each_difference(changes, said, begun):
    before = sorted(path.name for path in begun.rglob("*"))
    with pytest.raises(errors.ConfigError, match="holds another run") as caught:
        fit(begun, **changes)
    for part in said:
        assert part in str(caught.value)
    assert "name another folder" in str(caught.value)
    assert sorted(path.name for path in begun.rglob("*")) == before


def test_other_pretrained_weights_are_refused_by_the_leaves_that_differ(begun):
    strategy, loss_fn, state, frozen = victim.start("gradual")
    changed = jtl.tree.map_with_paths(lambda path, leaf: leaf + 1 if path == "stem/kernel" else leaf, frozen.params)
    with pytest.raises(errors.ConfigError, match=r"start\.leaves\.params/stem/kernel: ") as caught:
        next(jtl.fit(loss_fn, strategy, state, frozen._replace(params=changed), victim.data(), run=_again(begun)))
    assert str(caught.value).count(" -> ") == 2  # that line, and the heading


def test_one_process_at_a_time(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    strategy, loss_fn, state, frozen = victim.start("gradual")
    first = jtl.fit(loss_fn, strategy, state, frozen, victim.data(), run=_again(tmp_path / "run"))
    next(first)
    with pytest.raises(errors.ConfigError, match="another process trains in"):
        next(jtl.fit(loss_fn, strategy, state, frozen, victim.data(), run=_again(tmp_path / "run")))
    first.close()
    next(jtl.fit(loss_fn, strategy, state, frozen, victim.data(), run=_again(tmp_path / "run"))).step  # noqa: B018


def test_what_is_wrong_leaves_no_folder_behind(tmp_path):
    strategy, loss_fn, state, frozen = victim.start("full")
    x, y = victim.arrays()
    bad = jtl.data.batches({"x": x}, y + 7, batch_size=8)
    with pytest.raises(errors.DataError, match="row 0"):
        next(jtl.fit(loss_fn, strategy, state, frozen, bad, run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "run").write_text("x"), "is a file"),
        (lambda folder: ((folder / "run").mkdir(), (folder / "run" / "thesis.tex").write_text("x")), "thesis.tex"),
    ],
)
def test_a_place_that_cannot_be_a_run_is_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(errors.ConfigError, match=message):
        fit(tmp_path / "run")


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"watchdog": 0.0}, {"give_up": 0}, {"best_count": 0}])
def test_settings_of_a_run_are_checked(wrong, tmp_path):
    with pytest.raises(errors.ConfigError, match=f"{next(iter(wrong))}=0"):
        victim.train(tmp_path / "run", "full", run=wrong)


def test_a_damaged_description_is_named(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"identity"')
    with pytest.raises(errors.CheckpointError, match=r"run.json is damaged"):
        fit(tmp_path / "run")


def test_the_folder_tells_of_each_session(begun):
    said = json.loads((begun / "run.json").read_text())
    assert [session["from"] for session in said["sessions"]] == [0]
    assert said["sessions"][0]["versions"]["jax"] == jax.__version__
    assert said["identity"]["config"] == {"of": "a victim"}


def _again(folder):
    return jtl.Run(folder, {"of": "a victim"})


def _variables():
    return jtl.variables(*victim.start("full")[2:])

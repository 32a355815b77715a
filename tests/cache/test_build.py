import dataclasses
import errno
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl import errors
from jtl.cache import builder
from jtl.cache import store as stores

from .cases import Net


def computed(monkeypatch):
    """Counts the batches that a prefix computes."""
    calls, before = [], builder.Compiled.__call__
    monkeypatch.setattr(builder.Compiled, "__call__", lambda self, batch: (calls.append(1), before(self, batch))[1])
    return calls


def values(cache):
    (group,) = cache.store.groups
    return cache.store.rows(group, np.arange(cache.rows))


@pytest.mark.parametrize("directory", [False, True])
def test_a_row_is_what_the_prefix_gives_for_it(case, tmp_path, directory):
    cache = case.build(directory=tmp_path if directory else None, shard_bytes=200)
    np.testing.assert_allclose(values(cache)["cut/0"], hidden(case), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values(cache)["label"], case.y)


def hidden(case):
    """The input of the head, by the model's own intermediate values."""
    _, kept = case.model.apply(case.variables, case.x, capture_intermediates=True, mutable=["intermediates"])
    return kept["intermediates"]["norm"]["__call__"][0]


@pytest.mark.parametrize("directory", [False, True])
def test_cached_batches_hold_each_row_once_an_epoch(case, tmp_path, directory):
    cache = case.build(directory=tmp_path if directory else None, shard_bytes=200)
    for remainder, sizes in (("pad", {4}), ("keep", {4, 2}), ("drop", {4})):
        run = cache.batches(batch_size=4, epochs=2, key=jax.random.key(3), remainder=remainder)
        found = list(run)
        assert len(found) == len(run) == (10 if remainder == "drop" else 12)
        assert {len(batch["label"]) for batch in found} == sizes
        for epoch in (found[: len(found) // 2], found[len(found) // 2 :]):
            real = np.concatenate([batch["cut/0"][batch["weight"] > 0] for batch in epoch])
            rows = {tuple(row) for row in np.asarray(values(cache)["cut/0"]).tolist()}
            assert len(real) == len({tuple(row) for row in real.tolist()} & rows) == (20 if remainder == "drop" else 22)


def test_a_second_build_computes_nothing(case, tmp_path, monkeypatch):
    first = case.build(directory=tmp_path)
    calls = computed(monkeypatch)
    second = case.build(directory=tmp_path)
    assert (calls, first.key) == ([], second.key)
    np.testing.assert_array_equal(values(first)["cut/0"], values(second)["cut/0"])


def test_caches_of_one_prefix_share_its_programs_and_not_its_leaves(case):
    cut = case.cut()
    first = case.build(cut)
    case.frozen = case.frozen._replace(params=jax.tree.map(lambda leaf: 1.1 * leaf, case.frozen.params))
    second = case.build(cut)
    assert second.prefix.seconds == 0 < first.prefix.seconds
    assert second.prefix.flops == first.prefix.flops
    np.testing.assert_array_equal(values(second)["cut/0"], values(case.build())["cut/0"])
    assert not np.allclose(values(second)["cut/0"], values(first)["cut/0"], rtol=1e-2)


def mutations(case):
    """Everything that a stored value depends on, changed one at a time."""
    stem = case.frozen.params["stem"]
    leaf = {**case.frozen.params, "stem": {**stem, "bias": stem["bias"].at[0].add(1e-3)}}
    statistics = jax.tree.map(lambda x: x + 1e-3, case.frozen.collections)
    other = type(case)()
    other.x = case.x.copy()
    other.x[21, 4] += 1e-3
    labelled = type(case)()
    labelled.y = (case.y + 1) % 3
    squared = jtl.supervised(Squared(), jtl.losses.cross_entropy)
    augment = functools.partial(shifted, scale=1.0)
    return {
        "a frozen leaf": lambda build: build(frozen=case.frozen._replace(params=leaf)),
        "frozen statistics": lambda build: build(frozen=case.frozen._replace(collections=statistics)),
        "a value of the data": lambda build: build(batches=other.run()),
        "a label": lambda build: build(batches=labelled.run()),
        "the revision": lambda build: build(revision="2"),
        "the settings": lambda build: build(settings="resize=224"),
        "the stored dtype": lambda build: build(prefix=case.cut(dtype=jnp.bfloat16).prefix),
        "the computation": lambda build: build(
            prefix=jtl.split(squared, case.state, case.frozen, next(iter(case.run()))).prefix
        ),
        "the transform": lambda build: build(batches=case.run(transform=functools.partial(scaled, by=2.0))),
        "the augmentation": lambda build: build(augment=augment, key=jax.random.key(0)),
        "its random key": lambda build: build(augment=augment, key=jax.random.key(1)),
        "its settings": lambda build: build(augment=functools.partial(shifted, scale=2.0), key=jax.random.key(0)),
        "the number of views": lambda build: build(augment=augment, key=jax.random.key(0), views=2),
    }


class Squared(Net):
    """The same leaves, another computation."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x**2)


def scaled(batch, by):
    return {**batch, "x": batch["x"] * np.float32(by)}


def shifted(batch, *, key, scale):
    noise = jax.random.normal(key, batch["x"].shape)
    return {**batch, "x": np.asarray(batch["x"] + scale * noise)}


def test_any_change_makes_another_key(case, tmp_path, monkeypatch):
    def build(prefix=None, frozen=case.frozen, batches=None, **options):
        prefix = prefix or case.cut().prefix
        batches = batches or case.run()
        return jtl.cache.build(prefix, case.state, frozen, batches, directory=tmp_path, **options)

    keys = {"nothing": build().key}
    calls = computed(monkeypatch)
    assert build(batches=case.run(seed=5, epochs=9)).key == keys["nothing"]  # the order is no part of it
    assert not calls
    for what, change in mutations(case).items():
        before = len(calls)
        keys[what] = change(build).key
        assert len(calls) > before, what
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_build_goes_on_where_it_stopped(case, tmp_path, monkeypatch, stop):
    whole = case.build()

    def interrupt(done, total):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.build(directory=tmp_path, shard_bytes=1, on_batch=interrupt)
    (folder,) = tmp_path.iterdir()
    kept = len(list(folder.glob("shard-*")))
    (folder / "draft-of-a-killed-process").mkdir()
    calls = computed(monkeypatch)
    resumed = case.build(directory=tmp_path, shard_bytes=1)
    assert len(calls) == 6 - kept
    assert kept >= stop - 1
    assert not list(folder.glob("draft-*"))
    np.testing.assert_array_equal(values(resumed)["cut/0"], values(whole)["cut/0"])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "metadata"])
def test_a_damaged_shard_is_computed_again(case, tmp_path, monkeypatch, damage):
    before = np.array(values(case.build(directory=tmp_path, shard_bytes=1))["cut/0"])
    shard = sorted(next(iter(tmp_path.iterdir())).glob("shard-*"))[2]
    file = shard / ("shard.json" if damage == "metadata" else "0.npy")
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    calls = computed(monkeypatch)
    after = case.build(directory=tmp_path, shard_bytes=1)
    assert len(calls) == 1
    np.testing.assert_array_equal(values(after)["cut/0"], before)


def test_a_full_disk_leaves_a_valid_partial_store(case, tmp_path, monkeypatch):
    write, written = stores._write, []

    def full(*args):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        write(*args)

    monkeypatch.setattr(stores, "_write", full)
    with pytest.raises(errors.CacheError, match="disk is full: batches 2 to 2"):
        case.build(directory=tmp_path, shard_bytes=1)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("shard-*"))) == 2
    assert not list(folder.glob("draft-*"))
    monkeypatch.setattr(stores, "_write", write)
    calls = computed(monkeypatch)
    case.build(directory=tmp_path, shard_bytes=1)
    assert len(calls) == 4


def test_the_key_is_written_for_a_reader(case, tmp_path):
    cache = case.build(directory=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert cache.key.startswith(folder.name)
    assert {"leaves", "computation", "data", "revision", "settings"} <= set(
        json.loads((folder / "key.json").read_text())
    )


def test_bfloat16_survives_the_disk(case, tmp_path):
    cut = case.cut(dtype=jnp.bfloat16)
    kept, stored = case.build(cut), case.build(cut, directory=tmp_path)
    assert values(stored)["cut/0"].dtype == jnp.bfloat16
    assert values(kept)["cut/0"].tobytes() == values(stored)["cut/0"].tobytes()


def test_views_differ_and_epochs_go_through_them(case):
    cache = case.build(augment=functools.partial(shifted, scale=1.0), key=jax.random.key(0), views=3)
    (group,) = cache.store.groups
    views = [cache.store.rows(group, np.arange(22) + 22 * view)["cut/0"] for view in range(3)]
    assert not np.allclose(views[0], views[1])
    batches = list(cache.batches(batch_size=22, epochs=4, remainder="keep"))
    for epoch, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["cut/0"], views[epoch % 3])


def test_a_list_of_batches_can_be_cached(case):
    listed = list(case.run(epochs=1, seed=None))
    cache = case.build(run=listed)
    assert cache.rows == 22
    np.testing.assert_allclose(values(cache)["cut/0"], hidden(case), rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused(case, tmp_path):
    with pytest.raises(errors.ConfigError, match="read only once"):
        case.build(run=iter(list(case.run())))
    with pytest.raises(errors.DataError, match="no row"):
        case.build(run=[])
    with pytest.raises(errors.ConfigError, match="views=0"):
        case.build(views=0)
    with pytest.raises(errors.ConfigError, match="go together"):
        case.build(views=2)
    wrong = dataclasses.replace(case.run(), labels=np.full(22, 7))
    with pytest.raises(errors.DataError, match="label 7"):
        case.build(run=wrong)
    with pytest.raises(errors.ConfigError, match="leaves no batch"):
        case.build().batches(batch_size=23, remainder="drop")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        case.build(directory=tmp_path / "file")

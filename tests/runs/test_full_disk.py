"""A disk that fills up: the checkpoint before stays whole, and the error has the bytes."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl import errors, runs
from jtl.models.bert import Bert, BertConfig
from jtl.weights import folders

from . import victim

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small disk here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.long)])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(count, disk):
    numbers = np.random.default_rng(0).normal(size=250_000).astype(np.float32)  # a megabyte that does not compress
    steps = runs.Steps(disk / "checkpoints", keep=1)
    steps.save(1, {"model": {"x": jnp.asarray(numbers)}}, dict, wait=True)
    for k, free in enumerate(np.linspace(0, 800_000, count).astype(int)):
        ballast = disk / "ballast"
        with open(ballast, "wb") as file:
            file.write(bytes(max(0, _free(disk) - int(free))))
        with pytest.raises(errors.CheckpointError, match=r"is full: it needs 1,000,000 bytes, and [\d,]+ are free"):
            steps.save(2 + k, {"model": {"x": jnp.asarray(numbers + 1)}}, dict, wait=True)
        restored = steps.restore()
        assert restored.step == 1
        np.testing.assert_array_equal(restored.items["model"]["x"], numbers)
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["00000001"]
        ballast.unlink()
    steps.save(200, {"model": {"x": jnp.asarray(numbers + 1)}}, dict, wait=True)
    assert steps.found() == [200]


def test_a_disk_without_room_is_refused_before_the_first_step(disk):
    (disk / "ballast").write_bytes(bytes(_free(disk) - (1 << 20)))
    strategy, loss_fn, state, frozen = victim.start("full")
    steps = []
    with pytest.raises(errors.CheckpointError, match=r"no room for a checkpoint: it needs [\d,]+ bytes, and 1,048,576"):
        steps.extend(jtl.fit(loss_fn, strategy, state, frozen, victim.data(), run=disk / "run"))
    assert not steps
    assert not (disk / "run").exists()


@pytest.mark.parametrize("room", ["known", "late"])
def test_a_model_that_finds_no_room_is_not_half_saved(room, disk, monkeypatch):
    config = BertConfig(200, 256, 1, 4, 300)  # 3 MB
    model = Bert(config, jtl.heads.classifier(2))
    ids = jnp.ones((1, 4), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), ids, attention_mask=ids)
    (disk / "ballast").write_bytes(bytes(_free(disk) - 1_000_000))
    if room == "late":  # another program takes it in the meantime
        monkeypatch.setattr(folders, "free", lambda folder: 1 << 40)
    with pytest.raises(
        errors.CheckpointError, match=r"model could not be written: the disk is full: it needs [\d,]+ b"
    ):
        jtl.save(disk / "model", model, variables)
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    (disk / "ballast").unlink()
    jtl.save(disk / "model", model, variables)
    assert jtl.load(disk / "model", None)


def _free(place):
    import shutil

    return shutil.disk_usage(place).free

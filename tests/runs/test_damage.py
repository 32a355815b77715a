"""Whatever happens to the files of a checkpoint: it is noticed, the file is named, and an older checkpoint is taken."""

import random
import shutil

import pytest

import jtl
from jtl import checkpoint, errors

from . import damage, victim


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "run"
    victim.train(folder, "last blocks", run={"every": 60})
    return folder


@pytest.fixture
def subject(folder):
    return damage.Subject(folder / "checkpoints")


@pytest.mark.parametrize("fault", [damage.delete, damage.truncate, damage.zero], ids=lambda fault: fault.__name__)
def test_each_file_may_be_lost_cut_or_zeroed(fault, subject):
    rng = random.Random(0)
    found = {path: subject.suffer(fault, path, rng) for path in damage.files(subject.newest)}
    assert set(found.values()) == {"fallen back"}, found


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.long)])
def test_any_bit_may_flip(count, subject):
    rng, paths = random.Random(1), damage.files(subject.newest)
    found = [subject.suffer(damage.flip, rng.choice(paths), rng) for _ in range(count)]
    assert set(found) <= {"fallen back", "harmless"}, set(found)
    assert found.count("fallen back") > 0.9 * count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads that find no loop
@pytest.mark.parametrize("count", [60, pytest.param(2500, marks=pytest.mark.long)])
def test_files_that_are_changed_and_signed_anew_do_no_harm(count, subject):
    """Leaves have digests of their own; what orbax makes of such files is refused, whatever it raises."""
    rng, paths = random.Random(2), damage.files(subject.newest)
    found = [
        subject.suffer(rng.choice([damage.flip, damage.garble, damage.reshape]), rng.choice(paths), rng, signed=True)
        for _ in range(count)
    ]
    wrong = {verdict for verdict in found if verdict not in ("fallen back", "harmless")}
    assert not {verdict for verdict in wrong if "manifest" not in verdict}, (
        wrong
    )  # notes are what a signed manifest says


def test_nothing_is_restored_where_nothing_is_sound(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    paths = [path for step in (tmp_path / "run" / "checkpoints").iterdir() for path in damage.files(step)[-1:]]
    for path in paths:
        damage.flip(path, random.Random(3))
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint in .* is sound") as caught:
        victim.train(tmp_path / "run", "last blocks", run={"every": 60})
    assert all(str(path) in str(caught.value) for path in paths)


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_end(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    damage.zero(damage.files(newest)[0], random.Random(0))
    steps = []
    found = victim.train(tmp_path / "run", "last blocks", run={"every": 60}, on_step=steps.append)
    assert steps == list(range(31, 61))
    assert found == victim.train(None, "last blocks")
    assert checkpoint.check(newest)  # it was written again


def test_a_link_or_another_file_among_the_arrays_is_refused(subject, tmp_path):
    path = damage.files(subject.newest)[-1]
    (tmp_path / "other").write_bytes(path.read_bytes())
    assert subject.suffer(lambda path, rng: (path.unlink(), path.symlink_to(tmp_path / "other")), path, None) == (
        "fallen back"
    )
    path.unlink()
    path.write_bytes((tmp_path / "other").read_bytes())
    stranger = path.with_name("stranger")
    stranger.write_text("x")
    with pytest.raises(errors.CheckpointError, match=r"stranger is not one of the checkpoint's files"):
        checkpoint.check(subject.newest)
    stranger.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["manifest"].update(format=2), "SHA-256 differs"),
        (lambda m: m.pop("sha256"), "not what was written: 'sha256'"),
        (lambda m: m.update(manifest=[]), "SHA-256 differs"),
    ],
)
def test_a_manifest_proves_itself(change, message, subject):
    import json

    def damaged(path, rng):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    manifest = subject.newest / checkpoint.MANIFEST
    assert subject.suffer(damaged, manifest, None) == "fallen back"
    try:
        damaged(manifest, None)
        with pytest.raises(errors.CheckpointError, match=message):
            checkpoint.manifest_of(subject.newest)
    finally:
        manifest.write_bytes(subject.whole[manifest])


def test_items_that_do_not_exist_are_named(subject):
    with pytest.raises(errors.CheckpointError, match="no item 'weights'; it has model, optimizer"):
        checkpoint.read(subject.newest, ["weights"])
    assert isinstance(errors.CheckpointError("x"), OSError)
    assert jtl.runs.Steps(subject.newest.parent / "nowhere").restore() is None

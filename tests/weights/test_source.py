"""Where `resolve` looks, in which order, and what it says when it finds nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from jtl.errors import ConfigError, DigestError, SourceNotFoundError, WeightsError
from jtl.weights import assets, source
from jtl.weights.safetensors import read_tensors, write_tensors
from jtl.weights.tensors import open_tensors

from . import torch_bytes as torch
from .hub import Commit, Hub

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a few repositories, and an empty cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("JTL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    old, new = _weights(tmp_path, 1.0), _weights(tmp_path, 2.0)
    files = {
        "config.json": b"{}",
        "vocab.txt": b"a\nb",
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": torch_bytes(3.0),
    }
    shards = {
        "pytorch_model-00001-of-00002.bin": torch_bytes(4.0),
        "pytorch_model-00002-of-00002.bin": torch_bytes(5.0, "v"),
    }
    torch_index = b'{"weight_map": {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}}'
    index = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
    repos = {
        "org/model": (
            Commit(OLD, files | {"model.safetensors": old}, names=("v1",)),
            Commit(NEW, files | {"model.safetensors": new, "model.fp16.safetensors": old}),
        ),
        "bare-name": (Commit(NEW, {"model.safetensors": new}),),
        "org/sharded": (Commit(NEW, {"model.safetensors.index.json": index, "model-00001-of-00001.safetensors": new}),),
        "org/pickled": (Commit(NEW, files | {"training_args.bin": b"?", "tf_model.h5": b"?"}),),
        "org/pickled-shards": (Commit(NEW, {"pytorch_model.bin.index.json": torch_index, **shards}),),
        "org/pth": (Commit(NEW, {"config.json": b"{}", "model.pth": torch_bytes(6.0)}),),
        "org/many": (Commit(NEW, {"a.pth": torch_bytes(6.0), "b.pth": torch_bytes(6.0), "tf_model.h5": b"?"}),),
        "org/gated": (Commit(NEW, {"model.safetensors": new}),),
    }
    with Hub(repos) as hub:
        hub.gated.add("org/gated")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def _weights(folder: Path, value: float) -> bytes:
    path = folder / "scratch.safetensors"
    write_tensors(path, {"w": np.full(100, value)})
    return path.read_bytes()


def torch_bytes(value: float, name: str = "w") -> bytes:
    """What `torch.save({name: torch.full((4,), value)})` writes."""
    code = torch.program(torch.mapping({name: torch.vector("0", 4)}))
    return torch.zipped(code, {"0": np.full(4, value, np.float32).tobytes()})


def _first(found: source.Source) -> float:
    return float(read_tensors(found.path)["w"][0])


@pytest.fixture
def no_hub(monkeypatch):
    """Whatever is resolved here must not ask the hub."""
    monkeypatch.setattr(source, "_hub", lambda *args: pytest.fail(f"asked the hub for {args}"))


# Local paths and assets


def test_an_existing_folder_wins_over_an_asset_and_the_hub(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    for name in ("minilm-l6", "org/name", "plain"):
        Path(name).mkdir(parents=True)
        assert source.resolve(name) == (name, "folder", tmp_path / name, None)
        assert source.resolve(Path(name)).path == tmp_path / name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_file_of_weights_is_a_source(tmp_path, suffix, no_hub):
    file = tmp_path / f"weights{suffix}"
    file.touch()
    assert source.resolve(str(file)) == (str(file), "folder", file, None)


def test_home_is_expanded(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert source.resolve("~/model").path == tmp_path / "model"


@pytest.mark.parametrize("name", ["./absent", "../absent", "~/absent", "/absent/folder", "absent.safetensors"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name, no_hub):
    with pytest.raises(SourceNotFoundError, match=r"no such folder or file: .*absent"):
        source.resolve(name)


def test_a_missing_path_object_is_not_taken_for_a_hub_id(no_hub):
    with pytest.raises(SourceNotFoundError, match="no such folder or file"):
        source.resolve(Path("org/name"))


def test_a_file_of_another_kind_is_refused(tmp_path, no_hub):
    (tmp_path / "config.json").touch()
    with pytest.raises(SourceNotFoundError, match=r"config\.json is neither a folder nor a file of weights"):
        source.resolve(tmp_path / "config.json")


def test_an_empty_source_is_refused(no_hub):
    with pytest.raises(SourceNotFoundError, match="empty"):
        source.resolve("")


def test_an_asset_is_fetched_by_its_name(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / name)
    assert source.resolve("minilm-l6") == ("minilm-l6", "asset", tmp_path / "minilm-l6", None)


def test_a_data_asset_is_no_model(no_hub):
    with pytest.raises(SourceNotFoundError, match="'mnist-5k' is data, not a model"):
        source.resolve("mnist-5k")


def test_a_revision_of_a_folder_or_an_asset_is_refused(tmp_path, no_hub):
    for name in (str(tmp_path), "minilm-l6"):
        with pytest.raises(ConfigError, match="revision='v1' was given for"):
            source.resolve(name, revision="v1")


# The hub


def test_a_repository_is_downloaded_without_its_code(hub):
    found = source.resolve("org/model")
    assert found == ("org/model", "hub", found.path, NEW)
    names = {path.name for path in found.path.iterdir()}
    assert names == {"config.json", "vocab.txt", "model.safetensors"}
    assert _first(found) == 2.0


def test_a_name_without_a_slash_is_a_hub_id_too(hub):
    assert _first(source.resolve("bare-name")) == 2.0


def test_shards_are_downloaded_with_their_index(hub):
    assert _first(source.resolve("org/sharded")) == 2.0


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_pins_the_files(hub, revision):
    found = source.resolve("org/model", revision=revision)
    assert found.revision == OLD
    assert _first(found) == 1.0


def test_the_revision_of_a_source_gives_it_again(hub):
    found = source.resolve("org/model")
    assert source.resolve(found.name, revision=found.revision) == found


@pytest.mark.parametrize("variable", ["JTL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_and_asks_nobody(hub, monkeypatch, variable):
    found = source.resolve("org/model")
    monkeypatch.setenv(variable, "1")
    hub.requests.clear()
    assert source.resolve("org/model") == found
    assert not hub.requests


def test_offline_without_a_cached_copy_is_an_error(hub, monkeypatch):
    monkeypatch.setenv("JTL_OFFLINE", "1")
    with pytest.raises(SourceNotFoundError, match="cache does not hold all of org/model, and offline mode is on"):
        source.resolve("org/model")
    assert not hub.requests


def test_without_a_server_the_cached_copy_is_used_and_said(hub, caplog):
    found = source.resolve("org/model")
    hub.stop()
    assert source.resolve("org/model") == found
    assert [record.name for record in caplog.records if "does not answer" in record.message] == ["jtl"]


def test_a_failing_server_is_as_good_as_none(hub):
    found = source.resolve("org/model")
    hub.failing = True
    assert source.resolve("org/model") == found
    with pytest.raises(SourceNotFoundError, match=r"the hub does not answer \(HfHubHTTPError: .*503 Service"):
        source.resolve("org/sharded")


def test_a_web_page_is_no_answer(hub):
    hub.portal = True
    with pytest.raises(SourceNotFoundError, match=r"the hub does not answer \(JSONDecodeError"):
        source.resolve("org/model")


def test_without_a_server_and_a_cached_copy(hub):
    hub.stop()
    with pytest.raises(SourceNotFoundError, match=r"org/model at revision v1, and the hub does not answer \(Connect"):
        source.resolve("org/model", revision="v1")


def test_a_missing_repository(hub):
    with pytest.raises(SourceNotFoundError, match="no hub repository is named 'org/absent'; check the spelling"):
        source.resolve("org/absent")


def test_a_misspelt_asset_is_recognised(hub):
    with pytest.raises(SourceNotFoundError, match=r"'minlm-l6' .did you mean the asset 'minilm-l6'"):
        source.resolve("minlm-l6")


def test_a_missing_revision(hub):
    with pytest.raises(SourceNotFoundError, match="'org/model' has no revision 'v9'"):
        source.resolve("org/model", revision="v9")


def test_a_gated_repository(hub):
    with pytest.raises(SourceNotFoundError, match="'org/gated' is gated: accept its terms"):
        source.resolve("org/gated")


@pytest.mark.parametrize(
    ("repo", "fetched", "value"),
    [
        ("org/pickled", {"config.json", "vocab.txt", "pytorch_model.bin"}, 3.0),
        ("org/pth", {"config.json", "model.pth"}, 6.0),
    ],
)
def test_weights_of_pytorch_are_fetched_where_there_are_no_safetensors(hub, monkeypatch, repo, fetched, value):
    found = source.resolve(repo)
    assert {path.name for path in found.path.iterdir()} == fetched
    assert open_tensors(found.path)["w"].tolist() == [value] * 4
    monkeypatch.setenv("JTL_OFFLINE", "1")
    hub.requests.clear()
    assert source.resolve(repo) == found
    assert not hub.requests


def test_shards_of_pytorch_are_read_as_one(hub, monkeypatch):
    found = source.resolve("org/pickled-shards")
    for path in (found.path, found.path / "pytorch_model.bin.index.json"):
        tensors = open_tensors(path)
        assert {name: float(tensors[name][0]) for name in tensors} == {"w": 4.0, "v": 5.0}
    monkeypatch.setenv("JTL_OFFLINE", "1")
    assert source.resolve("org/pickled-shards") == found


def test_shards_of_pytorch_agree_with_their_index(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    (tmp_path / "a.bin").write_bytes(torch_bytes(1.0))
    for names, message in (
        ({"w": "a.bin", "v": "a.bin"}, "lacks tensors .*: v"),
        ({"w": "../a.bin"}, "names the shard"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(WeightsError, match=message):
            open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "b.bin"}}))
    with pytest.raises(SourceNotFoundError, match=r"not beside it: b\.bin"):
        open_tensors(tmp_path)


def test_safetensors_are_preferred(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes(1.0))
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert open_tensors(tmp_path)["w"][0] == 1.0
    write_tensors(tmp_path / "model.safetensors", {"w": np.full(4, 2.0)})
    assert open_tensors(tmp_path)["w"][0] == 2.0


def test_a_repository_without_weights_that_are_read_is_refused_before_any_download(hub):
    with pytest.raises(
        SourceNotFoundError, match=r"neither model\.safetensors nor .* holds: a\.pth, b\.pth, tf_model\.h5"
    ):
        source.resolve("org/many")
    assert not [path for path in hub.requests if "/resolve/" in path]


def test_a_cached_snapshot_without_weights_is_refused(hub, monkeypatch):
    huggingface_hub.snapshot_download("org/pickled", endpoint=hub.url, allow_patterns=["*.json", "*.txt"])
    monkeypatch.setenv("JTL_OFFLINE", "1")
    with pytest.raises(SourceNotFoundError, match=r"neither model\.safetensors nor"):
        source.resolve("org/pickled")


def test_a_name_that_no_hub_id_can_have(hub):
    with pytest.raises(SourceNotFoundError, match="'a/b/c' is no folder, no asset"):
        source.resolve("a/b/c")
    assert not hub.requests


def test_a_truncated_body_is_refused_and_the_next_try_succeeds(hub):
    hub.truncated.add("model.safetensors")
    with pytest.raises(SourceNotFoundError, match="the download of 'org/model' broke off"):
        source.resolve("org/model")
    hub.truncated.clear()
    assert _first(source.resolve("org/model")) == 2.0


def test_a_changed_byte_in_the_cache_is_found_and_repaired_by_the_remedy(hub):
    weights = source.resolve("org/model").path / "model.safetensors"
    blob = weights.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DigestError, match=f"(?s){blob.name}.*delete it and fetch it again"):
        source.resolve("org/model")
    blob.unlink()
    assert _first(source.resolve("org/model")) == 2.0


def test_importing_the_package_imports_no_framework_and_no_hub_client():
    code = (
        "import sys, jtl.weights.source, jtl.weights.assets\n"
        "print(sorted({'jax', 'flax', 'huggingface_hub', 'filelock'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"

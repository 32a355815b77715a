"""Commands that only look: `jtl models`, `jtl inspect`, and what a mistake gives."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jtl import cli

from .models import checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write_tokenizer(checkpoints.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def refused(capsys):
    """Run a command that must end with 2, one message and nothing else; gives the message."""

    def run(*args):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, args)))
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("jtl: ")
        assert "Traceback" not in err
        return err

    return run


def test_the_console_script_is_the_command_line():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"jtl": f"{cli.__name__}:{cli.main.__name__}"}


def test_models_are_listed_with_what_they_load_from(capsys):
    cli.main(["models"])
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "minilm-l6" in line]
    for word in ("bert", "packaged asset", "Apache-2.0"):
        assert word in row
    assert "any bert" in out
    assert "mnist-5k" not in out  # data, not a model


def test_models_takes_a_glob(capsys):
    cli.main(["models", "mini*"])
    out = capsys.readouterr().out
    assert "minilm-l6" in out
    assert "efficientnet" not in out


@pytest.mark.parametrize("pattern", ["minlm*", "MiniLM-L6", "xyz"])
def test_a_glob_without_a_match_names_the_nearest(refused, pattern):
    message = refused("models", pattern)
    assert f"named like {pattern!r}; nearest: " in message
    assert message.strip().split("nearest: ")[1]
    if pattern != "xyz":
        assert "minilm-l6" in message


def _counts(out):
    """The numbers of the first line: trained and all parameters."""
    trained, whole = re.search(r"([\d,]+) of ([\d,]+) parameters trained", " ".join(out.split())).groups()
    return int(trained.replace(",", "")), int(whole.replace(",", ""))


def _state(out, name):
    return [line.split()[-1] for line in out.splitlines() if name in line.split()]


def test_inspect_counts_and_marks_what_a_mask_trains(folder, capsys):
    cli.main(["inspect", str(folder), "--trainable", "head", "encoder/layer_1", "--outputs", "3"])
    out = capsys.readouterr().out
    values = checkpoints.tensors()
    head = 12 * 3 + 3
    block = sum(value.size for name, value in values.items() if name.startswith("encoder.layer.1."))
    assert _counts(out) == (head + block, sum(value.size for value in values.values()) + head)
    assert _state(out, "head") == ["trained"]
    assert _state(out, "layer_1") == ["trained"]
    assert _state(out, "layer_0") == _state(out, "embeddings") == ["frozen"]
    (encoder,) = [line for line in out.splitlines() if "encoder" in line.split()]
    assert encoder.endswith("partly trained")


def test_inspect_shows_shapes_and_stops_at_the_depth_asked_for(folder, capsys):
    cli.main(["inspect", str(folder), "--depth", "2"])
    out = capsys.readouterr().out
    assert "kernel  float32 [12, 2]  trained" in out
    assert "attention" not in out


def test_inspect_reads_no_weights(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    cli.main(["inspect", str(tmp_path)])
    assert _counts(capsys.readouterr().out)[0] == 12 * 2 + 2


def test_a_pattern_that_matches_nothing_names_the_nearest_path(folder, refused):
    message = refused("inspect", folder, "--trainable", "encoder/layer1")
    assert "'encoder/layer1' matches none" in message
    assert "encoder/layer_1" in message


def test_a_model_that_there_is_not(refused, tmp_path):
    assert "no such folder" in refused("inspect", tmp_path / "absent")
    assert "config.json does not exist" in refused("inspect", tmp_path)


def test_a_mistyped_flag_is_a_mistake_too(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", "--dat", "x.csv"])
    assert end.value.code == 2


def test_an_interruption_ends_with_130(monkeypatch, capsys):
    from jtl.recipes import models

    monkeypatch.setattr(models, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        cli.main(["models"])
    assert end.value.code == 130


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "jtl", "models", "minilm*"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "minilm-l6" in result.stdout

"""Whatever bytes a PyTorch file has: it is read or refused, quickly, in little memory, and nothing in it is run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
COUNT = 25_000
SECONDS = 2.0
MEMORY = 2**22  # beside four times the file


def _report(*arguments):
    """What the script says, which runs in a process of its own."""
    command = [sys.executable, "-m", "weights.torch_fuzz", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=TESTS)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "failure" not in report, f"{report['failure']}\nthe input, in base 85: {report['input']}"
    return report


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that torch wrote, where it is installed; those written by hand are always mutated."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    folder = tmp_path_factory.mktemp("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    half = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    values = {
        "module": (model.state_dict(), 2),
        "parameters": ({"state_dict": dict(model.named_parameters()), "epoch": 3, "note": "a"}, 2),
        "views": ({"a": half, "b": half.T, "c": half[:, ::2], "d": half[:1].expand(3, 3)}, 2),
        "later": ({"a": half, "b": half, "l": [1, 2.0, None]}, 4),
    }
    for name, (value, protocol) in values.items():
        for zipped in (True, False):
            path = folder / f"{name}-{zipped}"
            torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("shard", range(4))
def test_mutated_files_are_read_or_refused(shard, files):
    """100,000 in all; nothing is imported, opened, compiled or run on the way, which an audit hook watches."""
    report = _report("mutate", shard, COUNT, *files)
    assert report["count"] == COUNT
    assert report["slowest"] < SECONDS
    assert report["memory"] < MEMORY
    # The mutations reach all parts of the reader: each message, without names and numbers, is one kind.
    assert report["read"] > COUNT // 20
    assert report["kinds"] > 80


def test_mutated_files_do_not_break_the_annotations():
    assert _report("mutate", 99, 300, "--typed")["count"] == 300


def test_small_files_that_describe_much_take_little():
    for name, report in _report("swell").items():
        assert report["seconds"] < SECONDS, name
        assert report["peak"] < 4 * report["bytes"] + MEMORY, name

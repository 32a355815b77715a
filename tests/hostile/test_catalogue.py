"""Each input of the catalogue is refused by name: nothing hangs, nothing runs, nothing is written, little is taken."""

import json
import os
import subprocess
import sys

import pytest

from . import fuzz
from .catalogue import MARKER, ROWS

MEMORY = 16 << 20  # beside four times the file


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of each, from a process of its own."""
    place = tmp_path_factory.mktemp("hostile")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(fuzz.ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "tests.hostile.catalogue", str(place)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=fuzz.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(place.rglob(MARKER))
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


def test_there_are_enough_of_them():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 50


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_it_is_refused(row, found):
    report = found[row.name]
    assert report["error"] == row.error, report
    assert row.says in report["says"]
    assert report["peak"] < 4 * report["bytes"] + MEMORY
    assert report["appeared"] == []

"""Real training processes that are killed, asked to end, or end with a save under way."""

import signal
import subprocess
import sys

import pytest

import jtl

from . import crashes, victim


@pytest.fixture(scope="module")
def expected():
    return victim.train()


def _survive(folder, expected, count, number, seed=0):
    deaths, ends, wrong = crashes.campaign(folder, expected, count, number, seed=seed)
    assert ends
    assert not wrong
    # Every checkpoint that is there can be restored, or `newest` had raised; and no more than one interval is lost.
    assert max(death.done - (death.kept or 0) for death in deaths) <= crashes.EVERY
    return deaths


def test_killed_runs_lose_one_interval_at_most_and_end_as_if_never_killed(tmp_path, expected):
    deaths = _survive(tmp_path / "run", expected, 40, signal.SIGKILL)
    assert {death.code for death in deaths} == {-signal.SIGKILL}


@pytest.mark.long
def test_so_do_five_hundred(tmp_path, expected):
    _survive(tmp_path / "run", expected, 500, signal.SIGKILL, seed=1)


@pytest.mark.long
def test_a_hundred_terminated_runs_are_saved(tmp_path, expected):
    _survive(tmp_path / "run", expected, 100, signal.SIGTERM, seed=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_its_step_and_says_so(number, tmp_path, expected):
    with crashes.server() as process:
        death = crashes.interrupted(process, tmp_path / "run", 20, 0.0, number, pause=0.02)
    assert death.code == jtl.runs.EXIT == 75
    assert 20 <= death.done <= death.kept < 60
    assert victim.train(tmp_path / "run") == expected


END = """
import jax.numpy as jnp, sys
from pathlib import Path
from jtl import runs
steps = runs.Steps(Path(sys.argv[1]))
steps.save(7, {"model": {"x": jnp.ones(2_000_000)}}, dict)
if sys.argv[2] == "raises":
    raise ValueError("on purpose")
"""


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("raises", 1)])
def test_what_is_being_written_is_on_disk_when_python_has_ended(how, code, tmp_path):
    done = subprocess.run([sys.executable, "-c", END, str(tmp_path), how], capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert jtl.runs.Steps(tmp_path).restore().step == 7


def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    best = jtl.Plateau("accuracy", higher_is_better=True)
    steps = jtl.runs.Steps(tmp_path, keep=1, best=best)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, None), (4, 0.8), (5, float("inf"))):
        evaluation = None if accuracy is None else {"accuracy": accuracy if accuracy < 1 else None}
        steps.save(step, {"model": {}}, lambda evaluation=evaluation: {"evaluation": evaluation}, wait=True)
    assert steps.found() == [2, 5]
    reopened = jtl.runs.Steps(tmp_path, keep=1, best=best)
    reopened.open()
    reopened.save(6, {"model": {}}, dict, wait=True)
    assert reopened.found() == [2, 6]

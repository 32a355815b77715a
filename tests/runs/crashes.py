"""Kills and signals sent to real training processes, and what is left of their runs."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jtl

VICTIM = Path(__file__).with_name("victim.py")
EVERY, PAUSE = 8, 0.02


class Death(NamedTuple):
    """One process that was sent a signal, or ended before."""

    code: int
    seconds: float
    done: int
    kept: int | None


@contextlib.contextmanager
def server(**environment):
    """A process that forks victims."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    with subprocess.Popen(
        [sys.executable, str(VICTIM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(60)


def begin(process, folder, **order):
    """Start a victim; its process id."""
    process.stdin.write(json.dumps({"folder": str(folder), **order}) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())["began"]


def end(process, pid):
    """The exit code of a victim, when it has ended."""
    found = json.loads(process.stdout.readline())
    assert found["ended"] == pid, found
    return found["code"]


def interrupted(process, folder, steps, seconds, number=signal.SIGKILL, **order):
    """Start a victim, send it a signal so many seconds after so many steps, and look at what it left."""
    before = newest(folder)
    progress = folder.with_suffix(".progress")
    progress.write_bytes(struct.pack("q", -1))
    pid = begin(process, folder, **order)
    while steps and struct.unpack("q", progress.read_bytes())[0] < (before or 0) + steps and _runs(pid):
        time.sleep(0.001)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    sent = time.perf_counter()
    code = end(process, pid)
    seconds = time.perf_counter() - sent
    done = struct.unpack("q", progress.read_bytes())[0]
    return Death(code, seconds, max(done, before or 0), newest(folder))


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest(folder):
    """The newest sound step of a run; None without any checkpoint. Raises where there are some and none is sound."""
    if not (folder / "checkpoints").is_dir():
        return None
    stored = jtl.runs.Steps(folder / "checkpoints").restore()
    return None if stored is None else stored.step


def clean(folder):
    """Remove a run with all that belongs to it, but for compiled programs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_suffix(".cache"), ignore_errors=True)
    folder.with_suffix(".digest").unlink(missing_ok=True)


def campaign(folder, expected, count, number=signal.SIGKILL, *, seed=0, say=lambda line: None):
    """Interrupt victims `count` times, at random moments; each goes on where the one before was interrupted.

    Args:
      folder: of the run, begun anew whenever it has come to its end.
      expected: the digest of a run that was never interrupted.
      count: signals to send.
      number: which.
      seed: of the moments: three of four some steps after the start, one before the first step.
      say: called with a line now and then.

    Returns:
      `(deaths, ends, wrong)`: the interrupted ones, how many runs came to their end, and how many of them had another
      digest.
    """
    rng, deaths, ends, wrong = random.Random(seed), [], 0, 0
    order = {"pause": PAUSE, "run": {"every": EVERY, "keep": 2}, "compiled": True}
    with server() as process:
        while len(deaths) < count:
            early = rng.random() < 0.25
            steps, seconds = (0, rng.uniform(0.0, 2.0)) if early else (rng.randint(1, 24), rng.uniform(0.0, 4 * PAUSE))
            death = interrupted(process, folder, steps, seconds, number, **order)
            if death.code == 0:
                ends += 1
                wrong += folder.with_suffix(".digest").read_text() != expected
                clean(folder)
            else:
                deaths.append(death)
                if len(deaths) % 20 == 0:
                    say(f"{len(deaths)} interrupted, {ends} ended, {wrong} wrong")
        pid = begin(process, folder, **order)
        code = end(process, pid)
        ends, wrong = ends + 1, wrong + (code != 0 or folder.with_suffix(".digest").read_text() != expected)
    return deaths, ends, wrong

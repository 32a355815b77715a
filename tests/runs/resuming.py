"""A run that is interrupted after each of its steps, and what it comes to."""

import os
import shutil
from pathlib import Path

import jax

import jtl

from . import victim


def every_checkpoint(folder, name, **settings):
    """A run that keeps a checkpoint of each step; its digest."""
    return victim.train(folder, name, run={"every": 1, "keep": 2 * victim.STEPS}, **settings)


def resumed(folder, place, step, name, **settings):
    """The digest of a run that was interrupted after a step, and the steps that it did then."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "run.json", place)
    shutil.copy(folder / "metrics.jsonl", place)
    shutil.copytree(
        folder / "checkpoints" / f"{step:08d}", place / "checkpoints" / f"{step:08d}", copy_function=os.link
    )
    steps = []
    return victim.train(place, name, run={"every": 1000}, on_step=steps.append, **settings), steps


def wrong_steps(folder: Path, name, steps, **settings):
    """Those of the steps after which a resumed run ends otherwise than one that was never interrupted."""
    expected = victim.train(None, name, **settings)
    found = [] if every_checkpoint(folder / "whole", name, **settings) == expected else [0]
    for step in steps:
        got, done = resumed(folder / "whole", folder / "again", step, name, **settings)
        if got != expected or done != (list(range(step + 1, victim.STEPS + 1)) or [victim.STEPS]):
            found.append(step)
    return found


def mesh(count):
    """Of the first devices."""
    return jtl.parallel.data_mesh(jax.devices()[:count])

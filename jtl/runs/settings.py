"""What a run is told about its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jtl.errors import ConfigError
from jtl.runs import folder
from jtl.schedule import Plateau


class Run(NamedTuple):
    """A run's folder, and what is kept in it; `jtl.fit(run=...)` takes one, or the folder alone.

        folder/run.json          what the run is: settings, data, start, optimizer; versions, git revision, sessions
        folder/metrics.jsonl     a line for each step, and its evaluation
        folder/checkpoints/      one folder for each step that is kept

    Attributes:
      folder: made where it is absent. A run that is found in it goes on from its newest sound checkpoint.
      config: JSON values that name the run, such as its hyperparameters. Another run of the same folder must have the
        same.
      every: updates that an interruption may cost, at most. A checkpoint is begun after half as many, and is on disk
        before the next one begins. The last step is kept, too, and the one that a signal ends.
      keep: the newest checkpoints to keep, 1 or more.
      best: a metric of the held-out batches by which the best checkpoints are kept as well; `patience` and `by` have
        no meaning here.
      best_count: how many.
      give_up: end the run, with a checkpoint, after so many steps in a row that a guard skipped; see
        `jtl.transforms.guard`.
      watchdog: write the stacks of all threads to `folder/stacks.txt` whenever no step ended for so many seconds;
        the first step of a phase compiles. None for never.
    """

    folder: str | Path
    config: Mapping[str, Any] = {}
    every: int = 100
    keep: int = 2
    best: Plateau | None = None
    best_count: int = 1
    give_up: int = 10
    watchdog: float | None = None


def check(run: Run | str | Path) -> Run:
    """Settings that can work; a folder alone becomes them.

    Raises:
      ConfigError: a number below 1, a watchdog that does not wait, or a folder that something else is in.
    """
    run = run if isinstance(run, Run) else Run(run)
    for name in ("every", "keep", "best_count", "give_up"):
        if getattr(run, name) < 1:
            raise ConfigError(f"run: {name}={getattr(run, name)}; expected 1 or more")
    if run.watchdog is not None and not run.watchdog > 0:
        raise ConfigError(f"run: watchdog={run.watchdog}; expected seconds above 0, or None")
    folder.check(Path(run.folder))
    return run

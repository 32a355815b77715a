"""A run in its folder: where it goes on, what is kept after each step, and how it ends."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jtl import tree as jtree
from jtl.cache import Mode
from jtl.data import Batches
from jtl.errors import CheckpointError, DivergedError
from jtl.runs import contents, folder
from jtl.runs.identity import identity
from jtl.runs.log import Line, Log, lines, plain
from jtl.runs.settings import Run, check
from jtl.runs.signals import Interrupted, Signals, Watchdog
from jtl.runs.steps import Restored, Steps
from jtl.schedule import Progress, Strategy
from jtl.state import Frozen, TrainState
from jtl.typing import Batch

_TOLD = 5
"""Skipped steps that are named on the screen; the others are in the file of metrics."""


class Place(NamedTuple):
    """Where a run goes on.

    Attributes:
      state: the trained half.
      frozen: the frozen half.
      progress: in the strategy; None at the start.
      batches: those that are not yet consumed.
      ended: metrics and evaluation of the last step, where none is left to do.
    """

    state: TrainState
    frozen: Frozen
    progress: Progress | None
    batches: Iterable[Batch]
    ended: tuple[dict[str, Any], dict[str, float] | None] | None = None


class Session:
    """One process's part of a run. Its methods are called in the order that they stand here.

    Args:
      run: settings.
      say: called with lines about the run.
    """

    def __init__(self, run: Run, say: Callable[[str], None] | None = None):
        self.run, self.folder = check(run), Path(run.folder)
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._lock: Any = None
        self._steps = Steps(self.folder / folder.CHECKPOINTS, keep=run.keep, best=run.best, best_count=run.best_count)
        self._log = Log(self.folder / folder.METRICS, self._seen)
        self._signals = Signals(self._steps.finish)
        self._watchdog = Watchdog(self.folder / folder.STACKS, run.watchdog)
        self._evolved = contents.Evolved()
        self._phase, self._cached, self._resumed_in = -1, False, -1
        self._origin = self._saved = self._skipped = 0
        self._gave_up = ""
        self._evaluation: dict[str, float] | None = None
        self._counts: Mapping[str, int] = {}
        self._fingerprint: str | None = None
        self._batches: Iterable[Batch] = ()

    def enter(
        self, strategy: Strategy, state: TrainState, frozen: Frozen, batches: Iterable[Batch], **options: Any
    ) -> Place:
        """Claim the folder, and find where the run goes on.

        Args:
          strategy: its phases.
          state: the trained half at the start.
          frozen: the frozen half at the start.
          batches: of the whole run.
          **options: what else the run's numbers depend on.

        Raises:
          ConfigError: another run is in the folder, with each difference; or another process is.
          CheckpointError: the disk has no room for a checkpoint; or none is sound, or it is of another model or data.
        """
        folder.check_free(self.folder, jtree.nbytes(state))
        self._lock = folder.claim(self.folder)
        self._steps.open()
        self._batches, self._fingerprint = batches, getattr(batches, "fingerprint", None)
        self._origin = int(state.step)
        who = identity(self.run.config, strategy, state, frozen, batches, options)
        stored = self._steps.restore()
        if stored is not None and not (self.folder / folder.SAYS).exists():
            raise CheckpointError(f"{self.folder} has checkpoints, but no {folder.SAYS}: it is not the folder of a run")
        for line in folder.enter(self.folder, who, self._origin if stored is None else stored.step):
            self._say(line)
        self._log.begin(self._origin if stored is None else stored.step)
        place = Place(state, frozen, None, batches) if stored is None else self._place(stored, strategy, state, frozen)
        self._signals.start()
        self._watchdog.reset()
        return place

    def _place(self, stored: Restored, strategy: Strategy, state: TrainState, frozen: Frozen) -> Place:
        for line in stored.refused:
            self._say(f"refused: {line}")
        state, frozen = contents.rebuild(stored, strategy, state, frozen)
        self._evolved, progress = contents.evolved(stored), contents.progress(stored)
        self._phase = self._resumed_in = progress.phase
        self._cached, self._saved = bool(stored.notes["cached"]), stored.step
        self._evaluation, self._counts = stored.notes["evaluation"], stored.notes.get("microbatches", {})
        rest = _after(self._batches, stored.step - self._origin)
        ended = (stored.notes["metrics"], self._evaluation) if rest is None else None
        self._say(f"{self.folder}: {'ended' if ended else 'goes on'} after step {stored.step}")
        return Place(state, frozen, progress, () if rest is None else rest, ended)

    def cache(self, mode: Mode, progress: Progress) -> Mode:
        """Whether a phase trains from a cache: in the one that was interrupted, as before, for bits to be the same."""
        if progress.phase != self._resumed_in or mode == "off":
            return mode
        return "require" if self._cached else "off"

    def cached(self, used: bool) -> None:
        """A phase does, or does not, train from a cache."""
        self._cached = used

    def microbatches(self, progress: Progress) -> Mapping[str, int]:
        """Those of batches of each shape, where memory was short: in the phase that was interrupted."""
        return self._counts if progress.phase == self._resumed_in else {}

    def split(self, counts: Mapping[str, int]) -> None:
        """What `microbatches` gives when this run is resumed; a phase may change it."""
        self._counts = counts

    def after(self, report: Any, last: bool) -> None:
        """Log a step; save where it is due; end where the run was asked to.

        Args:
          report: of `jtl.fit`.
          last: whether there is no step after this one.

        Raises:
          CheckpointError: a checkpoint could not be written.
          DivergedError: a guard skipped too many steps in a row; the run is saved.
          Interrupted: a signal came; the run is saved.
        """
        self._watchdog.reset()
        if report.progress.phase != self._phase:
            self._evolved, self._phase = self._evolved.with_(report.state), report.progress.phase
        self._evaluation = report.evaluation or self._evaluation
        self._log.add(report.step, report.metrics, report.evaluation)
        self._steps.poll()
        asked = self._signals.caught is not None
        if asked:
            self._signals.answer()
        ends = bool(asked or last or self._gave_up)
        # What is being written is not on disk yet: with half of `every` between two, all of it is at stake at most.
        if ends or report.step - self._saved >= max(1, self.run.every // 2):
            self._save(report, wait=ends or self.run.every == 1)
        if asked:
            raise Interrupted(f"asked to end by signal {self._signals.caught}; saved after step {report.step}")
        if self._gave_up:
            raise DivergedError(f"{self._gave_up}; saved after step {report.step} in {self.folder}")

    def _save(self, report: Any, *, wait: bool) -> None:
        step, metrics, evaluation = report.step, report.metrics, self._evaluation
        notes = {
            "progress": contents.plain_progress(report.progress),
            "consumed": step - self._origin,
            "fingerprint": self._fingerprint,
            "cached": self._cached,
            "microbatches": dict(self._counts),
            "evaluation": None if evaluation is None else plain(evaluation),
            "versions": folder.versions(),
        }

        def complete() -> dict[str, Any]:
            self._log.flush(step)
            return {**notes, "metrics": plain(metrics)}

        self._steps.save(step, contents.items(report.state, report.frozen, self._evolved), complete, wait=wait)
        self._saved = step

    def close(self) -> None:
        """Let what is being written end, and give folder and signals back."""
        self._watchdog.stop()
        self._signals.stop()
        self._steps.finish()
        self._log.close()
        if self._lock is not None:
            self._lock.release()

    def _seen(self, line: Line) -> None:
        """Name what a guard skipped by its batch and rows, and count how many in a row."""
        if not line.get("skipped"):
            return
        self._skipped += 1
        number, rows = line["step"] - 1 - self._origin, []
        if isinstance(self._batches, Batches):
            number += self._batches.start
            rows = self._batches.plan(number).rows.tolist()
        line |= {"batch": number, "rows": rows}
        if self._skipped <= _TOLD:
            more = "; further ones are in the file of metrics" if self._skipped == _TOLD else ""
            which = f", rows {', '.join(map(str, rows[:8]))}{'...' if len(rows) > 8 else ''}" if rows else ""
            self._say(f"step {line['step']} skipped: loss {line.get('loss')}, batch {number}{which}{more}")
        if line.get("skipped_in_a_row", 0) >= self.run.give_up and not self._gave_up:
            self._gave_up = f"{line['skipped_in_a_row']:g} steps in a row were skipped, up to step {line['step']}"


@contextlib.contextmanager
def opened(run: Run | str | Path | None, say: Callable[[str], None] | None = None) -> Iterator[Session | None]:
    """A session that is closed in the end, whatever ends it; None without a run."""
    if run is None:
        yield None
        return
    session = Session(check(run), say)
    try:
        yield session
    finally:
        session.close()


def _after(batches: Iterable[Batch], consumed: int) -> Iterable[Batch] | None:
    """What is left of a run's batches; None where nothing is."""
    if hasattr(batches, "at") and hasattr(batches, "__len__"):  # those of jtl.data.batches, augmented or not
        run: Any = batches
        if consumed > len(run):
            raise CheckpointError(f"{consumed} batches were consumed, and the run has {len(run)}")
        return run.at(run.start + consumed) if consumed < len(run) else None
    rest = itertools.islice(batches, consumed, None)
    first = list(itertools.islice(rest, 1))
    return itertools.chain(first, rest) if first else None


def metrics(path: str | Path) -> list[Line]:
    """The metrics that a run's folder has: a line for each step.

    Args:
      path: of the run's folder.

    Raises:
      CheckpointError: it is not the folder of a run.
    """
    folder.read(Path(path))
    return list(lines(Path(path) / folder.METRICS))

"""The checkpoints of a run: written behind its back, kept by rule, and never trusted unread."""

import concurrent.futures.thread  # noqa: F401 (imported first, it stops its threads after what is registered below)
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl import checkpoint
from jtl.errors import CheckpointError
from jtl.schedule import Plateau
from jtl.typing import PyTree

Notes = Mapping[str, Any]


class Restored(NamedTuple):
    """A checkpoint that was read and verified.

    Attributes:
      step: updates done.
      items: leaves by path, for each item.
      notes: what was written with it.
      refused: one line for each newer checkpoint that is not what was written.
    """

    step: int
    items: dict[str, dict[str, Any]]
    notes: dict[str, Any]
    refused: tuple[str, ...]


class Steps:
    """A folder of checkpoints, one for each step that is kept.

    A save copies the state on the device and returns; a thread writes it. There is one at a time: a save waits for the
    one before it. Python does not exit, by its end or by an exception, before what was begun is on disk.

    Args:
      folder: of the checkpoints.
      keep: the newest to keep.
      best: keep the best ones by this metric of an evaluation, too.
      best_count: how many.
    """

    def __init__(self, folder: Path, *, keep: int = 2, best: Plateau | None = None, best_count: int = 1):
        self.folder, self._keep, self._best, self._best_count = folder, keep, best, best_count
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._scores: dict[int, float | None] = {}
        self._faulty: set[int] = set()
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        checkpoint.prepare()
        _OPEN.add(self)

    def found(self) -> list[int]:
        """The steps that have a checkpoint, sound or not."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())

    def open(self) -> None:
        """Remove what interrupted writes left, and look up how good the checkpoints are. Nobody else may write."""
        checkpoint.sweep_up(self.folder)
        for step in self.found():
            try:
                self._scores[step] = self._score(checkpoint.manifest_of(self.path(step)).notes)
            except CheckpointError:
                self._faulty.add(step)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, items: Mapping[str, PyTree], notes: Callable[[], Notes], *, wait: bool = False) -> None:
        """Begin to write a step; nothing, if it is there already.

        Args:
          step: updates done.
          items: pytrees of arrays by name. They may be donated as soon as this returns.
          notes: gives JSON values, once the device is done; `evaluation` by name is what the best are chosen by.
          wait: return when it is on disk.

        Raises:
          CheckpointError: this one, if `wait`, or the one before could not be written.
        """
        self.wait()
        if step not in self._scores:
            copied = self._copy(dict(items))
            self._thread = threading.Thread(target=self._write, args=(step, copied, notes), name=f"save-{step}")
            self._thread.start()
        if wait:
            self.wait()

    def restore(self, names: Iterable[str] | None = None) -> Restored | None:
        """The newest checkpoint that is what was written; None where there is none at all.

        Raises:
          CheckpointError: there are checkpoints, and none is sound: each is listed with its fault.
        """
        refused = []
        for step in reversed(self.found()):
            try:
                items, notes = checkpoint.read(self.path(step), names)
            except CheckpointError as error:
                refused.append(str(error))
                self._faulty.add(step)
                self._scores.pop(step, None)
                continue
            self._scores[step] = self._score(notes)
            return Restored(step, items, notes, tuple(refused))
        if refused:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is sound:\n  "
                + "\n  ".join(refused)
                + "\nto begin anew, name another folder or remove this one"
            )
        return None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
          CheckpointError: what was being written could not be.
        """
        self.finish()
        self.poll()

    def finish(self) -> None:
        """As `wait`, without raising."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def poll(self) -> None:
        """Raise what went wrong behind the run's back."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, items: Mapping[str, PyTree], notes: Callable[[], Notes]) -> None:
        try:
            jax.block_until_ready(items)
            written = notes()
            checkpoint.write(self.path(step), items, written)
            self._scores[step] = self._score(written)
            self._faulty.discard(step)
            self._retain()
        except Exception as error:  # it is raised where the run can hear it
            self._error = error

    def _retain(self) -> None:
        """Remove what is neither among the newest nor the best; a faulty one, once sound ones are as many as asked."""
        sound = sorted(self._scores)
        kept = set(sound[-self._keep :])
        if self._best is not None:
            ranked = sorted((score, -step) for step, score in self._scores.items() if score is not None)
            kept |= {-step for _, step in ranked[: self._best_count]}
        gone = [step for step in sound if step not in kept] + sorted(self._faulty)
        for step in gone:
            if self.path(step).exists():
                checkpoint.discard(self.path(step))
            self._scores.pop(step, None)
        self._faulty.clear()

    def _score(self, notes: Notes) -> float | None:
        """Less is better; None without an evaluation, or where it is not finite."""
        value = (notes.get("evaluation") or {}).get(self._best.metric) if self._best is not None else None
        if self._best is None or value is None or not math.isfinite(value):
            return None
        return -value if self._best.higher_is_better else value


_OPEN: "weakref.WeakSet[Steps]" = weakref.WeakSet()


def _finish_all() -> None:
    for steps in list(_OPEN):
        try:
            steps.wait()
        except Exception as error:  # Python is ending: nobody else would hear of it
            print(f"jtl: {error}", file=sys.stderr)


def _before_exit(call: Callable[[], None]) -> None:
    """Call when Python ends, while threads can still begin work: orbax needs some to write.

    `atexit` is too late: by then `concurrent.futures` refuses new work, and the write would fail. The hook is private;
    a test fails when it goes.
    """
    register: Any = threading._register_atexit  # pyright: ignore[reportAttributeAccessIssue]
    register(call)


_before_exit(_finish_all)

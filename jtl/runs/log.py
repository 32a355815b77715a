"""Metrics as JSON lines: one for each step, once, whatever interrupts the run."""

import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jtl.errors import CheckpointError

Line = dict[str, Any]
_PENDING = 64
"""Steps whose metrics may still be on the device."""


class Log:
    """A file of metrics. What is logged is written once the device has computed it, so that no step waits for it.

    Args:
      path: of the file.
      on_line: called with each line when its values are there.
    """

    def __init__(self, path: Path, on_line: Callable[[Line], None] = lambda line: None):
        self._path, self._on_line = path, on_line
        self._pending: deque[tuple[int, Mapping[str, Any], dict[str, float] | None]] = deque()
        self._file: Any = None
        self._turn = threading.Lock()  # the thread that writes checkpoints flushes, too

    def begin(self, step: int) -> None:
        """Go on after a step: lines of later ones, and one that was cut off, are removed.

        Raises:
          CheckpointError: the file cannot be written.
        """
        kept = [line for line in lines(self._path) if line["step"] <= step]
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            draft.write_text("".join(_text(line) for line in kept), encoding="utf-8")
            os.replace(draft, self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open for the run)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def add(self, step: int, metrics: Mapping[str, Any], evaluation: dict[str, float] | None) -> None:
        """Log a step, and write those that the device is done with."""
        with self._turn:
            self._pending.append((step, metrics, evaluation))
            while self._pending and (len(self._pending) > _PENDING or _ready(self._pending[0][1])):
                self._write()

    def flush(self, step: int) -> None:
        """Write every line up to a step, after waiting for the device.

        Raises:
          CheckpointError: the file cannot be written.
        """
        try:
            with self._turn:
                while self._pending and self._pending[0][0] <= step:
                    self._write()
                self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Write, as far as possible, and close."""
        if self._file is not None:
            try:
                self.flush(sys.maxsize)
                self._file.close()
            except (CheckpointError, OSError):
                pass  # closing must not hide what ended the run
            self._file = None

    def _write(self) -> None:
        step, metrics, evaluation = self._pending.popleft()
        line: Line = {"step": step, **plain(metrics)}
        if evaluation is not None:
            line["evaluation"] = plain(evaluation)
        self._on_line(line)
        self._file.write(_text(line))


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file of metrics; one that was cut off ends them."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                return
            yield line


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON values: numbers, lists of them, and null for what is not finite, which JSON lacks."""
    return {name: _plain(np.asarray(value).tolist()) for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _ready(metrics: Mapping[str, Any]) -> bool:
    arrays: list[Any] = [leaf for leaf in jax.tree.leaves(metrics) if isinstance(leaf, jax.Array)]
    return all(array.is_ready() for array in arrays)


def _text(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"

"""SIGTERM and SIGINT as a request to save and end, and a clock for steps that do not end."""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

EXIT = 75
"""The exit status of a run that was asked to end, saved, and will go on: EX_TEMPFAIL of sysexits.h."""

_GRACE = 8.0
"""Seconds that the main thread has to come to the end of its step."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A run was asked to end, and has saved; uncaught, the process exits with 75."""

    def __init__(self, message: str):
        super().__init__(EXIT)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Signals:
    """Notes the first SIGTERM or SIGINT; the second one acts as ever. In other threads than the main one, nothing.

    A program that computes or compiles for long does not come to the handler. So a thread is told as well, and where
    the step has not ended in time it ends the process; the newest checkpoint stands.

    Args:
      finish: called by that thread before it ends the process, to let a write in progress end.
    """

    def __init__(self, finish: Callable[[], None]):
        self.caught: int | None = None
        self._finish, self._before, self._ends = finish, {}, ()
        self._wakeup: int | None = None
        self._answered = threading.Event()

    def start(self) -> None:
        """Take the signals over."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        previous = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        if previous != -1:  # an event loop has it: its own stays
            signal.set_wakeup_fd(previous)
        else:
            self._wakeup = previous
            threading.Thread(target=self._watch, args=(self._ends[0],), name="signals", daemon=True).start()

    def answer(self) -> None:
        """The step has ended, and the run is saved: no clock runs any more."""
        self._answered.set()

    def stop(self) -> None:
        """Give the signals back."""
        self.answer()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
        for end in self._ends:
            end.close()
        self._before, self._ends, self._wakeup = {}, (), None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        for known, handler in self._before.items():
            signal.signal(known, handler)

    def _watch(self, end: socket.socket) -> None:
        while not self._answered.is_set():
            try:
                if not select.select([end], [], [], 1.0)[0]:
                    continue
                numbers = end.recv(64)
            except (OSError, ValueError):  # closed
                return
            if not set(numbers) & set(_SIGNALS):
                continue
            if not self._answered.wait(_GRACE) and not hasattr(sys, "ps1"):
                print(
                    "jtl: the step did not end in time; ending without it, the newest checkpoint stands",
                    file=sys.stderr,
                    flush=True,
                )
                self._finish()
                os._exit(EXIT)
            return


class Watchdog:
    """Writes the stacks of all threads whenever no step ended for so many seconds.

    Args:
      path: of the file; stacks are appended.
      seconds: None for never.
    """

    def __init__(self, path: Path, seconds: float | None):
        self._path, self._seconds = path, seconds
        self._file: Any = None

    def reset(self) -> None:
        """A step has ended."""
        if self._seconds is not None:
            if self._file is None:
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (faulthandler writes to it later)
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def stop(self) -> None:
        """Watch no longer."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None

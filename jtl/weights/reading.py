"""From a file into memory that arrays of the CPU can share, with each byte copied once.

    file  ->  a slice of some pages                   where the axes stay as they are
    file  ->  some rows, warm in a cache  ->  slice   where a tensor's rows become the last axis of a leaf

A tensor is never held whole beside its leaf, so that reading a checkpoint takes little more memory than it has bytes.
"""

import ctypes
import io
import math
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jtl.errors import WeightsError

Stream = Callable[[str, int, Iterable[np.ndarray]], Iterator[np.ndarray]]
"""`(name, row, arrays)`: fill contiguous arrays with a tensor's rows from `row` on, and give each when it is full."""

_LINE = 64
"""Bytes of a line of the processor's caches, and the alignment without which XLA copies an array."""

_CHUNK = 32 << 20

_STEP, _AHEAD = 4 << 20, 512 << 20
"""Bytes of pages that are asked for at once, and at most before their use."""

_RELEASED = 64 << 10
"""Smaller arrays have too few pages of their own to give back."""

_DONTNEED, _POPULATE_WRITE = 4, 23  # of Linux, where Python's mmap may not know them

# Larger than what stays warm in a core's second cache would be read from memory again.
_BLOCK = 1 << 20


class Memory:
    """Aligned arrays, cut one after another from anonymous memory; for several threads.

    An array's pages go back to the system when it is gone. Getting them takes longer than reading a file from the
    system's cache, so a thread asks for those of the first `size` bytes ahead of their use, until the context ends.

    Args:
      size: bytes that will be wanted, alignment included; more than that are found as well.
    """

    def __init__(self, size: int = 0):
        self._pages, self._used, self._lock, self._ended = _Pages(max(size, 1)), 0, threading.Lock(), False
        if size:
            threading.Thread(target=self._fetch, args=(self._pages,), daemon=True).start()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True

    def empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """A contiguous array whose values are undefined.

        Args:
          shape: of the array.
          dtype: of the array.
        """
        dtype, count = np.dtype(dtype), math.prod(shape)
        with self._lock:
            start, size = -(-self._used // _LINE) * _LINE, count * dtype.itemsize
            if start + size > self._pages.size:
                # Not np.empty: it asks for huge pages, whose first touch is slow on virtual machines.
                self._pages, start = _Pages(max(size, _CHUNK)), 0
            self._used = start + size
            return np.frombuffer(self._pages.part(start, size), dtype, count).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """An array's values, contiguous in the order of its axes.

        Args:
          array: of any layout in memory.
        """
        out = self.empty(array.shape, array.dtype)
        _turn_into(out, array)
        return out

    def _fetch(self, pages: "_Pages") -> None:
        done = 0
        while done < pages.size and not self._ended and self._pages is pages:
            if done > self._used + _AHEAD:
                time.sleep(1e-3)
            elif not pages.advise(_POPULATE_WRITE, done, done := min(done + _STEP, pages.size)):
                return  # before Linux 5.14, and on other systems, they come one by one as they are written


class _Pages:
    """Anonymous memory, of which parts can be given back."""

    def __init__(self, size: int):
        # Shared with processes that are forked, unless it is said.
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        self.size, self._map = size, mmap.mmap(-1, size, **flags)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def part(self, start: int, size: int) -> Any:
        """A buffer whose pages are given back when nothing refers to it."""
        buffer = (ctypes.c_char * size).from_buffer(self._map, start)
        if size > _RELEASED:
            whole = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            weakref.finalize(buffer, self.advise, _DONTNEED, *whole).atexit = False
        return buffer

    def advise(self, advice: int, start: int, end: int) -> bool:
        """Tell Linux about some pages; by ctypes, for the method of `mmap` keeps the interpreter's lock."""
        if sys.platform != "linux":
            return False
        arguments = ctypes.c_void_p(self._address + start), ctypes.c_size_t(end - start), advice
        return ctypes.CDLL(None).madvise(*arguments) == 0


def rows_last(
    stream: Stream,
    name: str,
    row: int,
    out: np.ndarray,
    shape: tuple[int, ...],
    turn: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Fill an array whose last axis runs over a tensor's rows.

    Args:
      stream: of the checkpoint.
      name: of the tensor.
      row: the first.
      out: `[..., rows]`, contiguous, of the tensor's dtype.
      shape: of a row.
      turn: `[some rows, *shape]` to `[..., some rows]`.
    """
    if not out.size:
        return
    count = out.shape[-1]
    step = min(count, max(_line(out.dtype), _BLOCK // (math.prod(shape) * out.itemsize)))
    scratch, starts = np.empty((step, *shape), out.dtype), range(0, count, step)
    blocks = stream(name, row, (scratch[: count - start] for start in starts))
    for start, block in zip(starts, blocks, strict=True):
        _turn_into(out[..., start : start + len(block)], turn(block))


def _turn_into(out: np.ndarray, array: np.ndarray) -> None:
    """Assign one line of the cache of each row of the result at a time, for those of the source are next to it."""
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        out[...] = array
        return
    for i in range(0, array.shape[-1], step := _line(out.dtype)):
        out[..., i : i + step] = array[..., i : i + step]


def _line(dtype: np.dtype) -> int:
    return max(1, _LINE // dtype.itemsize)


def file_state(file: io.RawIOBase | io.BufferedIOBase) -> tuple[int, int]:
    """What changes when a file is written, or another takes its place."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def file_into(path: Path, state: tuple[int, int], offset: int, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Fill contiguous arrays one after another from a place in a file; each is given when it is full.

    Args:
      path: of the file.
      state: the file's, as it was when its header was read.
      offset: of the first byte.
      arrays: to fill.

    Raises:
      WeightsError: the file has changed, or is gone.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            for array in arrays:
                left = array.reshape(-1).view(np.uint8).data
                while left and (count := file.readinto(left)):
                    left = left[count:]
                if left or file_state(file) != state:
                    raise WeightsError(f"{path} changed while it was read: load it again")
                yield array
    except FileNotFoundError as error:
        raise WeightsError(f"{path} was removed while it was read: fetch it again") from error

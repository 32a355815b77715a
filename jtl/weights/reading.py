"""From a file into memory that arrays of the CPU can share, with each byte copied once.

    file  ->  a slice of a chunk                      where the axes stay as they are
    file  ->  some rows, warm in a cache  ->  slice   where a tensor's rows become the last axis of a leaf

A tensor is never held whole beside its leaf, so that reading a checkpoint takes little more memory than it has bytes.
"""

import io
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import numpy as np

from jtl.errors import WeightsError

Stream = Callable[[str, int, Iterable[np.ndarray]], Iterator[np.ndarray]]
"""`(name, row, arrays)`: fill contiguous arrays with a tensor's rows from `row` on, and give each when it is full."""

_LINE = 64
"""Bytes of a line of the processor's caches, and the alignment without which XLA copies an array."""

_CHUNK = 32 << 20

# What is turned stays in a core's cache.
_BLOCK = 128 << 10

# Below it, a second thread costs more than it reads.
_SHARED = 1 << 20


class Memory:
    """Aligned arrays, cut one after another from large chunks of anonymous memory.

    A chunk is given back to the system when the last of its arrays is gone.
    """

    def __init__(self) -> None:
        self._chunk, self._used, self._ready = _anonymous(1), 1, 1

    def empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """A contiguous array whose values are undefined.

        Args:
          shape: of the array.
          dtype: of the array.
        """
        dtype = np.dtype(dtype)
        size, count = math.prod(shape) * dtype.itemsize, math.prod(shape)
        start = -(-self._used // _LINE) * _LINE
        if start + size > len(self._chunk):
            # Not np.empty: it asks for huge pages, whose first touch is slow on virtual machines.
            self._chunk, start, self._ready = _anonymous(max(size, _CHUNK)), 0, 0
        self._used = start + size
        self._fault_in()
        return np.frombuffer(self._chunk, dtype, count, start).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """An array's values, contiguous in the order of its axes.

        Args:
          array: of any layout in memory.
        """
        out = self.empty(array.shape, array.dtype)
        _turn_into(out, array)
        return out

    def _fault_in(self) -> None:
        """Have the pages in use at once, in place of one by one as they are written; only where the system can."""
        end = min(-(-self._used // mmap.PAGESIZE) * mmap.PAGESIZE, len(self._chunk))
        if sys.platform == "linux" and end > self._ready:
            with suppress(OSError):  # before Linux 5.14
                self._chunk.madvise(23, self._ready, end - self._ready)  # MADV_POPULATE_WRITE
            self._ready = end


def _anonymous(size: int) -> mmap.mmap:
    # Shared with processes that are forked, unless it is said.
    return mmap.mmap(-1, size, **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}))


def rows_last(
    stream: Stream,
    name: str,
    row: int,
    out: np.ndarray,
    shape: tuple[int, ...],
    turn: Callable[[np.ndarray], np.ndarray],
    helper: Executor,
) -> None:
    """Fill an array whose last axis runs over a tensor's rows.

    Args:
      stream: of the checkpoint.
      name: of the tensor.
      row: the first.
      out: `[..., rows]`, contiguous, of the tensor's dtype.
      shape: of a row.
      turn: `[some rows, *shape]` to `[..., some rows]`.
      helper: reads half of a large tensor in another thread.
    """

    def fill(first: int, last: int) -> None:
        step = min(last - first, max(_line(out.dtype), _BLOCK // (math.prod(shape) * out.itemsize)))
        scratch, starts = np.empty((step, *shape), out.dtype), range(first, last, step)
        blocks = stream(name, row + first, (scratch[: last - start] for start in starts))
        for start, block in zip(starts, blocks, strict=True):
            _turn_into(out[..., start : start + len(block)], turn(block))

    count = out.shape[-1]
    middle = count // 2 // _line(out.dtype) * _line(out.dtype)
    if not out.size:
        return
    if out.nbytes < _SHARED or not middle:
        fill(0, count)
        return
    later = helper.submit(fill, middle, count)
    try:
        fill(0, middle)
    finally:
        later.result()


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

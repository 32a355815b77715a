"""Rows of arrays in memory or in shards on disk: written once, committed atomically, verified when opened.

A shard is a folder of plain `.npy` files. Training reads rows in random order, and a memory-mapped
`.npy` gives a row for the price of a copy; record and chunk formats would parse or decompress each one.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jtl.errors import CacheError
from jtl.weights import folders
from jtl.weights.digest import sha256

Signature = tuple[tuple[str, tuple[int, ...], str], ...]
"""Name, shape and dtype of each entry of one example."""

_MANY = 16
"""Parts in memory before they are joined."""


class Part(NamedTuple):
    """Some rows of one group: their ids, int64 `[n]`, and their entries, `[n, ...]` each."""

    ids: np.ndarray
    entries: dict[str, np.ndarray]


class Shard(NamedTuple):
    """What a committed shard holds: the batches `[start, stop)` of the extraction, or the fault it has."""

    folder: Path
    start: int
    stop: int
    fault: str


def signature(entries: Mapping[str, Any]) -> Signature:
    """Of arrays `[batch, ...]`."""
    return tuple(sorted((name, tuple(value.shape[1:]), np.dtype(value.dtype).name) for name, value in entries.items()))


def row_bytes(group: Signature) -> int:
    """Of one row.

    >>> row_bytes((("x", (2, 3), "float32"),))
    24
    """
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in group)


class Store:
    """Rows by id, in groups of equal signature.

    Args:
      folder: where shards are; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._parts: dict[Signature, list[Part]] = {}
        self._places: dict[Signature, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(array.nbytes for parts in self._parts.values() for part in parts for array in part.entries.values())

    @property
    def groups(self) -> dict[Signature, np.ndarray]:
        """The ids of each group's rows."""
        return {group: np.concatenate([part.ids for part in parts]) for group, parts in self._parts.items()}

    def add(self, ids: np.ndarray, entries: Mapping[str, np.ndarray]) -> None:
        """Take rows into memory."""
        group = signature(entries)
        parts = self._parts.setdefault(group, [])
        parts.append(Part(np.asarray(ids, np.int64), dict(entries)))
        if self.folder is None and len(parts) > _MANY:
            self._parts[group] = [_joined(parts)]
        self._places.pop(group, None)

    def join(self) -> None:
        """Make one part of each group that is in memory, for the fastest reading."""
        if self.folder is None:
            self._parts = {group: [_joined(parts)] for group, parts in self._parts.items()}
            self._places.clear()

    def has(self, group: Signature, ids: np.ndarray) -> bool:
        """Whether all of these rows are there."""
        if group not in self._parts:
            return False
        part, _ = self._place(group)
        return bool(ids.max(initial=-1) < len(part) and (part[ids] >= 0).all())

    def rows(self, group: Signature, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of some rows, `[len(ids), ...]` each."""
        part_of, offset_of = self._place(group)
        which, offsets, parts = part_of[ids], offset_of[ids], self._parts[group]
        if len(parts) == 1:
            return {name: array[offsets] for name, array in parts[0].entries.items()}
        found = {name: np.empty((len(ids), *shape), dtype) for name, shape, dtype in group}
        for number in np.unique(which):
            at = which == number
            for name, array in parts[number].entries.items():
                found[name][at] = array[offsets[at]]
        return found

    def _place(self, group: Signature) -> tuple[np.ndarray, np.ndarray]:
        if group not in self._places:
            parts = self._parts[group]
            size = 1 + max(int(part.ids.max(initial=-1)) for part in parts)
            part_of, offset_of = np.full(size, -1, np.int64), np.zeros(size, np.int64)
            for number, part in enumerate(parts):
                part_of[part.ids], offset_of[part.ids] = number, np.arange(len(part.ids))
            self._places[group] = part_of, offset_of
        return self._places[group]

    def commit(self, start: int, stop: int, ids: np.ndarray, entries: Mapping[str, np.ndarray]) -> None:
        """Write a shard: all of it appears at once, or nothing does.

        Args:
          start: first batch of the extraction that it holds.
          stop: the batch after the last one.
          ids: int `[n]`.
          entries: `[n, ...]` each.

        Raises:
          CacheError: the disk is full, or refuses. What was committed before stays valid.
        """
        if self.folder is None:
            self.add(ids, entries)
            return
        final, draft = self.folder / f"shard-{start:08d}", self.folder / f"draft-{uuid.uuid4().hex}"
        try:
            draft.mkdir(parents=True)
            _write(draft, start, stop, Part(np.asarray(ids, np.int64), dict(entries)))
            draft.rename(final)
            folders.sync(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if final.is_dir():  # another process wrote the same rows first
                return self._open(final)
            size = sum(array.nbytes for array in entries.values())
            full = folders.is_full(error, self.folder, size)  # numpy tells of bytes that it could not write, not why
            reason = "the disk is full" if full else error.strerror or error
            raise CacheError(
                errno.ENOSPC if full else error.errno,
                f"{reason}: batches {start} to {stop - 1} could not be cached; what was cached before is kept, and the "
                "same call goes on from there",
                str(self.folder),
            ) from error
        return self._open(final)

    def load(self) -> list[Shard]:
        """Open every committed shard whose digests hold; drafts and faulty shards are removed and listed."""
        if self.folder is None or not self.folder.is_dir():
            return []
        for draft in self.folder.glob("draft-*"):
            shutil.rmtree(draft, ignore_errors=True)
        found = []
        for folder in sorted(self.folder.glob("shard-*")):
            shard = _verify(folder)
            found.append(shard)
            if shard.fault:
                shutil.rmtree(folder)
            else:
                self._open(folder)
        return found

    def _open(self, folder: Path) -> None:
        names = json.loads((folder / "shard.json").read_text("utf-8"))["names"]
        ids = np.load(folder / "ids.npy", allow_pickle=False)
        self.add(ids, {name: _mapped(folder / f"{k}.npy", dtype) for k, (name, dtype) in enumerate(names)})


@contextlib.contextmanager
def kept(folder: Path | str) -> Iterator[None]:
    """Say of a place for a cache that it cannot be written or read, whatever the system says of it.

    Raises:
      CacheError: it cannot.
    """
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            error.errno,
            f"a cache cannot be kept there: {error.strerror or error}; give a directory that can be written, or none "
            "to keep it in memory",
            str(folder),
        ) from error


def check_free(folder: Path, needed: int) -> None:
    """Refuse a place with too little room, before anything is computed for it.

    Args:
      folder: that exists.
      needed: bytes that will be written.

    Raises:
      CacheError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            errno.ENOSPC,
            f"the cache needs {needed:,} bytes more and {free:,} are free; free some, or give a directory with more",
            str(folder),
        )


def _joined(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    names = parts[0].entries
    entries = {name: np.concatenate([part.entries[name] for part in parts]) for name in names}
    return Part(np.concatenate([part.ids for part in parts]), entries)


def _write(folder: Path, start: int, stop: int, part: Part) -> None:
    names = [(name, array.dtype.name) for name, array in part.entries.items()]
    files = {"ids.npy": part.ids} | {f"{k}.npy": _storable(a) for k, a in enumerate(part.entries.values())}
    for name, array in files.items():
        with open(folder / name, "wb") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    text = {"start": start, "stop": stop, "names": names, "files": {name: sha256(folder / name) for name in files}}
    with open(folder / "shard.json", "w", encoding="utf-8") as file:
        json.dump(text, file)
        file.flush()
        os.fsync(file.fileno())
    folders.sync(folder)


def _verify(folder: Path) -> Shard:
    try:
        text = json.loads((folder / "shard.json").read_text("utf-8"))
        faults = [name for name, expected in text["files"].items() if sha256(folder / name) != expected]
        return Shard(folder, text["start"], text["stop"], f"{faults[0]} has another digest" if faults else "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Shard(folder, -1, -1, str(error) or type(error).__name__)


def _storable(array: np.ndarray) -> np.ndarray:
    # The .npy format has no bfloat16 or float8: their bits are stored, and the dtype beside them.
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def _mapped(file: Path, dtype: str) -> np.ndarray:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.dtype.name == dtype:
        return array
    import ml_dtypes

    return array.view(getattr(ml_dtypes, dtype))


def gaps(total: int, shards: list[Shard]) -> Iterator[tuple[int, int]]:
    """The ranges of batches that no sound shard holds.

    >>> list(gaps(5, [Shard(Path(), 1, 3, "")]))
    [(0, 1), (3, 5)]
    """
    at = 0
    for shard in sorted((shard for shard in shards if not shard.fault), key=lambda shard: shard.start):
        if shard.start > at:
            yield at, shard.start
        at = max(at, shard.stop)
    if at < total:
        yield at, total

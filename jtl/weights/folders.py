"""Folders that are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jtl.errors import ConfigError


def check_new(folder: Path) -> None:
    """Refuse a folder that something is in.

    Raises:
      ConfigError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: name a new folder")


def sync(folder: Path) -> None:
    """Return when what a folder lists is on disk, names that were changed included."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place beside a folder to write its files in; it takes the folder's name at the end, if nothing was raised.

    Args:
      folder: must not exist, or be empty.

    Raises:
      ConfigError: something is in it.
    """
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def added_to(folder: Path, *, last: str) -> Iterator[Path]:
    """A place for files that join those of a folder at the end, if nothing was raised.

    Args:
      folder: exists.
      last: the file by which others know that all are there. It comes last, and an old one goes first.
    """
    unfinished = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        yield unfinished
        (folder / last).unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == last):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

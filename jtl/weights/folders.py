"""Folders that are written whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from jtl.errors import CheckpointError, ConfigError, JtlError


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


def is_full(error: BaseException, folder: Path, size: int) -> bool:
    """Whether so many bytes could not be written for want of room, whichever library says so and however."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free(folder) < size:
        return True
    return any(text in str(error) for text in ("No space left", "ENOSPC", "File too large"))


@contextlib.contextmanager
def exported(folder: Path, size: int) -> Iterator[Path]:
    """As `new_folder`, for so many bytes of a model.

    Raises:
      CheckpointError: the disk has no room for them, which is said before anything is written where it is known; or it
        refuses. Nothing is left behind.
      ConfigError: as `new_folder`.
    """

    def refused(error: BaseException | None) -> CheckpointError:
        full = error is None or is_full(error, folder, size)
        why = f"the disk is full: it needs {size:,} bytes, and {free(folder):,} are free" if full else error
        return CheckpointError(f"{folder} could not be written: {why}")

    if free(folder) < size:
        raise refused(None)
    try:
        with new_folder(folder) as unfinished:
            yield unfinished
    except JtlError:
        raise
    except (OSError, SafetensorError) as error:
        raise refused(error) from error


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

"""Labelled examples from a folder, or a zip archive, with one sub-folder a class: texts or pictures."""

import codecs
import stat
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import tables
from jtl.data.examples import Examples, Skipped, check
from jtl.data.pictures import Member, load_image, opened, reading, verify

__all__ = ["IMAGE_SUFFIXES", "TEXT_SUFFIXES", "load_image", "read"]

TEXT_SUFFIXES = (".txt",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MOST_BYTES = 1 << 28
"""The largest file that is read from an archive."""


class _Place(NamedTuple):
    """A member of an archive by its path: the first part, and the others."""

    top: str
    rest: tuple[str, ...]
    info: zipfile.ZipInfo


def read(
    path: Path, *, classes: tuple[str, ...] | None = None, skip_bad: bool = False, held_out: bool = False
) -> Examples:
    """Read `path/<class>/<file>`: `.txt` files, or pictures, each decoded once to be sure that it can be.

    Hidden files are ignored. Classes are the sub-folders' names, sorted, unless declared. In a zip archive,
    which is never unpacked, the class folders may lie in one folder, and `__MACOSX` is ignored.

    Args:
      path: the folder, or a `.zip` file.
      classes: the class names in order.
      skip_bad: leave unreadable files out, and list them in `skipped`, where one would raise.
      held_out: whether they are only evaluated, for which one class will do.

    Returns:
      Examples with `columns={"text": [...]}`, or `{"image": [...]}` for `load_image`: paths, or the
      members of an archive.

    Raises:
      DataError: files that are not in a class folder, a folder inside a class folder, an empty class folder,
        texts mixed with pictures, an undeclared class, a file that cannot be read (unless `skip_bad`),
        a single class (unless `held_out`); or an archive that is damaged, encrypted, or holds names or sizes that are
        not safe.
    """
    files = _files_by_class(path, classes) if path.is_dir() else _members_by_class(path, classes)
    names = classes or tuple(files)
    column, read_file = _reader(path, [file for listed in files.values() for file in listed])
    values, labels, skipped = [], [], []
    for name, listed in files.items():
        for file in listed:
            try:
                values.append(read_file(file))
                labels.append(names.index(name))
            except errors.DataError as error:
                if not skip_bad:
                    raise
                skipped.append(Skipped(str(file), None, str(error)))
    found = Examples({column: values}, np.array(labels, np.int32), names, None, path.name, tuple(skipped))
    return check(found, held_out=held_out)


def _files_by_class(path: Path, classes: tuple[str, ...] | None) -> dict[str, list[Path]]:
    visible = _visible(path)
    _check_layout(path, [entry.name for entry in visible if entry.is_dir()], visible, classes)
    return {folder.name: _files(folder) for folder in visible}


def _check_layout(path: Path, folders: Sequence[str], entries: Sequence[Any], classes: tuple[str, ...] | None) -> None:
    """Refuse a folder that has files beside the classes, no class, or one that is not declared."""
    known = set(folders)
    stray = [entry.name for entry in entries if entry.name not in known]
    if not entries or stray:
        found = f"has the file {stray[0]!r} beside them" if stray else "is empty"
        raise errors.DataError(f"{path}: expected one sub-folder for each class; the folder {found}")
    for name in folders:
        if classes is not None and name not in classes:
            raise errors.DataError(
                f"{path}: the sub-folder {name!r} is not a declared class; expected "
                f"{', '.join(classes)}{tables.nearest(name, classes)}"
            )


def _files(folder: Path) -> list[Path]:
    files = _visible(folder)
    if not files:
        raise _empty(folder)
    for file in files:
        if file.is_dir():
            raise _nested(folder, file.name)
        if file.exists() and not file.is_file():  # a pipe would be waited for, a device read for ever
            raise errors.DataError(f"{file}: is no file but a pipe or a device; remove it")
    return files


def _empty(folder: Any) -> errors.DataError:
    return errors.DataError(f"{folder}: the class folder is empty; remove it, or put its files in")


def _nested(folder: Any, name: str) -> errors.DataError:
    return errors.DataError(
        f"{folder}: holds the folder {name!r}; expected files of one class. "
        f"If {PurePosixPath(folder).name!r} is a split, read that folder itself"
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _members_by_class(path: Path, classes: tuple[str, ...] | None) -> dict[str, list[Member]]:
    with reading(path):
        infos = opened(str(path)).infolist()
    _check_members(path, infos)
    places = _without_enclosing([_place(PurePosixPath(info.filename).parts, info) for info in infos])
    folders = sorted({place.top for place in places if place.rest or place.info.is_dir()})
    _check_layout(path, folders, [PurePosixPath(place.top) for place in places], classes)
    found: dict[str, list[Member]] = {name: [] for name in folders}
    for top, rest, info in sorted(places, key=lambda place: (place.top, place.rest)):
        if len(rest) > 1 or (rest and info.is_dir()):
            raise _nested(path / top, rest[0])
        if not info.is_dir():
            found[top].append(Member(str(path), info.filename, info.file_size, info.CRC))
    for name, members in found.items():
        if not members:
            raise _empty(path / name)
    return found


def _place(parts: Sequence[str], info: zipfile.ZipInfo) -> _Place:
    top, *rest = parts
    return _Place(top, tuple(rest), info)


def _without_enclosing(places: list[_Place]) -> list[_Place]:
    """The visible ones, without the one folder around all classes that most tools put a zipped folder into."""
    places = [place for place in places if not any(_hidden(part) for part in (place.top, *place.rest))]
    files = [place for place in places if not place.info.is_dir()]
    if not files or len({place.top for place in files}) > 1 or any(len(place.rest) < 2 for place in files):
        return places
    return [_place(place.rest, place.info) for place in places if place.rest]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _check_members(path: Path, infos: Iterable[zipfile.ZipInfo]) -> None:
    seen, packed = set(), 0
    for info in infos:
        packed += info.compress_size
        problem = _member_problem(info) or ("is there twice" if info.filename in seen else "")
        if problem:
            raise errors.DataError(f"{path}: the member {info.filename!r} {problem}; make the archive again")
        seen.add(info.filename)
    if packed > path.stat().st_size:
        raise errors.DataError(f"{path}: its members overlap, {packed:,} bytes of them in it; make the archive again")


def _member_problem(info: zipfile.ZipInfo) -> str:
    parts = PurePosixPath(info.filename).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in info.filename or ":" in parts[0]:
        return "has a name that leads out of the archive"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    if info.file_size > MOST_BYTES:
        return f"would unpack to {info.file_size:,} bytes, expected at most {MOST_BYTES:,}"
    if info.file_size > max(tables.FLOOR >> 4, tables.RATIO * info.compress_size):
        return (
            f"would unpack from {info.compress_size:,} bytes to {info.file_size:,}, over {tables.RATIO} times as many"
        )
    return ""


def _reader(path: Path, files: Sequence[Any]) -> tuple[str, Callable[[Any], Any]]:
    """The column's name and the function that reads one file, from the kind of the files."""
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if texts and images:
        raise errors.DataError(
            f"{path}: texts and pictures are mixed ({texts[0].name}, {images[0].name}); expected one kind"
        )
    if not texts and not images:
        raise errors.DataError(
            f"{path}: no file is of a kind that is read (first: {files[0].name}); "
            f"expected {', '.join(TEXT_SUFFIXES + IMAGE_SUFFIXES)}"
        )
    return ("text", _read_text) if texts else ("image", _verified_image)


def _read_text(file: Path | Member) -> str:
    _check_suffix(file, TEXT_SUFFIXES)
    text = file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    problem = tables.encoding_problem(text) or tables.blank_problem("the file", text)
    if problem:
        raise errors.DataError(f"{file}: {problem}")
    return text


def _verified_image(file: Path | Member) -> str | Member:
    _check_suffix(file, IMAGE_SUFFIXES)
    verify(file)
    return file if isinstance(file, Member) else str(file)


def _check_suffix(file: Path | Member, suffixes: tuple[str, ...]) -> None:
    if file.suffix.lower() not in suffixes:
        raise errors.DataError(f"{file}: a file of another kind; expected {', '.join(suffixes)}")

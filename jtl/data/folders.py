"""Labelled examples from a folder with one sub-folder a class: texts or pictures."""

import codecs
import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jtl import errors
from jtl.data import tables
from jtl.data.examples import Examples, Skipped, check

TEXT_SUFFIXES = (".txt",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def read(path: Path, *, classes: tuple[str, ...] | None = None, skip_bad: bool = False) -> Examples:
    """Read `path/<class>/<file>`: `.txt` files, or pictures, each decoded once to be sure that it can be.

    Hidden files are ignored. Classes are the sub-folders' names, sorted, unless declared.

    Args:
      path: the folder.
      classes: the class names in order.
      skip_bad: leave unreadable files out, and list them in `skipped`, where one would raise.

    Returns:
      Examples with `columns={"text": [...]}`, or `{"image": [...]}` paths for `load_image`.

    Raises:
      DataError: files that are not in a class folder, a folder inside a class folder, an empty class folder,
        texts mixed with pictures, an undeclared class, a file that cannot be read (unless `skip_bad`), or
        a single class.
    """
    files = _files_by_class(path, classes)
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
    return check(Examples({column: values}, np.array(labels, np.int32), names, None, path.name, tuple(skipped)))


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a picture, upright and in colour.

    The EXIF rotation is applied; transparency is dropped; of an animation the first frame is taken.

    Args:
      path: the picture.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      DataError: the file is not a picture, is cut short, or has more than 8 bits a channel.
      MissingExtraError: Pillow is not installed.
    """
    with _decoding(path):
        return _decode(path)


def _decode(path: str | os.PathLike[str]) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            # Pillow would clip these to white instead of scaling them.
            raise errors.DataError(f"{path}: the picture has mode {image.mode}; expected 8 bits a channel")
        upright = ImageOps.exif_transpose(image)
        if "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))


@contextlib.contextmanager
def _decoding(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what Pillow's decoders answer to a damaged file into one error that names the file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise errors.missing_extra("pillow", "data") from error
    try:
        yield
    except errors.DataError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise errors.DataError(f"{path}: the picture cannot be read: {error}") from error


def _files_by_class(path: Path, classes: tuple[str, ...] | None) -> dict[str, list[Path]]:
    visible = _visible(path)
    stray = [entry.name for entry in visible if not entry.is_dir()]
    if not visible or stray:
        found = f"has the file {stray[0]!r} beside them" if stray else "is empty"
        raise errors.DataError(f"{path}: expected one sub-folder for each class; the folder {found}")
    for folder in visible:
        if classes is not None and folder.name not in classes:
            raise errors.DataError(
                f"{path}: the sub-folder {folder.name!r} is not a declared class; expected "
                f"{', '.join(classes)}{tables.nearest(folder.name, classes)}"
            )
    return {folder.name: _files(folder) for folder in visible}


def _files(folder: Path) -> list[Path]:
    files = _visible(folder)
    if not files:
        raise errors.DataError(f"{folder}: the class folder is empty; remove it, or put its files in")
    for file in files:
        if file.is_dir():
            raise errors.DataError(
                f"{folder}: holds the folder {file.name!r}; expected files of one class. "
                f"If {folder.name!r} is a split, read that folder itself"
            )
    return files


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _reader(path: Path, files: list[Path]) -> tuple[str, Callable[[Path], str]]:
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


def _read_text(file: Path) -> str:
    _check_suffix(file, TEXT_SUFFIXES)
    text = file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    problem = tables.encoding_problem(text) or ("" if text.strip() else "the file is empty; expected text")
    if problem:
        raise errors.DataError(f"{file}: {problem}")
    return text


def _verified_image(file: Path) -> str:
    _check_suffix(file, IMAGE_SUFFIXES)
    with _decoding(file):
        from PIL import Image

        # Checksums are only compared by verify, missing rows only missed by a full decoding.
        with Image.open(file) as image:
            image.verify()
        _decode(file)
    return str(file)


def _check_suffix(file: Path, suffixes: tuple[str, ...]) -> None:
    if file.suffix.lower() not in suffixes:
        raise errors.DataError(f"{file}: a file of another kind; expected {', '.join(suffixes)}")

"""Pictures as files, members of an archive, records or bytes, and their decoding with Pillow."""

import contextlib
import functools
import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jtl import errors

MODES = {"rgb": "RGB", "gray": "L"}
"""The kinds of picture that models take, and Pillow's names for them."""

_READERS = threading.Lock()
"""zipfile counts the readers of an archive without a lock, and closes it when it has counted too few."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, whatever a file is called. Pillow knows others, some of which start another program."""


@runtime_checkable
class Readable(Protocol):
    """A place that holds an encoded picture; its `str` is what errors call it."""

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        ...


class Member(NamedTuple):
    """A file in a zip archive, read from there whenever it is needed.

    Attributes:
      archive: the path of the archive.
      path: the file's path inside.
      size: its bytes, uncompressed.
      crc: its CRC-32, as the archive has it.
    """

    archive: str
    path: str
    size: int
    crc: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.path).suffix

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
          DataError: the archive is damaged, or no longer the one that was listed.
        """
        with reading(self):
            archive = opened(self.archive)
            info = archive.getinfo(self.path) if self.path in archive.NameToInfo else None
            if info is None or (info.file_size, info.CRC) != (self.size, self.crc):
                raise errors.DataError(f"{self}: the archive has changed since it was listed; read it again")
            with _READERS:
                file = archive.open(info)
            try:
                return file.read()
            finally:
                with _READERS:
                    file.close()


class Record(NamedTuple):
    """A picture in a data source with random access, read from there whenever it is needed.

    Attributes:
      source: the data source.
      index: the number of its record.
      feature: the record's entry that is the encoded picture.
      name: of the source.
      crc: the CRC-32 of the encoded picture.
    """

    source: Any
    index: int
    feature: str
    name: str
    crc: int

    def __str__(self) -> str:
        return f"{self.name}, example {self.index}"

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        return bytes(self.source[self.index][self.feature])


Source = str | os.PathLike[str] | bytes | Readable
"""A picture that can be loaded: a path, the encoded bytes, or a place that reads them."""


def load_image(source: Source, mode: str = "rgb") -> np.ndarray:
    """Decode a picture, upright, with 8 bits a channel.

    The EXIF rotation is applied; of an animation the first frame is taken; palettes, CMYK and bilevel pictures
    become colour. Transparency is dropped and the colours under it are kept, as torchvision and timm do, and as
    the pictures were that published checkpoints saw. 16-bit grey is scaled by 1/257 and rounded; of
    16-bit colour Pillow gives the high byte.

    Args:
      source: a path, the encoded bytes, or anything with a method `read_bytes`.
      mode: "rgb", or "gray" for luma (ITU-R 601-2).

    Returns:
      uint8 `[H, W, 3]`, or `[H, W, 1]` for "gray".

    Raises:
      ConfigError: another mode.
      DataError: it is no picture, is cut short, would take too much memory (a decompression bomb by Pillow's
        limit), or has numbers of no known range: 32-bit integers, floats.
      MissingExtraError: Pillow is not installed.
    """
    if mode not in MODES:
        raise errors.ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    with reading(source), _image(source) as image:
        return _pixels(image, mode, source)


def verify(source: Source) -> None:
    """Decode a picture to the end and compare its checksums.

    Raises:
      DataError: as `load_image`.
    """
    # Checksums are only compared by verify, missing rows only missed by a full decoding.
    with reading(source), _image(source) as image:
        image.verify()
    load_image(source)


def checksum(picture: Any) -> int:
    """A CRC-32 of an encoded or decoded picture, as its place recorded it or from its bytes."""
    if isinstance(picture, Member | Record):
        return picture.crc
    if isinstance(picture, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(picture).tobytes())
    return zlib.crc32(content(picture))


def content(source: Source) -> bytes:
    """The bytes of an encoded picture.

    Raises:
      DataError: they cannot be read.
    """
    if isinstance(source, bytes):
        return source
    with reading(source):
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                return file.read()
        return source.read_bytes()


def opened(path: str) -> zipfile.ZipFile:
    """The archive at a path; the same object as long as the file is the same."""
    found = os.stat(path)
    return _archive(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _archive(path: str, size: int, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def reading(source: Any) -> Iterator[None]:
    """Turn what decoders answer to a damaged file into one error that names the file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise errors.missing_extra("pillow", "data") from error
    try:
        yield
    except errors.JtlError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        NotImplementedError,
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,  # where warnings are errors
    ) as error:
        raise errors.DataError(f"{_name(source)}: the picture cannot be read: {error}") from error


def _name(source: Any) -> str:
    return f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextlib.contextmanager
def _image(source: Source) -> Iterator[Any]:
    from PIL import Image

    file = source if isinstance(source, str | os.PathLike) else io.BytesIO(content(source))
    with Image.open(file, formats=_FORMATS) as image:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:  # Pillow itself refuses only twice as many
            raise errors.DataError(
                f"{_name(source)}: the picture has {image.width} x {image.height} pixels, expected at most {most:,}"
            )
        yield image


def _pixels(image: Any, mode: str, source: Source) -> np.ndarray:
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")) and not image.mode.startswith("I;16"):
        # Pillow would clip these to white instead of scaling them.
        raise errors.DataError(f"{_name(source)}: the picture has mode {image.mode}; expected 8 or 16 bits a channel")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        gray = ((np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.stack([gray] * (3 if mode == "rgb" else 1), axis=-1)
    if "transparency" in upright.info and upright.mode == "P":
        upright = upright.convert("RGBA")  # Pillow warns of a palette with transparency otherwise
    pixels = np.array(upright.convert(MODES[mode]))
    return pixels if pixels.ndim == 3 else pixels[..., None]

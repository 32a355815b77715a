"""The two layouts of PyTorch's files: where their pickle program and the bytes of their storages lie.

    zip, since torch 1.6: members that are stored, not compressed
      <name>/data.pkl         the program
      <name>/byteorder        "little", absent from older files
      <name>/data/<key>       a storage
      <name>/version ...      not needed

    legacy, before: one after the other
      the magic number, the protocol version, a dict about the machine, each a program
      the program
      a list of keys, a program too
      for each key the number of elements in 8 bytes, then the storage

The directory of an archive is read here and not by `zipfile`, which takes many times a small entry's size in memory.
Reading is strict: an archive begins with a member and ends with its directory, and its members do not overlap.
"""

import io
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from jtl.errors import WeightsError
from jtl.weights.torch_machine import DAMAGED, TENSORS, Allowance, Source, shown
from jtl.weights.torch_opcodes import run
from jtl.weights.torch_rebuild import Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

_LITTLE = "load it with torch on the machine that wrote it, and save it again as safetensors"

# Each begins with its signature; the layouts are those of the ZIP specification, APPNOTE 4.3.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_EXTRA_64 = 1
_SATURATED = {2: 0xFFFF, 4: 0xFFFFFFFF}

_ENCRYPTED = 0x2041  # flags of the two kinds of encryption and of a masked directory
_RECORDS = {b"data.pkl", b"byteorder", b"version"}


class Contents(NamedTuple):
    """What a file holds."""

    value: Any
    """What its program describes."""

    places: Mapping[str, int]
    """The first byte of each storage, by key."""


class _Member(NamedTuple):
    header: int
    size: int

    end: int
    """Where the next member or the directory begins."""


def contents(file: io.BufferedIOBase, size: int, allowance: Allowance) -> Contents:
    """Run the program of a file, and find its storages without reading them.

    Args:
      file: an open file.
      size: its length in bytes.
      allowance: the memory that may be taken.

    Raises:
      WeightsError: the file is damaged, of another format, or holds something other than tensors.
    """
    start = Source(file, 0, size, allowance).take(min(size, 262))
    if start.startswith(b"PK\x03\x04"):
        return _zip(file, size, allowance)
    if start.startswith(b"\x80"):
        return _legacy(Source(file, 0, size, allowance))
    if start[257:] == b"ustar":
        raise WeightsError("it has the tar layout of torch 0.1, which is not read: save it with a newer torch")
    raise WeightsError(
        f"it is no file of torch.save, it begins with {start[:16]!r}: check that the download is the file itself"
    )


# Legacy


def _legacy(source: Source) -> Contents:
    magic = _header(source)
    if magic != _MAGIC:
        raise WeightsError(f"it is a pickle, but not one that torch.save wrote: {TENSORS}")
    version = _header(source)
    if version != _VERSION:
        raise WeightsError(f"it has the version {version} of the legacy layout, expected {_VERSION}: {DAMAGED}")
    machine, _ = run(source)
    if type(machine) is dict and machine.get("little_endian") is False:
        raise WeightsError(f"it was written on a big-endian machine, which is not read: {_LITTLE}")
    value, storages = run(source)
    keys, _ = run(source)
    return Contents(value, _in_a_row(source, keys, storages))


def _header(source: Source) -> int | None:
    value, _ = run(source)
    return value if type(value) is int else None


def _in_a_row(source: Source, keys: Any, storages: dict[str, Storage]) -> dict[str, int]:
    places: dict[str, int] = {}
    for key in keys if type(keys) is list else ():
        storage = storages.get(key) if type(key) is str else None
        if storage is None or key in places:
            raise WeightsError(f"it lists a storage twice, or one that it does not refer to: {DAMAGED}")
        numel = source.number(8)
        if numel != storage.numel:
            raise WeightsError(f"its storage {shown(key)} has {numel} elements, expected {storage.numel}: {DAMAGED}")
        places[key] = source.position
        source.skip(storage.nbytes)
    for key in storages:
        if key not in places:
            raise WeightsError(f"it refers to the storage {shown(key)} and does not hold it: {DAMAGED}")
    return places


# Zip


def _zip(file: io.BufferedIOBase, size: int, allowance: Allowance) -> Contents:
    members = _members(file, size, allowance)
    if b"data.pkl" not in members:
        raise WeightsError(f"it is a zip archive without data.pkl, and none of torch.save: {TENSORS}")
    if (order := members.get(b"byteorder")) is not None:
        _check_order(_open(file, b"byteorder", order, allowance).take(min(order.size, 16)))
    value, storages = run(_open(file, b"data.pkl", members[b"data.pkl"], allowance))
    places = {key: _place(file, storage, members, allowance) for key, storage in storages.items()}
    return Contents(value, places)


def _check_order(order: bytes) -> None:
    if order == b"big":
        raise WeightsError(f"it was written on a big-endian machine, which is not read: {_LITTLE}")
    if order != b"little":
        raise WeightsError(f"its byteorder is {order!r}, expected b'little': {DAMAGED}")


def _place(file: io.BufferedIOBase, storage: Storage, members: Mapping[bytes, _Member], allowance: Allowance) -> int:
    name = b"data/" + storage.key.encode()
    if (member := members.get(name)) is None:
        raise WeightsError(f"it refers to the storage {shown(storage.key)} and does not hold it: {DAMAGED}")
    source = _open(file, name, member, allowance)
    if source.left < storage.nbytes:
        raise WeightsError(
            f"its storage {shown(storage.key)} has {source.left} bytes, expected {storage.nbytes}: {DAMAGED}"
        )
    return source.position


def _open(file: io.BufferedIOBase, name: bytes, member: _Member, allowance: Allowance) -> Source:
    """The bytes of a member, which lie behind a header that repeats its name."""
    header = Source(file, member.header, member.end, allowance)
    signature, *_, name_length, extra_length = _LOCAL.unpack(header.take(_LOCAL.size))
    repeated = header.take(name_length)
    header.skip(extra_length)
    if signature != b"PK\x03\x04" or repeated.partition(b"/")[2] != name or header.left < member.size:
        raise WeightsError(f"its member {_text(name)} is not where its directory says: {DAMAGED}")
    return Source(file, header.position, header.position + member.size, allowance)


def _members(file: io.BufferedIOBase, size: int, allowance: Allowance) -> dict[bytes, _Member]:
    """The members by their names without the folder that all lie in."""
    count, start, end = _directory(file, size, allowance)
    source = Source(file, start, end, allowance)
    found: dict[bytes, _Member] = {}
    folder = None
    for _ in range(count):
        path, member = _entry(source)
        allowance.pay(288)  # for the name, the record and its place in a dict
        first, _, name = path.partition(b"/")
        if name in found or first != (folder := first if folder is None else folder):
            raise WeightsError(f"it has the member {_text(path)} twice or in a second folder: {DAMAGED}")
        found[name] = member
    if source.left:
        raise WeightsError(f"its directory has {source.left} bytes behind its last entry: {DAMAGED}")
    return _apart(found, start)


def _apart(members: dict[bytes, _Member], directory: int) -> dict[bytes, _Member]:
    """The members with the ends of their places, where these do not overlap."""
    end = directory
    for name in sorted(members, key=lambda name: members[name].header, reverse=True):
        header, size, _ = members[name]
        if header + _LOCAL.size + len(name) + size > end:
            raise WeightsError(f"its member {_text(name)} overlaps what lies behind it: {DAMAGED}")
        members[name] = _Member(header, size, end)
        end = header
    return members


def _directory(file: io.BufferedIOBase, size: int, allowance: Allowance) -> tuple[int, int, int]:
    """The number of the directory's entries, and where it begins and ends."""
    end = size - _END.size
    if end < 0:
        raise WeightsError(f"it ends within the first member of a zip archive: {DAMAGED}")
    signature, *disks, _, count, length, start, comment = _END.unpack(
        Source(file, end, size, allowance).take(_END.size)
    )
    if signature != b"PK\x05\x06" or comment:
        raise WeightsError(f"it begins as a zip archive and does not end as one: {DAMAGED}")
    if (wide := _directory_64(file, end, allowance)) is not None:
        end, *values = wide
        short = (count, length, start)
        widths = (2, 4, 4)
        if any(a not in (b, _SATURATED[w]) for a, b, w in zip(short, values, widths, strict=True)):
            raise WeightsError(f"the two directories of this zip archive contradict each other: {DAMAGED}")
        count, length, start = values
    if any(disks) or start + length != end or count * _ENTRY.size > length:
        raise WeightsError(f"its zip directory is not where its end says: {DAMAGED}")
    return count, start, end


def _directory_64(file: io.BufferedIOBase, end: int, allowance: Allowance) -> tuple[int, int, int, int] | None:
    """Where a directory in the 64-bit form ends, its count, its length and its start; None in an archive without."""
    locator = end - _LOCATOR.size
    if locator < _END_64.size:
        return None
    signature, _, place, _ = _LOCATOR.unpack(Source(file, locator, end, allowance).take(_LOCATOR.size))
    if signature != b"PK\x06\x07":
        return None
    record = _END_64.unpack(Source(file, locator - _END_64.size, locator, allowance).take(_END_64.size))
    signature, *_, count, length, start = record
    if signature != b"PK\x06\x06" or place != locator - _END_64.size:
        raise WeightsError(f"its 64-bit zip directory is not where its end says: {DAMAGED}")
    return place, count, length, start


def _entry(source: Source) -> tuple[bytes, _Member]:
    """One entry of the directory, the end of its member's place still open."""
    signature, *fields = _ENTRY.unpack(source.take(_ENTRY.size))
    _, _, flags, method, _, _, _, packed, size, name_length, extra_length, comment_length, _, _, _, header = fields
    path, extra = source.take(name_length), source.take(extra_length)
    source.skip(comment_length)
    if signature != b"PK\x01\x02":
        raise WeightsError(f"an entry of its zip directory has no signature: {DAMAGED}")
    _check_name(path)
    if flags & _ENCRYPTED:
        raise WeightsError(f"its member {_text(path)} is encrypted, which torch.save never does: {TENSORS}")
    size, packed, header = _wide(extra, (size, packed, header))
    if method or packed != size:
        raise WeightsError(
            f"its member {_text(path)} is compressed, which torch.save never does: store it, or {TENSORS}"
        )
    return path, _Member(header, size, 0)


def _wide(extra: bytes, values: tuple[int, int, int]) -> tuple[int, ...]:
    """Sizes and place of a member, those that do not fit an entry from its field of 64-bit numbers."""
    saturated = _SATURATED[4]
    if saturated not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == _EXTRA_64 and min(length, len(extra) - at) >= 8 * values.count(saturated):
            numbers = iter(struct.unpack_from(f"<{values.count(saturated)}Q", extra, at))
            return tuple(next(numbers) if value == saturated else value for value in values)
        at += length
    raise WeightsError(f"an entry of its zip directory lacks its 64-bit sizes: {DAMAGED}")


def _check_name(path: bytes) -> None:
    name = path.partition(b"/")[2]
    if name.startswith(b"code/") or name == b"constants.pkl":
        raise WeightsError(f"it is a TorchScript archive, which holds a program ({_text(path)}): {TENSORS}")
    storage = name.startswith(b"data/") and len(name) > 5 and b"/" not in name[5:]
    hidden = name.startswith(b".") and b".." not in name  # torch's notes about the file
    if not (storage or hidden or name in _RECORDS) or b"\\" in name or b"\0" in name:
        raise WeightsError(f"it has the member {_text(path)}, which no file of torch.save has: {TENSORS}")


def _text(name: bytes) -> str:
    return shown(name.decode(errors="replace"))

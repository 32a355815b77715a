"""PyTorch's two file layouts, written by hand: no torch is needed, and nothing keeps a test from writing nonsense.

A program is the concatenation of the parts below; `test_torch_file` holds them to what `torch.save` writes.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
VERSION = b"\x80\x02M\xe9\x03."
PROTOCOL = b"\x80\x02"
REBUILD = "torch._utils", "_rebuild_tensor_v2"
MARK, NONE, TRUE, FALSE, REDUCE, BUILD, REFERENCE, SET, STOP = (
    b"(",
    b"N",
    b"\x88",
    b"\x89",
    b"R",
    b"b",
    b"Q",
    b"u",
    b".",
)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K" + bytes([value])
    if 0 <= value < 2**16:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def group(*parts: bytes) -> bytes:
    """A tuple."""
    short = (b")", b"\x85", b"\x86", b"\x87")
    return b"".join(parts) + short[len(parts)] if len(parts) < len(short) else MARK + b"".join(parts) + b"t"


def numbers(values: Sequence[int]) -> bytes:
    return group(*map(number, values))


def ordered() -> bytes:
    return name("collections", "OrderedDict") + b")" + REDUCE


def mapping(items: Mapping[str, bytes], empty: bytes = b"}") -> bytes:
    """A dict, or what stands on the stack in place of an empty one."""
    parts = [text(key) + value for key, value in items.items()]
    return empty + (parts[0] + b"s" if len(parts) == 1 else MARK + b"".join(parts) + SET if parts else b"")


def sequence(*parts: bytes) -> bytes:
    """A list."""
    return b"]" + (parts[0] + b"a" if len(parts) == 1 else MARK + b"".join(parts) + b"e" if parts else b"")


def storage(key: str, numel: int, kind: str = "FloatStorage", legacy: bool = False, part: bytes = NONE) -> bytes:
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    parts = text("storage"), name(module, kind), text(key), text("cpu"), number(numel)
    return group(*parts, part) + REFERENCE if legacy else group(*parts) + REFERENCE


def tensor(held: bytes, shape: Sequence[int], strides: Sequence[int], offset: int = 0, *more: bytes) -> bytes:
    arguments = held, number(offset), numbers(shape), numbers(strides), FALSE, ordered(), *more
    return name(*REBUILD) + group(*arguments) + REDUCE


def vector(key: str, numel: int, kind: str = "FloatStorage", legacy: bool = False) -> bytes:
    """A tensor of one axis that is a whole storage."""
    return tensor(storage(key, numel, kind, legacy), (numel,), (1,))


def program(value: bytes) -> bytes:
    return PROTOCOL + value + STOP


class Member:
    """A member of an archive; each field of its two headers can be set."""

    def __init__(self, path: str, data: bytes, **fields: int | bytes):
        self.path, self.data = path.encode(), data
        self.flags, self.method, self.size, self.packed = 0x808, 0, len(data), len(data)
        self.extra, self.local_path, self.place = b"", self.path, None
        for field, value in fields.items():
            assert hasattr(self, field)
            setattr(self, field, value)


def archive(members: Sequence[Member], *, wide: bool = True, start: bytes = b"", **end: int) -> bytes:
    """A zip archive; `wide` adds the records of a 64-bit one, as torch does; `end` sets fields of the last records."""
    body, directory = start, b""
    for member in members:
        place = len(body) if member.place is None else member.place
        sizes = zlib.crc32(member.data), member.packed, member.size
        padding = struct.pack("<2s2sH", b"FB", b"\0\0", 0)[:4]
        body += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, member.flags, member.method, 0, 0, *sizes, len(member.local_path), 4
        )
        body += member.local_path + padding + member.data
        entry = 0, 20, member.flags, member.method, 0, 0, *sizes, len(member.path), len(member.extra), 0, 0, 0, 0, place
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *entry) + member.path + member.extra
    fields = {"count": len(members), "length": len(directory), "place": len(body), "disk": 0, "comment": 0, **end}
    count, length, place = fields["count"], fields["length"], fields["place"]
    last = struct.pack(
        "<4s4H2LH", b"PK\5\6", fields["disk"], 0, *[min(count, 2**16 - 1)] * 2, length, place, fields["comment"]
    )
    if wide:
        at = len(body) + len(directory)
        last = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + last
        last = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 30, 45, 0, 0, count, count, length, place) + last
    return body + directory + last


def members(code: bytes, storages: Mapping[str, bytes], order: bytes = b"little") -> list[Member]:
    held = {"data.pkl": code, "byteorder": order, **{f"data/{key}": data for key, data in storages.items()}}
    return [Member(f"archive/{path}", data) for path, data in held.items()] + [Member("archive/version", b"3\n")]


def zipped(code: bytes, storages: Mapping[str, bytes]) -> bytes:
    return archive(members(code, storages))


def legacy(
    code: bytes,
    storages: Mapping[str, tuple[int, bytes]],
    *,
    magic: bytes = MAGIC,
    version: bytes = VERSION,
    little: bytes = TRUE,
    keys: bytes | None = None,
) -> bytes:
    """The legacy layout; a storage is its number of elements and its bytes."""
    sizes = mapping({"short": number(2), "int": number(4), "long": number(4)})
    info = mapping({"protocol_version": number(1001), "little_endian": little, "type_sizes": sizes})
    listed = program(sequence(*map(text, storages))) if keys is None else keys
    data = b"".join(struct.pack("<q", numel) + held for numel, held in storages.values())
    return magic + version + program(info) + code + listed + data

"""Mutations of PyTorch files that know the format: they move opcodes, and change sizes, names, keys and headers."""

import io
import itertools
import pickletools
import re
import struct
import zipfile

import numpy as np

from . import torch_bytes as tb


def hand_written():
    """Files of both layouts that are read."""
    ones, half = np.ones(6, "f4").tobytes(), np.full(4, 0.5, "f2").tobytes()
    w = tb.tensor(tb.storage("0", 6), (3, 2), (1, 3))
    parameter = tb.name("torch._utils", "_rebuild_parameter") + tb.group(w, tb.TRUE, tb.ordered()) + tb.REDUCE
    metadata = tb.mapping({"_metadata": tb.mapping({"": tb.mapping({"version": tb.number(1)})}, tb.ordered())})
    state = tb.mapping({"w": parameter, "b": tb.vector("1", 4, "HalfStorage")}, tb.ordered()) + metadata + tb.BUILD
    yield tb.zipped(tb.program(state), {"0": ones, "1": half})
    kinds = tb.sequence(tb.number(-1), b"G" + bytes(8), tb.text("ü"), b"C\2ab", tb.group(tb.NONE, tb.number(2**40)))
    expanded = tb.tensor(tb.storage("0", 6), (2, 6), (0, 1))
    inner = tb.mapping({"e": expanded, "m": tb.vector("2", 3, "BoolStorage"), "epoch": tb.number(300)})
    yield tb.zipped(tb.program(tb.mapping({"state_dict": inner, "more": kinds})), {"0": ones, "2": b"\1\0\1"})
    arguments = tb.group(tb.storage("0", 6), tb.number(0), tb.numbers((6,)), tb.numbers((1,)), tb.FALSE, tb.ordered())
    rebuild = b"\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94"
    two = b"(\x8c\1a\x94" + rebuild + arguments + b"R\x94\x8c\1b\x94h\4" + arguments + b"R\x94u"
    yield tb.zipped(b"\x80\x04\x95\x10" + bytes(7) + b"}\x94" + two + b".", {"0": ones})
    part = tb.group(tb.text("9"), tb.number(2), tb.number(4))
    view = tb.tensor(tb.storage("0", 6, legacy=True, part=part), (2, 2), (2, 1))
    state = tb.mapping({"w": view, "b": tb.vector("1", 4, "HalfStorage", legacy=True)})
    yield tb.legacy(tb.program(state), {"0": (6, ones), "1": (4, half)})
    yield tb.legacy(tb.program(tb.mapping({"model": state, "epoch": tb.number(3)})), {"0": (6, ones), "1": (4, half)})


class Seed:
    """A file in parts: opcodes, and members or the bytes behind the last program."""

    def __init__(self, data):
        self.data, self.members, self.tail = data, None, b""
        program = data
        if data.startswith(b"PK"):
            archive = zipfile.ZipFile(io.BytesIO(data))
            self.members = [(name, archive.read(name)) for name in archive.namelist()]
            program = next(held for name, held in self.members if name.endswith("/data.pkl"))
        self.ops, self.tail = _opcodes(program)

    def built(self, random_, ops):
        """A file of these opcodes."""
        program = b"".join(ops)
        if self.members is None:
            return program + self.tail
        held = [tb.Member(name, program if name.endswith("/data.pkl") else data) for name, data in self.members]
        return tb.archive(held, wide=random_.random() < 0.7)


def _opcodes(data):
    """The opcodes of all programs that a file begins with, and what follows."""
    stream, ops = io.BytesIO(data), []
    while data[stream.tell() : stream.tell() + 1] == b"\x80":
        starts = [start for _, _, start in pickletools.genops(stream)]
        ops += [data[a:b] for a, b in itertools.pairwise([*starts, stream.tell()])]
    return ops, stream.read()


# Mutations of opcodes

_POWERS = (16, 31, 32, 40, 62, 63, 64, 70)
_NUMBERS = [*range(-2, 9), 255, -(2**63), *(2**power + step for power in _POWERS for step in (-1, 0))]
_TEXTS = [*"0129w", "", "storage", "cpu", "module", "model", "state_dict", "_metadata", "ü😀", "../0", "\0", "x" * 300]
_NAMES = [
    *(
        tb.name("torch._utils", f"_rebuild_{kind}")
        for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter", "qtensor")
    ),
    *(
        tb.name("torch", f"{kind}Storage")
        for kind in ("Float", "Double", "Half", "Byte", "Bool", "ComplexFloat", "QInt8")
    ),
    *(tb.name("torch", other) for other in ("Size", "device", "float32", "uint16")),
    tb.name("torch.storage", "UntypedStorage"),
    tb.name("collections", "OrderedDict"),
    *(b"cos\nsystem\n", b"c__builtin__\neval\n", b"cposix\nsystem\n", b"c__main__\nNet\n", b"c\n\n", b"c\xff\n\xfe\n"),
]
_OPS = [
    *(bytes([code]) for code in b".()tNRbQaeusoPid]}012lp\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"),
    *(
        b"ios\nsystem\n",
        b"(ios\nsystem\n",
        b"P0\n",
        b"I01\n",
        b"L1L\n",
        b"F1.0\n",
        b"S'a'\n",
        b"Va\n",
        b"g0\n",
        b"p0\n",
    ),
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x8b\x04\x00\x00\x00\x01\x02\x03\x04", b"\x8a\x00"),
    *(b"\x95" + struct.pack("<Q", n) for n in (0, 5, 2**63)),
    *(b"\x80" + bytes([n]) for n in (0, 2, 4, 5, 6)),
    *(b"h" + bytes([n]) for n in (0, 1, 2, 5, 20)),
    *(b"q" + bytes([n]) for n in (0, 1, 2, 5, 20)),
    *(b"r" + struct.pack("<I", n) for n in (0, 1, 300, 2**32 - 1)),
    *(b"j" + struct.pack("<I", n) for n in (0, 1, 300, 2**32 - 1)),
    *(b"X" + struct.pack("<I", n) + b"abc" for n in (0, 2, 2**20, 2**32 - 1)),
    *(b"B" + struct.pack("<I", n) + b"abc" for n in (0, 3, 2**32 - 1)),
    *(code + struct.pack("<Q", n) + b"abc" for code in (b"\x8d", b"\x8e", b"\x96") for n in (0, 3, 2**63, 2**64 - 1)),
    *(
        b"T\xff\xff\xff\xff",
        b"U\x01\xff",
        b"\x8c\x03abc",
        b"C\x02ab",
        b"G" + b"\x7f" * 8,
        b"cos\nsystem\n(X\2\0\0\0lstR",
    ),
    *(b"X\2\0\0\0osX\6\0\0\0system\x93", b"ccollections\nOrderedDict\n)\x81", b"}X\t\0\0\0_metadataNsb"),
]


def _span(random_, ops, longest=30):
    start = random_.randrange(len(ops))
    return start, min(len(ops), start + random_.randint(1, longest))


def _delete(random_, ops, other):
    start, end = _span(random_, ops, 3)
    del ops[start:end]


def _repeat(random_, ops, other):
    start, end = _span(random_, ops)
    ops[end:end] = ops[start:end] * random_.choice((1, 1, 1, 2, 5, 30))


def _swap(random_, ops, other):
    a, b = random_.randrange(len(ops)), random_.randrange(len(ops))
    ops[a], ops[b] = ops[b], ops[a]


def _insert(random_, ops, other):
    ops.insert(random_.randrange(len(ops) + 1), random_.choice(_OPS))


def _replace(random_, ops, other):
    ops[random_.randrange(len(ops))] = random_.choice(_OPS)


def _splice(random_, ops, other):
    start, end = _span(random_, other)
    at = random_.randrange(len(ops) + 1)
    ops[at : at + random_.choice((0, 0, end - start))] = other[start:end]


def _scramble(random_, ops, other):
    at = random_.randrange(len(ops))
    op = bytearray(ops[at])
    op[random_.randrange(len(op))] = random_.randrange(256)
    ops[at] = bytes(op)


def _among(codes, new):
    """A mutation of one of the opcodes with these codes."""

    def mutate(random_, ops, other):
        places = [index for index, op in enumerate(ops) if op[0] in codes]
        if places:
            at = random_.choice(places)
            ops[at] = new(random_, ops[at])

    return mutate


def _longer(random_, op):
    length = random_.choice((0, len(op) - 6, len(op) - 4, 2**20, 2**31, 2**32 - 1))
    return op[:1] + struct.pack("<I", length % 2**32) + op[5:]


_number = _among(b"KMJ\x8a", lambda random_, op: tb.number(random_.choice(_NUMBERS)))
_text = _among(b"X", lambda random_, op: tb.text(random_.choice(_TEXTS)))
_length = _among(b"X", _longer)
_memo = _among(b"qh", lambda random_, op: op[:1] + bytes([random_.randrange(40)]))
_name = _among(b"c", lambda random_, op: random_.choice(_NAMES))
_size = _among(b"\x85\x86\x87t", lambda random_, op: random_.choice((b"\x85", b"\x86", b"\x87", b"t")))

_OF_OPS = [
    _delete,
    _repeat,
    _swap,
    _insert,
    _replace,
    _splice,
    _scramble,
    _text,
    _length,
    _memo,
    _name,
    _size,
    *[_number] * 6,
]


# Mutations of bytes

_HEADERS = {
    b"PK\1\2": "<4s6H3L5H2L",
    b"PK\3\4": "<4s5H3L2H",
    b"PK\5\6": "<4s4H2LH",
    b"PK\6\6": "<4sQ2H2L4Q",
    b"PK\6\7": "<4sLQL",
}
_WIDTHS = {"H": 2, "L": 4, "Q": 8}


def _field(random_, data):
    """Another value in a field of a header of an archive; elsewhere in any four bytes."""
    headers = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", data)]
    if not headers:
        return _word(random_, data)
    place = random_.choice(headers)
    codes = re.sub(r"(\d)(\w)", lambda m: m[2] * int(m[1]), _HEADERS[bytes(data[place : place + 4])][3:])
    which = random_.randrange(len(codes))
    start = place + 4 + sum(_WIDTHS[code] for code in codes[:which])
    width = _WIDTHS[codes[which]]
    old = int.from_bytes(data[start : start + width], "little")
    new = random_.choice((*_NUMBERS, old + 1, old - 1, old + 64, len(data), place)) % 2 ** (8 * width)
    data[start : start + width] = new.to_bytes(width, "little")


def _word(random_, data):
    start, width = random_.randrange(len(data)), random_.choice((1, 2, 4, 8))
    data[start : start + width] = (random_.choice(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")


def _flip(random_, data):
    for _ in range(random_.choice((1, 1, 2, 8))):
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)


def _cut(random_, data):
    del data[random_.randrange(1, len(data)) :]


def _remove(random_, data):
    start = random_.randrange(len(data))
    del data[start : start + random_.choice((1, 2, 4, 64, 300))]


def _double(random_, data):
    start = random_.randrange(len(data))
    end = start + random_.choice((1, 4, 64, 300))
    data[end:end] = data[start:end]


_OF_BYTES = [_word, _flip, _cut, _remove, _double, *[_field] * 5]


def mutated(random_, seeds):
    """One file: opcodes of a seed changed and the file built around them, or bytes of a file, or both."""
    seed = random_.choice(seeds)
    data = seed.data
    kind = random_.random()
    if kind < 0.75:
        ops = list(seed.ops)
        for _ in range(random_.choice((1, 1, 1, 2, 3))):
            random_.choice(_OF_OPS)(random_, ops or [b"."], random_.choice(seeds).ops)
        data = seed.built(random_, ops)
    if kind > 0.7:
        changed = bytearray(data)
        for _ in range(random_.choice((1, 1, 2))):
            random_.choice(_OF_BYTES)(random_, changed or bytearray(b"P"))
        data = bytes(changed)
    return data

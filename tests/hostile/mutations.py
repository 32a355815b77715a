"""Mutations that know the formats: of JSON trees, of headers, of archives' members, and of bytes."""

import json
import random
import struct
import warnings
import zipfile
from io import BytesIO

from ..weights import torch_mutations  # noqa: TID252
from . import seeds

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, 10**400)
_FLOATS = (0.5, -1.5, 1e308, -0.0, 1e-320, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    *("", " ", "a", "0", "None", "../x", "/etc/passwd", "a/b", "a\\b", "..", "x" * 300, "\0", "\ud800", "é\u202e😀"),
    *("F32", "BF16", "F8_E4M3", "Q9", "model.safetensors", "weight", "relu", "gelu", "(a+)+$", "[", "{}", "*"),
    *("__class__", "os.system", "bert", "LORA", "IA3", "float32", "mean", "Linear", "Hidden", "Tied", "none"),
)
_KEYS = {
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Slow", "evil.Fast"]},
    "trust_remote_code": True,
    "custom_pipelines": {"text": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}},
    "architectures": ["EvilModel"],
    "model_type": "evil",
    "__class__": "os.system",
    "py/object": "os.system",
    "is_decoder": True,
    "id2label": {"0": "a"},
    "num_labels": -1,
    "quantization_config": {"quant_method": "evil"},
    "torch_dtype": "float8",
    "pretrained_cfg": {"input_size": [3, 10**9, 10**9]},
}


def _leaf(rng: random.Random):
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind == 3:
        return rng.choice(_FLOATS)
    if kind < 6:
        return rng.choice(_TEXTS)
    return rng.choice((None, True, False, [], {}, [[]], {"": None}, [1, 2], ["a"], [None], [{}], "deep", "wide"))


def _places(value, found=None):
    """Every container of a tree with one of its keys."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        _places(inner, found)
    return found


def changed(rng: random.Random, tree):
    """A JSON tree with one to three changes, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(tree)
        if not places or rng.random() < 0.03:
            return _leaf(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind < 5:
            holder[key] = _leaf(rng)
        elif kind == 5:
            other, name = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
        elif kind == 6:
            del holder[key]
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice((*_TEXTS, *holder))] = holder.pop(key)
        elif kind == 8 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2, 10, 2**31))
        else:
            name = rng.choice(list(_KEYS))
            target = tree if isinstance(tree, dict) else {}
            target[name] = json.loads(json.dumps(_KEYS[name]))
    return tree


def json_text(rng: random.Random, text: bytes) -> bytes:
    """JSON whose tree, or whose text, is changed."""
    if rng.random() < 0.12:
        return flipped(rng, text)
    found = json.dumps(changed(rng, json.loads(text)), ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        found = found.replace(b'"deep"', b"[" * 3000 + b"]" * 3000).replace(b'"wide"', b"[" + b"[]," * 3000 + b"0]")
    if rng.random() < 0.04 and b"," in found:
        twice = found.split(b",")[0].lstrip(b"{[")  # the first key once more
        found = found.replace(b",", b"," + twice + b",", 1)
    if rng.random() < 0.02:
        found = rng.choice((b"\xef\xbb\xbf" + found, found.decode("utf-8", "replace").encode("utf-16"), found + b"\0"))
    return found


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut out, put in or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        if kind < 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + rng.choice((1, 2, 4, 8))] = rng.randbytes(rng.choice((1, 2, 4, 8)))
        elif kind == 3:
            size = rng.choice((4, 8))
            number = rng.choice(_NUMBERS[:14]) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, "little")
        elif kind == 4:
            del data[at : at + rng.choice((1, 4, 16, 64))]
        elif kind == 5:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.choice((1, 8, 32))]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def safetensors(rng: random.Random, file: bytes) -> bytes:
    """A safetensors file whose header, entries, length or data are changed."""
    kind = rng.randrange(12)
    if kind == 0:
        return flipped(rng, file)
    header, data = seeds.parts(file)
    if kind == 1:
        raw = json.dumps(header).encode()
        length = rng.choice((0, 1, len(raw) - 1, len(raw) + 1, len(file), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
        return seeds.with_header(raw, data, length)
    if kind == 2:
        return seeds.with_header(json_text(rng, json.dumps(header).encode()), data)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    if kind == 3:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "C64", "F8_E5M2", "F4", "I64", 5, None)
        )
    elif kind == 4:
        entry["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.randrange(6))]
    elif kind == 5:
        entry["shape"] = rng.choice(
            ([0, 2**62, 4], [2**32, 2**32], [0] * 40, [1] * 70, [0, 10**18], [2**64], [[3]], {})
        )
    elif kind == 6:
        entry["data_offsets"] = [rng.choice((*_NUMBERS, len(data), *entry["data_offsets"])) for _ in range(2)]
    elif kind == 7:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 8:
        header[rng.choice(_TEXTS)] = json.loads(json.dumps(entry))
    elif kind == 9:
        data += rng.randbytes(rng.choice((1, 8, 100)))
    elif kind == 10:
        return seeds.with_header(json.dumps(header).encode() + b" " * rng.choice((1, 7, 1000)), data)
    else:
        data = flipped(rng, data)
    return seeds.with_header(json.dumps(header).encode(), data)


def keras(rng: random.Random, file: bytes) -> bytes:
    """An HDF5 file with other bytes, or one made by h5py with what is not plain arrays."""
    return flipped(rng, file) if rng.random() < 0.9 else _odd_keras(rng)


def _odd_keras(rng: random.Random) -> bytes:
    import h5py
    import numpy as np

    target = BytesIO()
    with h5py.File(target, "w") as file:
        file["a/vars/0"] = np.ones(3, "f4")
        kind = rng.randrange(8)
        if kind == 0:
            file["b"] = h5py.SoftLink(rng.choice(("/a", "/b", "/", "/none")))
        elif kind == 1:
            file["b"] = h5py.ExternalLink(rng.choice(("/etc/passwd", "other.h5")), "/x")
        elif kind == 2:
            file["b"] = file[rng.choice(("/", "/a"))]
        elif kind == 3:
            filters = {"compression": "gzip"} if rng.random() < 0.5 else {"fletcher32": True}
            file.create_dataset("b", data=np.zeros(10**5, "u1"), chunks=(1000,), **filters)
        elif kind == 4:
            file.create_dataset("b", shape=(rng.choice((10**6, 10**12)),), dtype="f4", chunks=(1000,))
        elif kind == 5:
            file["b"] = rng.choice(("text", np.bytes_(b"bytes")))
        elif kind == 6:
            file["b"] = np.zeros(3, [("x", "f4"), ("y", "i8")])
        else:
            group = file
            for _ in range(rng.choice((50, 500))):
                group = group.create_group("g")
    return target.getvalue()


def torch(rng: random.Random, known: list) -> bytes:
    """As `torch_mutations` has them, of which there is a test of its own."""
    return torch_mutations.mutated(rng, known)


def zipped(rng: random.Random, file: bytes) -> bytes:
    """An archive with other bytes, or with members of odd names, kinds and sizes."""
    if rng.random() < 0.5:
        return flipped(rng, file)
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(file)) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        members = [(info, source.read(info)) for info in source.infolist()]
        for info, data in members:
            if rng.random() < 0.2:
                info.filename = rng.choice(
                    (*_TEXTS, "/abs/x.txt", "../../x.txt", "a/../../b.txt", "C:\\x.txt", "a/b/c.txt")
                )
            if rng.random() < 0.1:
                info.external_attr = rng.choice((0o120777, 0o040755, 0o010644)) << 16
            if rng.random() < 0.1:
                data = rng.choice((b"", b"\0" * 100, b"\xff" * 10, flipped(rng, data or b"x")))
            info.filename = info.filename.replace("\ud800", "x") or "x"
            with warnings.catch_warnings():  # of a name that is there already
                warnings.simplefilter("ignore")
                copy.writestr(info, data)
    raw = bytearray(target.getvalue())
    if rng.random() < 0.3:  # sizes in a header of the directory that lie
        at = raw.find(b"PK\1\2")
        raw[at + 24 : at + 28] = struct.pack("<I", rng.choice((0, 1, 2**20, 2**32 - 1)))
    return bytes(raw)


def table(rng: random.Random, name: str, data: bytes) -> bytes:
    """A table, plain or compressed, or an archive."""
    if name.endswith(".zip"):
        return zipped(rng, data)
    if name.endswith(".jsonl") and rng.random() < 0.6:
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json_text(rng, lines[at])
        return b"\n".join(lines)
    if name.endswith(".gz") and rng.random() < 0.5:
        import gzip

        return gzip.compress(flipped(rng, gzip.decompress(data)))
    return flipped(rng, data)

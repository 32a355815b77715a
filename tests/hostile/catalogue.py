"""Inputs that mean harm, or that nonsense made: each with what makes it, what reads it, and how that refuses it.

    python -m tests.hostile.catalogue PLACE        reads each, and prints a line of JSON for it

A process of its own, so that a crash is that of one input alone. Each has a payload where its format can hold one,
which would make the file `MARKER` beside it.
"""

import functools
import gzip
import io
import json
import os
import pickle
import signal
import struct
import sys
import tarfile
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import fuzz, seeds

MARKER = "ran"


class Row(NamedTuple):
    """One input.

    Attributes:
      name: what it is.
      load: the name of the reader in `LOADERS`.
      make: fills a folder, and gives the path to read; None for the folder.
      error: the class that is raised.
      says: a part of its message.
    """

    name: str
    load: str
    make: Callable[[Path], Path | None]
    error: str
    says: str


# Readers


@functools.cache
def _base():
    import jtl

    with tempfile.TemporaryDirectory() as place:
        _files(Path(place), seeds.transformers())
        return jtl.load(place)


def _adapter(path):
    from jtl.peft import store

    store.load(path, *_base())


def _model(path):
    import jtl

    jtl.load(path)


def _tokenizer(path):
    from jtl.data import text

    text.encode(text.tokenizer(path), ["good film"], max_length=8)


def _data(path):
    from jtl.data import read

    read(path)


LOADERS = {"model": _model, "adapter": _adapter, "tokenizer": _tokenizer, "data": _data}


# Makers


def _files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _bert(**changes):
    """A sound BERT, but for these settings, beside code that would run."""

    def make(folder):
        _files(folder, seeds.transformers())
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))
        _code(folder)

    return make


def _code(folder):
    marker = folder.parent / MARKER
    for name in ("evil", "modeling_evil", "configuration_evil", "tokenization_evil", "custom_generate"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")


def _raw(name, data):
    """A sound BERT, but for one file."""

    def make(folder):
        _files(folder, {**seeds.transformers(), name: data})

    return make


def _header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _raw("model.safetensors", seeds.with_header(text, data, length))


def _entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _index(weight_map, **others):
    def make(folder):
        files = seeds.transformers()
        del files["model.safetensors"]
        _files(folder.parent / "outside", {"model.safetensors": seeds.safetensors({"a": np.ones(3, "f4")})})
        text = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        _files(folder, files | {"model.safetensors.index.json": text} | others)

    return make


def _linked(target):
    """A shard that is a link."""

    def make(folder):
        _index({"a": "model-1.safetensors"})(folder)
        (folder / "model-1.safetensors").symlink_to(target)

    return make


def _shard_folder(folder):
    _index({"a": "model-1.safetensors"})(folder)
    (folder / "model-1.safetensors").mkdir()


def _folder_for_weights(folder):
    files = seeds.transformers()
    del files["model.safetensors"]
    _files(folder, files)
    (folder / "model.safetensors").mkdir()


class _Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class _Evaluated(_Evil):
    def __reduce__(self):
        return eval, (f"open({self.command.split()[-1]!r}, 'w')",)


def _pickled(name, kind=_Evil, protocol=2, zipped=False):
    """Weights of PyTorch that would run a command."""

    def make(folder):
        files = seeds.transformers()
        del files["model.safetensors"]
        _files(folder, files)
        program = pickle.dumps({"a": kind(f"touch {folder.parent / MARKER}")}, protocol)
        if zipped:
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("archive/data.pkl", program)
                archive.writestr("archive/version", b"3\n")
        else:
            (folder / name).write_bytes(program)

    return make


def _torch_zip(*members):
    def make(folder):
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)
        _weights("pytorch_model.bin", target.getvalue())(folder)

    return make


def _weights(name, data):
    """A sound BERT, but for its weights."""

    def make(folder):
        files = seeds.transformers()
        del files["model.safetensors"]
        _files(folder, files | {name: data})

    return make


def _tar(folder):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        info = tarfile.TarInfo("../../escaped")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
    _weights("model.pt", target.getvalue())(folder)


def _h5(fill):
    def make(folder):
        import h5py

        files = seeds.transformers()
        del files["model.safetensors"]
        _files(folder, files)
        with h5py.File(folder / "model.weights.h5", "w") as file:
            file["a"] = np.ones(3, "f4")
            fill(h5py, file)

    return make


def _virtual(h5py, file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(3,))
    file.create_virtual_dataset("b", layout)


def _external(h5py, file):
    file.create_dataset("b", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)])


def _cycle(h5py, file):
    file["group/again"] = file["/"]


def _deep(h5py, file):
    group = file
    for _ in range(400):
        group = group.create_group("g")


def _soft(h5py, file):
    file["b"] = h5py.SoftLink("/b")


def _elsewhere(h5py, file):
    file["b"] = h5py.ExternalLink("/etc/passwd", "/x")


def _references(h5py, file):
    file.create_dataset("b", data=np.array([file["a"].ref]), dtype=h5py.ref_dtype)


def _bomb(h5py, file):
    file.create_dataset("b", data=np.zeros(10**7, "u1"), chunks=(10**6,), compression="gzip")


def _claim(h5py, file):
    file.create_dataset("b", shape=(10**12,), dtype="f4", chunks=(1000,))


def _own(**changes):
    """A folder of `jtl.save`, with other settings."""

    def make(folder):
        _files(folder, seeds.own("bert"))
        settings = json.loads((folder / "jtl.json").read_text()) | changes
        (folder / "jtl.json").write_text(json.dumps(settings))
        _code(folder)

    return make


def _own_config(**changes):
    def make(folder):
        settings = json.loads(seeds.own("bert")["jtl.json"])
        _own(config=settings["config"] | changes)(folder)

    return make


def _resnet(folder):
    _files(folder, seeds.own("resnet"))
    settings = json.loads((folder / "jtl.json").read_text())
    settings["config"] |= {"depths": [10**9, 10**9]}
    (folder / "jtl.json").write_text(json.dumps(settings))


def _nan(folder):
    files = seeds.transformers()
    header, data = seeds.parts(files["model.safetensors"])
    at = header["bert.embeddings.LayerNorm.bias"]["data_offsets"][0]
    data = data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]
    _files(folder, files | {"model.safetensors": seeds.with_header(json.dumps(header).encode(), data)})


def _vit(folder):
    settings = seeds.configs()["vit"]
    _files(folder, {"config.json": json.dumps(settings).encode(), "model.safetensors": b""})
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": "x"}, "image_mean": 7}))
    (folder / "model.safetensors").write_bytes(seeds.safetensors({"a": np.ones(3, "f4")}))


def _words(change):
    """A tokenizer's file, changed."""

    def make(folder):
        files = {name: data for name, data in seeds.transformers().items() if name.startswith("tokenizer")}
        tree = json.loads(files["tokenizer.json"])
        changed = change(tree)
        tree = tree if changed is None else changed
        text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        _files(folder, files | {"tokenizer.json": text})
        _code(folder)

    return make


def _words_settings(**changes):
    def make(folder):
        files = {name: data for name, data in seeds.transformers().items() if name.startswith("tokenizer")}
        settings = json.loads(files["tokenizer_config.json"]) | changes
        _files(folder, files | {"tokenizer_config.json": json.dumps(settings).encode()})
        _code(folder)

    return make


def _peft(tensors=None, **changes):
    def make(folder):
        files = seeds.adapter()
        settings = json.loads(files["adapter_config.json"]) | changes
        files["adapter_config.json"] = json.dumps(settings).encode()
        _files(folder, files | ({} if tensors is None else {"adapter_model.safetensors": tensors}))

    return make


def _peft_pickle(folder):
    files = seeds.adapter()
    del files["adapter_model.safetensors"]
    program = pickle.dumps({"a": _Evil(f"touch {folder.parent / MARKER}")})
    _files(folder, files | {"adapter_model.bin": program})


def _zip(*members, change=lambda data: data):
    """An archive of texts in two classes, and of these members."""

    def make(folder):
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("a/0.txt", "b/0.txt"):
                archive.writestr(name, "text")
            for info, data in members:
                archive.writestr(info, data)
        (folder / "data.zip").write_bytes(change(target.getvalue()))
        return folder / "data.zip"

    return make


def _link():
    info = zipfile.ZipInfo("a/link.txt")
    info.external_attr = 0o120777 << 16
    return info, "/etc/passwd"


def _encrypted(data):
    at = data.find(b"PK\1\2")
    return data[: at + 8] + b"\1\0" + data[at + 10 :]


def _overlapping(folder):
    """Many entries of the directory for the same compressed bytes."""
    inner = zipfile.ZipInfo("a/0.txt")
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(inner, b"word " * 200000)
        archive.writestr("b/0.txt", b"text")
        first = archive.infolist()[0]
        for i in range(300):
            twin = zipfile.ZipInfo(f"a/{i + 1}.txt")
            twin.compress_type, twin.CRC, twin.header_offset = first.compress_type, first.CRC, first.header_offset
            twin.compress_size, twin.file_size = first.compress_size, first.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    (folder / "data.zip").write_bytes(target.getvalue())
    return folder / "data.zip"


def _file(name, data):
    def make(folder):
        _files(folder, {name: data})
        return folder / name

    return make


def _parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    many = pa.DictionaryArray.from_arrays(np.zeros(30_000_000, np.int8), pa.array(["a"]))
    pq.write_table(pa.table({"text": many, "label": many}), folder / "data.parquet", compression="zstd")
    return folder / "data.parquet"


def _picture_bomb(folder):
    from PIL import Image

    for name in "ab":
        (folder / name).mkdir()
        for i in range(2):
            (folder / name / f"{i}.png").write_bytes(seeds.png(i))
    target = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(target, "PNG")
    (folder / "a" / "bomb.png").write_bytes(target.getvalue())


def _pipe_in_folder(folder):
    for name in "ab":
        _files(folder, {f"{name}/0.txt": b"text"})
    os.mkfifo(folder / "a" / "1.txt")


def _pipe(folder):
    os.mkfifo(folder / "data.csv")
    return folder / "data.csv"


def _device(folder):
    for name in "ab":
        _files(folder, {f"{name}/0.txt": b"text"})
    (folder / "a" / "1.txt").symlink_to("/dev/zero")


_MANY = {f"t{i}": _entry((0,), (0, 0)) for i in range(60_000)}
_DEEP = b"[" * 100_000 + b"]" * 100_000
_W, _C, _S, _D = "WeightsError", "ConfigError", "SourceNotFoundError", "DataError"

ROWS = (
    # safetensors
    Row("an empty file", "model", _raw("model.safetensors", b""), _W, "damaged"),
    Row("a header longer than any memory", "model", _header({}, length=2**63), _W, "header of"),
    Row("a header longer than the file", "model", _header({}, length=10**8), _W, "header of"),
    Row("a header of 17 MiB", "model", _header(b"{" + b" " * (17 << 20) + b"}"), _W, "header of"),
    Row("a header that is nested deeply", "model", _header(b'{"a":' + _DEEP + b"}"), _W, "damaged"),
    Row("a header that is a list", "model", _header([1, 2]), _W, "damaged"),
    Row("a header that is not UTF-8", "model", _header(b'{"\xff": 1}'), _W, "damaged"),
    Row(
        "offsets that are not numbers",
        "model",
        _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}'),
        _W,
        "damaged",
    ),
    Row("offsets below zero", "model", _header({"a": _entry(offsets=(-4, 0))}, b"data"), _W, "damaged"),
    Row("tensors that overlap", "model", _header({"a": _entry(), "b": _entry()}, b"data"), _W, "damaged"),
    Row("a hole between tensors", "model", _header({"a": _entry(offsets=(4, 8))}, b"datadata"), _W, "damaged"),
    Row("bytes behind the last tensor", "model", _header({"a": _entry()}, b"data" + bytes(100)), _W, "damaged"),
    Row("sizes whose product overflows", "model", _header({"a": _entry((2**32, 2**32, 4))}, b"data"), _W, "damaged"),
    Row("no elements in a shape past all arrays", "model", _header({"a": _entry((0, 2**61, 4), (0, 0))}), _W, ""),
    Row("a shape of seventy axes", "model", _header({"a": _entry((1,) * 70)}, b"data"), _W, "too large for an array"),
    Row("floats of eight bits", "model", _header({"a": _entry((4,), dtype="F8_E4M3")}, b"data"), _W, "has dtype"),
    Row("sixty thousand empty tensors", "model", _header(_MANY), _W, "none of its tensors"),
    Row("a folder in place of the weights", "model", _folder_for_weights, _S, "neither"),
    Row("a pickle called safetensors", "model", _pickled("model.safetensors"), _W, "damaged"),
    Row("weights that are not finite", "model", _nan, _W, "finite"),
    # Indices of shards
    Row("a shard outside of the folder", "model", _index({"a": "../outside/model.safetensors"}), _W, "names the shard"),
    Row("a shard by an absolute path", "model", _index({"a": "/etc/passwd"}), _W, "names the shard"),
    Row("a shard by a path of Windows", "model", _index({"a": "C:\\x.safetensors"}), _W, "names the shard"),
    Row("a shard with a NUL in its name", "model", _index({"a": "x\0.safetensors"}), _W, "names the shard"),
    Row("a shard that is the folder", "model", _index({"a": "."}), _W, "names the shard"),
    Row("an index that is its own shard", "model", _index({"a": "model.safetensors.index.json"}), _W, ""),
    Row("shards that are numbers", "model", _index({"a": 7}), _W, "weight_map"),
    Row("a weight map that is a list", "model", _index(["a"]), _W, "weight_map"),
    Row("an index that is nested deeply", "model", _index(_DEEP), _W, "not valid JSON"),
    Row("an index of 17 MiB", "model", _index(b'{"a":"' + b" " * (17 << 20) + b'"}'), _W, "bytes, expected"),
    Row("a shard that is a folder", "model", _shard_folder, _S, "not beside it"),
    Row("a shard that links to nothing", "model", _linked("nowhere"), _S, "not beside it"),
    Row("a shard that links to a device", "model", _linked("/dev/zero"), _S, "not beside it"),
    Row("a shard that links to itself", "model", _linked("model-1.safetensors"), _S, "not beside it"),
    # Weights of PyTorch
    Row("a pickle that runs a command", "model", _pickled("pytorch_model.bin"), _W, "pytorch_model.bin"),
    Row("a newer pickle that runs a command", "model", _pickled("model.pth", protocol=4), _W, "model.pth"),
    Row(
        "a pickle in an archive that runs a command", "model", _pickled("pytorch_model.bin", zipped=True), _W, "system"
    ),
    Row("a pickle that evaluates a text", "model", _pickled("model.pt", _Evaluated, zipped=True), _W, "eval"),
    Row(
        "an archive with a name that leads out",
        "model",
        _torch_zip(
            ("../../data.pkl", b"\x80\2}."),
        ),
        _W,
        "",
    ),
    Row("an archive that is a bomb", "model", _torch_zip(("a/data.pkl", bytes(10**8))), _W, ""),
    Row("an archive without a program", "model", _torch_zip(("a/data/0", b"1234")), _W, ""),
    Row("a tar of PyTorch's first years", "model", _tar, _W, ""),
    Row(
        "an index of PyTorch that leads out",
        "model",
        _weights("pytorch_model.bin.index.json", b'{"weight_map":{"a":"../x.bin"}}'),
        _W,
        "names the shard",
    ),
    # Weights of Keras
    Row("a link to another file", "model", _h5(_elsewhere), _W, "link"),
    Row("a link to itself", "model", _h5(_soft), _W, "link"),
    Row("a group inside itself", "model", _h5(_cycle), _W, "second name"),
    Row("values of another file", "model", _h5(_external), _W, "another file"),
    Row("a virtual array", "model", _h5(_virtual), _W, "another file"),
    Row("a compressed array", "model", _h5(_bomb), _W, "compressed"),
    Row("an array of which nothing is stored", "model", _h5(_claim), _W, "declares"),
    Row("references in place of numbers", "model", _h5(_references), _W, "dtype"),
    Row("text called HDF5", "model", _weights("model.weights.h5", b"x" * 1000), _W, "not an HDF5 file"),
    # Settings of a model
    Row("code for the model", "model", _bert(auto_map={"AutoModel": "modeling_evil.Evil"}), _C, "never run"),
    Row("code of another repository", "model", _bert(auto_map={"AutoModel": "org/name--evil.Evil"}), _C, "never run"),
    Row("code for a pipeline", "model", _bert(custom_pipelines={"x": {"impl": "evil.Evil"}}), _C, "never run"),
    Row("a wish to trust code", "model", _bert(trust_remote_code=True), _C, "never run"),
    Row("a family that there is not", "model", _bert(model_type="evil"), _C, "'evil'"),
    Row("a family that is a path", "model", _bert(model_type="../../evil"), _C, "is not among"),
    Row("a family that is a list", "model", _bert(model_type=["bert"]), _C, "is not among"),
    Row("a billion layers", "model", _bert(num_hidden_layers=10**9), _C, "blocks"),
    Row("a width of a billion", "model", _bert(hidden_size=3 * 10**8), _W, "shape"),
    Row("a vocabulary of two billion", "model", _bert(vocab_size=2 * 10**9), _W, "shape"),
    Row("a width past all integers", "model", _bert(hidden_size=10**30), _C, "hidden_size"),
    Row("a width that is a text", "model", _bert(hidden_size="12"), _C, "hidden_size"),
    Row("a width that is true", "model", _bert(hidden_size=True), _C, "hidden_size"),
    Row("an epsilon that is no number", "model", _bert(layer_norm_eps=float("nan")), _C, "layer_norm_eps"),
    Row("an activation that is a path of code", "model", _bert(hidden_act="os.system"), _C, "os.system"),
    Row("architectures that are a number", "model", _bert(architectures=5), _C, "cannot be read"),
    Row("names of classes that are a number", "model", _bert(id2label=5), _C, "cannot be read"),
    Row("settings that are a list", "model", _raw("config.json", b"[]"), _W, "expected an object"),
    Row("settings that are nested deeply", "model", _raw("config.json", b'{"a":' + _DEEP + b"}"), _W, "not valid JSON"),
    Row("settings of 9 MiB", "model", _raw("config.json", b'{"a":"' + b" " * (9 << 20) + b'"}'), _W, "bytes, expected"),
    Row("settings with a NUL", "model", _raw("config.json", b"\0" * 100), _W, "not valid JSON"),
    Row("settings of pictures that are nonsense", "model", _vit, _C, ""),
    Row(
        "settings of pooling that are nonsense",
        "model",
        _raw("1_Pooling/config.json", b'{"pooling_mode_evil": 1}'),
        _C,
        "pooling_mode_evil",
    ),
    # Folders of jtl
    Row("a saved family that is a number", "model", _own(family=7), _C, "is not among"),
    Row("a saved configuration that is a list", "model", _own(config=[1]), _C, "cannot be read"),
    Row("a head that is a path of code", "model", _own(head={"kind": "os.system", "outputs": 2}), _C, "os.system"),
    Row("a head that is a text", "model", _own(head="evil"), _C, "cannot be read"),
    Row("a head with a parent", "model", _own(head={"kind": "Linear", "outputs": 2, "parent": 5}), _C, "parent"),
    Row("a head of a billion outputs", "model", _own(head={"kind": "Linear", "outputs": 10**9}), _W, "shape"),
    Row("a head of texts for outputs", "model", _own(head={"kind": "Linear", "outputs": "two"}), _C, "outputs"),
    Row("a field that a configuration has not", "model", _own_config(__class__="os.system"), _C, "__class__"),
    Row("two billion blocks", "model", _resnet, _C, "blocks"),
    # Tokenizers
    Row(
        "code for a tokenizer",
        "tokenizer",
        _words_settings(auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}),
        _C,
        "never run",
    ),
    Row(
        "code for a tokenizer, as a text",
        "tokenizer",
        _words_settings(auto_map="AutoTokenizer: tokenization_evil"),
        _C,
        "never run",
    ),
    Row(
        "a tokenizer that is valid JSON alone",
        "tokenizer",
        _words(lambda tree: {"a": [1, 2]}),
        _C,
        "cannot load a tokenizer",
    ),
    Row(
        "a tokenizer whose model is a number",
        "tokenizer",
        _words(lambda tree: tree.update(model=5)),
        _C,
        "cannot load a tokenizer",
    ),
    Row(
        "a tokenizer with ids past all tables",
        "tokenizer",
        _words(lambda tree: tree["model"]["vocab"].update(good=2**31 + 5)),
        _C,
        "ids",
    ),
    Row(
        "a tokenizer without its unknown word",
        "tokenizer",
        _words(lambda tree: tree["model"].update(vocab={"x": 0})),
        _C,
        "",
    ),
    Row("a tokenizer that is nested deeply", "tokenizer", _words(lambda tree: _DEEP), _C, "cannot load a tokenizer"),
    Row(
        "a tokenizer's settings that are a number",
        "tokenizer",
        _words_settings(added_tokens_decoder=5),
        _C,
        "cannot load a tokenizer",
    ),
    # Adapters
    Row(
        "a pattern that searches for years",
        "adapter",
        _peft(alpha_pattern={"(([a-z])+.)+[A-Z]": 8}),
        _C,
        "repeats a group",
    ),
    Row("a pattern that cannot be read", "adapter", _peft(alpha_pattern={"(": 8}), _C, "no regular expression"),
    Row("a scale that is a text", "adapter", _peft(lora_alpha="8"), _C, "lora_alpha"),
    Row("an adapter that is a pickle", "adapter", _peft_pickle, _S, "adapter_model.safetensors"),
    Row("an adapter of another kind", "adapter", _peft(peft_type="EVIL"), _C, "EVIL"),
    Row("an adapter of other tensors", "adapter", _peft(seeds.safetensors({"a": np.ones(3, "f4")})), _W, "no place"),
    # Data
    Row("a member that leads out", "data", _zip(("../../escaped.txt", "x")), _D, "leads out"),
    Row("a member by an absolute path", "data", _zip(("/tmp/escaped.txt", "x")), _D, "leads out"),
    Row("a member that is a link", "data", _zip(_link()), _D, "is a link"),
    Row("a member that is a bomb", "data", _zip(("a/bomb.txt", b"a" * (8 << 20))), _D, "times as many"),
    Row("members that overlap", "data", _overlapping, _D, "overlap"),
    Row("an encrypted member", "data", _zip(change=_encrypted), _D, "encrypted"),
    Row("an archive that is cut short", "data", _zip(change=lambda data: data[:-30]), _D, ""),
    Row(
        "a compressed table that is a bomb",
        "data",
        _file("data.csv.gz", gzip.compress(b"text,label\n" + b"a" * (64 << 20), 9)),
        _D,
        "unpacks to",
    ),
    Row("a Parquet file of thirty million rows", "data", _parquet, _D, "declares"),
    Row("text called Parquet", "data", _file("data.parquet", b"PAR1" * 100), _D, "cannot be read"),
    Row("a line that is nested deeply", "data", _file("data.jsonl", _DEEP + b"\n"), _D, "row 1"),
    Row("a picture that is a bomb", "data", _picture_bomb, _D, "pixels"),
    Row("a pipe among the texts", "data", _pipe_in_folder, _D, "pipe"),
    Row("a pipe for a table", "data", _pipe, _D, "pipe"),
    Row("a device among the texts", "data", _device, _D, "device"),
)


def replay(row: Row, place: Path) -> dict:
    """Make one input and read it; what happened."""
    from jtl.errors import JtlError

    folder = place / "folder"
    folder.mkdir(parents=True)
    path = row.make(folder) or folder
    before, size = _listed(place), sum(file.stat().st_size for file in _listed(folder) if file.is_file())
    load = LOADERS[row.load]
    found = {"name": row.name, "bytes": size}
    tracemalloc.start()
    started = time.process_time()
    try:
        fuzz._guarded(load, path, JtlError)
        found |= {"error": "nothing", "kinds": [], "says": ""}
    except JtlError as error:
        found |= {"error": type(error).__name__, "says": str(error)}
    except BaseException as error:
        found |= {"error": repr(error), "says": ""}
    found |= {"seconds": time.process_time() - started, "peak": tracemalloc.get_traced_memory()[1]}
    tracemalloc.stop()
    return found | {"appeared": [str(file) for file in _listed(place) - before]}


def _listed(folder):
    return set(folder.rglob("*"))


def main(place: Path) -> None:
    """Read all of them."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warm = place / "warm"  # what is imported when it is first needed takes longer than any file may
    _files(warm / "model", seeds.transformers())
    _files(warm / "adapter", seeds.adapter())
    _tokenizer(warm / "model")
    _model(warm / "model")
    _adapter(warm / "adapter")
    for i, files in enumerate(seeds.tables()):
        _files(warm / f"data{i}", files)
        _data(next((warm / f"data{i}").iterdir()))
    from jtl.models import registry
    from jtl.weights.tensors import open_tensors

    registry.families()

    _files(warm / "keras", seeds.keras())
    open_tensors(warm / "keras")
    for signal_ in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signal_, fuzz._alarm)
    sys.addaudithook(fuzz._listen)
    for number, row in enumerate(ROWS):
        print(json.dumps(replay(row, place / str(number))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

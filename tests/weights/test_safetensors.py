"""Tensors come back as they were written, and a checkpoint that is not whole is refused by name."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights.safetensors import INDEX, SINGLE, read_tensors, shapes, write_tensors

DTYPES = [
    *(np.dtype(name) for name in ("?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8")),
    *(np.dtype(name) for name in (">i4", ">f4", ">f8")),
    np.dtype(ml_dtypes.bfloat16),
]

# Each of these but the first gives a view that does not lie in memory in C order.
LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1] if x.ndim else x,
    "strided": lambda x: x[..., ::2] if x.ndim else x,
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape)),
}


@st.composite
def arrays(draw):
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    dtype = draw(st.sampled_from(DTYPES))
    count = int(np.prod(shape))
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype.kind == "b":
        data = bytes(byte % 2 for byte in data)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](np.frombuffer(data, dtype).reshape(shape))


def _bits(array: np.ndarray) -> bytes:
    """The values in native order, so that NaN equals itself."""
    return array.astype(array.dtype.newbyteorder("=")).tobytes()


@given(tensors=st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), arrays(), max_size=3))
def test_what_is_written_is_read(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("round") / SINGLE
    write_tensors(path, tensors)
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype.newbyteorder("=")
        assert _bits(found[name]) == _bits(tensor)
    assert shapes(path) == {name: (x.shape, x.dtype.name) for name, x in found.items()}


def test_a_reader_in_a_fresh_process_knows_bfloat16(tmp_path):
    write_tensors(tmp_path / SINGLE, {"w": np.ones(2, ml_dtypes.bfloat16)})
    code = "import sys; from jtl.weights.safetensors import *; print(read_tensors(sys.argv[1])['w'].dtype)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "bfloat16"


def test_arrays_belong_to_the_reader_and_not_to_the_file(tmp_path):
    path = tmp_path / SINGLE
    write_tensors(path, {"w": np.ones(1000)})
    found = read_tensors(path)["w"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert (found == 1).all()
    found[:] = 2


# Writing


@pytest.mark.parametrize("dtype", [np.complex128, np.dtype("U3"), object, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_a_dtype_that_could_not_be_read_again_is_not_written(tmp_path, dtype):
    with pytest.raises(WeightsError, match="the tensor 'x' has dtype"):
        write_tensors(tmp_path / SINGLE, {"x": np.zeros(2, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_kept_in_the_header(tmp_path):
    write_tensors(tmp_path / SINGLE, {"x": np.zeros(2)}, metadata={"format": "np"})
    assert b'"__metadata__":{"format":"np"}' in (tmp_path / SINGLE).read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / SINGLE
    write_tensors(path, {"x": np.zeros(2)})

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, {"x": np.ones(2)})
    assert list(tmp_path.iterdir()) == [path]
    assert read_tensors(path)["x"].sum() == 0


# Where the weights are


def test_a_file_a_folder_and_an_index_are_all_checkpoints(tmp_path):
    write_tensors(tmp_path / SINGLE, {"x": np.zeros(2)})
    assert read_tensors(tmp_path).keys() == read_tensors(str(tmp_path / SINGLE)).keys() == {"x"}
    _shard(tmp_path)
    assert read_tensors(tmp_path / INDEX).keys() == {"a", "b", "c"}
    assert read_tensors(tmp_path).keys() == {"x"}


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", INDEX])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(SourceNotFoundError, match=re.escape(str(tmp_path / name))):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "it holds: nothing; check the path"),
        (
            ["config.json", "pytorch_model.bin"],
            "pytorch_model.bin; its weights are in another format: convert them",
        ),
        (["other.safetensors"], "it holds: other.safetensors; give the path of the one"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path, held, message):
    for name in held:
        (tmp_path / name).touch()
    with pytest.raises(SourceNotFoundError, match=re.escape(message)):
        read_tensors(tmp_path)


# Damage


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / SINGLE
    write_tensors(path, {"x": np.arange(8.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or not a safetensors file: .*; fetch it"):
        read_tensors(tmp_path)


def _raw(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(begin: int, end: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"x": _entry(0, 2)}, b"123"),
        ({"x": _entry(0, 2), "y": _entry(1, 3)}, b"123"),
        ({"x": _entry(1, 3)}, b"123"),
        ({"x": _entry(0, 2) | {"shape": [3]}}, b"12"),
        ({"x": _entry(0, 2, "Q9")}, b"12"),
        (["x"], b""),
    ],
    ids=["trailing bytes", "overlap", "hole", "wrong shape", "unknown dtype", "no map"],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, header, data):
    _raw(tmp_path / SINGLE, header, data)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or not a safetensors file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("read", [read_tensors, shapes])
def test_eight_bit_floats_are_refused_by_name(tmp_path, dtype, read):
    _raw(tmp_path / SINGLE, {"w": _entry(0, 2, dtype)}, b"12")
    with pytest.raises(WeightsError, match=f"the tensor 'w' has dtype {dtype}, expected one of BOOL"):
        read(tmp_path)


# Shards


def _shard(folder: Path, index: object = None) -> None:
    """A checkpoint of tensors a, b and c in two shards."""
    write_tensors(folder / "model-1.safetensors", {"a": np.full(2, 1.0), "b": np.full(2, 2.0)})
    write_tensors(folder / "model-2.safetensors", {"c": np.full(2, 3.0)})
    shards = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards} if index is None else index))


def test_shards_are_read_as_one(tmp_path):
    _shard(tmp_path)
    found = read_tensors(tmp_path)
    assert {name: float(x[0]) for name, x in found.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert shapes(tmp_path) == {name: ((2,), "float64") for name in "abc"}


def test_a_missing_shard_is_named(tmp_path):
    _shard(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(SourceNotFoundError, match=r"not beside it: model-2\.safetensors; fetch"):
        read_tensors(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    _shard(tmp_path)
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model-2\.safetensors is damaged"):
        read_tensors(tmp_path)


def test_a_tensor_that_its_shard_lacks(tmp_path):
    _shard(tmp_path)
    write_tensors(tmp_path / "model-1.safetensors", {"a": np.zeros(2)})
    with pytest.raises(WeightsError, match=r"model-1\.safetensors lacks tensors .*: b; fetch"):
        read_tensors(tmp_path)


def test_a_tensor_that_the_index_lacks(tmp_path):
    _shard(tmp_path)
    write_tensors(tmp_path / "model-2.safetensors", {"c": np.zeros(2), "d": np.zeros(2)})
    with pytest.raises(WeightsError, match=r"model-2\.safetensors holds tensors .* not place there: d; "):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model-1.safetensors", "sub/model-1.safetensors", "/etc/hostname", "..", "", "a\\b", "C:a", "a\0"],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    _shard(tmp_path)
    _shard(folder, {"weight_map": {"a": name}})
    with pytest.raises(WeightsError, match=re.escape(f"names the shard {name!r}")):
        read_tensors(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    _shard(tmp_path, index)
    message = "holds a list, expected an object" if index == [] else 'has no "weight_map" from tensor names to shard'
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\xfd"])
def test_an_index_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(WeightsError, match="is not valid JSON"):
        read_tensors(tmp_path)

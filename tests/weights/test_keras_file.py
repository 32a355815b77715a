"""Keras's HDF5 files: what is read, and what is refused by name."""

import sys

import numpy as np
import pytest

from jtl.errors import MissingExtraError, SourceNotFoundError, WeightsError
from jtl.weights import keras_file

h5py = pytest.importorskip("h5py")


@pytest.fixture
def file(tmp_path):
    """A path, and the open file that a test fills."""
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as handle:
        yield path, handle


def _refused(file, message):
    path, handle = file
    handle.close()
    with pytest.raises(WeightsError, match=message) as caught:
        keras_file.opened(path)
    assert str(path) in str(caught.value)


def test_each_array_is_read_under_its_path(file):
    path, handle = file
    rng = np.random.default_rng(0)
    arrays = {
        "block1/layers/conv2d/vars/0": rng.normal(size=(3, 3, 2, 4)).astype("f4"),
        "block1/layers/conv2d/vars/1": rng.normal(size=4).astype("f2"),
        "dense/vars/0": rng.integers(0, 9, (2, 2)).astype("i8"),
        "scalar": np.float64(0.5),
        "big_endian": np.arange(3, dtype=">f4"),
        "none": np.zeros((0, 3), "f4"),
        "flags": np.array([True, False]),
    }
    for name, value in arrays.items():
        handle[name] = value
    handle.create_dataset("chunked", data=np.arange(10.0), chunks=(3,))
    handle.create_group("pool/vars").attrs["name"] = "empty"
    handle.close()
    signatures, read = keras_file.opened(path)
    assert set(signatures) == {name.replace("/", ".") for name in arrays} | {"chunked"}
    for name, value in arrays.items():
        dotted = name.replace("/", ".")
        got = read(dotted)
        np.testing.assert_array_equal(got, value)
        assert (got.shape, got.dtype.name) == signatures[dotted]
        assert got.dtype.isnative
        assert got.dtype == np.asarray(value).dtype.newbyteorder("=")
    np.testing.assert_array_equal(read("chunked"), np.arange(10.0))
    with pytest.raises(KeyError):
        read("absent")


def test_the_names_are_sorted(file):
    path, handle = file
    for name in ("b", "a/1", "a/0"):
        handle[name] = np.zeros(2)
    handle.close()
    assert list(keras_file.opened(path)[0]) == ["a.0", "a.1", "b"]


def test_links_are_refused(file):
    _, handle = file
    handle["real"] = np.zeros(3)
    handle["group/soft"] = h5py.SoftLink("/real")
    _refused(file, "/group/soft is a link")


def test_links_to_other_files_are_refused(file, tmp_path):
    _, handle = file
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.zeros(3)
    handle["outside"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/secret")
    _refused(file, "/outside is a link")


def test_an_array_with_two_names_is_refused(file):
    _, handle = file
    handle["a"] = np.zeros(3)
    handle["b"] = handle["a"]
    _refused(file, "/b is a second name")


def test_a_group_within_itself_is_refused(file):
    _, handle = file
    handle.create_group("a/b")
    handle["a/b/again"] = handle["a"]
    _refused(file, "/a/b/again is a second name")


def test_the_root_within_itself_is_refused(file):
    _, handle = file
    handle["a/root"] = handle["/"]
    _refused(file, "/a/root is a second name")


def test_virtual_arrays_are_refused(file, tmp_path):
    _, handle = file
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.zeros(3)
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "data", (3,))
    handle.create_virtual_dataset("virtual", layout)
    _refused(file, "/virtual takes its values from another file")


def test_arrays_in_other_files_are_refused(file, tmp_path):
    _, handle = file
    (tmp_path / "raw").write_bytes(bytes(80))
    handle.create_dataset("external", (10,), "f8", external=[(str(tmp_path / "raw"), 0, 80)])
    _refused(file, "/external takes its values from another file")


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}])
def test_compressed_arrays_are_refused(file, options):
    file[1].create_dataset("zip", data=np.zeros(1000), **options)
    _refused(file, "/zip is compressed")


@pytest.mark.parametrize("options", [{}, {"chunks": (1000,)}])
def test_an_array_that_is_larger_than_its_file_is_refused(file, options):
    file[1].create_dataset("bomb", (10**12,), "f8", **options)
    _refused(file, "/bomb declares 8000000000000 bytes and holds 0")


@pytest.mark.parametrize(
    "value",
    [
        "text",
        np.array([b"ab", b"c"]),
        np.zeros(2, [("x", "f4"), ("y", "f4")]),
        np.zeros(2, "c8"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(file, value):
    file[1]["odd"] = value
    _refused(file, "/odd has the dtype")


def test_ragged_arrays_are_refused(file):
    handle = file[1]
    handle.create_dataset("odd", (2,), h5py.vlen_dtype("f4"))
    _refused(file, "/odd has the dtype object")


def test_references_are_refused(file):
    handle = file[1]
    handle.create_dataset("odd", data=[handle.ref], dtype=h5py.ref_dtype)
    _refused(file, "/odd has the dtype object")


def test_an_array_without_shape_is_refused(file):
    file[1]["odd"] = h5py.Empty("f4")
    _refused(file, "/odd has no shape")


def test_a_named_type_is_refused(file):
    file[1]["type"] = np.dtype("f4")
    _refused(file, "/type is neither a group nor an array")


def test_two_paths_with_one_name_are_refused(file):
    file[1]["a/b"] = np.zeros(2)
    file[1]["a.b"] = np.zeros(2)
    _refused(file, "has the same name with dots as /a")


def test_a_deep_file_is_read(file):
    path, handle = file
    group = handle
    for _ in range(1500):
        group = group.create_group("g")
    group["x"] = np.zeros(1)
    handle.close()
    assert list(keras_file.opened(path)[0]) == ["g." * 1500 + "x"]


@pytest.mark.parametrize("cut", [0, 7, 600, -1])
def test_damaged_files_are_refused(file, cut):
    path, handle = file
    for i in range(20):
        handle[f"layer_{i}/vars/0"] = np.full(100, i, "f4")
    handle.close()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"damaged or not an HDF5 file.*fetch it again"):
        keras_file.opened(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(b"PK\x03\x04" + bytes(4000))
    with pytest.raises(WeightsError, match="damaged or not an HDF5 file"):
        keras_file.opened(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_give_arrays_or_jtls_own_errors(file, seed):
    path, handle = file
    for i in range(6):
        handle[f"layer_{i}/vars/0"] = np.full(10, i, "f4")
    handle.close()
    clean = path.read_bytes()
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(clean), 25):
        damaged = bytearray(clean)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged))
        try:
            signatures, read = keras_file.opened(path)
            assert all(read(name).shape == signature.shape for name, signature in signatures.items())
        except WeightsError:
            continue


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SourceNotFoundError, match="no such file"):
        keras_file.opened(tmp_path / "absent.h5")


def test_without_h5py_the_error_names_the_extra(file, monkeypatch):
    path, handle = file
    handle.close()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r'h5py.*pip install "jtl\[keras\]"'):
        keras_file.opened(path)

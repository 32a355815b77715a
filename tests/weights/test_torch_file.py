"""PyTorch's files are read as torch reads them, and one that asks for more than tensors is refused and runs nothing."""

import collections
import io
import pickletools
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights.torch_file import arrays, opened, read_tensors, shapes, views

from . import torch_bytes as tb

ONES = np.ones(3, "f4").tobytes()
VECTOR = tb.program(tb.mapping({"w": tb.vector("0", 3)}))
ZIPPED = tb.zipped(VECTOR, {"0": ONES})
LEGACY = tb.legacy(tb.program(tb.mapping({"w": tb.vector("0", 3, legacy=True)})), {"0": (3, ONES)})
LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


def _read(data):
    file = io.BytesIO(data)
    return arrays(file, views(file))


def _refused(data, message):
    with pytest.raises(WeightsError, match=message):
        _read(data)


def _run(value, message):
    """A program with a value beside a tensor is refused."""
    _refused(tb.zipped(tb.program(value), {"0": ONES}), message)


# As torch reads them


def _save(torch, value, path, zipped, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)


def _equal(found, tensors):
    """Bit for bit, so that NaN equals itself."""
    import torch

    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        expected = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        assert found[name].tobytes() == expected.view(torch.uint8).numpy().tobytes(), name


def _check(path):
    """All three ways to read a file against torch's."""
    import torch

    value = torch.load(path, weights_only=False)  # of protocols 2 to 5, and written by the test
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    found = read_tensors(path)
    _equal(found, tensors)
    signatures, read = opened(path)
    _equal({name: read(name) for name in signatures}, tensors)
    assert shapes(path) == signatures == {name: (x.shape, x.dtype.name) for name, x in found.items()}
    return found


def _tensor(torch, generator, dtype, shape):
    """Random bits."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, itemsize), generator=generator)
    return data.to(torch.uint8).view(dtype).reshape(shape)


def _draw(torch, seed):
    """A random state dict: dtypes, shapes, views of one another and of nothing, parameters, and other values."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tensors = collections.OrderedDict()
    for index in range(rng.integers(1, 8)):
        dtype = getattr(torch, DTYPES[rng.integers(len(DTYPES))])
        shape = tuple(int(size) for size in rng.integers(0 if index % 4 == 3 else 1, 5, rng.integers(0, 5)))
        tensor = _tensor(torch, generator, dtype, shape)
        variants = [
            tensor,
            tensor.permute(rng.permutation(len(shape)).tolist()),
            tensor.expand(2, 3, *shape),
            tensor[..., 1::2] if shape else tensor,
            tensor[1:] if shape else tensor,
            torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
            *(other for other in tensors.values() if isinstance(other, torch.Tensor)),
        ]
        for name in range(rng.integers(1, 4)):
            tensors[f"layer.{index}.{name}"] = variants[rng.integers(len(variants))]
    others = [3, -70000, 2**40, 0.5, "text ü", None, True, [1, "a"], (1, 2, 3, 4), {"a": 1}, {1: 2}, torch.float32]
    for index in range(rng.integers(0, 4)):
        tensors[f"other.{index}"] = others[rng.integers(len(others))]
    return tensors


@pytest.mark.torch
@LAYOUTS
@pytest.mark.parametrize("seed", range(40))
def test_random_state_dicts_are_read_as_torch_reads_them(tmp_path, seed, zipped):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    _save(torch, _draw(torch, seed), path, zipped, 2 + seed % 4)
    _check(path)


@pytest.mark.torch
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype(tmp_path, dtype, zipped):
    torch = pytest.importorskip("torch")
    tensor = _tensor(torch, torch.Generator().manual_seed(0), getattr(torch, dtype), (3, 4))
    path = tmp_path / f"ä model.{dtype}.pt"  # the name of the folder in the archive
    _save(torch, {"x": tensor, "y": tensor.T[1:]}, path, zipped)
    _check(path)


@pytest.mark.torch
@LAYOUTS
def test_the_state_dict_of_modules(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(5, 6, 2), torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(*layers)
    _save(torch, model.state_dict(), tmp_path / "model.bin", zipped)
    assert _check(tmp_path / "model.bin")["1.num_batches_tracked"].shape == ()


@pytest.mark.torch
@LAYOUTS
def test_tied_tensors_and_views_share_memory(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    _save(torch, {"a": base, "b": base, "c": base.T, "d": base[1]}, tmp_path / "m.pt", zipped)
    found = _check(tmp_path / "m.pt")
    assert all(np.shares_memory(found["a"], found[name]) for name in "bcd")
    found["a"][1] = 7
    assert (found["d"] == 7).all()
    assert (found["c"][:, 1] == 7).all()


@pytest.mark.torch
@LAYOUTS
def test_a_model_under_a_usual_key(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "best": torch.tensor(0.5),
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    _save(torch, checkpoint, tmp_path / "m.pt", zipped)
    _equal(read_tensors(tmp_path / "m.pt"), model.state_dict())


@pytest.mark.torch
@LAYOUTS
def test_the_bytes_written_here_are_those_of_torch(zipped):
    """Without the memo, which torch fills and, for one tensor, does not use."""
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    _save(torch, {"w": torch.arange(6.0).reshape(2, 3)[:, 1:]}, file, zipped)
    data = file.getvalue()
    key = "0" if zipped else re.search(rb"\d{9,}", data)[0].decode()
    code = tb.program(tb.mapping({"w": tb.tensor(tb.storage(key, 6, legacy=not zipped), (2, 2), (3, 1), 1)}))
    values = np.arange(6, dtype="f4").tobytes()
    if zipped:
        theirs, ours = zipfile.ZipFile(file), zipfile.ZipFile(io.BytesIO(tb.zipped(code, {"0": values})))
        assert _without_memo(theirs.read("archive/data.pkl")) == ours.read("archive/data.pkl")
        assert {name: theirs.read(name) for name in ours.namelist()[1:]} == {
            name: ours.read(name) for name in ours.namelist()[1:]
        }
    else:
        assert _without_memo(data) == tb.legacy(code, {key: (6, values)})


def _without_memo(data):
    """Programs without the opcodes that fill the memo, and what follows the last one."""
    stream, kept = io.BytesIO(data), b""
    while stream.tell() < len(data) and data[stream.tell()] == 0x80:
        ops = list(pickletools.genops(stream))
        ends = [start for _, _, start in ops[1:]] + [stream.tell()]
        kept += b"".join(data[a:b] for (op, _, a), b in zip(ops, ends, strict=True) if "PUT" not in op.name)
    return kept + stream.read()


# Layouts


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zip", "legacy"])
def test_both_layouts_are_read_from_bytes_and_from_files(tmp_path, data):
    assert (_read(data)["w"] == 1).all()
    path = tmp_path / "m.pth"
    path.write_bytes(data)
    assert shapes(path) == shapes(str(path)) == {"w": ((3,), "float32")}
    first, second = (opened(path)[1]("w") for _ in range(2))
    first[:] = 2
    assert (second == 1).all()


def test_an_archive_of_another_writer_is_read():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path, data in [("m/data.pkl", VECTOR), ("m/data/0", ONES)]:
            archive.writestr(path, data)
    assert (_read(file.getvalue())["w"] == 1).all()


def test_sizes_in_a_field_of_64_bit_numbers_are_read():
    held = tb.members(VECTOR, {"0": ONES})
    data = next(member for member in held if member.path == b"archive/data/0")
    data.extra = struct.pack("<2H2s2H2Q", 9, 2, b"ab", 1, 16, 12, 12)
    data.size = data.packed = 0xFFFFFFFF
    assert (_read(tb.archive(held))["w"] == 1).all()
    data.extra = data.extra[:-1]
    _refused(tb.archive(held), "lacks its 64-bit sizes")


def test_a_part_of_a_storage_in_the_legacy_layout():
    part = tb.group(tb.text("7"), tb.number(2), tb.number(3))
    held = tb.storage("0", 6, legacy=True, part=part)
    values = np.arange(6, dtype="f4")

    def read(tensor):
        return _read(tb.legacy(tb.program(tb.mapping({"w": tensor})), {"0": (6, values.tobytes())}))["w"]

    assert read(tb.tensor(held, (3,), (1,))).tolist() == [2, 3, 4]
    assert read(tb.tensor(held, (2,), (1,), 1)).tolist() == [3, 4]
    with pytest.raises(WeightsError, match="leads past the end of the storage '0', which has 3 elements"):
        read(tb.tensor(held, (3,), (1,), 1))
    far = tb.group(tb.text("7"), tb.number(2), tb.number(5))
    with pytest.raises(WeightsError, match="refers to a part that leads past the end of the storage '0'"):
        read(tb.tensor(tb.storage("0", 6, legacy=True, part=far), (3,), (1,)))


def test_what_python_2_and_old_torch_wrote():
    """Text as bytes, long sizes, a memo from 1, an OrderedDict with its items, and a tensor of four arguments."""
    key = b"U\x010"
    held = tb.group(b"U\x07storage", tb.name("torch", "FloatStorage"), key, b"U\x03cpu", b"\x8a\x01\x03", tb.NONE)
    arguments = tb.group(held + tb.REFERENCE, tb.number(0), b"\x8a\x01\x03\x85", b"\x8a\x01\x01\x85")
    old = tb.name("torch._utils", "_rebuild_tensor") + arguments + tb.REDUCE
    items = b"]q\x01(" + b"]q\x02(U\x01w" + old + b"e" + b"e\x85"
    code = tb.program(tb.name("collections", "OrderedDict") + items + tb.REDUCE)
    assert (_read(tb.legacy(code, {"0": (3, ONES)}))["w"] == 1).all()


def test_bools_that_are_neither_true_nor_false_are_true():
    code = tb.program(tb.mapping({"w": tb.vector("0", 3, "BoolStorage")}))
    assert _read(tb.zipped(code, {"0": b"\0\1\2"}))["w"].view("u1").tolist() == [0, 1, 1]


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_refused(data):
    for keep in range(len(data)):
        with pytest.raises(WeightsError):
            _read(data[:keep])


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zip", "legacy"])
def test_a_file_that_changes_before_a_tensor_is_read(tmp_path, data):
    path = tmp_path / "m.pth"
    path.write_bytes(data)
    signatures, read = opened(path)
    with pytest.raises(WeightsError, match=r"m\.pth: it has no tensor 'v'"):
        read("v")
    path.write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"m\.pth: it changed while it was read: read it again"):
        read("w")
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=r"no such file: .*m\.pth"):
        read("w")
    assert list(signatures) == ["w"]


def test_a_path_without_a_file(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"no such file: .*absent\.pth"):
        read_tensors(tmp_path / "absent.pth")
    with pytest.raises(SourceNotFoundError, match="is a folder, expected a file"):
        read_tensors(tmp_path)


def test_an_error_names_the_file(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(LEGACY[:-1])
    for function in (read_tensors, shapes, opened):
        with pytest.raises(WeightsError, match=r"m\.bin: 12 bytes are expected at byte \d+, found 11: the file is "):
            function(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"version https://git-lfs", b"<html>", struct.pack("<Q", 2) + b"{}", b"PK\5\6" + bytes(18), bytes(300)],
    ids=["empty", "pointer", "page", "safetensors", "empty archive", "zeros"],
)
def test_another_format_is_named_by_how_it_begins(data):
    _refused(data, re.escape(f"it is no file of torch.save, it begins with {data[:16]!r}: check"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(257) + b"ustar" + bytes(300), "tar layout of torch 0.1"),
        (tb.legacy(VECTOR, {}, magic=tb.program(tb.number(7))), "a pickle, but not one that torch.save wrote"),
        (
            tb.legacy(VECTOR, {}, version=tb.program(tb.number(7))),
            "has the version 7 of the legacy layout, expected 1001",
        ),
        (tb.legacy(VECTOR, {}, little=tb.FALSE), "big-endian machine, which is not read: load it with torch on"),
        (tb.legacy(VECTOR, {}), "refers to the storage '0' and does not hold it"),
        (tb.legacy(VECTOR, {"0": (2, ONES)}), "its storage '0' has 2 elements, expected 3"),
        (tb.legacy(VECTOR, {"0": (-1, ONES)}), "its storage '0' has 18446744073709551615 elements, expected 3"),
        (
            tb.legacy(VECTOR, {"0": (3, ONES), "1": (3, ONES)}),
            "lists a storage twice, or one that it does not refer to",
        ),
        (
            tb.legacy(VECTOR, {"0": (3, ONES)}, keys=tb.program(tb.sequence(tb.text("0"), tb.text("0")))),
            "lists a storage twice",
        ),
        (tb.legacy(VECTOR, {"0": (3, ONES)}, keys=tb.program(tb.sequence(tb.NONE))), "lists a storage twice, or one"),
        (tb.legacy(VECTOR, {"0": (3, ONES)}, keys=tb.program(tb.NONE)), "refers to the storage '0' and does not hold"),
    ],
)
def test_a_legacy_file_that_contradicts_itself(data, message):
    _refused(data, message)


# Archives


def _archive(change, **settings):
    """The archive of one vector after `change(members by name without folder)`."""
    held = {member.path.decode().partition("/")[2]: member for member in tb.members(VECTOR, {"0": ONES})}
    change(held)
    return tb.archive(list(held.values()), **settings)


def _set(name, **fields):
    return lambda held: [setattr(held[name], field, value) for field, value in fields.items()]


def _add(path, data=b""):
    return lambda held: held.update({path: tb.Member(path, data)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("data/0", method=8), "'archive/data/0' is compressed, which torch.save never does"),
        (_set("data.pkl", packed=3), "'archive/data.pkl' is compressed"),
        (_set("data.pkl", flags=0x809), "'archive/data.pkl' is encrypted"),
        (_set("data/0", flags=0x2808), "'archive/data/0' is encrypted"),
        (_add("archive/data/0", ONES), "'archive/data/0' twice or in a second folder"),
        (_add("other/data/1", ONES), "'other/data/1' twice or in a second folder"),
        (_add("archive/code/__torch__.py"), r"it is a TorchScript archive, which holds a program \('archive/code"),
        (_add("archive/constants.pkl"), "it is a TorchScript archive"),
        (_add("archive/data/../0"), "'archive/data/../0', which no file of torch.save has"),
        (_add("archive/data/a/0"), "'archive/data/a/0', which no file"),
        (_add("archive/.data/../../x"), "which no file"),
        (_add("archive/data/a\\0"), "which no file"),
        (_add("/etc/passwd"), "'/etc/passwd', which no file"),
        (_add("archive/data/"), "'archive/data/', which no file"),
        (_add("data.pkl"), "'data.pkl', which no file"),
        (lambda held: held.pop("data.pkl"), "zip archive without data.pkl"),
        (lambda held: held.pop("data/0"), "refers to the storage '0' and does not hold it"),
        (_set("byteorder", data=b"big", size=3, packed=3), "written on a big-endian machine"),
        (_set("byteorder", data=b"middle"), "its byteorder is b'middle', expected b'little'"),
        (_set("data/0", data=ONES[:-1], size=11, packed=11), "its storage '0' has 11 bytes, expected 12"),
        (_set("data/0", size=13, packed=13), "'data/0' is not where its directory says"),
        (_set("data/0", size=2**20, packed=2**20), "'data/0' overlaps what lies behind it"),
        (_set("data/0", size=2**32 - 1, packed=2**32 - 1), "lacks its 64-bit sizes"),
        (_set("data/0", place=0), "overlaps what lies behind it"),
        (_set("data/0", place=2**32 - 2), "overlaps what lies behind it"),
        (_set("version", place=3), "overlaps what lies behind it"),
        (_set("data/0", local_path=b"archive/data/1"), "'data/0' is not where its directory says"),
    ],
)
def test_an_archive_that_torch_would_not_write(change, message):
    _refused(_archive(change), message)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    "end",
    [{"count": 3}, {"count": 5}, {"count": 60000}, {"length": 9}, {"place": 0}, {"disk": 1}, {"comment": 1}],
    ids=str,
)
def test_a_directory_that_is_not_what_its_end_says(end, wide):
    _refused(_archive(lambda held: None, wide=wide, **end), "the file is damaged, fetch it again")


def test_a_second_directory_that_contradicts_the_first():
    data = bytearray(ZIPPED)
    data[-12:-10] = b"\1\0"
    _refused(bytes(data), "the two directories of this zip archive contradict each other")
    data[-12:-10] = b"\xff\xff"  # says only that the other one counts
    assert (_read(bytes(data))["w"] == 1).all()


@pytest.mark.parametrize("data", [b"\0" + ZIPPED, ZIPPED + b"\0", ZIPPED + ZIPPED], ids=["before", "behind", "twice"])
def test_bytes_around_an_archive_are_refused(data):
    with pytest.raises(WeightsError):
        _read(data)


# What is the model

W = tb.vector("0", 3)
ITEM = tb.mapping({"w": W})


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state", "model_state_dict", "module", "state_dict_ema"]
)
def test_each_usual_key(wrapper):
    other = tb.mapping({"lr": b"G" + struct.pack(">d", 0.1)})
    value = tb.mapping({"epoch": tb.number(3), "optimizer": other, wrapper: ITEM, "best": W})
    assert list(_read(tb.zipped(tb.program(value), {"0": ONES}))) == ["w"]


def test_averaged_tensors_are_the_second_choice():
    value = tb.mapping({"state_dict_ema": tb.mapping({"average": W}), "state_dict": ITEM})
    assert list(_read(tb.zipped(tb.program(value), {"0": ONES}))) == ["w"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tb.mapping({"model": ITEM, "state_dict": ITEM}), "tensors under each of 'state_dict', 'model', expected one"),
        (
            tb.mapping({"net": ITEM, "epoch": tb.number(3)}),
            r"no tensors under its keys \('net', 'epoch'\) nor under 'state_",
        ),
        (tb.mapping({"model": tb.mapping({"net": ITEM})}), r"no tensors under its keys \('model'\)"),
        (tb.mapping({}), r"no tensors under its keys \(none\)"),
        (tb.mapping({f"{i}": tb.NONE for i in range(9)}), r"'6', '7', \.\.\.\)"),
        (tb.mapping({"k" * 99: tb.NONE}), "'k{40}'\\.\\.\\."),
        (tb.mapping({"w": W, "x": ITEM}), "it holds others within its entry 'x'"),
        (tb.mapping({"w": W, "x": tb.sequence(W)}), "it holds others within its entry 'x'"),
        (tb.mapping({"w": W, "x": tb.group(W)}), "it holds others within its entry 'x'"),
        (b"}(" + tb.number(1) + W + tb.text("w") + W + b"u", "tensors under keys that are not text"),
        (W, "it holds a Tensor, expected a dict of tensors: save a dict of tensors, model.state_dict"),
        (tb.sequence(W), "it holds a list, expected a dict"),
        (tb.NONE, "it holds a NoneType, expected a dict"),
        (tb.storage("0", 3), "it holds a Storage, expected a dict"),
    ],
)
def test_a_file_whose_tensors_have_no_clear_names(value, message):
    _run(value, message)


def test_the_metadata_of_a_state_dict_is_passed_over():
    metadata = tb.mapping({"_metadata": tb.mapping({"": tb.mapping({"version": tb.number(2)})}, tb.ordered())})
    value = tb.mapping({"w": W}, tb.ordered()) + metadata + tb.BUILD
    assert list(_read(tb.zipped(tb.program(value), {"0": ONES}))) == ["w"]


# Tensors


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4,), (1,), 0),
        ((3,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((2,), (2**62,), 0),
        ((1,), (1,), 2**62),
        ((2**58,), (1,), 0),
    ],
)
def test_a_tensor_that_leads_past_the_end_of_its_storage(shape, strides, offset):
    message = re.escape(
        f"of shape {shape} with strides {strides} at {offset} that leads past the end of the storage '0'"
    )
    _run(tb.mapping({"w": tb.tensor(tb.storage("0", 3), shape, strides, offset)}), message)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((-1,), (1,), 0),
        ((3,), (-1,), 2),
        ((3,), (1,), -1),
        ((2**63,), (0,), 0),
        ((1,) * 65, (1,) * 65, 0),
        ((3,), (), 0),
    ],
)
def test_sizes_that_are_none(shape, strides, offset):
    tensor = tb.tensor(tb.storage("0", 3), shape, strides, offset)
    _run(tb.mapping({"w": tensor}), "do not fit each other|are not at most 64 natural numbers")


@pytest.mark.parametrize("shape", [(2**62, 0), (2**40, 2**40)])
def test_a_shape_that_no_memory_holds(shape):
    tensor = tb.tensor(tb.storage("0", 3), shape, (0,) * len(shape))
    _run(tb.mapping({"w": tensor}), r"makes a tensor of shape .*, which no memory holds")


@pytest.mark.parametrize("shape", [(2 * 10**6,), (10**12,), (1000, 10**9)])
def test_an_expanded_tensor_that_is_much_larger_than_its_file(shape):
    tensor = tb.tensor(tb.storage("0", 3), shape, (0,) * len(shape))
    message = f"several times larger than the file, among them 'w' of shape {shape}: save tensor.contiguous()"
    _run(tb.mapping({"w": tensor}), re.escape(message))


def test_many_large_views_of_one_storage_are_refused_and_tied_tensors_are_not():
    data = bytes(2**20)

    def code(offsets):
        held = tb.storage("0", 2**20, "ByteStorage")
        return tb.program(tb.mapping({f"{i}": tb.tensor(held, (2**20 - 100,), (1,), x) for i, x in enumerate(offsets)}))

    assert len(_read(tb.zipped(code([7] * 50), {"0": data}))) == 50
    _refused(tb.zipped(code(range(50)), {"0": data}), "several times larger than the file")


def test_an_expanded_tensor_is_read_only_and_odd_strides_of_short_axes_do_not_matter():
    held = tb.storage("0", 3)
    tensors = {
        "e": tb.tensor(held, (2, 3), (0, 1)),
        "o": tb.tensor(held, (1, 3), (2**60, 1)),
        "s": tb.tensor(held, (2,), (2,)),
    }
    data = tb.zipped(tb.program(tb.mapping(tensors)), {"0": np.arange(3, dtype="f4").tobytes()})
    found = _read(data)
    assert found["e"].tolist() == [[0, 1, 2]] * 2
    assert found["o"].tolist() == [[0, 1, 2]]
    assert not found["e"].flags.writeable
    assert found["o"].flags.writeable


def test_one_tensor_is_read_without_the_holes_in_its_memory(tmp_path):
    tensor = tb.tensor(tb.storage("0", 3), (2,), (2,))
    (tmp_path / "m.pt").write_bytes(
        tb.zipped(tb.program(tb.mapping({"s": tensor})), {"0": np.arange(3, dtype="f4").tobytes()})
    )
    found = opened(tmp_path / "m.pt")[1]("s")
    assert found.tolist() == [0, 2]
    assert found.flags.owndata


def test_a_storage_that_two_references_describe_differently():
    _run(tb.mapping({"a": tb.vector("0", 3), "b": tb.vector("0", 2)}), "the storage '0' with two types or sizes")
    _run(tb.mapping({"a": tb.vector("0", 3), "b": tb.vector("0", 3, "IntStorage")}), "with two types or sizes")


def test_a_storage_of_bytes_may_lie_beside_tensors_and_has_none():
    beside = tb.mapping({"w": W, "bytes": tb.storage("1", 2, "UntypedStorage")})
    assert list(_read(tb.zipped(tb.program(beside), {"0": ONES, "1": b"12"}))) == ["w"]
    _run(tb.mapping({"w": tb.vector("0", 12, "UntypedStorage")}), "something that is not a storage with a type")


def test_a_reference_to_something_else():
    module = tb.group(tb.text("module"), tb.name("collections", "OrderedDict"), tb.text("a.py"), tb.text(""), tb.NONE)
    for reference in (module, tb.NONE, tb.text("storage"), tb.group(tb.text("storage")), tb.group(*[tb.NONE] * 5)):
        _run(reference + tb.REFERENCE, "refers to something that is not a storage")
    named = tb.group(
        tb.text("storage"), tb.name("collections", "OrderedDict"), tb.text("0"), tb.text("cpu"), tb.number(3)
    )
    _run(named + tb.REFERENCE, "refers to a storage without a type, a key and a size")


# Refused by name


def _refusal(torch, value, path, message, zipped=True):
    _save(torch, value, path, zipped)
    with pytest.raises(WeightsError, match=message):
        shapes(path)


@pytest.mark.torch
@LAYOUTS
def test_a_whole_model_is_refused_with_its_class(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    message = "holds a whole pickled model, class 'torch.nn.modules.linear.Linear', or .*: save model.state_dict"
    _refusal(torch, torch.nn.Linear(2, 2), tmp_path / "m.pt", message, zipped)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"])
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    message = (
        f"'torch.{dtype}' is not read, at byte .*: cast it" if dtype != "complex128" else "'torch.ComplexDoubleStorage'"
    )
    _refusal(torch, {"x": torch.zeros(2).to(getattr(torch, dtype))}, tmp_path / "m.pt", message)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "has quantised tensors"),
        (lambda torch: torch.ones(2).to_sparse(), "has sparse tensors"),
        (lambda torch: torch.ones(2, 2).to_sparse_csr(), "has sparse tensors"),
        (lambda torch: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "has nested tensors"),
        (lambda torch: torch.ones(2, device="meta"), "has tensors of the meta device"),
        (
            lambda torch: torch.ones(2, dtype=torch.complex64).conj(),
            r"conjugate or the negative .*: save tensor.resolve_conj",
        ),
        (lambda torch: np.float64(1), "asks for 'numpy.*scalar', which a dict of tensors does not need"),
        (lambda torch: torch.nn.Linear(1, 1), "asks for 'torch.nn.modules.linear.Linear'"),
        (lambda torch: {1, 2}, "asks for '__builtin__.set'"),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path, make, message):
    torch = pytest.importorskip("torch")
    _refusal(torch, {"w": torch.ones(2), "x": make(torch)}, tmp_path / "m.pt", message)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), tmp_path / "m.pt")
    with pytest.raises(WeightsError, match="it is a TorchScript archive"):
        shapes(tmp_path / "m.pt")


SYSTEM = b"cos\nsystem\n"
MALICE = {
    "a call": (SYSTEM + tb.group(tb.text("touch ...")) + tb.REDUCE, "class 'os.system'"),
    "a call beside tensors": (
        tb.mapping({"w": W, "x": SYSTEM + b")R"}),
        "asks for 'os.system', which a dict of .* never",
    ),
    "a call by two texts": (tb.text("os") + tb.text("system") + b"\x93", "class 'os.system'"),
    "a name within a name": (tb.text("torch._utils") + tb.text("os.system") + b"\x93", "'torch._utils.os.system'"),
    "a short name": (b"c\n\n", r"class '\.'"),
    "a name of numbers": (tb.number(1) + tb.number(2) + b"\x93", "asks for a name that is not text"),
    "a pickle within": (tb.name("torch.storage", "_load_from_bytes"), "has pickles inside its pickle"),
    "INST": (b"(ios\nsystem\n", "has the opcode INST, which a dict of tensors does not need, at byte"),
    "OBJ": (b"(" + tb.ordered() + b"o", "the opcode OBJ"),
    "NEWOBJ": (tb.name("collections", "OrderedDict") + b")\x81", "the opcode NEWOBJ"),
    "NEWOBJ_EX": (tb.name("collections", "OrderedDict") + b")}\x92", "the opcode NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "the opcode EXT1"),
    "EXT2": (b"\x83\x01\x00", "the opcode EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
    "PERSID": (b"Pstorage\n", "the opcode PERSID"),
    "NEXT_BUFFER": (b"\x97", "the opcode NEXT_BUFFER"),
    "LONG4": (b"\x8b\xff\xff\xff\x7f", "the opcode LONG4"),
    "DUP": (b"]2", "the opcode DUP"),
    "EMPTY_SET": (b"\x8f", "the opcode EMPTY_SET"),
    "no opcode": (b"\xff", "has the byte 0xff in place of an opcode"),
    "BUILD of a dict": (tb.mapping({}) + tb.mapping({"_metadata": tb.NONE}) + b"b", "BUILD for something other than"),
    "BUILD of attributes": (tb.ordered() + tb.mapping({"__class__": tb.NONE}) + b"b", "BUILD for something other than"),
    "BUILD of two": (
        tb.ordered() + tb.mapping({"_metadata": tb.NONE, "x": tb.NONE}) + b"b",
        "BUILD for something other",
    ),
    "BUILD of a name": (tb.name("torch", "Size") + tb.mapping({"_metadata": tb.NONE}) + b"b", "BUILD for something"),
    "a call of text": (tb.text("torch.Size") + b")R", "applies something that is not a function of tensors"),
    "a call of a dtype": (tb.name("torch", "float32") + b")R", "applies something that is not a function"),
    "a call of a storage": (tb.name("torch", "FloatStorage") + b")R", "applies something that is not a function"),
    "a call with a list": (tb.name("torch", "Size") + b"]R", "applies something that is not a function"),
    "a tensor of text": (tb.tensor(tb.text("x"), (1,), (1,)), "of something that is not a storage"),
    "a tensor of nothing": (tb.name(*tb.REBUILD) + b")R", "of something that is not a storage"),
    "a parameter of text": (
        tb.name("torch._utils", "_rebuild_parameter") + tb.group(tb.text("x")) + b"R",
        "makes a parameter of something that is not a tensor",
    ),
    "an OrderedDict of text": (tb.name("collections", "OrderedDict") + tb.group(tb.text("ab")) + b"R", "list of pairs"),
    "an OrderedDict of a triple": (
        tb.name("collections", "OrderedDict") + tb.group(tb.sequence(tb.sequence(tb.NONE))) + b"R",
        "list of pairs",
    ),
    "a tensor of a new dtype": (
        tb.name("torch._utils", "_rebuild_tensor_v3") + tb.group(*[tb.NONE] * 6, tb.name("torch", "bits8")) + b"R",
        "whose dtype 'torch.bits8' is not read",
    ),
    "items of a list": (b"](NNu", "sets an item of something that is not a dict"),
    "an item of a tensor": (W + b"NNs", "sets an item of something that is not a dict"),
    "a key without a value": (b"}(Nu", "sets a key without a value"),
    "a key twice": (b"}(" + (tb.text("a") + b"N") * 2 + b"u", "sets the key 'a' twice"),
    "appends to a dict": (b"}Na", "appends to something that is not a list"),
    "an empty stack": (b"\x85", "takes a value where there is none"),
    "a stack below a mark": (b"](a", "takes a value where there is none"),
    "no mark": (b"t", "looks for a mark where there is none"),
    "no value": (b"", "takes a value where there is none"),
    "two values": (b"NN", "leaves values behind"),
    "an open mark": (b"N(", "takes a value where there is none"),
    "a value that was not kept": (b"h\x05", "asks for its value 5 when it has kept 0"),
    "a value kept far ahead": (b"Nr\xff\xff\xff\x7f", "keeps a value under 2147483647 when it has kept 0"),
    "a mark too many": (b"(" * 20000, "keeps too many values open"),
    "a value too many": (b"N" * 20000, "keeps too many values open"),
    "a text past the end": (b"X\xff\xff\xff\xff", "4294967295 bytes are expected at byte"),
    "a long text past the end": (b"\x8d" + b"\xff" * 8, "18446744073709551615 bytes are expected"),
    "bytes past the end": (b"\x8e" + b"\xff" * 8, "18446744073709551615 bytes are expected"),
    "a frame past the end": (b"\x95" + b"\xff" * 8, "announces 18446744073709551615 bytes where \\d+ are left"),
    "a text that is none": (b"U\x01\xff", "a text in its pickle program is not UTF-8"),
    "a name that is none": (b"c\xff\nx\n", "a text in its pickle program is not UTF-8"),
    "a name without an end": (b"c" + b"x" * 300, "a name in its pickle program has no end"),
    "another protocol": (b"\x80\x09", "is of protocol 9, expected one of 2 to 5"),
}


@pytest.mark.parametrize("case", MALICE)
@LAYOUTS
def test_a_program_that_asks_for_more_than_tensors(tmp_path, case, zipped):
    value, message = MALICE[case]
    canary = tmp_path / "canary"
    code = tb.program(value if case != "a call" else SYSTEM + tb.group(tb.text(f"touch {canary}")) + tb.REDUCE)
    _refused(tb.zipped(code, {"0": ONES}) if zipped else tb.legacy(code, {"0": (3, ONES)}), message)
    assert not canary.exists()


def test_values_of_every_kind_beside_tensors_are_passed_over():
    long = (2**100).to_bytes(14, "little")
    kinds = [
        *(
            b"N",
            b"\x88",
            b"\x89",
            tb.number(-3),
            b"\x8a\x0e" + long,
            b"\x8a\x00",
            b"G" + bytes(8),
            tb.sequence(b"N", b"N"),
        ),
        *(
            b"B\2\0\0\0ab",
            b"C\2ab",
            b"\x8e\2\0\0\0\0\0\0\0ab",
            b"\x96\2\0\0\0\0\0\0\0ab",
            b"]Na",
            b"}NNs",
            b"T\2\0\0\0ab",
        ),
        *(tb.name("torch", "float32"), tb.name("torch", "Size") + tb.numbers((2, 3)) + b"\x85R", b"\x8c\1a", b"}\x94"),
        tb.name("torch", "device") + tb.group(tb.text("cuda"), tb.number(0)) + b"R",
    ]
    value = tb.mapping({"w": W, **{f"{index}": kind for index, kind in enumerate(kinds)}})
    assert list(_read(tb.zipped(tb.program(b"\x95" + bytes(8) + value), {"0": ONES}))) == ["w"]


def test_a_container_that_holds_itself():
    value = b"}q\0(" + tb.text("w") + W + tb.text("self") + b"h\0" + tb.text("list") + b"]q\1h\1a" + b"u"
    _run(value, "it holds others within its entry 'self'")
    value = b"}(" + tb.text("w") + W + tb.text("list") + b"]q\1h\1a" + b"u"
    assert list(_read(tb.zipped(tb.program(value), {"0": ONES}))) == ["w"]


def test_bfloat16_is_the_dtype_of_ml_dtypes():
    code = tb.program(tb.mapping({"w": tb.vector("0", 2, "BFloat16Storage")}))
    assert _read(tb.zipped(code, {"0": b"\x80\x3f\0\x40"}))["w"].dtype == ml_dtypes.bfloat16


@LAYOUTS
def test_a_thousand_tensors_of_one_element(zipped):
    """Names and records are most of such a file, and take many times its size when they are read."""
    tensors = {f"layer.{i}.num_batches_tracked": tb.vector(f"{i}", 1, "LongStorage", not zipped) for i in range(1000)}
    code = tb.program(tb.mapping(tensors))
    data = {f"{i}": i.to_bytes(8, "little") for i in range(1000)}
    held = tb.zipped(code, data) if zipped else tb.legacy(code, {key: (1, value) for key, value in data.items()})
    assert [int(x[0]) for x in _read(held).values()] == list(range(1000))

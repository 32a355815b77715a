"""What `load` reads is what safetensors reads, turned by hand; the arrays are nobody else's, and safe to donate."""

import gc
import json
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jtl
from jtl.errors import WeightsError
from jtl.models import registry
from jtl.weights import convert, reading, safetensors
from jtl.weights.convert import HWIO, KEEP, TRANSPOSE, KeyRule
from jtl.weights.tensors import open_tensors

DTYPES = ["float32", "float16", ml_dtypes.bfloat16, "float64", "int8", "int64", "bool"]
LARGE = (1031, 517)  # of two threads, and of more than one block; both odd
NAMES = {KEEP: "keep", TRANSPOSE: "transpose", HWIO: "hwio"}
CASES = [
    (KEEP, ()),
    (KEEP, (0,)),
    (KEEP, (7,)),
    (KEEP, (1, 5, 3)),
    (KEEP, LARGE),
    (TRANSPOSE, (7,)),
    (TRANSPOSE, (0, 3)),
    (TRANSPOSE, (3, 0)),
    (TRANSPOSE, (1, 1)),
    (TRANSPOSE, (33, 17)),
    (TRANSPOSE, LARGE),
    (HWIO, (5, 3, 2, 7)),
    (HWIO, (263, 31, 7, 9)),
]


def written(path, **tensors):
    safetensors.write_tensors(path, tensors)
    return open_tensors(path)


def random(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(0, 40, shape).astype(dtype)


def one(tensors, layout, shape, dtype, finish=convert.owned):
    target = {"w": jax.ShapeDtypeStruct(shape, np.float32)}
    keys = [KeyRule("w", "t", layout)]
    return convert.convert(target, tensors, keys, ignored=["before"], finish=lambda _, x: finish(x, dtype))["w"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=lambda case: NAMES.get(case) or str(case))
def test_each_value_is_the_file_s_turned(tmp_path, layout, shape, dtype):
    tensors = written(tmp_path / "x.safetensors", before=random((3,), "int8"), t=random(shape, dtype))
    expected = layout.read(load_file(tmp_path / "x.safetensors")["t"])
    held = one(tensors, layout, expected.shape, None, finish=lambda x, _: x)
    assert (held.dtype, held.flags.c_contiguous) == (np.dtype(dtype), True)
    assert held.tobytes() == np.ascontiguousarray(expected).tobytes()
    if np.dtype(dtype).name in ("float32", "bfloat16", "bool"):
        assert np.asarray(one(tensors, layout, expected.shape, None)).tobytes() == held.tobytes()


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"], ids=lambda dtype: np.dtype(dtype).name)
def test_a_wanted_dtype_is_numpy_s_cast(tmp_path, dtype):
    tensors = written(tmp_path / "x.safetensors", t=random((33, 17), dtype))
    got = one(tensors, TRANSPOSE, (17, 33), jnp.float32)
    np.testing.assert_array_equal(got, random((33, 17), dtype).T.astype(np.float32))


def test_a_layout_s_turn_is_its_reading_of_some_rows():
    layouts = {
        rule.layout
        for family in registry.families()
        for config in list(family.variants.values())[:1]
        for layout in family.layouts
        for rule in layout.keys(config)
    }
    turned = [layout for layout in layouts if layout.turn is not None]
    assert len(turned) >= 5
    for layout in turned:
        for shape in ((12,), (12, 5), (12, 5, 3, 2), (12, 5, 1, 1), (12, 512 * 49)):
            whole = np.arange(np.prod(shape)).reshape(shape)
            try:
                expected = layout.read(whole)
            except ValueError:  # not as many axes
                continue
            part, parts = layout.part
            rows = whole[part * (12 // parts) : (part + 1) * (12 // parts)]
            if expected.shape[-1] == len(rows) != whole.shape[-1]:
                blocks = [layout.turn(rows[i : i + 3]) for i in range(0, len(rows), 3)]
                np.testing.assert_array_equal(np.concatenate(blocks, axis=-1), expected)


def test_a_fused_tensor_is_read_by_parts(tmp_path):
    fused, bias = random((9, 5), "float32"), random((9,), "float32", 1)
    tensors = written(tmp_path / "x.safetensors", **{"blocks.0.attn.qkv.weight": fused, "blocks.0.attn.qkv.bias": bias})
    family = registry.of_architecture("vit_base_patch16_224")
    rules = next(x for x in family.layouts if x.name == "timm").keys(family.variants["vit_base_patch16_224"])
    rules = [rule for rule in rules if ".qkv." in rule.source]
    assert len(rules) == 6
    target = {rule.path.replace("*", "0"): rule for rule in rules}
    shapes = {p: jax.ShapeDtypeStruct((5, 3) if p.endswith("kernel") else (3,), np.float32) for p in target}
    held = convert.convert(nested(shapes), tensors, rules)
    for i, part in enumerate(("query", "key", "value")):
        leaf = held["encoder"]["layer_0"]["attention"][part]
        np.testing.assert_array_equal(leaf["kernel"], fused[3 * i : 3 * i + 3].T)
        np.testing.assert_array_equal(leaf["bias"], bias[3 * i : 3 * i + 3])


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("layout", "shape"), [(KEEP, (70,)), (TRANSPOSE, LARGE), (HWIO, (5, 3, 2, 7))])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, layout, shape, value):
    array = random(shape, "float32")
    array[(-1,) * array.ndim] = value
    tensors = written(tmp_path / "x.safetensors", t=array)
    with pytest.raises(WeightsError, match="t holds values that are not finite"):
        one(tensors, layout, layout.read(array).shape, None)


def test_sums_that_overflow_are_not_taken_for_values(tmp_path):
    tensors = written(tmp_path / "x.safetensors", t=np.full(LARGE, 3e38, np.float32))
    assert float(one(tensors, TRANSPOSE, LARGE[::-1], None)[0, 0]) == np.float32(3e38)


# Files that change


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_changes_between_header_and_values_is_refused(tmp_path, change, whole):
    path = tmp_path / "x.safetensors"
    tensors = written(path, t=random(LARGE, "float32"))
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        safetensors.write_tensors(path, {"t": random((3,), "int8")})
    with pytest.raises(WeightsError, match=r"x\.safetensors (changed|was removed) while it was read"):
        _ = tensors["t"] if whole else list(tensors.stream("t", 5, [np.empty((3, LARGE[1]), "float32")]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT of timm's, of more than one chunk."""
    family, name = registry.of_architecture("vit_tiny_patch16_224"), "vit_tiny_patch16_224"
    folder = tmp_path_factory.mktemp("timm") / "vit"
    model, variables = jtl.load(name, jtl.heads.classifier(3), key=jax.random.key(0), pretrained=False)
    keys, tensors = next(x for x in family.layouts if x.name == "timm").keys(model.config), {}
    for i, (path, leaf) in enumerate(jtl.tree.leaves_with_paths(variables["params"])):
        source, axes = convert.locate(path, keys)
        tensors[source] = random(axes.write(np.broadcast_to(np.float32(0), leaf.shape)).shape, "float32", i)
    folder.mkdir()
    safetensors.write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 3}))
    return folder


def test_loaded_arrays_do_not_follow_the_file(folder):
    _, variables = jtl.load(folder)
    before = jax.tree.map(lambda x: np.array(x, copy=True), variables)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    try:
        with open(path, "r+b") as file:  # the same file, in place
            file.write(b"\xff" * len(content))
        jax.tree.map(np.testing.assert_array_equal, variables, before)
        path.unlink()
        gc.collect()
        jax.tree.map(np.testing.assert_array_equal, variables, before)
    finally:
        path.write_bytes(content)


def test_loading_twice_gives_arrays_of_their_own(folder):
    (_, first), (_, second) = jtl.load(folder), jtl.load(folder)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    places = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.is_fully_addressable} for tree in (first, second)
    ]
    assert not places[0] & places[1]


# Memory that arrays share


def test_donated_arrays_are_not_written_and_results_are_right(folder):
    _, variables = jtl.load(folder)
    _, untouched = jtl.load(folder)
    expected = jax.tree.map(lambda x: np.asarray(x) * np.float32(2) + np.float32(1), untouched)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    views = jax.tree.map(np.asarray, untouched)
    result = step(variables)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    again = step(step(step(result)))  # buffers that a step made are donated to the next
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, ((y * 2 + 1) * 2 + 1) * 2 + 1), again, expected)
    jax.tree.map(np.testing.assert_array_equal, untouched, views)


def test_memory_that_is_shared_is_not_written_by_the_step_it_is_donated_to():
    array = reading.Memory().copy(random(LARGE, "float32"))
    shared = convert.owned(array, None)
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, donate_argnums=0)(shared), array + 1)
    np.testing.assert_array_equal(array, random(LARGE, "float32"))


def test_pages_live_as_long_as_an_array_of_them():
    memory = reading.Memory()
    arrays = [convert.owned(memory.copy(random((64,), "float32", i)), None) for i in (0, 1)]
    pages = weakref.ref(memory._pages._map)
    del memory, arrays[0]
    gc.collect()
    assert pages() is not None
    np.testing.assert_array_equal(arrays[0], random((64,), "float32", 1))
    del arrays
    gc.collect()
    assert pages() is None


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 0, 2), (7, 11), reading._CHUNK // 4 + 1])
def test_arrays_of_memory_are_aligned_and_apart(shape):
    memory, shape = reading.Memory(), (shape,) if isinstance(shape, int) else shape
    arrays = [memory.empty(shape, "float32") for _ in range(3)]
    for i, array in enumerate(arrays):
        assert (array.shape, array.ctypes.data % 64 if array.size else 0) == (shape, 0)
        array[...] = i
    assert [np.unique(array).tolist() for array in arrays] == [[i] if arrays[0].size else [] for i in range(3)]

"""The converter is strict both ways, and undoes what a checkpoint's layout did."""

import jax
import numpy as np
import pytest

from jtl.errors import WeightsError
from jtl.models import bert, bert_layouts
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule, as_dtype, convert, locate

from .models import checkpoints

RULES = [KeyRule("block_*/kernel", "block.{}.weight", TRANSPOSE), KeyRule("**/bias", "{}.bias", KEEP)]
TARGET = {
    "block_0": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)},
    "block_1": {"kernel": jax.ShapeDtypeStruct((3, 4), np.float32)},
}
TENSORS = {
    "block.0.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "block.1.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
}


def test_each_leaf_has_its_tensor_in_its_layout():
    filled = convert(TARGET, TENSORS, RULES)
    for i in range(2):
        np.testing.assert_array_equal(filled[f"block_{i}"]["kernel"], TENSORS[f"block.{i}.weight"].T)


def test_a_missing_tensor_is_named_with_its_leaf_and_shape():
    with pytest.raises(WeightsError, match=r"block_1/kernel needs the tensor block\.1\.weight \(4, 3\), .*missing"):
        convert(TARGET, {"block.0.weight": TENSORS["block.0.weight"]}, RULES)


def test_an_extra_tensor_is_named_with_its_shape():
    with pytest.raises(WeightsError, match=r"the tensor block\.2\.weight \(5,\) has no place"):
        convert(TARGET, {**TENSORS, "block.2.weight": np.zeros(5, np.float32)}, RULES)


def test_a_wrong_shape_is_told_in_the_layout_of_the_checkpoint():
    wrong = {**TENSORS, "block.0.weight": TENSORS["block.0.weight"].T}
    with pytest.raises(WeightsError, match=r"block\.0\.weight has shape \(2, 3\), block_0/kernel expects \(3, 2\)"):
        convert(TARGET, wrong, RULES)


def test_all_faults_are_told_at_once():
    with pytest.raises(WeightsError) as caught:
        convert(TARGET, {"block.0.weight": np.zeros(1), "x": np.zeros(1), "y": np.zeros(1)}, RULES, name="ours")
    message = str(caught.value)
    assert message.startswith("ours does not fit the model")
    for name in ("block.0.weight", "block.1.weight", "tensor x", "tensor y"):
        assert name in message


def test_a_long_list_of_faults_is_cut_and_counted():
    with pytest.raises(WeightsError, match=r"and 12 more$"):
        convert({}, {f"t{i}": np.zeros(1) for i in range(20)}, RULES)


def test_a_leaf_is_new_or_ignored_only_where_that_is_said():
    filled = convert(TARGET, {"block.0.weight": TENSORS["block.0.weight"]}, RULES, new=["block_1"])
    assert filled["block_1"] == {"kernel": None}
    filled = convert({"block_0": TARGET["block_0"]}, TENSORS, RULES, ignored=["block/1"])
    np.testing.assert_array_equal(filled["block_0"]["kernel"], TENSORS["block.0.weight"].T)
    with pytest.raises(WeightsError, match=r"block\.10\.weight"):  # a pattern takes whole segments
        convert(TARGET, {**TENSORS, "block.10.weight": np.zeros(1)}, RULES, ignored=["block/1"])


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(WeightsError, match="no key rule covers the leaf stem/kernel"):
        locate("stem/kernel", RULES)


@pytest.mark.parametrize("layout", [KEEP, TRANSPOSE])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_writing_undoes_reading(layout, shape):
    array = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(layout.write(layout.read(array)), array)
    np.testing.assert_array_equal(layout.read(layout.write(array)), array)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dtype_is_for_floats_alone(dtype):
    assert as_dtype(np.ones(2, np.float32), dtype).dtype.name == dtype
    assert as_dtype(np.ones(2, np.int32), dtype).dtype.name == "int32"
    assert as_dtype(np.ones(2, dtype), None).dtype.name == dtype


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    keys = [KeyRule("w", "weight", TRANSPOSE)]
    array = np.ones((3, 2), np.float32)
    array[2, 1] = value
    with pytest.raises(WeightsError, match="weight holds values that are not finite"):
        convert({"w": jax.ShapeDtypeStruct((2, 3), np.float32)}, {"weight": array}, keys)
    large = np.full((3, 2), 3e38, np.float32)  # their sum overflows, they do not
    assert convert({"w": jax.ShapeDtypeStruct((2, 3), np.float32)}, {"weight": large}, keys)["w"].shape == (2, 3)


# BERT's names, in the spellings that checkpoints in circulation use


def _filled(tmp_path, tensors):
    import jtl

    return jtl.load(checkpoints.write(tmp_path / str(len(list(tmp_path.iterdir()))), values=tensors))[1]["params"]


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_prefix_and_the_old_names_of_norms_change_nothing(tmp_path):
    plain = checkpoints.tensors()
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in plain.items()
    }
    assert any(name.endswith(".gamma") for name in old)
    _same(_filled(tmp_path, plain), _filled(tmp_path, old))


def test_buffers_and_heads_of_other_tasks_are_ignored(tmp_path):
    plain, some = checkpoints.tensors(), np.zeros((2, 3), np.float32)
    others = (
        "bert.embeddings.position_ids",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
        "classifier.weight",
        "classifier.bias",
        "qa_outputs.weight",
    )
    whole = {f"bert.{name}": value for name, value in plain.items()} | dict.fromkeys(others, some)
    _same(_filled(tmp_path, plain), _filled(tmp_path, whole))
    with pytest.raises(WeightsError, match=r"encoder\.layer\.0\.adapter\.weight"):
        _filled(tmp_path, whole | {"bert.encoder.layer.0.adapter.weight": some})


def test_two_spellings_of_one_tensor_are_an_error(tmp_path):
    plain = checkpoints.tensors()
    twice = {**plain, "bert.pooler.dense.bias": plain["pooler.dense.bias"] + 1}
    with pytest.raises(WeightsError, match=r"pooler\.dense\.bias"):
        _filled(tmp_path, twice)


def test_every_rule_of_the_backbone_is_used():
    sources = {name.replace("layer.0", "layer.{}").replace("layer.1", "layer.{}") for name in checkpoints.tensors()}
    assert {rule.source for rule in bert_layouts.key_rules(bert.BertConfig())} == sources

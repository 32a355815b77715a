"""ResNet against transformers, against torchvision's names, and against published sizes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError, WeightsError
from jtl.models.family import ImageInput
from jtl.models.resnet import FAMILY
from jtl.models.resnet_config import LAYER_TYPES, ResNetConfig
from jtl.weights import convert, safetensors

from ..covering import long_but  # noqa: TID252
from . import pictures_parity as parity

TRANSFORMERS, TORCH = FAMILY.layouts
TIGHT = {"tolerance": 1e-4, "outputs": 1e-5}


def _draw(seed):
    """A random configuration: both kinds of blocks, one to four stages, either place of the stride."""
    rng = np.random.default_rng(seed)
    stages = (3, 1, 2)[seed % 3]
    return {
        "num_channels": (3, 1, 4)[seed % 3],
        "embedding_size": int(rng.integers(2, 9)),
        "hidden_sizes": tuple(4 * int(size) for size in rng.integers(2, 6, stages)),
        "depths": tuple(int(depth) for depth in rng.integers(1, 3, stages)),
        "layer_type": LAYER_TYPES[seed % 2],
        "hidden_act": ("relu", "gelu", "relu", "silu")[seed % 4],
        "downsample_in_first_stage": seed % 5 == 1,
        "downsample_in_bottleneck": seed % 3 == 0,
    }


def _reference(kind, settings, seed, **more):
    transformers = pytest.importorskip("transformers")
    return parity.randomised(getattr(transformers, kind)(transformers.ResNetConfig(**settings, **more)), seed)


def _run(reference, pixels):
    out = reference(pixels)
    return out.last_hidden_state, out.pooler_output.flatten(1)


def _pictures(config, seed):
    return parity.pictures(seed, (2, *((33, 47), (64, 40), (17, 29))[seed % 3], config.num_channels))


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(range(6), (0, 1, 2)))
def test_features_and_gradients_are_those_of_the_reference(seed):
    config = ResNetConfig(**_draw(seed))
    reference = _reference("ResNetModel", _draw(seed), seed)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference))
    parity.check_features(FAMILY, model, variables, reference, _run, _pictures(config, seed), **TIGHT)


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(range(6), (3, 4, 5)))
def test_a_training_step_is_that_of_the_reference(seed):
    """Features, gradients and running statistics with the batch's own mean and variance."""
    config = ResNetConfig(**_draw(seed))
    reference = _reference("ResNetModel", _draw(seed), seed)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference))
    parity.check_training_step(FAMILY, model, variables, reference, _run, _pictures(config, seed), **TIGHT)


@pytest.mark.torch
def test_logits_are_those_of_the_reference():
    settings = _draw(2)
    reference = _reference("ResNetForImageClassification", settings, 2, num_labels=5)
    config = ResNetConfig(**settings)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=5)
    images = _pictures(config, 2)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).logits, TIGHT["outputs"])


@pytest.mark.torch
@pytest.mark.parametrize("outputs", [None, 5])
def test_transformers_loads_what_is_written_in_the_first_layout(outputs, tmp_path):
    """None is missing or left over but PyTorch's counters of batches, which nothing reads; outputs are the same."""
    transformers = pytest.importorskip("transformers")
    config = ResNetConfig(**_draw(1))
    model = FAMILY.build(config, None if outputs is None else FAMILY.head(config, outputs))
    images = jnp.array(_pictures(config, 1))
    variables = parity.random_variables(FAMILY, model)
    tensors = {}
    for path, leaf in jtl.tree.leaves_with_paths(parity.merged(variables)):
        source, layout = convert.locate(path, TRANSFORMERS.keys(config))
        tensors[source] = layout.write(np.asarray(leaf))
    safetensors.write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.settings(config, outputs)))
    kind = getattr(transformers, "ResNetModel" if outputs is None else "ResNetForImageClassification")
    reference, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.endswith(".num_batches_tracked") for name in report.pop("missing_keys"))
    assert not any(report.values()), report
    out = reference.eval()(parity.to_torch(np.asarray(images)))
    expected = out.logits if outputs else out.pooler_output.flatten(1)
    got = parity.run_once(model.apply, variables, images)
    parity.assert_close(got if outputs else got.pooled, parity.to_numpy(expected), 1e-6)
    assert FAMILY.parse(json.loads((tmp_path / "config.json").read_text()), tmp_path, {}) == config


@pytest.mark.torch
def test_the_names_of_torchvision_hold_the_same_values():
    """timm's and torchvision's names, against transformers' of the same reference."""
    settings = _draw(0)
    reference = _reference("ResNetForImageClassification", settings, 0, num_labels=5)
    config, tensors = ResNetConfig(**settings), {}
    for name, value in parity.state(reference).items():
        tensors[_torchvision_name(name)] = value
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.1.bias"} <= set(tensors)
    ours = parity.loaded(FAMILY, config, parity.state(reference), outputs=5)[1]
    got = parity.loaded(FAMILY, config, tensors, outputs=5, layout=TORCH)[1]
    assert jtl.tree.digest(ours) == jtl.tree.digest(got)


def _torchvision_name(name):
    name = name.removeprefix("resnet.").replace("classifier.1", "fc")
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    stage = re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name)
    if stage is None:
        return name
    rest = stage[3].replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    for kind, short in (("convolution", "conv"), ("normalization", "bn")):
        rest = re.sub(rf"layer\.(\d+)\.{kind}", lambda at, short=short: f"{short}{int(at[1]) + 1}", rest)
    return f"layer{int(stage[1]) + 1}.{stage[2]}.{rest}"


# Variants

COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", COUNTS)
def test_each_variant_has_its_published_size_and_is_told_by_its_tensors(name):
    config = FAMILY.variants[name]
    assert parity.parameter_count(FAMILY, config, 1000) == COUNTS[name]
    for layout in FAMILY.layouts:
        tensors = parity.tensor_shapes(FAMILY, config, 1000, layout)
        assert FAMILY.infer(tensors, "model.safetensors") == config
        assert FAMILY.infer({f"module.{key}": shape for key, shape in tensors.items()}, "a.pth") == config


@pytest.mark.parametrize("seed", range(6))
def test_tensors_of_any_widths_and_depths_tell_their_configuration(seed):
    # Tensors do not tell the place of the stride, nor the activation.
    plain = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    config = ResNetConfig(**_draw(seed) | plain)
    for layout in FAMILY.layouts:
        tensors = parity.tensor_shapes(FAMILY, config, 3, layout)
        assert FAMILY.infer(tensors, "weights.bin") == config
        headless = {name: shape for name, shape in tensors.items() if not name.startswith(("fc.", "classifier."))}
        assert FAMILY.infer(headless, "weights.bin") == config
    bare = {name.removeprefix("resnet."): shape for name, shape in parity.tensor_shapes(FAMILY, config, 3).items()}
    assert FAMILY.infer(bare, "weights.bin") == config


@pytest.mark.parametrize("strided", [False, True])
def test_a_shortcut_without_other_channels_tells_of_its_stride(strided):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=(8,), depths=(2,), layer_type="basic", downsample_in_first_stage=strided
    )
    for layout in FAMILY.layouts:
        assert FAMILY.infer(parity.tensor_shapes(FAMILY, config, 2, layout), "") == config


@pytest.mark.parametrize(
    ("file", "resize_to", "interpolation"),
    [
        ("resnet50-0676ba61.pth", 256, "bilinear"),
        ("resnet50-11ad3fa6.pth", 232, "bilinear"),
        ("pytorch_model.bin", ImageInput().resize_to, ImageInput().interpolation),
    ],
)
def test_the_name_of_a_published_file_tells_how_its_pictures_are_resized(file, resize_to, interpolation):
    tensors = parity.tensor_shapes(FAMILY, FAMILY.variants["resnet50"], 1000, TORCH)
    found = FAMILY.infer(tensors, file).input
    assert (found.resize_to, found.interpolation) == (resize_to, interpolation)


def _resnet50(**changed):
    return parity.tensor_shapes(FAMILY, FAMILY.variants["resnet50"], 10, TORCH) | changed


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"bert.embeddings.word_embeddings.weight": (30522, 768)},
        {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,)},
        {"features.0.weight": (64, 3, 3, 3)},
        # resnet50d has three convolutions in its stem, a RegNet a kernel of 3, a ResNeXt groups, a wide one widths.
        _resnet50(**{"conv1.weight": (64, 3, 3, 3)}),
        _resnet50(**{"conv1.weight": (64,)}),
        _resnet50(**{"conv1.weight": (64, 0, 7, 7)}),
        _resnet50(**{"layer4.2.conv3.weight": ()}),
        _resnet50(**{"layer4.0.conv3.weight": (0, 512, 1, 1)}),
        _resnet50(**{"layer1.0.conv2.weight": (128, 4, 3, 3)}),
        _resnet50(**{"layer1.0.conv1.weight": (128, 64, 1, 1)}),
        _resnet50(**{"layer3.6.conv1.weight": (256, 1024, 1, 1)}),
        {name: shape for name, shape in _resnet50().items() if "conv3" not in name or "layer2.0" not in name},
    ],
)
def test_tensors_that_are_not_of_a_resnet_tell_nothing(tensors):
    assert FAMILY.infer(tensors, "resnet50-11ad3fa6.pth") is None


# Settings


def test_a_configuration_survives_json():
    config = ResNetConfig(**_draw(1), input=ImageInput(size=(64, 64), std=(0.5, 0.5, 0.5)))
    assert FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {}) == config
    assert hash(config) is not None


def test_transformers_settings_and_the_preprocessor_beside_them(tmp_path):
    settings = {"model_type": "resnet", "layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 2]}
    config = FAMILY.parse(settings, tmp_path, {})
    assert (config.hidden_sizes, config.depths, config.embedding_size) == ((8, 16), (1, 2), 64)
    assert config.input == ImageInput()
    preprocessor = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 160, "crop_pct": 0.875, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = FAMILY.parse(settings, tmp_path, {}).input
    assert (found.size, found.interpolation) == ((160, 160), "bilinear")
    assert FAMILY.parse(settings, tmp_path, {"input": ImageInput()}).input == ImageInput()


def test_timm_settings():
    settings = {
        "architecture": "resnet34",
        "num_classes": 1000,
        "num_features": 512,
        "global_pool": "avg",
        "pretrained_cfg": {"input_size": [3, 288, 288], "crop_pct": 0.95, "interpolation": "bicubic"},
    }
    config = FAMILY.parse(settings, None, {})
    assert dataclasses.replace(config, input=ImageInput()) == FAMILY.variants["resnet34"]
    assert config.input.size == (288, 288)
    assert FAMILY.parse({"architecture": "resnet18.a1_in1k"}, None, {}) == FAMILY.variants["resnet18"]
    assert FAMILY.parse({**settings, "model_args": {"in_chans": 1}}, None, {}).num_channels == 1
    assert FAMILY.parse(settings, None, {"depths": [1, 1, 1, 1]}).depths == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "resnet50d"}, "architecture='resnet50d'.*nearest: resnet50"),
        ({"architecture": "seresnet50"}, "architecture='seresnet50'"),
        ({"architecture": "resnet50", "model_args": {"stem_type": "deep"}}, "model_args stem_type='deep'"),
        ({"architecture": "resnet50", "global_pool": "max"}, "global_pool='max'"),
        ({"hidden_act": "swiglu"}, "'swiglu' is not among"),
        ({"layer_type": "preactivation"}, "layer_type 'preactivation' is not among"),
        ({"depths": [1, 2]}, "different lengths"),
        ({"depths": [1, 2, 0, 1]}, "depths must be integers above 0"),
        ({"depths": [], "hidden_sizes": []}, "hidden_sizes must be integers above 0"),
        ({"embedding_size": 0}, "embedding_size must be integers above 0, got 0"),
        ({"hidden_sizes": [6, 8, 8, 8]}, "must be multiples of 4"),
        ({"input": {"colour": "bgr"}}, "ImageInput has no field 'colour'"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse({"model_type": "resnet", **settings}, None, {})


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match="no field 'depth'; nearest: depths"):
        FAMILY.parse({"model_type": "resnet"}, None, {"depth": (1, 1, 1, 1)})


# The model


@pytest.mark.parametrize("shape", [(1, 32, 32, 1), (32, 32, 3), (1, 3, 32, 32)])
def test_pictures_of_another_shape_are_refused(shape):
    config = ResNetConfig(hidden_sizes=(8,), depths=(1,))
    with pytest.raises(ConfigError, match=r"images must be \[batch, height, width, 3\], got"):
        jax.eval_shape(FAMILY.build(config, None).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_features_are_there_with_a_head_too():
    config = ResNetConfig(hidden_sizes=(8, 16), depths=(1, 1))
    images = jnp.array(parity.pictures(0))
    model = FAMILY.build(config, jtl.heads.classifier(3))
    variables = parity.random_variables(FAMILY, model)
    logits = parity.run_once(model.apply, variables, images)
    features = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, images)
    assert logits.shape == (2, 3)
    assert features.spatial.shape == (2, 5, 6, 16)
    np.testing.assert_allclose(features.pooled, np.mean(features.spatial, (1, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_half(dtype):
    config = ResNetConfig(hidden_sizes=(8, 16), depths=(1, 1))
    images = jnp.array(parity.pictures(0))
    model = FAMILY.build(config, None)
    variables = parity.random_variables(FAMILY, model)
    expected = parity.run_once(model.apply, variables, images).pooled
    half = jax.tree.map(lambda x: x.astype(dtype), (variables["params"], images))
    got = parity.run_once(model.apply, {**variables, "params": half[0]}, half[1]).pooled
    assert got.dtype.name == dtype
    error = np.max(np.abs(got.astype("f4") - expected))
    assert error < 30 * float(jnp.finfo(dtype).eps) * np.max(np.abs(expected))


@pytest.mark.parametrize("head", [None, jtl.heads.classifier(3)])
@pytest.mark.parametrize("seed", range(3))
def test_depth_groups_cover_every_leaf_once(seed, head):
    config = ResNetConfig(**_draw(seed))
    model = FAMILY.build(config, head)
    assert parity.depth_groups_partition(FAMILY, model)
    assert FAMILY.depth_groups(model)[0] == ("stem",)
    assert len(FAMILY.depth_groups(model)) == 2 + sum(config.depths)


def test_a_tensor_too_many_is_refused():
    config = ResNetConfig(hidden_sizes=(8,), depths=(1,))
    tensors = {name: np.zeros(shape, "f4") for name, shape in parity.tensor_shapes(FAMILY, config, 3).items()}
    tensors["resnet.encoder.stages.0.layers.0.se.weight"] = np.zeros(3, "f4")
    with pytest.raises(WeightsError, match=r"se\.weight \(3,\) has no place in the model"):
        parity.loaded(FAMILY, config, tensors, outputs=3)

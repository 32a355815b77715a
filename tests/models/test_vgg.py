"""VGG against PyTorch references with torchvision's and timm's names, and against published sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError, WeightsError
from jtl.models.family import ImageInput
from jtl.models.vgg import FAMILY, adaptive_mean
from jtl.models.vgg_config import CAFFE, VggConfig
from jtl.models.vgg_layouts import keras_name
from jtl.weights import convert, keras_file

from ..covering import long_but, product  # noqa: TID252
from . import pictures_parity as parity

TORCHVISION, TIMM, KERAS = FAMILY.layouts
TIGHT = {"tolerance": 1e-4, "outputs": 1e-5}


def _draw(seed, **more):
    """A random small configuration; every second one has batch normalisation."""
    rng = np.random.default_rng(seed)
    stages = 1 + seed % 3
    fields = {
        "num_channels": (3, 1, 4)[seed % 3],
        "widths": tuple(int(width) for width in rng.integers(2, 9, stages)),
        "depths": tuple(int(depth) for depth in rng.integers(1, 4, stages)),
        "batch_norm": bool(seed % 2),
        "hidden": int(rng.integers(5, 12)),
        "pool_size": int(rng.integers(1, 6)),
        "dropout": 0.0,
    }
    return VggConfig(**fields | more)


def _reference(kind, seed, config, *args):
    pytest.importorskip("torch")
    from . import torch_vgg

    return parity.randomised(getattr(torch_vgg, kind)(config, *args), seed)


def _run(reference, pixels):
    return reference.extract(pixels)


def _pictures(config, seed):
    # Maps smaller than the dense layers' window, of its size, and larger, with odd edges.
    size = ((33, 47), (16, 24), (9, 61), (8 * config.pool_size,) * 2)[seed % 4]
    return parity.pictures(seed, (2, *size, config.num_channels))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "seed", "training"),
    # Odd seeds have a batch normalisation, in which training differs.
    long_but(
        product(("Torchvision", "Timm"), range(4), (False, True)),
        [
            ("Torchvision", 0, False),
            ("Torchvision", 1, True),
            ("Torchvision", 3, False),
            ("Timm", 1, False),
            ("Timm", 2, True),
            ("Timm", 3, True),
        ],
    ),
)
def test_features_and_gradients_are_those_of_the_reference(kind, seed, training):
    """Of both libraries, in evaluation and in training, with the statistics after a step."""
    pooling, layout = {"Torchvision": ("adaptive", TORCHVISION), "Timm": ("sliding", TIMM)}[kind]
    config = _draw(seed, pooling=pooling)
    reference = _reference(kind, seed, config, 5)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=5, layout=layout)
    images = _pictures(config, seed)
    if not training:
        parity.check_logits(model, variables, images, reference(parity.to_torch(images)), TIGHT["outputs"])
        parity.check_features(FAMILY, model, variables, reference, _run, images, layout, **TIGHT)
    else:
        parity.check_training_step(FAMILY, model, variables, reference, _run, images, layout, **TIGHT)


@pytest.mark.torch
def test_the_convolutions_alone_pool_by_the_mean():
    config = _draw(1, hidden=None, pool_size=7)
    reference = _reference("Backbone", 1, config)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference))
    assert set(variables["params"]) == {f"stages_{i}" for i in range(len(config.depths))}
    parity.check_features(FAMILY, model, variables, reference, _run, _pictures(config, 0), **TIGHT)


@pytest.mark.torch
def test_means_over_a_grid_are_those_of_the_reference():
    """To smaller and to larger grids, of odd and even sizes."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for height, width, size in [(1, 1, 7), (3, 5, 7), (7, 7, 7), (8, 13, 7), (14, 14, 7), (15, 9, 4), (6, 11, 5)]:
        x = rng.normal(size=(2, height, width, 3)).astype("f4")
        expected = torch.nn.functional.adaptive_avg_pool2d(parity.to_torch(x), (size, size))
        np.testing.assert_allclose(adaptive_mean(jnp.array(x), (size, size)), parity.to_numpy(expected), atol=1e-6)


@pytest.mark.torch
def test_the_names_of_all_libraries_hold_the_same_values():
    """A picture whose last map is just what the dense layers look at: the libraries do not differ then."""
    config = _draw(2, pool_size=3, batch_norm=False)
    reference = _reference("Torchvision", 2, config, 5)
    images = parity.pictures(2, (2, 24, 24, config.num_channels))
    expected = reference(parity.to_torch(images))
    torchvision = parity.state(reference)
    hidden, place = config.hidden, (config.widths[-1], 3, 3)
    timm = {_timm_name(name): value for name, value in torchvision.items()}
    timm["pre_logits.fc1.weight"] = timm["pre_logits.fc1.weight"].reshape(hidden, *place)
    timm["pre_logits.fc2.weight"] = timm["pre_logits.fc2.weight"].reshape(hidden, hidden, 1, 1)
    keras = dict(_keras_tensors(config, torchvision))
    sliding = dataclasses.replace(config, pooling="sliding")
    for layout, tensors in ((TORCHVISION, torchvision), (TIMM, timm), (KERAS, keras)):
        settings = sliding if layout is TIMM else config
        model, variables = parity.loaded(FAMILY, settings, tensors, outputs=5, layout=layout)
        parity.check_logits(model, variables, images, expected, TIGHT["outputs"])
        told = FAMILY.infer({name: value.shape for name, value in tensors.items()}, "weights")
        assert dataclasses.replace(told, input=ImageInput(), dropout=0.0) == settings


def _timm_name(name):
    for old, new in (
        ("classifier.0", "pre_logits.fc1"),
        ("classifier.3", "pre_logits.fc2"),
        ("classifier.6", "head.fc"),
    ):
        name = name.replace(old, new)
    return name


def _keras_tensors(config, torchvision):
    """As Keras distributes VGG: kernels `[height, width, in, out]`, and a flat map in that order too."""
    convolutions = [name for name in torchvision if name.startswith("features.") and name.endswith(".weight")]
    places = [(i + 1, j + 1) for i, depth in enumerate(config.depths) for j in range(depth)]
    for (block, place), name in zip(places, convolutions, strict=True):
        layer = f"block{block}_conv{place}"
        yield f"{layer}.{layer}_W_1:0", torchvision[name].transpose(2, 3, 1, 0)
        yield f"{layer}.{layer}_b_1:0", torchvision[name.replace("weight", "bias")]
    for layer, source in (("fc1", "classifier.0"), ("fc2", "classifier.3"), ("predictions", "classifier.6")):
        weight, place = torchvision[f"{source}.weight"], (config.widths[-1], config.pool_size, config.pool_size)
        if layer == "fc1":
            weight = weight.reshape(-1, *place).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        yield f"{layer}.{layer}_W_1:0", weight.T
        yield f"{layer}.{layer}_b_1:0", torchvision[f"{source}.bias"]


@pytest.mark.parametrize("layout", FAMILY.layouts, ids=lambda layout: layout.name)
def test_the_dense_layers_of_a_checkpoint_can_be_left_out(layout):
    config = _draw(2, batch_norm=False)
    tensors = {name: np.zeros(shape, "f4") for name, shape in parity.tensor_shapes(FAMILY, config, 3, layout).items()}
    variables = parity.loaded(FAMILY, dataclasses.replace(config, hidden=None), tensors, layout=layout)[1]
    assert set(variables["params"]) == {f"stages_{i}" for i in range(len(config.depths))}


# Files of Keras


def _edge_tensors(config):
    """The names that a detector of edges saves: blocks with layers of their own, side outputs and their fusion."""
    rng, inputs = np.random.default_rng(0), config.num_channels
    for block, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True), 1):
        for place in range(depth):
            layer = f"block{block}/layers/conv2d{f'_{place}' if place else ''}/vars"
            yield f"{layer}/0", rng.normal(size=(3, 3, inputs, width)).astype("f4")
            yield f"{layer}/1", rng.normal(size=width).astype("f4")
            inputs = width
        yield f"dsn{block}/vars/0", np.zeros((1, 1, width, 1), "f4")
        yield f"dsn{block}/vars/1", np.zeros(1, "f4")
    yield "fuse/vars/0", np.zeros((1, 1, len(config.depths), 1), "f4")
    yield "fuse/vars/1", np.zeros(1, "f4")


def test_the_convolutions_of_a_detector_of_edges_are_read_from_its_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    config = VggConfig(widths=(2, 3), depths=(2, 3), hidden=None, input=CAFFE, dropout=0.0)
    arrays = dict(_edge_tensors(config))
    with h5py.File(tmp_path / "edges.weights.h5", "w") as file:
        for name, value in arrays.items():
            file[name] = value
    signatures, read = keras_file.opened(tmp_path / "edges.weights.h5")
    assert FAMILY.infer({name: found.shape for name, found in signatures.items()}, "edges.weights.h5") == config
    tensors = {name: read(name) for name in signatures}
    _, variables = parity.loaded(FAMILY, config, tensors, layout=KERAS)
    for block, place in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3)):
        conv = variables["params"][f"stages_{block - 1}"][f"conv_{place - 1}"]
        layer = f"block{block}/layers/conv2d{f'_{place - 1}' if place > 1 else ''}/vars"
        np.testing.assert_array_equal(conv["kernel"], arrays[f"{layer}/0"])
        np.testing.assert_array_equal(conv["bias"], arrays[f"{layer}/1"])
    with pytest.raises(WeightsError, match=r"extra\.vars\.0 \(1,\) has no place"):
        parity.loaded(FAMILY, config, tensors | {"extra.vars.0": np.zeros(1, "f4")}, layout=KERAS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block1.layers.conv2d.vars.0", "block1_conv1.kernel"),
        ("block5.layers.conv2d_2.vars.1", "block5_conv3.bias"),
        ("block3_conv2.block3_conv2_W_1:0", "block3_conv2.kernel"),
        ("block3_conv2.block3_conv2.bias:0", "block3_conv2.bias"),
        ("block3_conv2.block3_conv2.kernel", "block3_conv2.kernel"),
        ("model_weights.fc1.fc1.kernel:0", "fc1.kernel"),
        ("predictions.predictions_b_1:0", "predictions.bias"),
        ("fuse.vars.0", "fuse.vars.0"),
        ("block1.layers.dense.vars.0", "block1.layers.dense.vars.0"),
        ("block1_conv1.block1_conv2_W_1:0", "block1_conv1.block1_conv2_W_1:0"),
    ],
)
def test_names_of_keras(name, expected):
    assert keras_name(name) == expected
    assert keras_name(expected) == expected


# Variants

COUNTS = {
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}


@pytest.mark.parametrize("name", COUNTS)
def test_each_variant_has_its_published_size_and_is_told_by_its_tensors(name):
    config = FAMILY.variants[name]
    assert parity.parameter_count(FAMILY, config, 1000) == COUNTS[name]
    assert FAMILY.infer(parity.tensor_shapes(FAMILY, config, 1000, TORCHVISION), "model.pth") == config
    timm = dataclasses.replace(config, pooling="sliding", dropout=0.0)
    assert FAMILY.infer(parity.tensor_shapes(FAMILY, timm, 1000, TIMM), "model.safetensors") == timm
    if not config.batch_norm:
        keras = dataclasses.replace(config, input=CAFFE, dropout=0.0)
        assert FAMILY.infer(parity.tensor_shapes(FAMILY, keras, 1000, KERAS), "model.h5") == keras


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_tensors_of_any_widths_and_depths_tell_their_configuration(seed, headless):
    config = _draw(seed, dropout=0.5, **({"hidden": None, "pool_size": 7} if headless else {}))
    tensors = parity.tensor_shapes(FAMILY, config, 3)
    assert FAMILY.infer(tensors, "a.pth") == config
    without = {name: shape for name, shape in tensors.items() if not name.startswith("classifier.6")}
    assert FAMILY.infer({f"module.{name}": shape for name, shape in without.items()}, "a.pth") == config


def test_the_name_of_a_published_file_tells_how_its_pictures_are_resized():
    tensors = parity.tensor_shapes(FAMILY, FAMILY.variants["vgg11_bn"], 1000)
    assert FAMILY.infer(tensors, "vgg11_bn-6002323d.pth").input.interpolation == "bilinear"
    assert FAMILY.infer(tensors, "vgg11_bn.pth").input == ImageInput()


def _vgg11(**changed):
    return parity.tensor_shapes(FAMILY, FAMILY.variants["vgg11"], 10) | changed


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"conv1.weight": (64, 3, 7, 7)},
        {"features.0.weight": (64,)},
        {"features.0.weight": (0, 3, 3, 3)},
        {"features.0.weight": (64, 0, 3, 3)},
        {"features.0.weight": (1, 3, 3, 3), "classifier.0.weight": ()},
        {"features.0.weight": (1, 3, 3, 3), "classifier.0.weight": (0, 1)},
        {"features.0.weight": (), "classifier.0.weight": (4096, 25088)},
        # AlexNet, SqueezeNet, MobileNet and DenseNet.
        {"features.0.weight": (64, 3, 11, 11), "features.3.weight": (192, 64, 5, 5)},
        {"features.0.weight": (64, 3, 3, 3), "features.3.squeeze.weight": (16, 64, 1, 1)},
        {"features.0.0.weight": (32, 3, 3, 3)},
        {"features.conv0.weight": (64, 3, 7, 7)},
        _vgg11(**{"features.3.weight": (128, 32, 3, 3)}),
        _vgg11(**{"features.8.weight": (300, 256, 3, 3)}),
        _vgg11(**{"classifier.0.weight": (4096, 25000)}),
        {"block1_conv1.block1_conv1_W_1:0": (64,)},
        {"block1_conv1.block1_conv1_W_1:0": (7, 7, 3, 64)},
    ],
)
def test_tensors_that_are_not_of_a_vgg_tell_nothing(tensors):
    assert FAMILY.infer(tensors, "vgg16-397923af.pth") is None


# Settings


def test_a_configuration_survives_json():
    config = _draw(4, input=CAFFE)
    assert FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {}) == config
    headless = _draw(4, hidden=None)
    assert FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(headless))), None, {}) == headless
    assert hash(config) is not None


def test_timm_settings():
    settings = {
        "architecture": "vgg16_bn",
        "num_classes": 1000,
        "global_pool": "avg",
        "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"},
    }
    config = FAMILY.parse(settings, None, {})
    expected = dataclasses.replace(FAMILY.variants["vgg16_bn"], pooling="sliding", dropout=0.0, input=config.input)
    assert config == expected
    assert (config.input.interpolation, config.input.resize_to) == ("bilinear", 256)
    assert FAMILY.parse({**settings, "model_args": {"drop_rate": 0.2}}, None, {}).dropout == 0.2
    assert FAMILY.parse({"architecture": "vgg11.tv_in1k"}, None, {"widths": [1, 2, 3, 4, 5]}).widths == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "repvgg_a0"}, "architecture='repvgg_a0'.*nearest: vgg"),
        ({"architecture": "vgg16", "model_args": {"mlp_ratio": 2.0}}, "model_args mlp_ratio=2.0"),
        ({"architecture": "vgg16", "global_pool": "max"}, "global_pool='max'"),
        ({"pooling": "max"}, "pooling 'max' is not among"),
        ({"depths": [1, 2]}, "must be of one length"),
        ({"depths": [], "widths": []}, "must be of one length"),
        ({"depths": [1, 0], "widths": [1, 1]}, "depths must be integers above 0"),
        ({"hidden": 0}, "hidden must be integers above 0, got 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(settings, None, {})


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match="no field 'width'; nearest: widths"):
        FAMILY.parse({"architecture": "vgg16"}, None, {"width": (1,)})


# The model


@pytest.mark.parametrize("shape", [(1, 32, 32, 1), (32, 32, 3), (1, 3, 32, 32), (1, 7, 32, 3)])
def test_pictures_of_another_shape_are_refused(shape):
    model = FAMILY.build(VggConfig(widths=(2, 2, 2), depths=(1, 1, 1), hidden=4), None)
    with pytest.raises(ConfigError, match=r"images must be \[batch, height, width, 3\] of at least 8 x 8 pixels, got"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_features_are_there_with_a_head_too_and_dropout_is_off_unless_asked_for():
    config = _draw(0, dropout=0.5)
    model = FAMILY.build(config, FAMILY.head(config, 3))
    assert model.head.dropout == 0.5
    variables = parity.random_variables(FAMILY, model)
    images = jnp.array(_pictures(config, 0))
    features = parity.run_once(lambda v, x: model.apply(v, x, method="features"), variables, images)
    assert features.spatial.shape == (2, 16, 23, config.widths[-1])
    assert features.pooled.shape == (2, config.hidden)

    def logits(seed):
        return model.apply(variables, images, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    first, again, other = parity.run_once(lambda: (logits(0), logits(0), logits(1)))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_half(dtype):
    config = _draw(1)
    model = FAMILY.build(config, None)
    variables = parity.random_variables(FAMILY, model)
    images = jnp.array(_pictures(config, 0))
    expected = parity.run_once(model.apply, variables, images).pooled
    params, images = jax.tree.map(lambda x: x.astype(dtype), (variables["params"], images))
    got = parity.run_once(model.apply, {**variables, "params": params}, images).pooled
    assert got.dtype.name == dtype
    error = np.max(np.abs(got.astype("f4") - expected))
    assert error < 30 * float(jnp.finfo(dtype).eps) * np.max(np.abs(expected))


@pytest.mark.parametrize("head", [None, jtl.heads.classifier(3)])
@pytest.mark.parametrize("hidden", [None, 6])
def test_depth_groups_cover_every_leaf_once(hidden, head):
    model = FAMILY.build(_draw(2, hidden=hidden), head)
    assert parity.depth_groups_partition(FAMILY, model)
    assert FAMILY.depth_groups(model)[0] == ("stages_0",)


@pytest.mark.parametrize("layout", FAMILY.layouts, ids=lambda layout: layout.name)
def test_a_dense_layer_of_another_shape_is_refused_by_name(layout):
    config = _draw(2, batch_norm=False)
    shapes = parity.tensor_shapes(FAMILY, config, 3, layout)
    tensors = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
    for path in ("fc_0/kernel", "fc_1/kernel", "head/kernel"):
        name = convert.locate(path, layout.keys(config))[0]
        wrong = tensors | {name: np.zeros((*tensors[name].shape[:-1], 99), "f4")}
        with pytest.raises(WeightsError, match=f"{name} has shape"):
            parity.loaded(FAMILY, config, wrong, outputs=3, layout=layout)

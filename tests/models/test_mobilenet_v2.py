"""MobileNetV2 against transformers, against timm and torchvision written out in PyTorch, and cut at the boundary."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError
from jtl.models.family import ImageInput
from jtl.models.mobilenet_v2 import FAMILY, VARIANTS, MobileNetV2, MobileNetV2Config, network

from ..boundary.cases import TX, assert_exact, compiled, ready, shapes  # noqa: TID252
from . import pictures_parity as parity
from .inverted_shapes import parameters, tensors

TIGHT = {"tolerance": 1e-4}  # of gradients; float32 itself is 2e-5 away from float64 in the outputs of this many layers
LAYOUT = {layout.name: layout for layout in FAMILY.layouts}

# Parameters with a classifier of 1000 classes, as timm publishes them.
PARAMETERS = {
    "mobilenetv2_035": 1_677_128,
    "mobilenetv2_050": 1_968_680,
    "mobilenetv2_075": 2_636_424,
    "mobilenetv2_100": 3_504_872,
    "mobilenetv2_110d": 4_516_520,
    "mobilenetv2_120d": 5_831_144,
    "mobilenetv2_140": 6_108_776,
}

DRAWS = (
    {
        "depth_multiplier": 0.1,
        "depth_divisible_by": 2,
        "min_depth": 4,
        "expand_ratio": 2.0,
        "tf_padding": True,
        "finegrained_output": False,
    },
    {
        "depth_multiplier": 0.07,
        "depth_divisible_by": 1,
        "min_depth": 3,
        "expand_ratio": 1.5,
        "tf_padding": False,
        "output_stride": 8,
        "first_layer_is_expansion": False,
        "finegrained_output": False,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "num_channels": 1,
    },
    {
        "depth_multiplier": 0.12,
        "depth_divisible_by": 8,
        "min_depth": 8,
        "expand_ratio": 1.0,
        "tf_padding": True,
        "output_stride": 16,
    },
)
SIZES = ((33, 47), (40, 31), (65, 33))


def transformers_reference(seed, kind="MobileNetV2ForImageClassification"):
    """A model whose batch normalisations move as ours: it takes the share that stays for the share that goes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from .torch_efficientnet import lively

    torch.manual_seed(seed)
    settings = {**DRAWS[seed], "num_labels": 7, "classifier_dropout_prob": 0.0}
    reference = lively(getattr(transformers, kind)(transformers.MobileNetV2Config(**settings)))
    for module in reference.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1 - 0.997
    return parity.randomised(reference, seed)


def run_transformers(model, pixels):
    out = getattr(model, "mobilenet_v2", model)(pixels)
    return out.last_hidden_state, out.pooler_output


def parsed(reference, folder):
    """The configuration that the reference writes to a folder."""
    reference.config.save_pretrained(folder)
    return FAMILY.parse(json.loads((folder / "config.json").read_text()), folder, {})


def shapes_of(config, layout, outputs=10):
    """The tensors of a checkpoint, by name."""
    return tensors(network(config), LAYOUT[layout], config, outputs)


def images_of(seed, size=2):
    return parity.pictures(seed, (size, *SIZES[seed], DRAWS[seed].get("num_channels", 3)))


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 2])
def test_features_and_gradients_are_those_of_transformers(seed, tmp_path):
    reference = transformers_reference(seed)
    model, variables = parity.loaded(FAMILY, parsed(reference, tmp_path), parity.state(reference), outputs=7)
    images = images_of(seed)
    parity.check_features(FAMILY, model, variables, reference, run_transformers, images, **TIGHT)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).logits)


@pytest.mark.torch
@pytest.mark.parametrize("seed", [1])
def test_a_training_step_is_that_of_transformers(seed, tmp_path):
    reference = transformers_reference(seed, "MobileNetV2Model")
    model, variables = parity.loaded(FAMILY, parsed(reference, tmp_path), parity.state(reference))
    parity.check_training_step(FAMILY, model, variables, reference, run_transformers, images_of(seed, 6))


# timm and torchvision

NARROW = {"depth_multiplier": 0.2}


def run_features(model, pixels):
    spatial = model.features(pixels)
    return spatial, spatial.mean((2, 3))


@pytest.mark.torch
def test_features_and_gradients_are_those_of_torchvision():
    """So narrow that the first block has as many channels on both sides."""
    torch = pytest.importorskip("torch")
    from .torch_mobilenet import TorchvisionMobileNetV2

    torch.manual_seed(0)
    config, layout = dataclasses.replace(VARIANTS["mobilenetv2_100"], **NARROW), LAYOUT["torchvision"]
    reference = TorchvisionMobileNetV2(width=0.2, classes=7)
    assert network(config).blocks[0].residual
    reference, images = parity.randomised(reference, 0), parity.pictures(1)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=7, layout=layout)
    parity.check_features(FAMILY, model, variables, reference, run_features, images, layout, **TIGHT)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "width", "depth", "fixed"),
    [("mobilenetv2_035", 0.35, 1.0, False), ("mobilenetv2_120d", 1.2, 1.4, True), ("mobilenetv2_140", 1.4, 1.0, False)],
)
def test_the_tensors_of_whole_networks_are_those_of_the_libraries(name, width, depth, fixed):
    """Names and shapes, without computing any."""
    torch = pytest.importorskip("torch")
    from . import torch_mobilenet as reference

    with torch.device("meta"):
        models = {"timm": reference.timm_mobilenet(width, depth, fixed)}
        if not fixed:
            models["torchvision"] = reference.TorchvisionMobileNetV2(width=width)
    for layout, model in models.items():
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items() if "num_batches" not in key}
        assert shapes_of(VARIANTS[name], layout, 1000) == theirs


# Settings


def test_default_settings_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.MobileNetV2Config(), MobileNetV2Config()
    own = {"batch_norm_momentum", "out_channels", "num_block_repeats", "stem_channels", "head_channels"}
    for field in dataclasses.fields(ours):
        if field.name not in own | {"first_residual", "input"}:
            assert getattr(ours, field.name) == getattr(reference, field.name), field.name


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_number_of_parameters(name):
    assert parameters(shapes_of(VARIANTS[name], "timm", 1000)) == PARAMETERS[name]


def test_a_model_has_the_published_number_of_parameters():
    assert parity.parameter_count(FAMILY, VARIANTS["mobilenetv2_100"], 1000) == PARAMETERS["mobilenetv2_100"]


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_of_timm_tell_the_variant(name):
    shapes = shapes_of(VARIANTS[name], "timm")
    assert FAMILY.infer(shapes, "weights.pth") == VARIANTS[name]


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv2_140"])
@pytest.mark.parametrize("layout", ["transformers", "torchvision"])
def test_tensors_of_other_libraries_tell_the_variant(name, layout):
    config = VARIANTS[name]
    shapes = shapes_of(config, layout)
    found = FAMILY.infer({f"module.{key}": value for key, value in shapes.items()}, "weights.pth")
    own = {"depth_multiplier": config.depth_multiplier}
    if layout == "transformers":
        assert found == MobileNetV2Config(**own)
    else:
        assert found == dataclasses.replace(config, input=dataclasses.replace(config.input, interpolation="bilinear"))


@pytest.mark.parametrize("layout", LAYOUT)
@pytest.mark.parametrize("expands", [True, False])
def test_tensors_of_no_variant_tell_channels_and_repeats(layout, expands):
    if layout == "timm" and not expands:
        return  # has no such network
    config = MobileNetV2Config(
        depth_divisible_by=1,
        min_depth=1,
        expand_ratio=2.5,
        out_channels=(6, 6, 8, 10, 14, 14, 20),
        num_block_repeats=(1, 2, 3, 4, 3, 3, 1),
        stem_channels=7,
        head_channels=33,
        num_channels=1,
        first_layer_is_expansion=expands,
    )
    found = FAMILY.infer(shapes_of(config, layout), "x")
    names = ("inputs", "expanded", "features", "stride", "stage")
    ours, theirs = ([[getattr(b, n) for n in names] for b in network(c).blocks] for c in (found, config))
    assert ours == theirs
    assert (network(found).stem, network(found).top, found.num_channels) == (7, 33, 1)


def test_tensors_of_other_networks_tell_nothing():
    assert FAMILY.infer({}, "x") is None
    shapes = shapes_of(VARIANTS["mobilenetv2_100"], "timm")
    large = {
        name: (*shape[:2], 5, 5) if name == "blocks.3.0.conv_dw.weight" else shape for name, shape in shapes.items()
    }
    assert FAMILY.infer(large, "efficientnet_lite0.pth") is None
    fewer = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.6")}
    assert FAMILY.infer(fewer, "x") is None


def test_settings_of_timm():
    settings = {
        "architecture": "mobilenetv2_050",
        "num_classes": 1000,
        "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bilinear"},
    }
    config = FAMILY.parse(settings, None, {"classifier_dropout_prob": 0.0})
    expected = dataclasses.replace(VARIANTS["mobilenetv2_050"], classifier_dropout_prob=0.0)
    assert dataclasses.replace(config, input=expected.input) == expected
    assert (config.input.resize_to, config.input.interpolation) == (248, "bilinear")


def test_the_processor_of_transformers_is_read(tmp_path):
    processor = {"image_processor_type": "MobileNetV2ImageProcessor", "size": {"shortest_edge": 200}, "crop_size": 160}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = {"model_type": "mobilenet_v2", "image_size": 160, "depth_multiplier": 1}
    given = FAMILY.parse(settings, tmp_path, {}).input
    assert (given.size, given.resize_to, given.mean) == ((160, 160), 200, (0.5,) * 3)
    assert FAMILY.parse(settings, None, {}).input.size == (160, 160)


def test_a_configuration_survives_json():
    for config in (*VARIANTS.values(), MobileNetV2Config(output_stride=8)):
        assert FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {}) == config


@pytest.mark.torch
def test_transformers_loads_what_is_written_for_it():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = {"depth_multiplier": 0.1, "depth_divisible_by": 2, "min_depth": 2, "expand_ratio": 2.0}
    config = dataclasses.replace(
        VARIANTS["mobilenetv2_100"], **settings, finegrained_output=False, input=ImageInput(size=(40, 40))
    )
    written = json.loads(json.dumps(FAMILY.settings(config, 7)))
    torch.manual_seed(0)
    reference = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config.from_dict(written))
    reference, images = parity.randomised(reference, 0), parity.pictures(0)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=7)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).logits)
    assert network(FAMILY.parse(written, None, {}))._replace(momentum=0.9) == network(config)
    assert FAMILY.settings(config, None)["architectures"] == ["MobileNetV2Model"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VARIANTS["mobilenetv2_110d"], "has only out_channels="),
        (dataclasses.replace(VARIANTS["mobilenetv2_100"], **NARROW), "has no first_residual=True"),
    ],
)
def test_what_transformers_does_not_have_is_not_written(config, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.settings(config, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mobilenetv3_large_100"}, "architecture='mobilenetv3_large_100'.*nearest: mobilenetv2_"),
        ({"architecture": "mobilenetv2_100", "model_args": {"bn_eps": 1}}, "model_args bn_eps=1"),
        ({"model_type": "mobilenet_v2", "hidden_act": "mish"}, "hidden_act 'mish' is not among"),
        ({"model_type": "mobilenet_v2", "output_stride": 64}, "output_stride 64 is not among"),
        ({"model_type": "mobilenet_v2", "depth_multiplier": 0.0}, "depth_multiplier 0.0 .* must be above 0"),
        ({"model_type": "mobilenet_v2", "min_depth": 0}, "min_depth must be integers above 0"),
        ({"out_channels": [16, 24]}, "out_channels must have one number for each of 7 stages"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(settings, None, {})


def test_an_unknown_override_is_refused_with_the_nearest_field():
    with pytest.raises(ConfigError, match="no field 'width'; nearest:"):
        FAMILY.parse({"model_type": "mobilenet_v2"}, None, {"width": 0.1})


# The module

TINY = MobileNetV2Config(
    depth_divisible_by=1,
    min_depth=1,
    expand_ratio=2.0,
    stem_channels=6,
    out_channels=(4, 5, 6, 7, 8, 9, 10),
    num_block_repeats=(1, 1, 1, 1, 2, 1, 1),
    head_channels=12,
    input=ImageInput(size=(32, 32)),
)


def test_depth_groups_cover_every_leaf_once():
    for head in (None, jtl.heads.classifier(3)):
        model = FAMILY.build(TINY, head)
        assert parity.depth_groups_partition(FAMILY, model)
        groups = FAMILY.depth_groups(model)
        assert groups[:2] == [("stem",), ("stages_0/blocks_0",)]
        assert groups[-1] == ("top", *(() if head is None else ("head",)))


def test_the_head_of_the_family_has_its_dropout():
    assert FAMILY.head(VARIANTS["mobilenetv2_100"], 5) == jtl.heads.Linear(5, 0.2)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 4)])
def test_bad_images_are_refused(shape):
    with pytest.raises(ConfigError, match=r"images must be \[batch, height, width, 3\], got"):
        jax.eval_shape(FAMILY.build(TINY, None).init, jax.random.key(0), jnp.zeros(shape))


# The freeze boundary

IMAGES = {"images": jnp.array(parity.pictures(0, (4, 33, 47, 3))), "label": jnp.arange(4) % 3}


@functools.cache
def classifier():
    model = MobileNetV2(TINY, jtl.heads.classifier(3))
    variables = parity.run_once(model.init, jax.random.key(1), IMAGES["images"])
    return jtl.supervised(model, jtl.losses.cross_entropy, inputs=("images",)), variables


@pytest.mark.parametrize(("mask", "rows", "width"), [(("head",), 1, 12), (("head", "top", "stages_6"), 4, 9)])
def test_a_loss_is_cut_where_training_begins(mask, rows, width):
    """Depthwise convolutions, whose way the platform decides, are on both sides of the cut."""
    loss_fn, variables = classifier()
    (stored,) = shapes(assert_exact(loss_fn, variables, mask, IMAGES))
    assert (np.prod(stored[:-1]), stored[-1]) == (rows, width)


def test_frozen_statistics_stay_and_trained_ones_move():
    loss_fn, variables = classifier()
    state, frozen = ready(variables, ("head", "top"))
    cut = jtl.split(loss_fn, state, frozen, IMAGES)
    cached = compiled(cut.prefix)(frozen, frozen.collections, IMAGES)
    after, _ = compiled(jtl.train_step(cut.suffix, TX))(state, frozen, cached)
    before = dict(jtl.tree.leaves_with_paths(variables["batch_stats"]))
    for path, leaf in jtl.tree.leaves_with_paths(jtl.variables(after, frozen)["batch_stats"]):
        assert np.array_equal(leaf, before[path]) != path.startswith("top"), path


def test_a_cut_among_depthwise_convolutions_is_exact_in_float64():
    """In the batch's statistics of four small maps rounding grows; with twice the digits nothing else is left."""
    loss_fn, variables = classifier()
    with jax.enable_x64():
        wide = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf), jnp.float64), variables)
        batch = {**IMAGES, "images": jnp.array(np.asarray(IMAGES["images"]), jnp.float64)}
        assert_exact(loss_fn, wide, ("head", "top", "stages_6", "stages_5/blocks_0/depthwise/conv"), batch)


def test_a_trained_depthwise_kernel_keeps_its_own_gradient():
    """The call with the rule for its derivatives stays whole in the second half."""
    loss_fn, variables = classifier()
    state, frozen = ready(variables, ("stages_6/blocks_0/depthwise/conv", "head"))
    cut = jtl.split(loss_fn, state, frozen, IMAGES)
    cached = jax.eval_shape(cut.prefix, frozen, frozen.collections, IMAGES)
    suffix = jax.make_jaxpr(lambda batch: cut.suffix(variables["params"], {**variables}, batch, key=None))
    assert "custom_vjp_call" in str(suffix(cached))

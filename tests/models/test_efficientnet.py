"""EfficientNet against transformers, and against timm, torchvision and lukemelas written out in PyTorch."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError
from jtl.models import efficientnet
from jtl.models.efficientnet import FAMILY
from jtl.models.efficientnet_config import VARIANTS, EfficientNetConfig, network, odd_blocks
from jtl.models.family import ImageInput
from jtl.models.inverted_residual import Block, InvertedResidual
from jtl.models.inverted_residual_layouts import as_found

from ..covering import long_but  # noqa: TID252
from . import pictures_parity as parity
from .inverted_shapes import parameters, tensors

TIGHT = {"tolerance": 1e-4, "outputs": 1e-5}
LAYOUT = {layout.name: layout for layout in FAMILY.layouts}

# Parameters with a classifier of 1000 classes, as torchvision, timm and the paper publish them.
PARAMETERS = {
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
    "b8": 87_413_142,
    "l2": 480_309_308,
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}

# What the conversion of transformers lists for each checkpoint.
DEPTHWISE_PADDING = {
    "b0": (),
    "b1": (16,),
    "b2": (5, 8, 16),
    "b3": (5, 18),
    "b4": (6,),
    "b5": (13, 27),
    "b6": (31,),
    "b7": (18,),
}

# Three networks, of three and of two stages: width, depth, kernels, channels, strides, repeats, expansion, padding.
DRAWS = {
    0: (0.05, 1.0, (3, 5, 3), (96, 160, 160), (1, 2, 2), (1, 2, 1), (1, 4, 6), ()),
    1: (0.04, 1.2, (5, 3, 3), (200, 240, 100), (2, 1, 2), (1, 1, 2), (3, 2, 1), (0, 4)),
    2: (0.06, 0.4, (5, 5), (64, 220), (2, 2), (2, 3), (2, 3), (1,)),
}
SIZES = {0: (33, 47), 1: (32, 36), 2: (29, 50)}


def transformers_config(seed):
    import transformers

    width, depth, kernels, channels, strides, repeats, expansions, padding = DRAWS[seed]
    settings = transformers.EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        depth_divisor=4,
        kernel_sizes=kernels,
        in_channels=(32, *channels[:-1]),
        out_channels=channels,
        depthwise_padding=padding,
        strides=strides,
        num_block_repeats=repeats,
        expand_ratios=expansions,
        squeeze_expansion_ratio=(0.25, 0.5, 0.3)[seed],
        hidden_act=("swish", "relu", "gelu")[seed],
        pooling_type=("mean", "max", "mean")[seed],
        batch_norm_eps=(1e-3, 1e-5, 1e-2)[seed],
        hidden_dim=4 * round(1280 * width / 4),
        num_labels=7,
        image_size=32,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    settings.num_hidden_layers = 1
    return settings


def transformers_reference(seed):
    """A model whose batch normalisations move as ours: it takes the share that stays for the share that goes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from .torch_efficientnet import lively

    torch.manual_seed(seed)
    model = lively(transformers.EfficientNetForImageClassification(transformers_config(seed)))
    model = parity.randomised(model, seed)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 0.01
    return model


def run_transformers(model, pixels):
    out = model.efficientnet(pixels)
    return out.last_hidden_state, out.pooler_output


def parsed(reference, folder):
    """The configuration that the reference writes to a folder."""
    reference.config.save_pretrained(folder)
    return FAMILY.parse(json.loads((folder / "config.json").read_text()), folder, {})


def shapes_of(config, layout, outputs=10):
    """The tensors of a checkpoint, by name."""
    return tensors(network(config), LAYOUT[layout], config, outputs)


def images_of(seed):
    return parity.pictures(seed, (2, *SIZES[seed], 3))


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(DRAWS, (1, 2)))  # a step is trained of the first
def test_features_and_gradients_are_those_of_transformers(seed, tmp_path):
    reference = transformers_reference(seed)
    model, variables = parity.loaded(FAMILY, parsed(reference, tmp_path), parity.state(reference), outputs=7)
    parity.check_features(FAMILY, model, variables, reference, run_transformers, images_of(seed), **TIGHT)
    expected = reference(parity.to_torch(images_of(seed))).logits
    parity.check_logits(model, variables, images_of(seed), expected)


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0])
def test_a_training_step_is_that_of_transformers(seed, tmp_path):
    reference = transformers_reference(seed)
    model, variables = parity.loaded(FAMILY, parsed(reference, tmp_path), parity.state(reference))
    images = parity.pictures(seed, (4, *SIZES[seed], 3))
    parity.check_training_step(FAMILY, model, variables, reference, run_transformers, images, **TIGHT)


@pytest.mark.torch
def test_a_model_without_classifier_has_the_same_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = parity.randomised(transformers.EfficientNetModel(transformers_config(1)), 1)
    model, variables = parity.loaded(FAMILY, parsed(reference, tmp_path), parity.state(reference))
    spatial = reference(parity.to_torch(images_of(1))).last_hidden_state
    parity.assert_close(jax.jit(model.apply)(variables, images_of(1)).spatial, parity.to_numpy(spatial))


# timm, torchvision, lukemelas

SMALL = {"width_coefficient": 0.25, "depth_coefficient": 1.3}
TABLE = {
    "kernel_sizes": (3, 5, 3),
    "out_channels": (32, 96, 96),
    "strides": (1, 2, 2),
    "num_block_repeats": (1, 2, 1),
    "expand_ratios": (1, 6, 2),
    "head_channels": 96,
}


def small(name, **fields):
    """A variant's settings, with fewer stages and channels."""
    config = dataclasses.replace(VARIANTS[name], **SMALL, **{**TABLE, **fields})
    return dataclasses.replace(config, input=ImageInput(size=(32, 32)))


def torch_stages():
    from .torch_efficientnet import Stage

    columns = ("num_block_repeats", "kernel_sizes", "strides", "expand_ratios", "out_channels")
    return tuple(Stage(*row) for row in zip(*(TABLE[column] for column in columns), strict=True))


def library(name):
    """A configuration, the same network of a library in PyTorch, and its layout."""
    torch = pytest.importorskip("torch")
    from . import torch_efficientnet as reference

    scale, timm = {"width": 0.25, "depth": 1.3, "classes": 7}, {"head": 96}
    lite = {"squeeze": 0, "act": torch.nn.ReLU6, "fixed": True}
    tensorflow = {"same": True, "eps": 1e-3}
    stages = torch_stages()
    torch.manual_seed(0)
    if name == "torchvision":
        config = small("efficientnet_b0", head_channels=4 * 96)
        return config, reference.TorchvisionEfficientNet(stages, **scale), LAYOUT["torchvision"]
    if name.startswith("lukemelas"):
        variant = "tf_efficientnet_lite0" if name.endswith("lite") else "tf_efficientnet_b0"
        config = dataclasses.replace(small(variant, head_channels=1280), batch_norm_momentum=0.99)
        model = reference.LukemelasEfficientNet(stages, lite=name.endswith("lite"), **scale)
        return config, model, LAYOUT["lukemelas"]
    settings = {**timm, **(tensorflow if name.startswith("tf_") else {}), **(lite if "lite" in name else {})}
    return small(name), reference.TimmEfficientNet(stages, **scale, **settings), LAYOUT["timm"]


def run_features(model, pixels):
    spatial = model.features(pixels)
    return spatial, spatial.mean((2, 3))


LIBRARIES = (
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "efficientnet_lite0",
    "tf_efficientnet_lite0",
    "torchvision",
    "lukemelas",
    "lukemelas lite",
)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", long_but(LIBRARIES, ("efficientnet_b0", "tf_efficientnet_lite0", "torchvision", "lukemelas"))
)
def test_features_and_gradients_are_those_of_other_libraries(name):
    config, reference, layout = library(name)
    reference, images = parity.randomised(reference, 0), parity.pictures(1)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=7, layout=layout)
    parity.check_features(FAMILY, model, variables, reference, run_features, images, layout, **TIGHT)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "lukemelas lite"])
def test_a_training_step_is_that_of_other_libraries(name):
    config, reference, layout = library(name)
    config = dataclasses.replace(config, drop_connect_rate=0.0)
    reference = parity.randomised(reference, 0)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), layout=layout)
    images = parity.pictures(1, (4, 33, 47, 3))
    parity.check_training_step(FAMILY, model, variables, reference, run_features, images, layout, **TIGHT)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["b0", "b3", "b7", "lite0", "lite4"])
def test_the_tensors_of_whole_networks_are_those_of_the_libraries(name):
    """Names and shapes, without computing any."""
    torch = pytest.importorskip("torch")
    from . import torch_efficientnet as reference

    config = VARIANTS[f"efficientnet_{name}"]
    scale = {"width": config.width_coefficient, "depth": config.depth_coefficient}
    lite = config.fixed_ends
    with torch.device("meta"):
        models = {
            "timm": reference.TimmEfficientNet(**scale, fixed=lite, squeeze=0 if lite else 0.25),
            "lukemelas": reference.LukemelasEfficientNet(**scale, lite=lite),
        }
        if not lite:
            models["torchvision"] = reference.TorchvisionEfficientNet(**scale)
    for layout, model in models.items():
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items() if "num_batches" not in key}
        assert shapes_of(config, layout, 1000) == theirs


# Settings


def test_default_settings_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.EfficientNetConfig(), EfficientNetConfig()
    own = {"stem_channels", "head_channels", "fixed_ends", "first_residual", "padding", "input"}
    for field in dataclasses.fields(ours):
        if field.name not in own:
            expected = getattr(reference, field.name)
            expected = tuple(expected) if isinstance(expected, list) else expected
            assert getattr(ours, field.name) == expected, field.name
    assert (network(ours).stem, network(ours).top) == (64, reference.hidden_dim)
    assert ours.input.size == (reference.image_size,) * 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_published_number_of_parameters(name):
    for prefix in ("efficientnet", "tf_efficientnet"):
        assert parameters(shapes_of(VARIANTS[f"{prefix}_{name}"], "timm", 1000)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["b0", "lite0"])
def test_models_have_the_published_number_of_parameters(name):
    assert parity.parameter_count(FAMILY, VARIANTS[f"efficientnet_{name}"], 1000) == PARAMETERS[name]


@pytest.mark.parametrize("name", DEPTHWISE_PADDING)
def test_blocks_of_odd_size_are_those_that_transformers_lists(name):
    assert odd_blocks(VARIANTS[f"tf_efficientnet_{name}"]) == DEPTHWISE_PADDING[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_of_timm_tell_the_variant(name):
    shapes = shapes_of(VARIANTS[name], "timm")
    assert FAMILY.infer(shapes, f"{name}-0123abcd.pth") == VARIANTS[name]


def test_no_two_variants_have_the_same_tensors():
    found = [(net.stem, tuple(as_found(net)), net.top) for net in map(network, VARIANTS.values())]
    assert len(set(found)) == len(VARIANTS) // 2 == len(PARAMETERS)


@pytest.mark.parametrize(
    ("layout", "name", "padding", "epsilon", "momentum", "odd"),
    [
        ("transformers", "b1", "even", 1e-3, 0.99, (16,)),
        ("torchvision", "b0", "symmetric", 1e-5, 0.9, ()),
        ("torchvision", "b5", "symmetric", 1e-3, 0.99, ()),
        ("lukemelas", "b0", "same", 1e-3, 0.99, ()),
        ("lukemelas", "lite2", "same", 1e-3, 0.99, ()),
    ],
)
def test_tensors_of_other_libraries_tell_the_variant(layout, name, padding, epsilon, momentum, odd):
    config = VARIANTS[f"tf_efficientnet_{name}"]
    shapes = shapes_of(config, layout)
    found = FAMILY.infer({f"module.{key}": value for key, value in shapes.items()}, "weights.bin")
    got = (found.padding, found.batch_norm_eps, found.batch_norm_momentum, found.depthwise_padding)
    assert got == (padding, epsilon, momentum, odd)
    for field in ("width_coefficient", "depth_coefficient", "hidden_act", "fixed_ends", "squeeze_expansion_ratio"):
        assert getattr(found, field) == getattr(config, field)


ODD = {
    "out_channels": (10, 12, 18, 18, 30, 34, 50),
    "num_block_repeats": (2, 1, 3, 1, 1, 2, 1),
    "stem_channels": 14,
    "head_channels": 33,
    "num_channels": 1,
    "squeeze_expansion_ratio": 0.3,
}


@pytest.mark.parametrize("layout", LAYOUT)
def test_tensors_of_no_variant_tell_channels_and_repeats(layout):
    scales = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 1}
    config = dataclasses.replace(VARIANTS["tf_efficientnet_b0"], **ODD, **scales)
    found = FAMILY.infer(shapes_of(config, layout), "weights.bin")
    names = ("inputs", "expanded", "features", "kernel", "stride", "squeezed", "stage")
    ours, theirs = ([[getattr(b, n) for n in names] for b in network(c).blocks] for c in (found, config))
    assert ours == theirs
    assert (network(found).stem, network(found).top, found.num_channels) == (14, 33, 1)


def test_tensors_of_other_networks_tell_nothing():
    shapes = shapes_of(VARIANTS["efficientnet_lite0"], "timm")
    assert FAMILY.infer({}, "x.pth") is None
    assert FAMILY.infer({"conv_stem.weight": (32, 3, 3, 3)}, "x.pth") is None
    small_kernels = {name: (*shape[:2], 3, 3) if shape[2:] == (5, 5) else shape for name, shape in shapes.items()}
    assert FAMILY.infer(small_kernels, "mobilenetv2_100.pth") is None


def test_stages_of_another_number_are_refused_for_their_strides():
    config = dataclasses.replace(small("efficientnet_b0"), **SMALL)
    with pytest.raises(ConfigError, match="has 3 stages, an EfficientNet 7: tensors do not tell strides"):
        FAMILY.infer(shapes_of(config, "transformers"), "x")


def test_settings_of_timm():
    settings = {
        "architecture": "tf_efficientnet_b3",
        "num_classes": 1000,
        "model_args": {"drop_path_rate": 0.1},
        "pretrained_cfg": {
            "input_size": [3, 300, 300],
            "crop_pct": 0.904,
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
    }
    config = FAMILY.parse(settings, None, {"dropout_rate": 0.0})
    expected = dataclasses.replace(VARIANTS["tf_efficientnet_b3"], drop_connect_rate=0.1, dropout_rate=0.0)
    assert dataclasses.replace(config, input=expected.input) == expected
    assert (config.input.size, config.input.mean) == ((300, 300), (0.5, 0.5, 0.5))


def test_the_processor_of_transformers_is_read(tmp_path):
    processor = {
        "image_processor_type": "EfficientNetImageProcessor",
        "include_top": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.47853944, 0.4732864, 0.47434163],
        "resample": 0,
        "size": {"height": 224, "width": 224},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    given = FAMILY.parse({"model_type": "efficientnet", "image_size": 224}, tmp_path, {}).input
    assert (given.size, given.resize, given.interpolation) == ((224, 224), "exact", "nearest")
    np.testing.assert_allclose(given.std, (0.229, 0.224, 0.225), atol=1e-6)  # normalised twice
    assert FAMILY.parse({"model_type": "efficientnet", "image_size": 240}, None, {}).input.size == (240, 240)


def test_a_configuration_survives_json():
    for config in (*VARIANTS.values(), EfficientNetConfig(depthwise_padding=(1, 2))):
        assert FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {}) == config


@pytest.mark.torch
@pytest.mark.parametrize("padding", ["even", "same"])
def test_transformers_loads_what_is_written_for_it(padding):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    fields = {"padding": padding, "head_channels": 1280, "first_residual": False, "input": ImageInput(size=(30, 30))}
    config = dataclasses.replace(small("tf_efficientnet_b0"), **fields)
    settings = json.loads(json.dumps(FAMILY.settings(config, 7)))
    assert settings["depthwise_padding"] == ([2] if padding == "same" else [])
    reference = transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig.from_dict(settings))
    reference = parity.randomised(reference, 0)
    images = parity.pictures(0, (2, 30, 30, 3))
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), outputs=7)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).logits)
    back = FAMILY.parse(settings, None, {})
    assert network(back)._replace(blocks=(), momentum=0.9) == network(
        dataclasses.replace(config, padding="even")
    )._replace(blocks=())
    assert FAMILY.settings(config, None)["architectures"] == ["EfficientNetModel"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet_lite0", "only fixed_ends=False"),
        ("efficientnet_b0", "no padding='symmetric'"),
    ],
)
def test_what_transformers_does_not_have_is_not_written(name, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.settings(VARIANTS[name], 10)
    plain = dataclasses.replace(VARIANTS["tf_efficientnet_b0"], squeeze_expansion_ratio=0.0)
    with pytest.raises(ConfigError, match="no squeeze_expansion_ratio=0"):
        FAMILY.settings(plain, 10)
    odd = dataclasses.replace(VARIANTS["tf_efficientnet_b0"], input=ImageInput(size=(225, 225)))
    with pytest.raises(ConfigError, match="pads pictures of 225 x 225 pixels otherwise"):
        FAMILY.settings(odd, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "efficientnetv2_s"}, "architecture='efficientnetv2_s'.*nearest: efficientnet_"),
        ({"architecture": "efficientnet_b0_gn"}, "which jtl does not have; nearest: efficientnet_b0"),
        ({"architecture": "efficientnet_b0", "model_args": {"bn_eps": 1}}, "model_args bn_eps=1"),
        ({"architecture": "efficientnet_b0", "global_pool": "max"}, "global_pool='max'"),
        ({"model_type": "efficientnet", "hidden_act": "mish"}, "hidden_act 'mish' is not among"),
        ({"model_type": "efficientnet", "pooling_type": "sum"}, "pooling_type 'sum' is not among"),
        ({"model_type": "efficientnet", "hidden_dim": 2561}, "hidden_dim=2561; the other settings give 2560"),
        ({"model_type": "efficientnet", "in_channels": [32] * 7}, "in_channels=.*the other settings give"),
        ({"model_type": "efficientnet", "strides": [1, 2]}, "strides .* are of different lengths"),
        ({"model_type": "efficientnet", "strides": [1, 2, 2, 3, 1, 2, 1]}, "strides .* 1 or 2"),
        ({"model_type": "efficientnet", "kernel_sizes": [2] * 7}, "kernel_sizes .* must be odd"),
        ({"model_type": "efficientnet", "out_channels": [0] * 7}, "out_channels must be integers above 0"),
        ({"model_type": "efficientnet", "width_coefficient": 0}, "width_coefficient .* must be above 0"),
        ({"padding": "full"}, "padding 'full' is not among"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(settings, None, {})


def test_an_unknown_override_is_refused_with_the_nearest_field():
    with pytest.raises(ConfigError, match="no field 'dropout'; nearest: dropout_rate"):
        FAMILY.parse({"model_type": "efficientnet"}, None, {"dropout": 0.1})


# The module


def test_depth_groups_cover_every_leaf_once():
    for head in (None, jtl.heads.classifier(3)):
        model = FAMILY.build(small("efficientnet_b0"), head)
        assert parity.depth_groups_partition(FAMILY, model)
        groups = FAMILY.depth_groups(model)
        assert groups[:2] == [("stem",), ("stages_0/blocks_0",)]
        assert groups[-1] == ("top", *(() if head is None else ("head",)))


def test_the_head_of_the_family_has_its_dropout():
    assert FAMILY.head(VARIANTS["efficientnet_b4"], 5) == jtl.heads.Linear(5, 0.4)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 4), (1, 1, 32, 3)])
def test_bad_images_are_refused(shape):
    model = FAMILY.build(EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1), None)
    message = "too small: nothing is left" if shape[-1] == 3 and len(shape) == 4 else r"must be \[batch, .*, 3\], got"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_stochastic_depth_drops_whole_examples_and_keeps_their_mean():
    net = network(small("efficientnet_b0"))
    block = Block(0, 1, 4, 8, 4, 3, 1, 1, residual=True, drop=0.25)
    model, x = InvertedResidual(net, block), jax.random.normal(jax.random.key(0), (400, 3, 3, 4))
    variables = model.init(jax.random.key(1), x)
    plain = model.apply(variables, x) - x
    # In training with the statistics of running: dropout alone.
    with nn.intercept_methods(running):
        dropped = model.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(2)}) - x
    ratio = np.asarray(jnp.sum(dropped * plain, axis=(1, 2, 3)) / jnp.sum(plain * plain, axis=(1, 2, 3)))
    kept = ratio > 0.5
    np.testing.assert_allclose(ratio[kept], 1 / 0.75, rtol=1e-4)
    np.testing.assert_allclose(ratio[~kept], 0, atol=1e-5)
    assert 0.65 < kept.mean() < 0.85


def running(call, args, kwargs, context):
    return call(*args, **{**kwargs, "use_running_average": True} if "use_running_average" in kwargs else kwargs)


def test_drop_rates_grow_with_depth():
    drops = [block.drop for block in network(VARIANTS["efficientnet_b0"]).blocks]
    np.testing.assert_allclose(drops, 0.2 * np.arange(16) / 16)


def test_half_precision_follows_single():
    model = FAMILY.build(small("tf_efficientnet_b0"), None)
    images = parity.pictures(0, (2, 32, 32, 3))
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), parity.shapes(FAMILY, model))
    half = efficientnet.EfficientNet(model.config, None, jnp.bfloat16)
    got, expected = (parity.run_once(m.apply, variables, images).pooled for m in (half, model))
    assert got.dtype == jnp.bfloat16
    parity.assert_close(got.astype("float32"), expected, 0.05)

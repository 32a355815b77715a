"""ViT and DeiT against transformers, against timm's and torchvision's names, and against published sizes."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl.errors import ConfigError, WeightsError
from jtl.models import vit_layouts
from jtl.models.vit import FAMILY
from jtl.models.vit_config import POOLS, ViTConfig
from jtl.models.vit_layouts import POSITIONS, adapt_positions
from jtl.weights import safetensors

from ..covering import covering, long_but, product  # noqa: TID252
from . import pictures_parity as parity

LAYOUTS = {layout.name: layout for layout in FAMILY.layouts}
OUTPUTS = 5


def _draw(seed):
    """A random configuration, as settings of transformers: odd grids, pictures that are not square, any activation."""
    rng = np.random.default_rng(seed)
    heads = (1, 2, 3, 4)[seed % 4]
    patch = (8, 16, 5)[seed % 3]
    height, width = ((48, 32), (16, 16), (35, 15), (80, 48), (48, 64), (15, 25))[seed % 6]
    return {
        "hidden_size": heads * int(rng.integers(2, 7)),
        "num_hidden_layers": (1, 2, 3)[seed % 3],
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "hidden_act": ("gelu", "gelu_new", "relu", "silu")[seed % 4],
        "layer_norm_eps": (1e-12, 1e-6, 1e-2)[int(rng.integers(3))],
        "image_size": [height - height % patch, width - width % patch],
        "patch_size": patch,
        "num_channels": (3, 1, 4)[seed // 2 % 3],
        "qkv_bias": seed % 5 != 1,
    }


def _transformers(kind, settings, seed, **more):
    transformers = pytest.importorskip("transformers")
    config = "DeiTConfig" if kind.startswith("DeiT") else "ViTConfig"
    made = getattr(transformers, config)(**settings, attn_implementation="eager", **more)
    return parity.randomised(getattr(transformers, kind)(made), seed)


def _config(reference, **overrides):
    """The configuration that the reference's own settings give."""
    settings = {**reference.config.to_dict(), "architectures": [type(reference).__name__]}
    return FAMILY.parse(settings, None, overrides)


def _pictures(config, seed=0):
    return parity.pictures(seed, (2, *config.image_size, config.num_channels))


def _images(config):
    return jnp.asarray(_pictures(config))


def _run(reference, pixels, grid, prefix):
    """Features of transformers' models with the pooler."""
    out = reference(pixels)
    return out.last_hidden_state[:, prefix:].transpose(1, 2).unflatten(2, grid), out.pooler_output


def _with_head(config, tensors, layout):
    """A model with the family's own head, and the checkpoint's variables, position embeddings interpolated."""
    model = FAMILY.build(config, FAMILY.head(config, OUTPUTS))
    return model, jax.tree.map(jnp.array, parity.converted(FAMILY, model, _adapted(config, tensors, layout), layout))


def _adapted(config, tensors, layout):
    named = {layout.rename(name): value for name, value in tensors.items()}
    source = jtl.weights.convert.locate(POSITIONS, layout.keys(config))[0]
    shape = (1, config.grid[0] * config.grid[1] + config.prefix, config.hidden_size)
    return named | {source: adapt_positions(config, POSITIONS, named[source], shape)}


@functools.cache
def _leaves(model):
    """The shapes of a model's leaves by path."""
    return {path: leaf.shape for path, leaf in jtl.tree.leaves_with_paths(parity.shapes(FAMILY, model)["params"])}


def _random_leaves(model):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape, scale=0.3).astype(np.float32) for path, shape in _leaves(model).items()}


def _random_variables(model):
    tree = {}
    for path, value in _random_leaves(model).items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(value)
    return {"params": tree}


# Against transformers


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(range(8), (1, 2, 3, 4)))
def test_features_and_gradients_are_those_of_the_reference(seed):
    reference = _transformers(("ViTModel", "DeiTModel")[seed // 2 % 2], _draw(seed), seed)
    config = _config(reference)
    assert config.pool == "pooler"
    layout = LAYOUTS["transformers, no head"]
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), layout=layout)

    def run(module, pixels):
        return _run(module, pixels, config.grid, config.prefix)

    parity.check_features(FAMILY, model, variables, reference, run, _pictures(config, seed), layout, tolerance=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "seed"),
    covering(
        product(
            ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
            range(3),
        )
    ),
)
def test_logits_are_those_of_the_reference(kind, seed):
    reference = _transformers(kind, _draw(seed), seed, num_labels=OUTPUTS)
    config = _config(reference)
    model, variables = _with_head(config, parity.state(reference), LAYOUTS["transformers"])
    images = _pictures(config)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).logits)


@pytest.mark.torch
def test_the_class_token_of_a_model_with_two_heads_takes_the_first():
    reference = _transformers("DeiTForImageClassificationWithTeacher", _draw(0), 0, num_labels=OUTPUTS)
    config = _config(reference, pool="cls")
    model, variables = _with_head(config, parity.state(reference), LAYOUTS["transformers, two heads"])
    images = _pictures(config)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)).cls_logits)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "edges"),
    covering(
        product(
            ("ViTForImageClassification", "DeiTForImageClassification"),
            ((40, 40), (56, 24), (8, 72), (24, 16), (16, 64)),
        )
    ),
)
def test_pictures_of_another_size_are_as_the_reference_interpolates(kind, edges):
    """To larger and smaller, odd and oblong grids, among them one with as many patches as the checkpoint's."""
    settings = _draw(0) | {"image_size": 32, "patch_size": 8}
    reference = _transformers(kind, settings, 0, num_labels=OUTPUTS)
    config = _config(reference, image_size=edges)
    assert (config.checkpoint_size, config.input.size) == ((32, 32), edges)
    model, variables = _with_head(config, parity.state(reference), LAYOUTS["transformers"])
    images = _pictures(config)
    expected = reference(parity.to_torch(images), interpolate_pos_encoding=True).logits
    parity.assert_close(jax.jit(model.apply)(variables, images), expected.detach().numpy(), 1e-5, "logits")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "ViTModel"])
def test_the_files_of_transformers_and_its_modules_are_read(kind, tmp_path):
    """Release 5 writes the names of release 4, and has others once loaded."""
    reference = _transformers(kind, _draw(1), 1)
    reference.save_pretrained(tmp_path)
    written, held = safetensors.read_tensors(tmp_path), parity.state(reference)
    assert set(written) != set(held)
    settings = json.loads((tmp_path / "config.json").read_text())
    config = FAMILY.parse(settings, tmp_path, {})
    assert config == _config(reference)
    layout = LAYOUTS["transformers, no head" if kind == "ViTModel" else "transformers"]
    model = FAMILY.build(config, None)
    for tensors in (held, {f"module.{name}": value for name, value in held.items()}):
        jax.tree.map(
            np.testing.assert_array_equal,
            parity.converted(FAMILY, model, tensors, layout),
            parity.converted(FAMILY, model, written, layout),
        )


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "overrides", "outputs"),
    [
        ("ViTForImageClassification", {}, 4),
        ("ViTForImageClassification", {}, None),
        ("ViTModel", {}, None),
        ("DeiTForImageClassification", {}, 4),
        ("DeiTForImageClassificationWithTeacher", {}, 4),
    ],
)
def test_written_settings_and_names_are_loaded_strictly(kind, overrides, outputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = _config(_transformers(kind, _draw(2), 2), **overrides)
    written = FAMILY.settings(config, outputs)
    assert written["architectures"] == [kind]
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = FAMILY.build(config, None if outputs is None else FAMILY.head(config, outputs))
    tensors = {}
    for path, value in _random_leaves(model).items():
        source, layout = jtl.weights.convert.locate(path, FAMILY.layouts[0].keys(config))
        tensors[source] = layout.write(value)
    safetensors.write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    reference, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    images = _pictures(config)
    if outputs is not None:
        expected = reference.eval()(parity.to_torch(images)).logits
        parity.check_logits(model, _random_variables(model), images, expected)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "format"),
    covering(
        product(
            ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher"),
            ("jtl", "transformers"),
        )
    ),
)
def test_a_resized_checkpoint_is_loaded_and_saved(kind, format, tmp_path):
    settings = _draw(0) | {"image_size": 32, "patch_size": 8, "num_labels": OUTPUTS}
    reference = _transformers(kind, settings, 0)
    reference.save_pretrained(tmp_path / "reference")
    model, variables = jtl.load(tmp_path / "reference", image_size=(40, 24))
    images = _pictures(model.config)
    expected = reference(parity.to_torch(images), interpolate_pos_encoding=True).logits
    parity.check_logits(model, variables, images, expected)
    jtl.save(tmp_path / "saved", model, variables, format=format)
    again, same = jtl.load(tmp_path / "saved")
    assert again.config == dataclasses.replace(model.config, checkpoint_size=None)
    assert type(again.head) is type(model.head)
    jax.tree.map(np.testing.assert_array_equal, same, variables)


# Against timm's and torchvision's names

TIMM = {
    "token": {"size": (24, 16), "patch": 8, "width": 12, "depth": 2, "heads": 3, "hidden": 20},
    "token, no bias": {
        "size": (16, 16),
        "patch": 8,
        "width": 8,
        "depth": 1,
        "heads": 2,
        "hidden": 9,
        "qkv_bias": False,
    },
    "avg": {"size": (15, 25), "patch": 5, "width": 6, "depth": 3, "heads": 1, "hidden": 24, "pool": "avg"},
    "distilled": {"size": (32, 64), "patch": 16, "width": 10, "depth": 1, "heads": 5, "hidden": 7, "distilled": True},
}


def _timm_config(settings):
    fields = {
        "pool": "distilled" if settings.get("distilled") else ("mean" if "pool" in settings else "cls"),
        "norm_after_pool": "pool" in settings,
        "distillation_token": settings.get("distilled", False),
        "qkv_bias": settings.get("qkv_bias", True),
    }
    return ViTConfig(
        hidden_size=settings["width"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["heads"],
        intermediate_size=settings["hidden"],
        layer_norm_eps=1e-6,
        image_size=settings["size"],
        patch_size=settings["patch"],
        antialias=True,
        **fields,
    )


@pytest.mark.torch
@pytest.mark.parametrize("case", TIMM)
def test_timm(case):
    pytest.importorskip("torch")
    from . import torch_vit

    config = _timm_config(TIMM[case])
    reference = parity.randomised(torch_vit.TimmViT(**TIMM[case], outputs=OUTPUTS), 3)
    _check_names(config, reference, LAYOUTS["timm"])


@pytest.mark.torch
def test_torchvision():
    pytest.importorskip("torch")
    from . import torch_vit

    reference = parity.randomised(torch_vit.TorchvisionViT(24, 8, 12, 2, 3, 20, OUTPUTS), 4)
    config = ViTConfig(12, 2, 3, 20, layer_norm_eps=1e-6, image_size=(24, 24), patch_size=8)
    _check_names(config, reference, LAYOUTS["torchvision"])
    tensors = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
        for name, value in parity.state(reference).items()
    }
    parity.loaded(FAMILY, config, tensors, OUTPUTS, LAYOUTS["torchvision"])


def _check_names(config, reference, layout):
    images = _pictures(config)
    model, variables = parity.loaded(FAMILY, config, parity.state(reference), layout=layout)
    run = type(reference).features
    parity.check_features(FAMILY, model, variables, reference, run, images, layout, tolerance=1e-4)
    model, variables = _with_head(config, parity.state(reference), layout)
    parity.check_logits(model, variables, images, reference(parity.to_torch(images)))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 3)), ((5, 5), (5, 5)), ((3, 6), (2, 9)), ((14, 14), (24, 24))])
def test_positions_with_antialias_are_as_timm_resamples(old, new, dtype):
    torch = pytest.importorskip("torch")
    config = ViTConfig(
        image_size=(16 * new[0], 16 * new[1]), checkpoint_size=(16 * old[0], 16 * old[1]), antialias=True
    )
    array = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 6)).astype(np.float32).astype(dtype)
    got = adapt_positions(config, POSITIONS, array, (1, 1 + new[0] * new[1], 6))
    grid = torch.from_numpy(array[:, 1:].astype(np.float32)).double().reshape(1, *old, -1).permute(0, 3, 1, 2)
    moved = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True)
    expected = moved.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).numpy()
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got[:, :1], array[:, :1])
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(got[:, 1:].astype(np.float32), expected, rtol=0, atol=tolerance)


def test_positions_of_no_grid_are_refused():
    config = ViTConfig(image_size=(32, 32))
    with pytest.raises(WeightsError, match=r"for 6 patches.*not a grid of 2x2.*checkpoint_size="):
        adapt_positions(config, POSITIONS, np.zeros((1, 7, 768), np.float32), (1, 5, 768))
    array = np.zeros((1, 5, 768), np.float32)
    assert adapt_positions(config, POSITIONS, array, array.shape) is array
    assert adapt_positions(config, "norm/scale", array, (7,)) is array


def test_the_writer_of_a_third_never_passes_for_the_whole():
    for part, layout in vit_layouts._PARTS.items():
        kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
        whole = layout.write(kernel)
        assert whole.shape == (12, 3), part
        assert np.isnan(whole).sum() == 24
        np.testing.assert_array_equal(layout.read(whole), kernel)


# Sizes

PUBLISHED = {
    # Millions of parameters with 1000 classes, from timm's table of results.
    "vit_tiny_patch16_224": 5.72,
    "vit_tiny_patch16_384": 5.79,
    "vit_small_patch32_224": 22.88,
    "vit_small_patch16_224": 22.05,
    "vit_small_patch16_384": 22.20,
    "vit_base_patch32_224": 88.22,
    "vit_base_patch32_384": 88.30,
    "vit_base_patch16_224": 86.57,
    "vit_base_patch16_384": 86.86,
    "vit_base_patch8_224": 86.58,
    "vit_large_patch32_384": 306.63,
    "vit_large_patch16_224": 304.33,
    "vit_large_patch16_384": 304.72,
    "vit_large_patch14_224": 304.20,
    "vit_huge_patch14_224": 632.05,
    "deit_tiny_patch16_224": 5.72,
    "deit_small_patch16_224": 22.05,
    "deit_base_patch16_224": 86.57,
    "deit_base_patch16_384": 86.86,
    "deit_tiny_distilled_patch16_224": 5.91,
    "deit_small_distilled_patch16_224": 22.44,
    "deit_base_distilled_patch16_224": 87.34,
    "deit_base_distilled_patch16_384": 87.63,
}


def _count(config):
    model = FAMILY.build(config, FAMILY.head(config, 1000))
    return sum(math.prod(shape) for shape in _leaves(model).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    assert round(_count(FAMILY.variants[name]) / 1e6, 2) == PUBLISHED[name]


def test_the_number_of_parameters_of_a_base_model():
    assert _count(FAMILY.variants["vit_base_patch16_224"]) == 86_567_656


def _tensor_shapes(config, layout, *, head=True):
    model = FAMILY.build(config, FAMILY.head(config, 1000) if head else None)
    tensors = {}
    for path, shape in _leaves(model).items():
        source, written = jtl.weights.convert.locate(path, layout.keys(config))
        tensors[source] = written.write(np.broadcast_to(np.float32(0), shape)).shape
    return tensors


@pytest.mark.parametrize("name", FAMILY.variants)
def test_a_variant_is_inferred_from_the_tensors_of_timm(name):
    config = FAMILY.variants[name]
    got = FAMILY.infer(_tensor_shapes(config, LAYOUTS["timm"]), f"{name}.safetensors")
    # Tensors tell neither how much of a larger picture is cropped away, nor the statistics of DINO.
    if config.image_size != (384, 384) and name != "vit_small_patch8_224":
        assert got == config
    assert dataclasses.replace(got, input=config.input) == config


NON_STANDARD = {
    "transformers": ViTConfig(128, 3, 2, 100, num_channels=1, image_size=(40, 40), patch_size=8, qkv_bias=False),
    "transformers, no head": ViTConfig(64, 1, 1, 300, image_size=(32, 32), patch_size=4, pool="pooler"),
    "timm": dataclasses.replace(
        FAMILY.variants["vit_small_patch16_224"], num_hidden_layers=5, pool="mean", norm_after_pool=True
    ),
    "torchvision": ViTConfig(192, 2, 3, 10, image_size=(28, 28), patch_size=14, layer_norm_eps=1e-6),
}


@pytest.mark.parametrize("name", NON_STANDARD)
def test_other_widths_and_depths_are_inferred(name):
    config, layout = NON_STANDARD[name], LAYOUTS[name]
    tensors = _tensor_shapes(config, layout, head=name != "transformers, no head")
    got = FAMILY.infer({f"module.{tensor}": shape for tensor, shape in tensors.items()}, "weights.pth")
    assert dataclasses.replace(got, input=config.input) == config


@pytest.mark.parametrize("kind", ["cls", "distilled", "pooler"])
def test_a_deit_of_transformers_is_inferred(kind):
    config = ViTConfig(64, 1, 1, 8, distillation_token=True, pool=kind, image_size=(32, 32))
    layout = LAYOUTS["transformers, no head" if kind == "pooler" else "transformers"]
    got = FAMILY.infer(_tensor_shapes(config, layout, head=kind != "pooler"), "model.safetensors")
    assert got.input.mean == (0.485, 0.456, 0.406)
    assert dataclasses.replace(got, input=config.input) == config


def test_what_is_not_a_vit_is_not_inferred():
    tensors = _tensor_shapes(FAMILY.variants["vit_tiny_patch16_224"], LAYOUTS["timm"])
    assert FAMILY.infer({"conv1.weight": (64, 3, 7, 7)}, "resnet50.pth") is None
    assert FAMILY.infer({**tensors, "blocks.0.ls1.gamma": (192,)}, "deit3.pth") is None
    assert FAMILY.infer({**tensors, "norm_pre.weight": (192,)}, "clip.pth") is None


def test_what_tensors_do_not_tell_is_asked_for():
    tensors = _tensor_shapes(ViTConfig(100, 1, 4, 8, image_size=(32, 32)), LAYOUTS["timm"])
    with pytest.raises(ConfigError, match="how many heads share the width 100: set num_attention_heads="):
        FAMILY.infer(tensors, "x.pth")
    tensors = _tensor_shapes(ViTConfig(64, 1, 1, 8, image_size=(32, 48)), LAYOUTS["timm"])
    with pytest.raises(ConfigError, match="for 6 patches are not those of a square: set image_size="):
        FAMILY.infer(tensors, "x.pth")


# Settings


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_small_distilled_patch16_224"])
def test_own_settings_come_back_from_json(name):
    config = dataclasses.replace(FAMILY.variants[name], image_size=(64, 96))
    again = FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {})
    assert again == config
    assert hash(again) == hash(config)


def test_another_size_is_kept_once_it_is_saved():
    config = FAMILY.parse({"architecture": "vit_tiny_patch16_224"}, None, {"image_size": 384})
    assert (config.image_size, config.checkpoint_size) == ((384, 384), (224, 224))
    assert (config.input.size, config.input.resize_to) == ((384, 384), round(248 * 384 / 224))
    again = FAMILY.parse(json.loads(json.dumps(dataclasses.asdict(config))), None, {})
    assert (again.image_size, again.checkpoint_size) == ((384, 384), None)


def test_timm_settings():
    settings = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 1000,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, 256, 256],
            "crop_pct": 1.0,
            "mean": [0.1, 0.2, 0.3],
            "std": [1.0, 1.0, 1.0],
        },
        "model_args": {"depth": 3, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2.5, "qkv_bias": False},
    }
    config = FAMILY.parse(settings, None, {})
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 96, 4)
    assert (config.intermediate_size, config.qkv_bias, config.image_size) == (240, False, (256, 256))
    assert (config.pool, config.norm_after_pool, config.antialias) == ("mean", True, True)
    assert config.input.mean == (0.1, 0.2, 0.3)
    tagged = FAMILY.parse({"architecture": "deit_tiny_distilled_patch16_224.fb_in1k"}, None, {})
    assert tagged == FAMILY.variants["deit_tiny_distilled_patch16_224"]


def test_the_preprocessor_beside_the_settings_is_read(tmp_path):
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    config = FAMILY.parse({"model_type": "vit", "image_size": 64}, tmp_path, {})
    assert (config.input.mean, config.input.interpolation, config.input.size) == ((0.1, 0.2, 0.3), "bicubic", (64, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "vit_mae"}, "'vit_mae' is not among"),
        ({"model_type": "vit", "hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not among"),
        ({"model_type": "vit", "pooler_act": "prelu"}, "pooler_act 'prelu' is not among"),
        ({"model_type": "vit", "pooler_output_size": 12}, "pooler_output_size=12"),
        ({"model_type": "vit", "head_dim": 12}, "head_dim=12"),
        ({"model_type": "vit", "patch_size": [16, 8]}, "square patches alone"),
        ({"model_type": "vit", "image_size": 100}, r"image_size \(100, 100\) does not divide into patches of 16"),
        ({"model_type": "vit", "num_attention_heads": 0}, "num_attention_heads must be an integer above 0"),
        ({"model_type": "vit", "num_attention_heads": 7}, "768 is not a multiple of num_attention_heads 7"),
        ({"architecture": "vit_base_patch16_clip_224"}, "nearest: vit_base_patch16_224"),
        ({"architecture": "deit3_small_patch16_224"}, "nearest: deit_small_patch16_224"),
        ({"architecture": "vit_tiny_patch16_224", "global_pool": "map"}, "global_pool='map'"),
        ({"architecture": "deit_tiny_distilled_patch16_224", "global_pool": "avg"}, "global_pool='avg'"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"init_values": 1e-5}}, "init_values=1e-05"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"fc_norm": True}}, "fc_norm"),
        ({"hidden_sizes": 3}, "no field 'hidden_sizes'; nearest: hidden_size"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(settings, None, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pooling": "mean"}, "no field 'pooling'; nearest: pool"),
        ({"pool": "sum"}, "pool 'sum' is not among"),
        ({"pool": "distilled"}, "needs a model with distillation_token"),
        ({"class_token": False}, "pool must be 'mean'"),
        ({"norm_after_pool": True}, "norm_after_pool goes with pool 'mean'"),
        ({"image_size": (224, 224, 3)}, "expected pixels, or height and width"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse({"model_type": "vit"}, None, overrides)


@pytest.mark.parametrize(("fields", "outputs"), [({"pool": "mean"}, None), ({"pool": "pooler"}, 3)])
def test_what_transformers_does_not_have_is_not_written(fields, outputs):
    with pytest.raises(ConfigError, match="transformers has no ViT"):
        FAMILY.settings(ViTConfig(**fields), outputs)


def test_default_settings_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    written, reference = FAMILY.settings(ViTConfig(), None), transformers.ViTConfig()
    kept = {name: getattr(reference, name) for name in written if name not in ("architectures", "id2label", "label2id")}
    assert {name: written[name] for name in kept} == kept


# The module

TINY = ViTConfig(12, 2, 3, 20, image_size=(16, 24), patch_size=8)


@pytest.mark.parametrize("pool", POOLS)
def test_depth_groups_cover_every_leaf_once(pool):
    config = dataclasses.replace(TINY, distillation_token=True, pool=pool)
    for head in (None, FAMILY.head(config, 3)):
        assert parity.depth_groups_partition(FAMILY, FAMILY.build(config, head))


def test_a_model_without_class_token_pools_the_patches():
    config = dataclasses.replace(TINY, class_token=False, pool="mean")
    model = FAMILY.build(config, None)
    variables = _random_variables(model)
    got = jax.jit(model.apply)(variables, _images(config))
    assert variables["params"]["embeddings"]["position"].shape == (1, 6, 12)
    assert got.spatial.shape == (2, 2, 3, 12)
    np.testing.assert_allclose(got.pooled, got.spatial.mean((1, 2)), rtol=0, atol=1e-6)


def test_pictures_that_do_not_fit_are_refused():
    model = FAMILY.build(TINY, None)
    for shape in ((2, 24, 16, 3), (2, 16, 24, 1), (16, 24, 3)):
        with pytest.raises(ConfigError, match=r"\[batch, 16, 24, 3\], got .* image_size="):
            model.init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ConfigError, match="attention 'flash' is not among"):
        model.clone(attention="flash").init(jax.random.key(0), _images(TINY))


def test_dropout_is_random_in_training_and_off_otherwise():
    plain = dataclasses.replace(TINY, num_hidden_layers=1)
    config = dataclasses.replace(plain, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model, images = FAMILY.build(config, None), _images(config)
    variables = _random_variables(model)

    def apply(key, attention="xla"):
        settings = {"deterministic": False, "rngs": {"dropout": key}}
        return model.clone(attention=attention).apply(variables, images, **settings).pooled

    first, again, other = (jax.jit(apply)(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(
        jax.jit(model.apply)(variables, images).pooled,
        jax.jit(FAMILY.build(plain, None).apply)(variables, images).pooled,
    )
    with pytest.raises(ConfigError, match="used without dropout"):
        jax.eval_shape(lambda: apply(jax.random.key(0), attention="cudnn"))


def test_the_head_and_the_features_share_parameters():
    config = dataclasses.replace(TINY, distillation_token=True, pool="distilled")
    model, images = FAMILY.build(config, FAMILY.head(config, 3)), _images(config)
    variables = _random_variables(model)
    head = variables["params"]["head"]
    pooled = jax.jit(functools.partial(model.apply, method="features"))(variables, images).pooled
    first = pooled[:, :12] @ head["kernel"] + head["bias"][None]
    second = pooled[:, 12:] @ head["distillation_kernel"] + head["distillation_bias"][None]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), (first + second) / 2, rtol=0, atol=1e-6)

"""Vision checkpoints through `load` and `save`: real ones, and those that transformers writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jtl
from jtl.data import load_image, preprocess
from jtl.errors import ConfigError, SourceNotFoundError, WeightsError
from jtl.models import registry
from jtl.models.family import PictureFeatures
from jtl.weights import assets

from .models.pictures_parity import pictures, tensor_shapes, to_torch

# Real weights


@pytest.mark.assets
@pytest.mark.parametrize("name", ["efficientnet-lite0", "mobilenet-v2"])
def test_real_weights_know_a_cat_and_a_coffee(name):
    model, variables = jtl.load(name)
    folder = assets.fetch("photographs")
    images = [preprocess(load_image(folder / f"{photo}.png"), model.config.input) for photo in ("chelsea", "coffee")]
    cat, coffee = np.asarray(jax.jit(model.apply)(variables, jnp.stack(images)))
    assert set(np.argsort(-cat)[:3]) == {281, 282, 285}
    assert np.argmax(coffee) == 967


@pytest.mark.assets
def test_the_edge_detector_s_backbone_has_features_and_no_classifier():
    pytest.importorskip("h5py")
    model, variables = jtl.load("vgg16-hed")
    assert (model.head, model.config.input.channels) == (None, "bgr")
    assert jtl.tree.size(variables) == 14_714_688


# What transformers writes

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
REFERENCES = [
    ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}, ""),
    ("ViT", SMALL, ""),
    ("DeiT", SMALL, "WithTeacher"),
    ("EfficientNet", {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 32}, ""),
    ("MobileNetV2", {"depth_multiplier": 0.25, "image_size": 32}, ""),
    ("Bert", {"vocab_size": 50, "max_position_embeddings": 20, **{k: SMALL[k] for k in list(SMALL)[:4]}}, ""),
]


def reference(name, settings, suffix, *, head):
    import torch
    import transformers

    kind = ("ForImageClassification" if name != "Bert" else "ForSequenceClassification") + suffix if head else "Model"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**settings, num_labels=5))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.torch
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("name", "settings", "suffix"), REFERENCES)
def test_a_folder_goes_there_and_back_bit_for_bit(tmp_path, name, settings, suffix, head):
    pytest.importorskip("torch")
    theirs = reference(name, settings, suffix, head=head)
    theirs.save_pretrained(tmp_path / "theirs")
    model, variables = jtl.load(tmp_path / "theirs")
    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    left, right = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert set(left) == set(right)
    for tensor, value in left.items():
        assert value.dtype == right[tensor].dtype
        np.testing.assert_array_equal(value, right[tensor], err_msg=tensor)
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    if name != "Bert":
        images = pictures(0, (2, 32, 32, 3))
        output = again.eval()(to_torch(images))
        got = jax.jit(model.apply)(variables, jnp.asarray(images))
        expected = output.logits if head else output.pooler_output
        got = got if head else got.pooled
        np.testing.assert_allclose(got, expected.detach().numpy().reshape(got.shape), atol=1e-4)


@pytest.mark.torch
def test_names_of_classes_reach_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, variables = jtl.load("resnet18", jtl.heads.classifier(2), key=jax.random.key(0), pretrained=False)
    jtl.save(tmp_path / "out", model, variables, format="transformers", classes=("cat", "dog"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.id2label) == ("resnet", {0: "cat", 1: "dog"})
    with pytest.raises(ConfigError, match="3 names of classes for a head of 2"):
        jtl.save(tmp_path / "other", model, variables, format="transformers", classes=("a", "b", "c"))


# Folders of timm, bare state dicts, folders of jtl


def random_tensors(name, outputs=5, layout=None, seed=0):
    family = registry.of_architecture(name)
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(family, family.variants[name], outputs, layout or family.layouts[-1])
    return {key: rng.uniform(0.1, 0.5, shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def mobilenet():
    return random_tensors("mobilenetv2_035", layout=timm("mobilenetv2_035"))


def timm(name):
    return next(layout for layout in registry.of_architecture(name).layouts if "timm" in layout.name)


def write_timm(folder, tensors, **settings):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "mobilenetv2_035", "num_classes": 5} | settings))
    return folder


def test_timm_s_folder_tells_its_statistics(tmp_path, mobilenet):
    cfg = {
        "input_size": [3, 96, 96],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    }
    model, variables = jtl.load(write_timm(tmp_path / "timm", mobilenet, pretrained_cfg=cfg))
    assert model.head.outputs == 5
    assert model.config.input.size == (96, 96)
    assert model.config.input.mean == (0.5, 0.5, 0.5)
    assert model.config.input.resize_to == 120
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], mobilenet["classifier.weight"].T)
    assert set(variables) == {"params", "batch_stats"}


def test_a_classifier_is_kept_or_replaced_but_never_silently(tmp_path, mobilenet):
    folder = write_timm(tmp_path / "timm", mobilenet)
    model, variables = jtl.load(folder, jtl.heads.classifier(7), key=jax.random.key(0))
    assert variables["params"]["head"]["kernel"].shape[1] == model.head.outputs == 7
    features = model.apply(variables, jnp.zeros((1, 32, 32, 3)), method="features")
    assert isinstance(features, PictureFeatures)
    wrong = write_timm(tmp_path / "wrong", mobilenet, num_classes=1000)
    with pytest.raises(WeightsError, match=r"declares 1000 classes, and classifier\.weight has 5 outputs"):
        jtl.load(wrong)
    assert jtl.load(wrong, jtl.heads.classifier(7), key=jax.random.key(0))[0].head.outputs == 7


def test_a_bare_state_dict_tells_its_family(tmp_path, mobilenet):
    save_file(mobilenet, tmp_path / "weights.safetensors")
    model, variables = jtl.load(tmp_path / "weights.safetensors")
    assert registry.of_model(model).name == "mobilenet_v2"
    jtl.save(tmp_path / "own", model, variables)
    again, same = jtl.load(tmp_path / "own")
    assert again.config == model.config
    assert again.head == model.head
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    _, replaced = jtl.load(tmp_path / "own", jtl.heads.classifier(3), key=jax.random.key(0))
    assert replaced["params"]["head"]["bias"].shape == (3,)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_s_own_files_load(tmp_path, mobilenet, zipped):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in mobilenet.items()}
    torch.save(tensors, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    _, variables = jtl.load(tmp_path / "weights.pth")
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], mobilenet["classifier.bias"])


def test_statistics_keep_their_dtype(tmp_path, mobilenet):
    _, variables = jtl.load(write_timm(tmp_path / "timm", mobilenet), dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["batch_stats"])} == {"float32"}


# What is refused


def _without(tensors):
    tensors.pop("bn2.running_var")


def _with_more(tensors):
    tensors["extra.weight"] = np.zeros(3, np.float32)


def _misshapen(tensors):
    tensors["conv_stem.weight"] = tensors["conv_stem.weight"][:, :1]


def _not_finite(tensors):
    tensors["conv_stem.weight"] = np.full_like(tensors["conv_stem.weight"], np.nan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, r"top/norm/var needs the tensor bn2\.running_var .*which is missing"),
        (_with_more, r"the tensor extra\.weight \(3,\) has no place"),
        (_misshapen, r"conv_stem\.weight has shape \(\d+, 1, 3, 3\), stem/conv/kernel expects \(\d+, 3, 3, 3\)"),
        (_not_finite, r"conv_stem\.weight holds values that are not finite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(tmp_path, mobilenet, damage, message):
    tensors = dict(mobilenet)
    damage(tensors)
    with pytest.raises(WeightsError, match=message):
        jtl.load(write_timm(tmp_path / "timm", tensors))


def test_an_unknown_layout_is_refused_with_the_nearest_families(tmp_path):
    tensors = {"layer1.0.conv1.weight": np.zeros((4, 4, 3, 3), np.float32), "odd.weight": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"no family of jtl's has this layout.*the nearest families are resnet"):
        jtl.load(tmp_path / "odd.safetensors")


def test_an_unknown_architecture_is_refused_with_the_nearest(tmp_path, mobilenet):
    with pytest.raises(ConfigError, match="'convnext_tiny' is of none of jtl's families"):
        jtl.load(write_timm(tmp_path / "a", mobilenet, architecture="convnext_tiny"))
    with pytest.raises(ConfigError, match=r"resnet50d.*nearest: resnet50"):
        jtl.load(write_timm(tmp_path / "b", mobilenet, architecture="resnet50d"))


def test_a_variant_has_no_weights_of_its_own():
    with pytest.raises(SourceNotFoundError):
        jtl.load("resnet18_of_mine")
    model, _ = jtl.load("vit_tiny_patch16_224", pretrained=False, key=jax.random.key(0), num_hidden_layers=1)
    assert (model.head, model.config.num_hidden_layers) == (None, 1)


def test_pictures_of_other_channels_are_refused(tmp_path, mobilenet):
    model, variables = jtl.load(write_timm(tmp_path / "timm", mobilenet))
    with pytest.raises(ConfigError, match="3"):
        model.apply(variables, jnp.zeros((1, 32, 32, 1)))


def test_transformers_has_no_vgg(tmp_path):
    model = registry.get("vgg").build(registry.get("vgg").variants["vgg11"], None)
    with pytest.raises(ConfigError, match="transformers has no model of the family vgg"):
        jtl.save(tmp_path / "vgg", model, {"params": {}}, format="transformers")

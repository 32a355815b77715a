"""Preprocessing against the Pillow processors of transformers, and against timm's recipe written out."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
from PIL import Image

from jtl import errors
from jtl.cache import keys
from jtl.data import Examples, batches, picture_batches, picture_transform, pictures, preprocess
from jtl.data.preprocess import normalize, resize
from jtl.models.family import ImageInput
from jtl.models.pictures import PROCESSORS, image_input

RNG = np.random.default_rng(0)
SIZES = [(61, 47), (47, 61), (64, 64), (33, 200), (131, 40), (1, 1), (5, 3), (300, 257)]
IMAGES = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

SETTINGS = {
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    "ViT of old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_resize": True, **IMAGENET},
    "ViT, not square": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 30, "width": 41}},
    "ViT, lanczos": {"image_processor_type": "ViTImageProcessor", "size": [32, 33], "resample": 1},
    "ViT, raw": {"image_processor_type": "ViTImageProcessor", "size": 32, "do_rescale": False, "do_normalize": False},
    "DeiT": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "size": 37,
        "crop_size": 32,
        "resample": 3,
        **IMAGENET,
    },
    "DeiT, no crop": {"image_processor_type": "DeiTImageProcessor", "size": 32, "do_center_crop": False},
    "Beit": {"image_processor_type": "BeitImageProcessor", "size": 35, "crop_size": 32, "do_center_crop": True},
    "EfficientNet": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 0,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.47853944, 0.4732864, 0.47434163],
    },
    "EfficientNet, offset": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": 32,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "include_top": False,
        "do_normalize": False,
    },
    "EfficientNet, all": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": 40,
        "crop_size": 31,
        "do_center_crop": True,
        "rescale_offset": True,
        "do_normalize": None,
    },
    "ResNet": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.875, **IMAGENET},
    "ConvNext, odd": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 33}, "crop_pct": 0.9},
    "ConvNext, 384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "MobileNetV1": {"image_processor_type": "MobileNetV1ImageProcessor", "size": 37, "crop_size": 32},
    "MobileNetV2": {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
    },
    "Bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 39}, "crop_size": 32},
    "CLIP, not square": {"image_processor_type": "CLIPImageProcessor", "size": 40, "crop_size": [31, 37]},
    "CLIP, padded": {
        "image_processor_type": "CLIPImageProcessor",
        "size": 20,
        "crop_size": {"height": 31, "width": 32},
    },
    "Bit, no resize": {"image_processor_type": "BitImageProcessor", "do_resize": False, "crop_size": 32},
}


def processor(settings):
    """The Pillow processor of transformers that these settings are for."""
    transformers = pytest.importorskip("transformers")
    name = settings.get("image_processor_type") or settings["feature_extractor_type"]
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    kind = getattr(transformers, f"{name}Pil")
    return kind(**{key: value for key, value in settings.items() if not key.endswith("_type")})


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_the_processor_of_transformers(name):
    reference, spec = processor(SETTINGS[name]), image_input(SETTINGS[name])
    exact = "offset" not in name and "EfficientNet" not in name  # whose second division is folded into one
    for image in IMAGES:
        expected = reference(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        result = preprocess(image, spec)
        assert (result.shape, result.dtype) == ((*spec.size, 3), np.float32)
        if exact:
            np.testing.assert_array_equal(result, expected)
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_defaults_are_those_of_transformers(name):
    reference = processor({"image_processor_type": f"{name}ImageProcessor"})
    image = IMAGES[0]
    expected = reference(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    result = preprocess(image, image_input({"image_processor_type": f"{name}ImageProcessor"}))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def timm_recipe(image, cfg):
    """timm's evaluation transform: Resize, CenterCrop, ToTensor, Normalize of torchvision, on a Pillow picture."""
    picture, size = Image.fromarray(image), cfg["input_size"][-1]
    scaled = math.floor(size / cfg["crop_pct"])
    width, height = picture.size
    if cfg.get("crop_mode") == "squash":
        new = (scaled, scaled)
    else:
        short, long = (width, height) if width <= height else (height, width)
        new = (scaled, int(scaled * long / short)) if width <= height else (int(scaled * long / short), scaled)
    picture = picture.resize(new, getattr(Image.Resampling, cfg["interpolation"].upper()))
    left, top = (round((edge - size) / 2.0) for edge in picture.size)
    tensor = np.asarray(picture.crop((left, top, left + size, top + size))).astype(np.float32) / np.float32(255)
    return (tensor - np.array(cfg["mean"], np.float32)) / np.array(cfg["std"], np.float32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 0.965, 1.0])
@pytest.mark.parametrize("size", [32, 33, 63])
def test_equal_to_the_recipe_of_timm(size, crop_pct, interpolation):
    cfg = {"input_size": [3, size, size], "crop_pct": crop_pct, "interpolation": interpolation}
    cfg |= {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}
    spec = image_input({"architecture": "x", "pretrained_cfg": cfg})
    for image in IMAGES:
        np.testing.assert_allclose(preprocess(image, spec), timm_recipe(image, cfg), rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_timm_squashes(crop_pct):
    cfg = {"input_size": [3, 36, 36], "crop_pct": crop_pct, "interpolation": "bicubic", "crop_mode": "squash"}
    cfg |= {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}
    for image in IMAGES:
        np.testing.assert_allclose(preprocess(image, image_input(cfg)), timm_recipe(image, cfg), rtol=0, atol=1e-6)
    tall = image_input({**cfg, "input_size": [3, 48, 36], "crop_pct": 1.0})
    assert (tall.size, tall.resize) == ((48, 36), "exact")


def test_settings_that_are_left_out_are_those_of_timm():
    spec = image_input({"input_size": (3, 224, 224)})
    assert spec == ImageInput(resize="torchvision", resize_to=256)
    assert (spec.interpolation, spec.mean) == ("bicubic", (0.485, 0.456, 0.406))


def test_without_settings_the_default_stands():
    mine = ImageInput(size=(8, 8))
    assert image_input({}, mine) == image_input(None, mine) == mine
    assert image_input(None) == ImageInput()
    assert image_input({"size": 32}, processor="ViT").size == (32, 32)


VIT = {"image_processor_type": "ViTImageProcessor"}
CLIP = {"image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 32}, "the image processor None is not among"),
        ({"image_processor_type": "Sam3ImageProcessor"}, "'Sam3ImageProcessor' is not among"),
        ({**VIT, "size": {"longest_edge": 32}}, "size is .*longest_edge.* expected height and width"),
        ({**VIT, "size": {"shortest_edge": 32}}, "without do_center_crop"),
        ({**VIT, "size": 0}, "size is 0"),
        ({**VIT, "do_center_crop": True}, "crop_size is None"),
        ({**VIT, "do_resize": False}, "neither do_resize nor do_center_crop"),
        ({**VIT, "do_pad": True}, "do_pad"),
        ({**VIT, "resample": 9}, "resample is 9"),
        ({**VIT, "image_mean": [0.5]}, "image_mean is .0.5.: expected three numbers"),
        ({**VIT, "size": [30, 40], "do_center_crop": True, "crop_size": 20}, "not square"),
        ({**CLIP, "crop_size": {"shortest_edge": 3}}, "crop_size has a shortest edge alone"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": [3, 4]}, "ConvNext's processor expects"),
        ({"image_processor_type": "ConvNextImageProcessor", "do_resize": False}, "not supported"),
        ({"input_size": [3, 32, 48]}, "a square"),
        ({"input_size": [3, 32, 32], "crop_mode": "border"}, "crop_mode 'border'"),
        ({"input_size": [3, 32, 32], "interpolation": "random"}, "interpolation is 'random'"),
        ({"input_size": [3, 33, 33], "crop_mode": "squash", "crop_pct": 33 / 36.5}, "no exact centre"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        image_input(settings)


def test_bgr_and_gray():
    rgb = ImageInput(size=(8, 8), resize_to=None)
    bgr = dataclasses.replace(rgb, channels="bgr", mean=rgb.mean[::-1], std=rgb.std[::-1])
    np.testing.assert_array_equal(preprocess(IMAGES[0], bgr), preprocess(IMAGES[0], rgb)[..., ::-1])
    gray = ImageInput(size=(8, 9), resize="exact", channels="gray", mean=(0.5,), std=(0.25,))
    image = IMAGES[0][..., :1]
    expected = np.asarray(Image.fromarray(image[..., 0]).resize((9, 8), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(preprocess(image, gray)[..., 0], (expected - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "change", "error", "message"),
    [
        (IMAGES[0][..., :1], {}, errors.DataError, r"has 1 channel.*takes 3: .*np\.repeat"),
        (IMAGES[0], {"channels": "gray", "mean": (0.5,), "std": (0.5,)}, errors.DataError, "has 3 channel.*takes 1"),
        (IMAGES[0][..., 0], {}, errors.DataError, r"uint8 \(61, 47\); expected uint8 \[height"),
        (IMAGES[0] / 255, {}, errors.DataError, "float64"),
        (IMAGES[0][:0], {}, errors.DataError, r"uint8 \(0, 47, 3\)"),
        (np.zeros((1, 4000, 3), np.uint8), {}, errors.DataError, "1 x 4000 pixels is too thin"),
        (IMAGES[0], {"resize": "fit"}, errors.ConfigError, "resize='fit': expected one of shortest"),
        (IMAGES[0], {"interpolation": "area"}, errors.ConfigError, "interpolation='area'"),
        (IMAGES[0], {"channels": "hsv"}, errors.ConfigError, "channels='hsv'"),
        (IMAGES[0], {"mean": (0.5,)}, errors.ConfigError, "expected 3 of each"),
    ],
)
def test_bad_pictures_and_specs_are_refused(image, change, error, message):
    with pytest.raises(error, match=message):
        preprocess(image, dataclasses.replace(ImageInput(), **change))


SPEC = ImageInput(size=(16, 16), resize_to=20)


@pytest.fixture
def files(tmp_path):
    names = [tmp_path / f"{i}.png" for i in range(5)]
    for name, image in zip(names, IMAGES, strict=False):
        Image.fromarray(image).save(name)
    return names


def test_paths_bytes_and_arrays_make_the_same_batches(files):
    labels, classes = np.arange(5, dtype=np.int32) % 2, ("a", "b")
    expected = np.stack([preprocess(image, SPEC) for image in IMAGES[:5]])
    columns = ([str(file) for file in files], [file.read_bytes() for file in files], files, IMAGES[:5])
    for pictures_ in columns:
        run = picture_batches(Examples({"image": pictures_}, labels, classes), SPEC, batch_size=3)
        seen = list(run)
        assert [batch["image"].shape for batch in seen] == [(3, 16, 16, 3)] * 2
        np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in seen])[:5], expected)
        assert [batch["label"].tolist() for batch in seen] == [[0, 1, 0], [1, 0, 1]]


def test_pictures_of_one_size_are_one_array():
    stack = RNG.integers(0, 256, (4, 20, 20, 3), np.uint8)
    run = picture_batches(Examples({"image": stack}, np.array([0, 1, 0, 1], np.int32), ("a", "b")), SPEC, batch_size=2)
    for batch, images in zip(run, (stack[:2], stack[2:]), strict=True):
        np.testing.assert_array_equal(batch["image"], [preprocess(image, SPEC) for image in images])


def test_bytes_are_kept_for_an_augmentation(files):
    canvas = dataclasses.replace(SPEC, resize="exact", size=(24, 24))
    transform = picture_transform(canvas, normalized=False)
    (batch,) = batches({"image": np.array([str(file) for file in files])}, batch_size=5, transform=transform)
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (5, 24, 24, 3))
    np.testing.assert_array_equal(batch["image"][0], resize(IMAGES[0], canvas))
    np.testing.assert_array_equal(normalize(batch["image"], canvas)[1], preprocess(IMAGES[1], canvas))


def test_resuming_is_exact(files):
    examples = Examples({"image": [str(file) for file in files]}, np.arange(5, dtype=np.int32) % 2, ("a", "b"))
    run = picture_batches(examples, SPEC, batch_size=2, seed=3, epochs=2)
    for whole, resumed in zip(list(run)[2:], run.at(2), strict=True):
        assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_bad_file_is_named_by_the_batch(files):
    files[3].write_bytes(b"no longer a picture")
    run = picture_batches(
        Examples({"image": [str(file) for file in files]}, np.zeros(5, np.int32), ("a",)), SPEC, batch_size=5
    )
    with pytest.raises(errors.DataError, match=r"3\.png: the picture cannot be read"):
        list(run)


def test_pictures_are_not_held_decoded(files, monkeypatch):
    decoded = []
    module = importlib.import_module("jtl.data.preprocess")
    monkeypatch.setattr(module, "load_image", lambda *a: decoded.append(a) or pictures.load_image(*a))
    examples = Examples({"image": [str(file) for file in files]}, np.zeros(5, np.int32), ("a",))
    run = picture_batches(examples, SPEC, batch_size=1, prefetch=0)
    assert not decoded
    next(iter(run))
    assert len(decoded) == 1


@pytest.mark.parametrize("change", [{}, {"resize": "torchvision"}, {"resize": "exact"}, {"channels": "bgr"}])
def test_pictures_that_are_kept_are_decoded_once(files, monkeypatch, change):
    decoded = []
    module = importlib.import_module("jtl.data.preprocess")
    monkeypatch.setattr(module, "load_image", lambda *a: decoded.append(a) or pictures.load_image(*a))
    spec, labels = dataclasses.replace(SPEC, size=(15, 16), **change), np.arange(5, dtype=np.int32) % 2
    for column in ([str(file) for file in files], [file.read_bytes() for file in files]):
        settings = {"batch_size": 2, "seed": 3, "epochs": 2}
        data = Examples({"image": column}, labels, ("a", "b"))
        expected = list(picture_batches(data, spec, **settings))
        decoded.clear()
        seen = list(picture_batches(data, spec, keep=True, **settings))
        assert len(decoded) == 5
        for one, other in zip(seen, expected, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in other)
    files[3].write_bytes(b"no longer a picture")
    with pytest.raises(errors.DataError, match=r"3\.png: the picture cannot be read"):
        picture_batches(Examples({"image": list(map(str, files))}, labels, ("a", "b")), spec, keep=True, batch_size=2)


def test_a_cache_sees_changed_pictures_and_other_preprocessing(files):
    def run(column, spec=SPEC):
        examples = Examples({"image": column}, np.arange(len(column), dtype=np.int32) % 2, ("a", "b"))
        return picture_batches(examples, spec, batch_size=2)

    def key(column):
        return keys.of_batches(dataclasses.replace(run(column), transform=None))

    content = [file.read_bytes() for file in files]
    assert key(content) == key(list(content))
    assert len({key(content), key([content[0], *content[2:], content[1]]), key(content[:4])}) == 3
    # What a key takes of a transform is its fields, printed.
    assert "5 pictures" in repr(run(content).transform)
    assert repr(run(content).transform) != repr(run(content, dataclasses.replace(SPEC, resize_to=21)).transform)

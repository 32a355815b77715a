"""How a checkpoint's pictures were prepared: transformers' and timm's settings as one `ImageInput`.

References:
  transformers' image processors, of which the Pillow ones are the reference, and timm's `pretrained_cfg`
  (both Apache-2.0). A setting that a file leaves out has the value that its own library gives it.
"""

import math
from collections.abc import Mapping
from typing import Any

from jtl.errors import ConfigError
from jtl.models.family import ImageInput

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""In the order of Pillow's numbers for them."""

_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIZE = {"height": 224, "width": 224}
_CROPPED = {"crop_size": _SIZE, "do_center_crop": True}

PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {**_HALF, "resample": 3, "size": _SIZE, "crop_size": _SIZE},
    "Bit": {**_CLIP, **_CROPPED, "resample": 3, "size": {"shortest_edge": 224}},
    "CLIP": {**_CLIP, **_CROPPED, "resample": 3, "size": {"shortest_edge": 224}},
    "ConvNext": {**_HALF, "resample": 3, "size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "DeiT": {**_HALF, **_CROPPED, "resample": 3, "size": {"height": 256, "width": 256}},
    "EfficientNet": {
        **_HALF,
        "resample": 3,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "include_top": True,
    },
    "MobileNetV1": {**_HALF, **_CROPPED, "resample": 2, "size": {"shortest_edge": 256}},
    "MobileNetV2": {**_HALF, **_CROPPED, "resample": 2, "size": {"shortest_edge": 256}},
    "ViT": {**_HALF, "resample": 2, "size": _SIZE},
}
"""What each processor of transformers does where its settings say nothing."""

_SHORTEST = ("Bit", "CLIP", "ConvNext", "MobileNetV1", "MobileNetV2")
"""Processors for which a size that is one number means the shortest edge; for others, both edges."""


def image_input(
    settings: Mapping[str, Any] | None, default: ImageInput | None = None, *, processor: str | None = None
) -> ImageInput:
    """What a checkpoint says of its pictures.

    Args:
      settings: the object in a `preprocessor_config.json` of transformers, or in a `config.json` of timm
        (or its `pretrained_cfg` alone).
      default: the answer where there are no settings.
      processor: which of `PROCESSORS` the settings are for, where they do not say so themselves, as old
        files do not.

    Raises:
      ConfigError: settings for pictures that would not all have one size, of an unknown processor, or with
        a step that is not supported; it names the setting.

    >>> image_input({"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"}).resize_to
    235
    """
    if not settings:
        return default or ImageInput()
    timm = settings.get("pretrained_cfg", settings)
    if "input_size" in timm:
        return _from_timm(timm)
    name = _processor(settings, processor)
    return _from_transformers(name, {**PROCESSORS[name], **settings})


def pair(value: Any, name: str) -> tuple[int, int]:
    """Height and width, where a file may give one number for both.

    Args:
      value: pixels, or two numbers.
      name: of the setting.

    Raises:
      ConfigError: something else.
    """
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    if len(both) != 2 or not all(type(edge) is int and 0 < edge < 2**31 for edge in both):
        raise ConfigError(f"{name} is {value!r:.80}: expected pixels, or height and width")
    return both


def _processor(settings: Mapping[str, Any], fallback: str | None) -> str:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or fallback
    name = str(named or "")
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    if name not in PROCESSORS:
        raise ConfigError(
            f"the image processor {named!r} is not among those that are known: {', '.join(PROCESSORS)}; "
            "pass an ImageInput of your own"
        )
    return name


def _from_transformers(name: str, s: Mapping[str, Any]) -> ImageInput:
    if s.get("do_pad"):
        raise ConfigError("do_pad: pictures that are padded to the largest of a batch are not supported")
    mean, std, scale = _statistics(name, s)
    size, resize, resize_to = _conv_next_size(s) if name == "ConvNext" else _size_and_crop(name, s)
    return ImageInput(
        size=size,
        resize=resize,
        resize_to=resize_to,
        interpolation=_resample(s["resample"]),
        mean=mean,
        std=std,
        scale=scale,
    )


def _statistics(name: str, s: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Mean, std and scale of `(x * scale - mean) / std`, which all steps come down to."""
    rescaled, normalized = s.get("do_rescale", True), s.get("do_normalize", True)
    scale = _number(s, "rescale_factor", 1 / 255) if rescaled else 1.0
    mean, std = _three(s, "image_mean"), _three(s, "image_std")
    shift = 1.0 if name == "EfficientNet" and rescaled and s.get("rescale_offset") else 0.0
    again = std if name == "EfficientNet" and s["include_top"] else (1.0, 1.0, 1.0)
    if not normalized:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(m + shift for m in mean), tuple(d * e for d, e in zip(std, again, strict=True)), scale


def _three(s: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = s[key]
    values = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
    if len(values) != 3 or not all(isinstance(item, int | float) for item in values):
        raise ConfigError(f"{key} is {value!r}: expected three numbers")
    return tuple(float(item) for item in values)


def _number(s: Mapping[str, Any], key: str, default: int | float) -> int | float:
    value = s.get(key, default)
    if not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{key} is {value!r}: expected a number above 0")
    return float(value)


def _resample(value: Any) -> str:
    value = 2 if value is None else value
    if not isinstance(value, int) or not 0 <= value < len(INTERPOLATIONS):
        raise ConfigError(f"resample is {value!r}: expected one of Pillow's numbers, 0 to {len(INTERPOLATIONS) - 1}")
    return INTERPOLATIONS[value]


def _size_and_crop(name: str, s: Mapping[str, Any]) -> tuple[tuple[int, int], str, int | None]:
    """`size`, `resize` and `resize_to` of a processor that resizes, then may crop."""
    crop = _both(_edges(s, "crop_size", square=True), "crop_size") if s.get("do_center_crop") else None
    if not s.get("do_resize", True):
        if crop is None:
            raise ConfigError("neither do_resize nor do_center_crop: pictures of any size do not make a batch")
        return crop, "none", None
    edges = _edges(s, "size", square=name not in _SHORTEST)
    if "shortest_edge" in edges:
        if crop is None:
            raise ConfigError("a size of the shortest edge without do_center_crop: pictures would differ in shape")
        return crop, "shortest", edges["shortest_edge"]
    size = _both(edges, "size")
    if crop is None or crop == size:
        return size, "exact", None
    if size[0] != size[1]:
        raise ConfigError(f"size {size} is not square, and is cropped to {crop}: this is not supported")
    return crop, "squash", size[0]


def _conv_next_size(s: Mapping[str, Any]) -> tuple[tuple[int, int], str, int | None]:
    if s.get("do_center_crop") or not s.get("do_resize", True):
        raise ConfigError("do_center_crop, or no do_resize, with ConvNext's processor: this is not supported")
    edge = _edges(s, "size", square=False).get("shortest_edge")
    if edge is None:
        raise ConfigError(f"size is {s['size']!r}: ConvNext's processor expects the shortest edge")
    # Pictures of 384 and more are evaluated whole, though squeezed.
    if edge >= 384:
        return (edge, edge), "exact", None
    return (edge, edge), "shortest", int(edge / _number(s, "crop_pct", 224 / 256))


def _edges(s: Mapping[str, Any], key: str, *, square: bool) -> dict[str, int]:
    """A size as transformers writes it: one number, two, or a mapping."""
    value = s.get(key)
    if isinstance(value, int):
        edges = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        edges = {"height": value[0], "width": value[1]}
    else:
        edges = dict(value) if isinstance(value, Mapping) else {}
    known = set(edges) in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(isinstance(edge, int) and edge > 0 for edge in edges.values()):
        raise ConfigError(f"{key} is {value!r}: expected height and width, or the shortest edge, in pixels")
    return edges


def _both(edges: Mapping[str, int], key: str) -> tuple[int, int]:
    if "shortest_edge" in edges:
        raise ConfigError(f"{key} has a shortest edge alone: expected height and width")
    return edges["height"], edges["width"]


def _from_timm(s: Mapping[str, Any]) -> ImageInput:
    interpolation = s.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise ConfigError(f"interpolation is {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
    size, resize, resize_to = _timm_size(s)
    return ImageInput(
        size=size,
        resize=resize,
        resize_to=resize_to,
        interpolation=interpolation,
        mean=tuple(s.get("mean") or ImageInput.mean),
        std=tuple(s.get("std") or ImageInput.std),
    )


def _timm_size(s: Mapping[str, Any]) -> tuple[tuple[int, int], str, int | None]:
    channels, height, width = (*s["input_size"], 0, 0, 0)[:3]
    mode = s.get("crop_mode") or "center"
    resized = math.floor(height / (_number(s, "crop_pct", 0.875) if s.get("crop_pct") else 0.875))
    if mode == "squash" and channels == 3 and resized == height:
        return (height, width), "exact", None
    if mode not in ("center", "squash") or channels != 3 or height != width:
        size = tuple(s["input_size"])
        raise ConfigError(f"crop_mode {mode!r} of input_size {size}: expected center or squash, 3 channels, a square")
    if mode == "center":
        return (height, width), "torchvision", resized
    if (resized - height) % 4 == 3:  # the one case in which "squash", which rounds as transformers does, is off
        raise ConfigError(f"crop_mode 'squash' from {resized} to {height} pixels has no exact centre: not supported")
    return (height, width), "squash", resized

"""From pictures to what a model takes: resized, cropped and normalised as its checkpoint was evaluated."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jtl import errors
from jtl.data.examples import Examples
from jtl.data.pictures import checksum, load_image
from jtl.data.pipeline import Batch, Batches, batches

if TYPE_CHECKING:
    import jtl.models.family

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

RESIZES = ("shortest", "torchvision", "exact", "squash", "none")
"""How a picture is brought to the size of a model:

- "shortest": the shortest edge to `resize_to`, then the centre; an odd pixel is left over below and right, as
  transformers crops;
- "torchvision": the same with torchvision's rounding of the crop, which timm's checkpoints were evaluated with;
- "exact": both edges to `size`;
- "squash": both edges to `resize_to`, then the centre;
- "none": the centre alone.

A picture smaller than the crop is padded with black.
"""

_MOST_PIXELS = 1 << 27


def preprocess(image: np.ndarray, spec: "jtl.models.family.ImageInput") -> np.ndarray:
    """Resize, crop and normalise one picture.

    The bytes after resizing are those of Pillow, so of the image processors of transformers (`backend="pil"`)
    and of timm's evaluation transform.

    Args:
      image: uint8 `[H, W, C]`, in the order red, green, blue.
      spec: what the model takes.

    Returns:
      float32 `[h, w, C]`, `(image * scale - mean) / std`, in the order of `spec.channels`.

    Raises:
      ConfigError: a resize rule, interpolation or order of channels that is not known.
      DataError: not uint8 `[H, W, C]`, a number of channels that is not the model's, or a picture so long
        and thin that its resized form would take too much memory.
      MissingExtraError: Pillow is not installed.
    """
    return normalize(resize(image, spec), spec)


def resize(image: np.ndarray, spec: "jtl.models.family.ImageInput") -> np.ndarray:
    """Resize and crop one picture: uint8 `[H, W, C]` to `[h, w, C]`, in the order red, green, blue.

    Raises:
      ConfigError, DataError, MissingExtraError: as `preprocess`.
    """
    _check(image, spec)
    height, width = image.shape[:2]
    target = _target(height, width, spec)
    if target[0] * target[1] > _MOST_PIXELS:
        raise errors.DataError(f"a picture of {height} x {width} pixels is too thin to resize to {target}")
    if target != (height, width):
        image = _resample(image, target, spec.interpolation)
    for axis, size in enumerate(spec.size):
        image = _centre(image, axis, size, spec.resize == "torchvision")
    return image


def normalize(image: np.ndarray, spec: "jtl.models.family.ImageInput") -> np.ndarray:
    """Scale, subtract the mean, divide by std: uint8 `[..., C]` to float32 in the order of `spec.channels`."""
    if spec.channels == "bgr":
        image = image[..., ::-1]
    table = _table(spec.scale, spec.mean, spec.std)
    return np.stack([table[:, c].take(image[..., c]) for c in range(table.shape[1])], axis=-1)


def picture_transform(
    spec: "jtl.models.family.ImageInput",
    column: str = "image",
    *,
    pictures: Sequence[Any] | None = None,
    normalized: bool = True,
) -> Callable[[Batch], Batch]:
    """A transform for `jtl.data.batches` that decodes and preprocesses a column of pictures.

    The column holds paths, decoded pictures uint8 `[B, H, W, C]`, or rows of a number whose first value is
    the index into `pictures`.

    Args:
      spec: what the model takes.
      column: the column's name.
      pictures: N of what `load_image` takes, or decoded pictures.
      normalized: float32 for a model; False keeps the bytes, for an augmentation that ends with
        `jtl.augment.normalize`. `dataclasses.replace(spec, resize="exact", size=(256, 256))` keeps all of a
        picture for it to crop from.
    """
    _check_spec(spec)
    return _Transform(spec, column, None if pictures is None else _Held(pictures), normalized)


def picture_batches(
    examples: Examples,
    spec: "jtl.models.family.ImageInput",
    *,
    column: str = "image",
    normalized: bool = True,
    keep: bool = False,
    **settings: Any,
) -> Batches:
    """Batches of labelled pictures, each decoded when its batch is made, in the prefetching threads.

    Args:
      examples: with paths, encoded or decoded pictures in a column.
      spec: what the model takes.
      column: the column's name.
      normalized: as in `picture_transform`.
      keep: decode each picture once, now, and keep it in memory at the model's size: a byte for each value. Batches
        are the same.
      **settings: of `jtl.data.batches`.

    Raises:
      ConfigError, DataError: as `jtl.data.batches`, and with `keep` as `load_image` and `preprocess`.
    """
    pictures: Any = examples.columns[column]
    if keep:
        pictures, spec = _resized(pictures, spec), dataclasses.replace(spec, resize="none")
    if isinstance(pictures, np.ndarray):
        values, held = pictures, None
    elif all(isinstance(picture, str | os.PathLike) for picture in pictures):
        values, held = np.array([os.fspath(picture) for picture in pictures]), None
    else:  # the checksums let a cache see whether pictures have changed
        values = np.array([(i, checksum(picture)) for i, picture in enumerate(pictures)], np.int64)
        held = pictures
    transform = picture_transform(spec, column, pictures=held, normalized=normalized)
    return batches({column: values}, examples.labels, transform=transform, **settings)


def _resized(pictures: Sequence[Any], spec: "jtl.models.family.ImageInput") -> np.ndarray:
    """All pictures, resized and cropped: uint8 `[N, h, w, C]`."""

    def one(picture: Any) -> np.ndarray:
        return resize(_decoded(picture, spec), spec)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, pictures)))


def _decoded(picture: Any, spec: Any) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    return load_image(picture, "gray" if spec.channels == "gray" else "rgb")


class _Held:
    """Pictures outside of a batch. What is printed of them does not grow with them."""

    def __init__(self, pictures: Sequence[Any]):
        self.pictures = pictures

    def __repr__(self) -> str:
        return f"{len(self.pictures)} pictures"


@dataclasses.dataclass(frozen=True, eq=False)
class _Transform:
    spec: Any
    column: str
    held: _Held | None
    normalized: bool

    def __call__(self, batch: Batch) -> Batch:
        finish = preprocess if self.normalized else resize
        images = [finish(_decoded(self._picture(value), self.spec), self.spec) for value in batch[self.column]]
        return {**batch, self.column: np.stack(images)}

    def _picture(self, value: Any) -> Any:
        return self.held.pictures[int(value[0])] if isinstance(value, np.ndarray) and self.held is not None else value


def _check(image: np.ndarray, spec: Any) -> None:
    _check_spec(spec)
    if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
        raise errors.DataError(f"a picture is {image.dtype} {image.shape}; expected uint8 [height, width, channels]")
    if image.shape[2] != len(spec.mean):
        remedy = " (np.repeat(image, 3, axis=-1) makes grey into colour)" if image.shape[2] == 1 else ""
        raise errors.DataError(
            f"a picture has {image.shape[2]} channel(s), the model takes {len(spec.mean)}: "
            f"load_image gives as many as are wanted{remedy}"
        )


def _check_spec(spec: Any) -> None:
    for name, value, known in (
        ("resize", spec.resize, RESIZES),
        ("interpolation", spec.interpolation, INTERPOLATIONS),
        ("channels", spec.channels, ("rgb", "bgr", "gray")),
    ):
        if value not in known:
            raise errors.ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    channels = 1 if spec.channels == "gray" else 3
    if (len(spec.mean), len(spec.std)) != (channels, channels):
        raise errors.ConfigError(
            f"channels={spec.channels!r} with mean {spec.mean} and std {spec.std}: expected {channels} of each"
        )


def _target(height: int, width: int, spec: Any) -> tuple[int, int]:
    """The size before the crop."""
    if spec.resize == "none":
        return height, width
    if spec.resize == "exact":
        return spec.size
    edge = min(spec.size) if spec.resize_to is None else spec.resize_to
    if spec.resize == "squash":
        return edge, edge
    # The longer edge is cut off, not rounded: so do torchvision and transformers.
    return (edge, int(edge * width / height)) if height < width else (int(edge * height / width), edge)


def _resample(image: np.ndarray, target: tuple[int, int], interpolation: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise errors.missing_extra("pillow", "data") from error
    single = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if single else image)
    height, width = target
    resized = np.asarray(picture.resize((width, height), getattr(Image.Resampling, interpolation.upper())))
    return resized[..., None] if single else resized


def _centre(image: np.ndarray, axis: int, size: int, even: bool) -> np.ndarray:
    """Crop, or pad with black, one axis; an odd pixel goes where transformers or torchvision puts it."""
    spare = image.shape[axis] - size
    if spare >= 0:
        first = round(spare / 2) if even else spare // 2  # round takes halves to the even number
        return image[(slice(None),) * axis + (slice(first, first + size),)]
    before = -spare // 2 if even else math.ceil(-spare / 2)
    return np.pad(image, [(before, -spare - before) if i == axis else (0, 0) for i in range(image.ndim)])


@functools.lru_cache(maxsize=16)
def _table(scale: int | float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 `[256, C]`: each byte's value, rounded after each step as the processors of transformers do."""
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    return (scaled[:, None] - np.array(mean, np.float32)) / np.array(std, np.float32)

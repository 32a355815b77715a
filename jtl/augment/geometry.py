"""Where the pixels come from: crops, flips, affine maps."""

import math

import jax
import jax.numpy as jnp

from jtl.augment.core import Augmentation, each
from jtl.errors import ConfigError
from jtl.typing import Key

_METHODS = {"bilinear": "linear", "bicubic": "cubic"}
_TRIES = 10


def random_resized_crop(
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> Augmentation:
    """A random part of each picture, resized, with antialiasing.

    Of ten random boxes, the first that fits is taken; if none does, the largest in the centre of a ratio
    within bounds.

    Args:
      size: height and width of the result.
      scale: the least and the largest share of the picture's area.
      ratio: the least and the largest width by height.
      interpolation: "bilinear" or "bicubic".

    References:
      Szegedy et al, Going deeper with convolutions, 2015 (arXiv 1409.4842); torchvision's RandomResizedCrop.
    """
    if interpolation not in _METHODS:
        raise ConfigError(f"interpolation={interpolation!r}: expected one of {', '.join(_METHODS)}")
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ConfigError(f"scale={scale}, ratio={ratio}: expected 0 < low <= high, and no scale above 1")

    def change(key: Key, image: jax.Array) -> jax.Array:
        box = random_box(key, image.shape[0], image.shape[1], scale, ratio)
        return crop_and_resize(image, box, size, interpolation)

    return each(change)


def random_box(
    key: Key, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width of a random part of a picture, in fractions of pixels."""
    areas, ratios, top, left = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(areas, (_TRIES,), minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = jnp.exp(jax.random.uniform(ratios, (_TRIES,), minval=low, maxval=high))
    heights, widths = jnp.sqrt(area / shape), jnp.sqrt(area * shape)
    fits = (heights <= height) & (widths <= width)
    # The largest box of an allowed ratio, where none fits.
    whole = min(max(width / height, ratio[0]), ratio[1])
    chosen, found = jnp.argmax(fits), jnp.any(fits)
    box_height = jnp.where(found, heights[chosen], min(height, width / whole))
    box_width = jnp.where(found, widths[chosen], min(width, height * whole))
    first = jnp.where(found, jax.random.uniform(top), 0.5) * (height - box_height)
    second = jnp.where(found, jax.random.uniform(left), 0.5) * (width - box_width)
    return first, second, box_height, box_width


def crop_and_resize(
    image: jax.Array,
    box: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    size: tuple[int, int],
    interpolation: str = "bilinear",
) -> jax.Array:
    """A part of a picture `[height, width, channels]`, resized as Pillow does with `box`, clipped to 0 and 1."""
    top, left, height, width = box
    scale = jnp.stack([size[0] / height, size[1] / width])
    shift = -jnp.stack([top, left]) * scale
    out = jax.image.scale_and_translate(
        image, (*size, image.shape[2]), (0, 1), scale, shift, _METHODS[interpolation], antialias=True
    )
    return jnp.clip(out, 0, 1)


def flip(probability: float = 0.5) -> Augmentation:
    """Left and right exchanged in some pictures.

    Args:
      probability: of each picture.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"probability={probability}: expected 0 to 1")

    def change(key: Key, image: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)

    return each(change)


def affine(image: jax.Array, matrix: jax.Array, fill: float) -> jax.Array:
    """Resample a picture `[height, width, channels]` by a map from the new places to the old.

    The place of a pixel is its centre, half a pixel from its corner, and interpolation is bilinear, as in Pillow.

    Args:
      image: the picture.
      matrix: `[2, 3]`: `(a, b, c), (d, e, f)` with `x_old = a x + b y + c` and `y_old = d x + e y + f`.
      fill: the value of places outside.
    """
    height, width, _ = image.shape
    y, x = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) + 0.5 for n in (height, width)), indexing="ij")
    old_x, old_y = (row[0] * x + row[1] * y + row[2] for row in (matrix[0], matrix[1]))
    inside = (old_x >= 0) & (old_x < width) & (old_y >= 0) & (old_y < height)
    places = [old_y - 0.5, old_x - 0.5]

    def sample(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, places, order=1, mode="nearest")

    sampled = jax.vmap(sample, in_axes=2, out_axes=2)(image)
    return jnp.where(jnp.expand_dims(inside, -1), sampled, fill)

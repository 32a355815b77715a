"""The values of pixels: functions of one picture `[height, width, channels]`, floats from 0 to 1, and their jitter.

They are the operations of Pillow, which published recipes were tuned with. dm-pix has the TensorFlow ones: its
contrast keeps the mean of each channel where Pillow's keeps that of the luma, and its saturation scales that of HSV.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtl.augment.core import Augmentation, each
from jtl.errors import ConfigError
from jtl.typing import Key

LUMA = (0.299, 0.587, 0.114)


def colour_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Augmentation:
    """Random brightness, contrast, saturation and hue, in this order.

    Args:
      brightness: the factor is drawn from `[max(0, 1 - brightness), 1 + brightness]`.
      contrast: likewise.
      saturation: likewise.
      hue: the shift is drawn from `[-hue, hue]`, at most 0.5: half the circle.

    References:
      torchvision's ColorJitter, whose order is random.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ConfigError(f"colour_jitter{brightness, contrast, saturation, hue}: expected 0 or more, hue up to 0.5")
    changes: list[tuple[Callable[..., jax.Array], float, float]] = []
    for function, width in ((adjust_brightness, brightness), (adjust_contrast, contrast), (adjust_colour, saturation)):
        changes += [(function, max(0.0, 1 - width), 1 + width)] if width else []
    changes += [(shift_hue, -hue, hue)] if hue else []

    def change(key: Key, image: jax.Array) -> jax.Array:
        for i, (function, low, high) in enumerate(changes):
            image = function(image, jax.random.uniform(jax.random.fold_in(key, i), minval=low, maxval=high))
        return image

    return each(change)


def adjust_brightness(image: jax.Array, factor: Any) -> jax.Array:
    """0 is black, 1 the picture."""
    return jnp.clip(image * factor, 0, 1)


def adjust_contrast(image: jax.Array, factor: Any) -> jax.Array:
    """0 is the grey of the mean luma, 1 the picture."""
    return _blend(jnp.full_like(image, jnp.mean(luma(image))), image, factor)


def adjust_colour(image: jax.Array, factor: Any) -> jax.Array:
    """0 is grey, 1 the picture."""
    return _blend(jnp.broadcast_to(luma(image), image.shape), image, factor)


def adjust_sharpness(image: jax.Array, factor: Any) -> jax.Array:
    """0 is smoothed by Pillow's 3 x 3 filter, but for its border; 1 the picture."""
    height, width, _ = image.shape
    shifted = [image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    smooth = (sum(shifted) + 4 * image[1:-1, 1:-1]) / 13
    return _blend(image.at[1:-1, 1:-1].set(smooth), image, factor)


def shift_hue(image: jax.Array, shift: Any) -> jax.Array:
    """Turn the hue of HSV by a share of the circle.

    References:
      Smith, Color gamut transform pairs, SIGGRAPH 1978.
    """
    if image.shape[-1] != 3:
        raise ConfigError(f"hue of a picture with {image.shape[-1]} channel(s): expected 3")
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, chroma = jnp.max(image, axis=-1), jnp.max(image, axis=-1) - jnp.min(image, axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = jnp.where(value == red, (green - blue) / safe, sector) + 6 * shift
    ramps = [jnp.mod(sector + offset, 6) for offset in (5, 3, 1)]
    return jnp.stack([value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1) for k in ramps], axis=-1)


def invert(image: jax.Array) -> jax.Array:
    """The negative."""
    return 1 - image


def solarize(image: jax.Array, threshold: float) -> jax.Array:
    """The negative of what is at least as bright as a threshold."""
    return jnp.where(image < threshold, image, 1 - image)


def posterize(image: jax.Array, bits: int) -> jax.Array:
    """The highest bits of each byte."""
    return _floats((_bytes(image) >> (8 - bits)) << (8 - bits), image)


def autocontrast(image: jax.Array) -> jax.Array:
    """Each channel stretched from black to white, if it has two values."""
    low, high = jnp.min(image, axis=(0, 1), keepdims=True), jnp.max(image, axis=(0, 1), keepdims=True)
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def equalize(image: jax.Array) -> jax.Array:
    """Each channel's histogram made even, by the integer arithmetic of Pillow."""
    return _floats(jax.vmap(_equalized, in_axes=2, out_axes=2)(_bytes(image)), image)


def _equalized(channel: jax.Array) -> jax.Array:
    counts = jnp.bincount(channel.reshape(-1), length=256)
    last = counts[jnp.max(channel)]
    step = (jnp.sum(counts) - last) // 255
    before = jnp.cumsum(counts) - counts
    table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table[channel], channel)


def luma(image: jax.Array) -> jax.Array:
    """`[height, width, 1]` by ITU-R 601-2; of one channel, the picture itself."""
    if image.shape[-1] == 1:
        return image
    return jnp.sum(image * jnp.array(LUMA, image.dtype).reshape(1, 1, 3), axis=-1, keepdims=True)


def _blend(other: jax.Array, image: jax.Array, factor: Any) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0, 1)


def _bytes(image: jax.Array) -> jax.Array:
    return jnp.round(image * 255).astype(jnp.int32)


def _floats(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.astype(like.dtype) / 255

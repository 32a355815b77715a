"""RandAugment: some operations, drawn for each picture from one list, all of one strength."""

import math

import jax
import jax.numpy as jnp

from jtl.augment import colour
from jtl.augment.core import Augmentation, each
from jtl.augment.geometry import affine
from jtl.errors import ConfigError
from jtl.typing import Key

COLOURS = (
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "brightness",
    "colour",
    "contrast",
    "sharpness",
)
PLACES = ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def rand_augment(num_ops: int = 2, magnitude: int = 9, fill: float = 0.5) -> Augmentation:
    """A few random operations on each picture.

    Operations and their strengths are those of the paper's 14 in torchvision; a sign is drawn where there is
    one. An operation is drawn for each picture, but all are computed for all: the cost is that of all 14.

    Args:
      num_ops: how many, one after the other.
      magnitude: their strength, 0 to 30.
      fill: the value of places that come from outside of the picture.

    References:
      Cubuk et al, RandAugment, 2019 (arXiv 1909.13719).
    """
    if num_ops < 0 or not 0 <= magnitude <= 30:
        raise ConfigError(f"num_ops={num_ops}, magnitude={magnitude}: expected 0 or more operations of 0 to 30")

    def change(key: Key, image: jax.Array) -> jax.Array:
        def one(i: jax.Array, image: jax.Array) -> jax.Array:
            choice, sign = jax.random.split(jax.random.fold_in(key, i))
            op = jax.random.randint(choice, (), 0, len(COLOURS) + len(PLACES))
            return operation(image, op, jnp.where(jax.random.bernoulli(sign), 1.0, -1.0), magnitude / 30, fill)

        return jax.lax.fori_loop(0, num_ops, one, image)  # compiled once, however many there are

    return each(change)


def operation(image: jax.Array, op: jax.Array, sign: jax.Array, strength: float, fill: float) -> jax.Array:
    """Apply the operation with a number: of `COLOURS`, then of `PLACES`.

    Args:
      image: `[height, width, channels]`, floats from 0 to 1.
      op: its number.
      sign: 1 or -1: more or less, left or right.
      strength: 0 to 1.
      fill: the value of places that come from outside.
    """
    factor = 1 + sign * 0.9 * strength
    changed = [
        lambda image: colour.autocontrast(image),
        lambda image: colour.equalize(image),
        lambda image: colour.solarize(image, 1 - strength),
        lambda image: colour.posterize(image, 8 - round(4 * strength)),
        lambda image: colour.adjust_brightness(image, factor),
        lambda image: colour.adjust_colour(image, factor),
        lambda image: colour.adjust_contrast(image, factor),
        lambda image: colour.adjust_sharpness(image, factor),
        lambda image: image,
    ]
    image = jax.lax.switch(jnp.minimum(op, len(COLOURS)), changed, image)
    matrices = _matrices(image.shape[0], image.shape[1], sign, strength)
    return affine(image, matrices[jnp.maximum(op - len(COLOURS), 0)], fill)


def _matrices(height: int, width: int, sign: jax.Array, strength: float) -> jax.Array:
    """`[6, 2, 3]`: the maps of `PLACES` from new places to old."""
    angle, shear, shift = sign * math.radians(30) * strength, sign * 0.3 * strength, sign * 150 / 331 * strength
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    rotate = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    rows = [
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        rotate,
        [1.0, shear, 0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, shear, 1.0, 0.0],
        [1.0, 0.0, shift * width, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 1.0, shift * height],
    ]
    return jnp.stack([jnp.stack([jnp.asarray(value, jnp.float32) for value in row]) for row in rows]).reshape(6, 2, 3)

"""Mixup and cutmix: examples mixed with others of their batch, and their losses in proportion."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.typing import Batch, Collections, Key, Params


def mixed(loss_fn: Any, *, mixup: float = 0.0, cutmix: float = 0.0, column: str = "image") -> "Mixed":
    r"""The loss of mixed examples, of a loss function that `jtl.supervised` made.

    In training, each example is mixed with another one of its batch, and its loss is
    :math:`\lambda \ell(z, y) + (1 - \lambda) \ell(z, y')`, which for cross-entropy is that of the mixed
    labels. In evaluation, when there is no key, nothing is mixed. A training metric compares with an example's own
    label.

    Args:
      loss_fn: of `jtl.supervised`, with any loss of single examples.
      mixup: alpha of the Beta distribution that the share of blended pictures is drawn from; 0 for none.
      cutmix: alpha for pictures with a box of another one; 0 for none. With both, each example has one
        or the other with equal chance.
      column: the batch's entry that is mixed: floats `[batch, height, width, channels]`.

    Raises:
      ConfigError: neither, or another kind of loss function.

    References:
      Zhang et al, mixup, 2017 (arXiv 1710.09412). Yun et al, CutMix, 2019 (arXiv 1905.04899).
    """
    if min(mixup, cutmix) < 0 or not max(mixup, cutmix):
        raise ConfigError(f"mixup={mixup}, cutmix={cutmix}: expected one or both above 0")
    if not all(hasattr(loss_fn, name) for name in ("loss", "target", "checker")):
        raise ConfigError(f"mixed needs a loss function of jtl.supervised; got {type(loss_fn).__name__}")
    return Mixed(loss_fn, mixup, cutmix, column)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A loss function of mixed examples; `mixed` makes it."""

    loss_fn: Any
    mixup: float
    cutmix: float
    column: str

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Any]:
        """As the loss function that it was made of; mixed where there is a key."""
        if key is None:
            return self.loss_fn(params, collections, batch, key=None)
        mixing, rest = jax.random.split(key)
        images, partner, share = mix(mixing, batch[self.column], mixup=self.mixup, cutmix=self.cutmix)

        def loss(outputs: Any, targets: jax.Array) -> jax.Array:
            return joint(self.loss_fn.loss(outputs, targets), self.loss_fn.loss(outputs, targets[partner]))

        def joint(own: jax.Array, other: jax.Array) -> jax.Array:
            return share.astype(own.dtype) * own + (1 - share.astype(own.dtype)) * other

        weigh = getattr(self.loss_fn.loss, "weigh", None)
        if weigh is not None:  # the weights of classes are mixed, too
            setattr(loss, "weigh", lambda targets: joint(weigh(targets), weigh(targets[partner])))  # noqa: B010
        whole = dataclasses.replace(self.loss_fn, loss=loss)
        return whole(params, collections, {**batch, self.column: images}, key=rest)

    def checker(self, params: Params, collections: Collections) -> Callable[[Batch], None]:
        """As that of the loss function that it was made of."""
        return self.loss_fn.checker(params, collections)


def mix(
    key: Key, images: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mix each picture of a batch with another one.

    Args:
      key: a random key.
      images: floats `[batch, height, width, channels]`.
      mixup: alpha; 0 for none.
      cutmix: alpha; 0 for none.

    Returns:
      `(images, partner, share)`: the mixed pictures, int `[batch]` what each is mixed with, float32
      `[batch]` the share of itself that is left.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ConfigError(f"images are {images.dtype} {images.shape}; expected floats [batch, height, width, channels]")
    order, blends, boxes, which = jax.random.split(key, 4)
    size = images.shape[0]
    partner = jax.random.permutation(order, size)
    blended = _by_example(symmetric_beta(blends, mixup, size)) if mixup else jnp.ones((size, 1, 1, 1))
    own = _outside_boxes(boxes, images.shape, cutmix) if cutmix else blended
    if mixup and cutmix:
        own = jnp.where(_by_example(jax.random.bernoulli(which, 0.5, (size,))), own, blended)
    own = jnp.broadcast_to(own, (*images.shape[:3], 1))
    weight = own.astype(images.dtype)
    return weight * images + (1 - weight) * images[partner], partner, jnp.mean(own, axis=(1, 2, 3))


def symmetric_beta(key: Key, alpha: float, size: int) -> jax.Array:
    r"""float32 `[size]` from Beta(alpha, alpha), of two uniform numbers each.

    .. math:: (1 + t / \sqrt{1 + t^2}) / 2, \quad t = \sqrt{u^{-1 / \alpha} - 1} \cos 2 \pi v

    `jax.random.beta` samples by rejection, in loops that take seconds to compile.

    References:
      Bailey, Polar generation of random variates with the t-distribution, 1994, for the t-distribution with
      2 alpha degrees of freedom, of which this is a function.
    """
    radius, angle = jax.random.uniform(key, (2, size), minval=jnp.finfo(jnp.float32).tiny)
    power = radius ** (1 / alpha)  # may be 0 or 1 for an extreme alpha, which the form below allows
    cosine = jnp.cos(2 * jnp.pi * angle)
    return (1 + cosine / jnp.sqrt(power / (1 - power) + cosine**2)) / 2


def _by_example(values: jax.Array) -> jax.Array:
    return values.reshape(-1, 1, 1, 1)


def _outside_boxes(key: Key, shape: tuple[int, ...], alpha: float) -> jax.Array:
    """Float32 `[batch, height, width, 1]`: 0 in a box with its centre anywhere and an area of 1 - Beta, else 1."""
    size, height, width, _ = shape
    shares, ys, xs = jax.random.split(key, 3)
    edge = jnp.sqrt(1 - symmetric_beta(shares, alpha, size))
    rows = _within(jax.random.uniform(ys, (size,)), edge, height)
    columns = _within(jax.random.uniform(xs, (size,)), edge, width)
    inside = jnp.expand_dims(rows, 2) & jnp.expand_dims(columns, 1)
    return jnp.expand_dims(1 - inside.astype(jnp.float32), -1)


def _within(centre: jax.Array, edge: jax.Array, length: int) -> jax.Array:
    """Bool `[batch, length]`: the places of an axis that lie within half an edge of a centre, both shares of it."""
    places = (jnp.arange(length, dtype=jnp.float32) + 0.5) / length
    return jnp.abs(jnp.expand_dims(places, 0) - jnp.expand_dims(centre, 1)) < jnp.expand_dims(edge, 1) / 2

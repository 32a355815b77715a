"""Augmentations put together, and put between the batches and the training step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.typing import Batch, Key

Augmentation = Callable[[Key, jax.typing.ArrayLike], jax.Array]
"""`(key, images) -> images`, both `[batch, height, width, channels]`; the size may change."""


@runtime_checkable
class Statistics(Protocol):
    """What of a `jtl.models.family.ImageInput` says how pictures are normalised."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, after scaling."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel, after scaling."""
        ...

    @property
    def scale(self) -> float:
        """Factor of the bytes."""
        ...

    @property
    def channels(self) -> str:
        """Their order."""
        ...


def compose(*augmentations: Augmentation) -> Augmentation:
    """One after the other, each with a key of its own.

    >>> compose()(jax.random.key(0), jnp.ones((1, 2, 2, 3))).shape
    (1, 2, 2, 3)
    """

    def augmentation(key: Key, images: jax.typing.ArrayLike) -> jax.Array:
        images = jnp.asarray(images)
        for i, augment in enumerate(augmentations):
            images = augment(jax.random.fold_in(key, i), images)
        return images

    return augmentation


def each(change: Callable[[Key, jax.Array], jax.Array]) -> Augmentation:
    """An augmentation of batches from a function of one picture.

    Args:
      change: `(key, image) -> image`, floats from 0 to 1, `[height, width, channels]`.
    """

    def augmentation(key: Key, images: jax.typing.ArrayLike) -> jax.Array:
        images = unit(images)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
        return jax.vmap(change)(keys, images)

    return augmentation


def unit(images: jax.typing.ArrayLike) -> jax.Array:
    """Floats from 0 to 1: bytes are divided by 255, floats are taken to be so already."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def normalize(spec: Statistics) -> Augmentation:
    """What a model takes, of pictures from 0 to 1: the last of an augmentation.

    Args:
      spec: the model's `ImageInput`.
    """

    def augmentation(key: Key, images: jax.typing.ArrayLike) -> jax.Array:
        images = unit(images)
        mean, std = _statistics(spec, images)
        images = images[..., ::-1] if spec.channels == "bgr" else images
        return (images * (255 * spec.scale) - mean) / std

    return augmentation


def denormalize(spec: Statistics) -> Augmentation:
    """The opposite of `normalize`: pictures from 0 to 1, of what a model takes.

    Before other augmentations, it lets them start from batches that are ready for evaluation. So do the
    views of `jtl.cache.build`, whose augmentation keeps shapes and dtypes as they are.

    Args:
      spec: the model's `ImageInput`.
    """

    def augmentation(key: Key, images: jax.typing.ArrayLike) -> jax.Array:
        images = jnp.asarray(images)
        mean, std = _statistics(spec, images)
        images = jnp.clip((images * std + mean) / (255 * spec.scale), 0, 1)
        return images[..., ::-1] if spec.channels == "bgr" else images

    return augmentation


def _statistics(spec: Statistics, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    if images.shape[-1] != len(spec.mean):
        raise ConfigError(f"images {images.shape} have {images.shape[-1]} channels; expected {len(spec.mean)}")
    shape = (1,) * (images.ndim - 1) + (-1,)
    return jnp.array(spec.mean, images.dtype).reshape(shape), jnp.array(spec.std, images.dtype).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class OnBatch:
    """An augmentation of one entry of a batch; `on_batch` makes it."""

    augmentation: Augmentation
    column: str

    def __call__(self, batch: Batch, *, key: Key) -> Batch:
        """The batch with that entry augmented."""
        return {**batch, self.column: _compiled(self.augmentation)(key, batch[self.column])}


@functools.lru_cache(maxsize=16)
def _compiled(augmentation: Augmentation) -> Any:
    return jax.jit(augmentation)


def on_batch(augmentation: Augmentation, column: str = "image") -> OnBatch:
    """`augment(batch, key=key) -> batch`, as `jtl.cache.build` takes it to make views; compiled.

    Args:
      augmentation: of images.
      column: the entry that it changes.
    """
    return OnBatch(augmentation, column)


@runtime_checkable
class Resumable(Protocol):
    """Batches whose run can be entered at any of them, as `jtl.data.batches` makes."""

    @property
    def start(self) -> int:
        """Batches already consumed."""
        ...

    @property
    def shard(self) -> int:
        """The number of this process."""
        ...

    def at(self, start: int) -> Any:
        """The run from a batch on."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
    """Batches with one entry augmented; `augmented` makes it."""

    batches: Resumable
    augment: OnBatch
    key: Key

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches, self.batches.start):
            yield self.augment(batch, key=self._key(number))

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def start(self) -> int:
        """Batches already consumed."""
        return self.batches.start

    def at(self, start: int) -> "Augmented":
        """The same run from its batch `start` on, bit for bit: `list(run)[n:]` equals `list(run.at(n))`."""
        return dataclasses.replace(self, batches=self.batches.at(start))

    def _key(self, number: int) -> Key:
        key = jax.random.fold_in(self.key, number)
        # Processes share the key, and each has examples of its own.
        return jax.random.fold_in(key, self.batches.shard) if self.batches.shard else key


def augmented(batches: Resumable, augmentation: Augmentation, key: Key, column: str = "image") -> Augmented:
    """Batches to train on, each augmented on the device as it is taken.

    The key of the batch with the number n, counted from the run's beginning, is `fold_in(key, n)`: a run that
    is resumed with `at(n)` goes on exactly.

    Args:
      batches: of `jtl.data.batches`, with pictures as bytes; see `jtl.data.picture_transform`.
      augmentation: of images.
      key: the random key of the data.
      column: the entry that it changes.
    """
    return Augmented(batches, on_batch(augmentation, column), key)

"""The loss of a label at each position: tags of words, masked words, the next word."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.errors import ConfigError, DataError
from jtl.labels import IGNORED
from jtl.losses.checks import check_targets, name_of, takes_labels
from jtl.losses.examples import Loss, cross_entropy


def per_token(loss: Loss = cross_entropy, *, shift: bool = False) -> "PerToken":
    """A loss of labels at each position, of those that are not `jtl.labels.IGNORED`.

    By itself it gives the sum over each example's positions. The mean that `jtl.supervised` takes of it is divided by
    the number of positions that count, so that it is PyTorch's `CrossEntropyLoss(ignore_index=-100)` over all positions
    together, over any number of batches.

    Args:
      loss: `(outputs, labels) -> [batch]`, such as `cross_entropy`, `focal` or a partial of them; with
        `weighted(loss, weights)`, positions weigh as their classes do.
      shift: compare the outputs at a position with the label at the next one: causal language models, whose labels are
        the input ids, `IGNORED` at padding. The first label is compared with nothing.

    Returns:
      `(outputs, labels) -> [batch]`, of outputs `[batch, length, classes]` and integer labels `[batch, length]`.

    Raises:
      ConfigError: a loss whose targets are no labels.

    >>> print(per_token()(jnp.zeros((2, 3, 4)), jnp.array([[1, 2, IGNORED], [0, IGNORED, IGNORED]])))
    [2.7725887 1.3862944]
    """
    if isinstance(loss, PerToken) or takes_labels(loss) is False:
        raise ConfigError(f"{name_of(loss)} has no single labels; expected cross_entropy, focal or the like")
    return PerToken(loss, shift)


@dataclasses.dataclass(frozen=True, eq=False)
class PerToken:
    """A loss of labels at each position; made by `per_token`."""

    loss: Loss
    shift: bool

    def __call__(self, outputs: jax.Array, labels: jax.Array) -> jax.Array:
        """The sum over the positions of each example that count, `[batch]`."""
        labels = compared(labels, shift=self.shift)
        counted = labels != IGNORED
        # An output that does not count has no gradient, not even NaN times zero where it is not finite.
        used = jnp.where(jnp.expand_dims(counted, -1), outputs, jnp.zeros((), outputs.dtype))
        values = self.loss(used.reshape(-1, used.shape[-1]), jnp.where(counted, labels, 0).reshape(-1))
        return jnp.sum(jnp.where(counted, values.reshape(labels.shape), 0), axis=1)

    def weigh(self, labels: jax.Array) -> jax.Array:
        """How many positions of each example count, or the sum of their weights, float32 `[batch]`."""
        labels = compared(labels, shift=self.shift)
        counted = labels != IGNORED
        weigh = getattr(self.loss, "weigh", jnp.ones_like)  # as `weighted` has it
        weights = weigh(jnp.where(counted, labels, 0).reshape(-1)).reshape(labels.shape)
        return jnp.sum(jnp.where(counted, weights, 0), axis=1, dtype=jnp.float32)

    def check(self, output_shape: tuple[int, ...] | None, targets: Any) -> None:
        """Whether labels are those of the model's classes or `IGNORED`, and any of them counts."""
        if output_shape is None or len(output_shape) != 3:
            raise DataError(
                f"the outputs have shape {output_shape}: per_token takes [batch, length, classes], which "
                "heads.token_classifier, masked_language_model and language_model give"
            )
        labels, (*shape, classes) = np.asarray(targets), output_shape
        if list(labels.shape) != shape or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"labels are {labels.dtype}{list(labels.shape)}: expected integers {shape}")
        wrong = np.argwhere((labels != IGNORED) & ((labels < 0) | (labels >= classes)))
        if len(wrong):
            row, position = wrong[0]
            raise DataError(
                f"label {labels[row, position]} of example {row} at position {position} is outside the model's "
                f"{classes} classes: expected 0 to {classes - 1}, or {IGNORED} where there is none"
            )
        compare = labels[:, 1:] if self.shift else labels
        used = compare[compare != IGNORED]
        if not used.size:
            raise DataError(f"no label of the batch counts: every one{' but the first' * self.shift} is {IGNORED}")
        check_targets(self.loss, (used.size, classes), used)


def compared(labels: jax.Array, *, shift: bool) -> jax.Array:
    """The label that the outputs at each position are compared with.

    Args:
      labels: `[batch, length]` integers.
      shift: whether it is that of the next position, and `IGNORED` at the last.

    Returns:
      int32 `[batch, length]`.
    """
    labels = labels.astype(jnp.int32)
    # The labels move, not the outputs: a slice of those is a copy of the largest array there is.
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED) if shift else labels

"""New heads: small linen modules from what a backbone computes to outputs.

Any linen module from pooled features `[batch, width]` to outputs is a head, `nn.Dense(3)` too. Models keep it under
the path `head`, so that `select("head")` is the mask of linear probing. A head says by its attribute `reads` what it
is given; one without it is given the pooled features:

    "pooled"      the pooled features `[batch, width]`
    "sequence"    each position's, `[batch, length, width]`
    "table"       each position's, and the table of word embeddings `[vocabulary, width]` with which it is tied
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError


class Linear(nn.Module):
    """Dropout, then one dense layer whose parameters sit directly under the head's path.

    Attributes:
      outputs: the width of the output.
      dropout: rate, active in training.
      scale: standard deviation of the initial kernel; 0 starts from equal logits.
      use_bias: whether a bias is added.
    """

    outputs: int
    dropout: float = 0.0
    scale: float = 0.02
    use_bias: bool = True
    reads: ClassVar[str] = "pooled"

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Outputs `[..., outputs]` of features `[..., width]`."""
        features = nn.Dropout(self.dropout)(features, deterministic=deterministic)
        init = nn.initializers.normal(self.scale) if self.scale else nn.initializers.zeros_init()
        kernel = self.param("kernel", init, (features.shape[-1], self.outputs))
        flat = features.reshape(-1, features.shape[-1]) @ kernel.astype(features.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.outputs,))
            flat = flat + jnp.expand_dims(bias.astype(features.dtype), 0)
        return flat.reshape(*features.shape[:-1], self.outputs)


class Tokens(Linear):
    """The same of each position: `[batch, length, width]` to `[batch, length, outputs]`."""

    reads: ClassVar[str] = "sequence"


class Span(Linear):
    """Where a span begins and where it ends: `[batch, length, width]` to `[batch, 2, length]`."""

    outputs: int = 2
    reads: ClassVar[str] = "sequence"

    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits of each position for the begin and for the end."""
        return Linear.__call__(self, features, deterministic=deterministic).swapaxes(1, 2)


class Hidden(nn.Module):
    """Dropout, a dense layer of the features' own width, its activation, dropout, and a dense layer.

    Attributes:
      outputs: the width of the output.
      dropout: rate, active in training.
      scale: standard deviation of the initial kernels.
      activation: by its name in `jtl.activations`.
      outer_dropout: whether the features are thinned too, and not the hidden layer alone.
    """

    outputs: int
    dropout: float = 0.0
    scale: float = 0.02
    activation: str = "tanh"
    outer_dropout: bool = True
    reads: ClassVar[str] = "pooled"

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Outputs `[batch, outputs]` of features `[batch, width]`."""
        init = nn.initializers.normal(self.scale)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        features = drop(features) if self.outer_dropout else features
        hidden = nn.Dense(features.shape[-1], kernel_init=init, name="hidden")(features)
        return nn.Dense(self.outputs, kernel_init=init, name="out")(drop(ACTIVATIONS[self.activation](hidden)))


class Tied(nn.Module):
    """The next word's logits: products with the table of word embeddings. It has no parameters of its own."""

    reads: ClassVar[str] = "table"

    def __call__(self, sequence: jax.Array, table: jax.Array) -> jax.Array:
        """Logits `[batch, length, vocabulary]` of `[batch, length, width]` and the table `[vocabulary, width]`."""
        return _products(sequence, table)


class MaskedWords(nn.Module):
    """A masked word's logits: a dense layer, its activation, a norm, and products with the table of word embeddings.

    Attributes:
      activation: by its name in `jtl.activations`.
      epsilon: of the norm.
      scale: standard deviation of the initial kernel.
    """

    activation: str = "gelu"
    epsilon: float = 1e-12
    scale: float = 0.02
    reads: ClassVar[str] = "table"

    @nn.compact
    def __call__(self, sequence: jax.Array, table: jax.Array) -> jax.Array:
        """Logits `[batch, length, vocabulary]` of `[batch, length, width]` and the table `[vocabulary, width]`."""
        width = sequence.shape[-1]
        flat = nn.Dense(width, kernel_init=nn.initializers.normal(self.scale), name="dense")(
            sequence.reshape(-1, width)
        )
        norm = nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False, name="norm")
        words = norm(ACTIVATIONS[self.activation](flat)).reshape(sequence.shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (len(table),))
        return _products(words, table) + jnp.expand_dims(bias.astype(words.dtype), (0, 1))


def _products(sequence: jax.Array, table: jax.Array) -> jax.Array:
    # One product of two matrices: on CPU, a table's gradient of more leading axes takes longer.
    flat = sequence.reshape(-1, sequence.shape[-1]) @ table.astype(sequence.dtype).T
    return flat.reshape(*sequence.shape[:-1], len(table))


KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (Linear, Tokens, Span, Hidden, Tied, MaskedWords)}
"""The heads that `jtl.save` knows, by name."""


def reads(head: Any) -> str:
    """What a head is given; "pooled" where it does not say, and where there is none."""
    return getattr(head, "reads", "pooled")


def classifier(num_classes: int, *, dropout: float = 0.0, scale: float = 0.02) -> Linear:
    """A linear classifier.

    Args:
      num_classes: the number of classes, at least 2.
      dropout: rate on the features, in `[0, 1)`.
      scale: standard deviation of the initial kernel.

    Returns:
      A module from `[batch, width]` to logits `[batch, num_classes]`.

    Raises:
      ConfigError: fewer than two classes, or a rate outside `[0, 1)`.
    """
    _check(num_classes, 2, "a classifier needs at least 2 classes, got {}; regressor(1) has one output", dropout)
    return Linear(num_classes, dropout, scale)


def regressor(outputs: int = 1, *, dropout: float = 0.0, scale: float = 0.02) -> Linear:
    """A linear regressor.

    Args:
      outputs: the number of values to predict.
      dropout: rate on the features, in `[0, 1)`.
      scale: standard deviation of the initial kernel.

    Returns:
      A module from `[batch, width]` to `[batch, outputs]`.

    Raises:
      ConfigError: fewer than one output, or a rate outside `[0, 1)`.
    """
    _check(outputs, 1, "a regressor needs at least 1 output, got {}", dropout)
    return Linear(outputs, dropout, scale)


def token_classifier(num_classes: int, *, dropout: float = 0.0, scale: float = 0.02) -> Tokens:
    """A linear classifier of each position: tags of words.

    Args:
      num_classes: the number of tags, at least 2.
      dropout: rate on the features, in `[0, 1)`.
      scale: standard deviation of the initial kernel.

    Returns:
      A module from `[batch, length, width]` to logits `[batch, length, num_classes]`.

    Raises:
      ConfigError: fewer than two tags, or a rate outside `[0, 1)`.
    """
    _check(num_classes, 2, "a classifier of tokens needs at least 2 tags, got {}", dropout)
    return Tokens(num_classes, dropout, scale)


def span(*, dropout: float = 0.0, scale: float = 0.02) -> Span:
    """Begin and end of a span, such as the answer to a question.

    Args:
      dropout: rate on the features, in `[0, 1)`.
      scale: standard deviation of the initial kernel.

    Returns:
      A module from `[batch, length, width]` to logits `[batch, 2, length]`.

    Raises:
      ConfigError: a rate outside `[0, 1)`.
    """
    _check(2, 2, "", dropout)
    return Span(2, dropout, scale)


def language_model() -> Tied:
    """Logits of words by the table of word embeddings, which stays one leaf.

    Returns:
      A module from `[batch, length, width]` and the model's table to logits `[batch, length, vocabulary]`.
    """
    return Tied()


def masked_language_model(*, activation: str = "gelu", epsilon: float = 1e-12, scale: float = 0.02) -> MaskedWords:
    """Logits of masked words, by the table of word embeddings.

    Args:
      activation: of its dense layer.
      epsilon: of its norm.
      scale: standard deviation of the initial kernel.

    Returns:
      A module from `[batch, length, width]` and the model's table to logits `[batch, length, vocabulary]`.

    Raises:
      ConfigError: no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not among {sorted(ACTIVATIONS)}")
    return MaskedWords(activation, epsilon, scale)


def _check(outputs: int, least: int, message: str, dropout: float) -> None:
    if outputs < least:
        raise ConfigError(message.format(outputs))
    if not 0 <= dropout < 1:
        raise ConfigError(f"a dropout rate lies in [0, 1), got {dropout}")

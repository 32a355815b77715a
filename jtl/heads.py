"""New heads: small linen modules from pooled features `[batch, width]` to outputs.

Any linen module with that signature is a head, `nn.Dense(3)` too. Models keep it under the
path `head`, so that `select("head")` is the mask of linear probing.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.errors import ConfigError


class Linear(nn.Module):
    """Dropout, then one dense layer whose parameters sit directly under the head's path.

    Attributes:
      outputs: the width of the output.
      dropout: rate, active in training.
      scale: standard deviation of the initial kernel; 0 starts from equal logits.
    """

    outputs: int
    dropout: float = 0.0
    scale: float = 0.02

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Outputs `[batch, outputs]` of features `[batch, width]`."""
        features = nn.Dropout(self.dropout)(features, deterministic=deterministic)
        init = nn.initializers.normal(self.scale) if self.scale else nn.initializers.zeros_init()
        kernel = self.param("kernel", init, (features.shape[-1], self.outputs))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.outputs,))
        return features @ kernel.astype(features.dtype) + jnp.expand_dims(bias.astype(features.dtype), 0)


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
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {num_classes}; regressor(1) has one output")
    return _linear(num_classes, dropout, scale)


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
    if outputs < 1:
        raise ConfigError(f"a regressor needs at least 1 output, got {outputs}")
    return _linear(outputs, dropout, scale)


def _linear(outputs: int, dropout: float, scale: float) -> Linear:
    if not 0 <= dropout < 1:
        raise ConfigError(f"a dropout rate lies in [0, 1), got {dropout}")
    return Linear(outputs, dropout, scale)

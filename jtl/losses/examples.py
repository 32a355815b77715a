"""Losses of examples: of one label each, of several, of numbers, of a span."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import tree as jtree

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    r"""Softmax cross-entropy with integer labels.

    .. math:: -\log \mathrm{softmax}(z)_y

    Args:
      logits: `[batch, num_classes]`, floats; the loss is computed in float32 or wider.
      labels: `[batch]`, integers in `[0, num_classes)`.
      label_smoothing: share of the target spread evenly over all classes.

    Returns:
      `[batch]`, nats.

    References:
      Szegedy et al, Rethinking the Inception architecture, 2016 (label smoothing).

    >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])))
    [1.3862944]
    """
    logits = _wide(logits)
    if not label_smoothing:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over the labels of an example: multi-label classification.

    Args:
      logits: `[batch, num_labels]`.
      targets: `[batch, num_labels]`, in `[0, 1]`.

    Returns:
      `[batch]`, nats.
    """
    logits = _wide(logits)
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype)), axis=-1)


def focal(
    logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0, alpha: Sequence[float] | np.ndarray | None = None
) -> jax.Array:
    r"""Softmax focal loss: cross-entropy that turns from examples which are right already.

    .. math:: -\alpha_y (1 - p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(z)

    Args:
      logits: `[batch, num_classes]`, floats; the loss is computed in float32 or wider.
      labels: `[batch]`, integers in `[0, num_classes)`.
      gamma: 0 for cross-entropy.
      alpha: `[num_classes]`, a factor for each class; by default 1. Unlike the weights of `weighted`, it does not
        count in a batch's mean, as in the paper.

    Returns:
      `[batch]`, nats.

    References:
      Lin et al, Focal loss for dense object detection, ICCV 2017 (arXiv 1708.02002).
    """
    logits = _wide(logits)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, jnp.finfo(logits.dtype).min, logits), axis=-1)
    loss = _focal(jnp.sum(jnp.where(own, logits, 0), axis=-1) - others, gamma)
    return loss if alpha is None else loss * jnp.asarray(alpha, loss.dtype)[labels]


def binary_focal(logits: jax.Array, targets: jax.Array, *, gamma: float = 2.0, alpha: float | None = None) -> jax.Array:
    r"""Sigmoid focal loss, summed over the labels of an example: multi-label classification.

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t

    with p the sigmoid of z for a target of 1, and one minus it for 0.

    Args:
      logits: `[batch, num_labels]`, floats; the loss is computed in float32 or wider.
      targets: `[batch, num_labels]`, each 0 or 1.
      gamma: 0 for `binary_cross_entropy`.
      alpha: the factor of targets of 1; that of 0 is `1 - alpha`. None for no factors. The paper's best is 0.25.

    Returns:
      `[batch]`, nats.

    References:
      Lin et al, Focal loss for dense object detection, ICCV 2017 (arXiv 1708.02002).
    """
    logits = _wide(logits)
    targets = targets.astype(logits.dtype)
    loss = _focal((2 * targets - 1) * logits, gamma)
    loss = loss if alpha is None else loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return jnp.sum(loss, axis=-1)


def _focal(margin: jax.Array, gamma: float) -> jax.Array:
    """Of the log-odds of the truth. A power of `1 - p` would have no finite slope at 0, and lose digits near it."""
    nats = jax.nn.softplus(-margin)
    return nats * jnp.exp(gamma * jax.nn.log_sigmoid(-margin)) if gamma else nats


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error, averaged over the outputs of an example: regression.

    Args:
      outputs: `[batch]` or `[batch, num_outputs]`; one output may keep its axis.
      targets: `[batch]` or `[batch, num_outputs]`.

    Returns:
      `[batch]`, squared units of the targets.
    """
    outputs = _wide(outputs)
    errors = jnp.square(outputs.reshape(targets.shape) - targets.astype(outputs.dtype))
    return errors if errors.ndim == 1 else jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


def span_cross_entropy(logits: jax.Array, spans: jax.Array) -> jax.Array:
    """The mean of two softmax cross-entropies over positions: of a span's begin, and of its end.

    All positions take part in both, those of padding too, as in transformers' models of question answering.

    Args:
      logits: `[batch, 2, length]` for begin and end, as `jtl.heads.span` gives them; the loss is computed in float32
        or wider.
      spans: `[batch, 2]`, integers in `[0, length)`: the first position of the span, and its last.

    Returns:
      `[batch]`, nats.

    References:
      Devlin et al, BERT, 2018 (arXiv 1810.04805), whose objective for SQuAD it is.

    >>> print(span_cross_entropy(jnp.zeros((1, 2, 4)), jnp.array([[1, 2]])))
    [1.3862944]
    """
    return jnp.mean(cross_entropy(logits, spans), axis=-1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jtree.wide_dtype(x.dtype))

"""Embeddings of pairs that belong together: near each other, and far from the rest of their batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import metrics as jmetrics
from jtl import tree as jtree
from jtl.errors import ConfigError, DataError
from jtl.losses import cross_entropy
from jtl.objective import Supervised, supervised
from jtl.step import Aux
from jtl.typing import Batch, Collections, Key, Params

PAIR = "pair_"
"""Before the names of the second inputs."""

NEGATIVE = "negative_"
"""Before the names of inputs that belong to no other."""


def contrastive(
    model: Any,
    *,
    scale: float = 20.0,
    normalize: bool = True,
    symmetric: bool = False,
    inputs: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
) -> "Contrastive":
    r"""The loss function of a model on pairs: each first input finds its own among the second ones of the batch.

    .. math:: -\log \frac{\exp(s \, u_i \cdot v_i)}{\sum_j \exp(s \, u_i \cdot v_j)}

    of the embeddings u of first and v of second inputs. A batch holds `input_ids` and `pair_input_ids`,
    `attention_mask` and `pair_attention_mask`, and so on, the second ones as long or of another length. Entries with
    `negative_` before their names, one row for each pair as well, are further wrong answers to every first input. Rows
    of weight 0 are no answer to any other. All others are, also where they say the same: leave out what occurs twice.

    The wrong answers are those of the batch that the step is given: of a microbatch with `accumulate`, of all devices
    with a mesh. Each input has dropout of its own.

    Args:
      model: of embeddings `[batch, width]`; of features, the pooled ones are taken. The model's `pool` decides how.
        What a head gives are its embeddings: of a classifier's checkpoint take `model.clone(head=None)`, and its
        variables without `params["head"]`.
      scale: s, the inverse of what is also called the temperature.
      normalize: divide embeddings by their length, so that products are cosines.
      symmetric: the mean of this loss and that in which second inputs look for their first ones.
      inputs: the batch's entries that the model takes, in the order of its arguments; by default all that have neither
        `pair_` nor `negative_` before their names, but `weight`, by keyword.
      call: further keyword arguments for the model; see `jtl.supervised`.

    Returns:
      A loss function for `jtl.train_step`, `jtl.eval_step` and `jtl.fit`. It reports `loss` and `accuracy`, the share
      of first inputs whose own second one is nearest.

    Raises:
      ConfigError: `model` cannot be applied, or a scale that is not above 0.

    References:
      Henderson et al, Efficient natural language response suggestion, 2017 (arXiv 1705.00652). van den Oord et al,
      Contrastive predictive coding, 2018 (arXiv 1807.03748). Reimers and Gurevych, Sentence-BERT, 2019
      (arXiv 1908.10084), whose library has the scale of 20. Radford et al, CLIP, 2021 (arXiv 2103.00020), symmetric.
    """
    if not scale > 0:
        raise ConfigError(f"scale={scale}: expected a number above 0")
    encoder = supervised(model, _unused, inputs=inputs, target="weight", call=call)
    return Contrastive(encoder, scale, normalize, symmetric)


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive:
    """A loss function of pairs; `contrastive` makes it and documents the fields."""

    encoder: Supervised
    scale: float
    normalize: bool
    symmetric: bool

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Aux]:
        """The weighted mean loss of the batch's pairs, its metrics, and the collections after the calls."""
        parts, vectors = self._parts(batch), []
        for number, part in enumerate(parts):
            own = None if key is None else jax.random.fold_in(key, number)
            outputs, collections = self.encoder.apply(params, collections, part, key=own)
            vectors.append(self._vectors(outputs))
        weight = jnp.asarray(parts[0]["weight"]).astype(vectors[0].dtype)
        losses, hits = self._compared(vectors[0], vectors[1], vectors[2:], weight)
        mean = jmetrics.mean(losses, weight)
        # Never 0/0: a batch of filler rows alone, one process's share of the last one, has loss 0.
        loss = mean.total / jnp.maximum(mean.weight, jnp.finfo(weight.dtype).tiny)
        return loss, Aux({"loss": mean, "accuracy": jmetrics.mean(hits, weight)}, collections)

    def checker(self, params: Params, collections: Collections) -> Callable[[Batch], None]:
        """A function that refuses a batch which the model cannot mean, or which has nothing to compare."""
        inner = self.encoder.checker(params, collections)

        def check(batch: Batch) -> None:
            parts = self._parts(batch)
            rows = {name: np.shape(value)[:1] for name, value in batch.items()}
            if len(set(rows.values())) > 1:
                raise DataError(f"the batch's entries have different lengths: {rows}")
            for part in parts:
                inner(part)
            if rows.popitem()[1] == (1,) and len(parts) == 2:
                raise DataError("a batch of one pair has no wrong answer: make batches larger, and drop a last one")

        return check

    def _parts(self, batch: Batch) -> list[dict[str, Any]]:
        """First, second and, where there are some, wrong inputs, each under the names that the model knows."""
        if not isinstance(batch, Mapping):
            raise DataError(f"a batch is a mapping of arrays by name, got {type(batch).__name__}")
        groups: dict[str, dict[str, Any]] = {"": {}, PAIR: {}, NEGATIVE: {}}
        for name, value in batch.items():
            prefix = next((prefix for prefix in (PAIR, NEGATIVE) if name.startswith(prefix)), "")
            plain = name.removeprefix(prefix)
            if plain != "weight" and (self.encoder.inputs is None or plain in self.encoder.inputs):
                groups[prefix][plain] = value
        first = groups.pop("")
        if not first:
            raise DataError(f"the batch has no input for the model; it has {sorted(batch)}")
        for prefix, group in groups.items():
            lacking = [f"{prefix}{name}" for name in first if name not in group]
            lacking += [name for name in group if name not in first]
            if lacking and (group or prefix == PAIR):
                raise DataError(f"the batch lacks {lacking}; it has {sorted(batch)}")
        weight = batch.get("weight")
        if weight is None:
            weight = np.ones(np.shape(next(iter(first.values())))[:1], np.float32)
        return [{**group, "weight": weight} for group in (first, *groups.values()) if group]

    def _vectors(self, outputs: Any) -> jax.Array:
        vectors = getattr(outputs, "pooled", outputs)
        if getattr(vectors, "ndim", 0) != 2:
            found = getattr(vectors, "shape", type(vectors).__name__)
            raise ConfigError(
                f"the model's outputs are {found}: expected embeddings [batch, width], or pooled features"
            )
        vectors = vectors.astype(jtree.wide_dtype(vectors.dtype))
        if not self.normalize:
            return vectors
        # No length counts as less than 1e-12, as in PyTorch's `normalize`: zeros have a finite gradient.
        squares = jnp.sum(jnp.square(vectors), axis=1, keepdims=True)
        return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))

    def _compared(
        self, left: jax.Array, right: jax.Array, negatives: list[jax.Array], weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of each pair, and whether its second input was the nearest, both `[batch]`."""
        answers = jnp.arange(len(left))
        # A filler row stays its own answer: its loss, which weighs nothing, is finite.
        allowed = jnp.expand_dims(weight > 0, 0) | jnp.eye(len(left), dtype=bool)
        scores = _products(left, right) * self.scale
        found = [_where(allowed, scores)]
        found += [_where(jnp.expand_dims(weight > 0, 0), _products(left, wrong) * self.scale) for wrong in negatives]
        forward = jnp.concatenate(found, axis=1)
        losses = cross_entropy(forward, answers)
        if self.symmetric:
            losses = (losses + cross_entropy(_where(allowed, scores.T), answers)) / 2
        return losses, (jnp.argmax(forward, axis=1) == answers).astype(weight.dtype)


def _products(left: jax.Array, right: jax.Array) -> jax.Array:
    # Devices may multiply float32 with fewer bits, of which cosines near 1 would all be the same.
    return jnp.matmul(left, right.T, precision="highest")


def _where(allowed: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)


def _unused(outputs: Any, weight: jax.Array) -> jax.Array:
    """In the place of a loss of single examples, which pairs do not have."""
    raise NotImplementedError

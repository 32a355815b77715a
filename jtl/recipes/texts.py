"""Texts as batches of token ids: cut to a length, or as overlapping windows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jtl
from jtl import tree as jtree
from jtl.data import Batches, Examples, batches, text, windows
from jtl.errors import ConfigError, DataError
from jtl.state import Frozen, TrainState

_WINDOW = "window"
"""The column of a window's number, which no model sees."""


class Encoded(NamedTuple):
    """Batches, how many texts were cut, and which text each row is of, int `[W]`."""

    batches: Batches
    truncated: int
    text: np.ndarray


def text_batches(
    tokenizer: Any,
    examples: Examples,
    *,
    max_length: int,
    stride: int | None = None,
    numbered: bool = False,
    max_buckets: int = 3,
    known: Sequence[int] = (),
    types: bool = False,
    **settings: Any,
) -> Encoded:
    """Batches of token ids padded to length buckets.

    Args:
      tokenizer: a fast tokenizer of Hugging Face.
      examples: labelled texts, in the column `text`, and the second texts of pairs in the column `second`.
      max_length: longer texts are cut, or become windows.
      stride: how many tokens a window has in common with the one before it, each with the label of its text; None to
        cut texts.
      numbered: give each row its number, in the column "window".
      max_buckets: the most padded lengths, each of which is compiled once.
      known: the lengths of other batches, which are compiled already: they are used, and a longer one if need be.
      types: whether the model is told which text of a pair a token is of, where the tokenizer says it.
      **settings: of `jtl.data.pipeline.batches`.

    Raises:
      ConfigError: windows of pairs, or a stride as long as a window.
      DataError: as `jtl.data.text.encode` raises.
    """
    columns, truncated, owners = _columns(tokenizer, examples, max_length, stride, types)
    lengths = columns["input_ids"].lengths
    longer = lengths[lengths > max(known, default=0)]
    if known and len(longer):
        buckets = (*known, *text.buckets(longer, max_length=max_length, max_buckets=1))
    else:
        buckets = known or text.buckets(lengths, max_length=max_length, max_buckets=max_buckets)
    values = examples.labels[owners]
    labels = values if examples.task == "classification" else None
    if labels is None:
        columns["label"] = values
    if numbered:
        columns[_WINDOW] = np.arange(len(lengths))
    return Encoded(batches(columns, labels, buckets=buckets, **settings), truncated, owners)


def _columns(
    tokenizer: Any, examples: Examples, max_length: int, stride: int | None, types: bool
) -> tuple[dict[str, Any], int, np.ndarray]:
    texts, second = list(examples.columns["text"]), examples.columns.get("second")
    if stride is not None:
        if second is not None:
            raise ConfigError("stride: windows are of single texts, and these are pairs; leave it out to cut them")
        cut = windows.encode(tokenizer, texts, max_length=max_length, stride=stride)
        return {"input_ids": cut.input_ids}, 0, cut.text
    pairs = None if second is None else list(second)
    encoded = text.encode(tokenizer, texts, max_length=max_length, pairs=pairs)
    columns: dict[str, Any] = {"input_ids": encoded.input_ids}
    if types and pairs is not None and encoded.token_type_ids is not None:
        columns["token_type_ids"] = encoded.token_type_ids
    return columns, encoded.truncated, np.arange(len(texts))


class Windowed(NamedTuple):
    """The windows of N texts to evaluate on: a text's outputs are the mean of its windows'.

    Attributes:
      batches: of numbered windows.
      text: int `[W]`, which text a window is of.
      targets: `[N, ...]`, of the texts.
    """

    batches: Batches
    text: np.ndarray
    targets: np.ndarray

    def scores(self, loss_fn: Any, state: TrainState, frozen: Frozen, *, mesh: Any = None) -> Mapping[str, float]:
        """The loss and the metrics of a loss of `jtl.supervised`, over texts.

        Args:
          loss_fn: the loss.
          state: the trained half.
          frozen: the frozen half.
          mesh: split every batch over the devices of this mesh.
        """

        @jax.jit
        def outputs(state: TrainState, frozen: Frozen, batch: Any) -> jax.Array:
            params = jtree.combine(state.params, frozen.params)
            return loss_fn.apply(params, jtree.combine(state.collections, frozen.collections), batch, key=None)[0]

        found: np.ndarray | None = None
        for batch in self.batches:
            numbers, real = batch.pop(_WINDOW), batch["weight"] > 0
            given = batch if mesh is None else jtl.parallel.shard_batch(batch, mesh)
            part = np.asarray(outputs(state, frozen, given))[real]
            found = np.zeros((len(self.text), *part.shape[1:]), part.dtype) if found is None else found
            found[numbers[real]] = part
        if found is None:
            raise DataError("there are no windows to predict: the data set is empty")
        means, targets = jnp.asarray(windows.mean(found, self.text, len(self.targets))), jnp.asarray(self.targets)
        weight = jnp.ones(len(targets), means.dtype)
        scores = {name: metric(means, targets, weight) for name, metric in loss_fn.metrics.items()}
        scores = {"loss": loss_fn.loss(means, targets).mean(), **scores}
        return {name: float(value) for name, value in jtl.metrics.compute(jtl.metrics.accumulators(scores)).items()}

"""Inputs as a compiled generation takes them: checked, and padded to one of few lengths."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jtl import heads
from jtl.errors import ConfigError, DataError
from jtl.models.inputs import check_tokens

STEP = 32
"""Inputs are padded to a multiple of it, so that one compilation serves many lengths."""


class Prompts(NamedTuple):
    """Inputs of one padded length.

    Attributes:
      ids: `[batch, length]` int32, 0 where there is padding.
      mask: `[batch, length]` bool, True for real tokens.
    """

    ids: np.ndarray
    mask: np.ndarray


def generating(model: Any) -> Any:
    """The model that generates, within adapters.

    Args:
      model: a linen module, or a `jtl.peft.Adapted`.

    Raises:
      ConfigError: it does not generate, its head gives no logits of words, or an adapter puts positions in front.
    """
    inner = model
    while not hasattr(inner, "decode") and hasattr(inner, "model"):
        adapter = getattr(inner, "adapter", None)
        if adapter is not None and adapter.in_front:
            raise ConfigError(
                f"what {adapter.name}() puts in front of a sequence has no place among the keys and values that are "
                "kept while words are written; write without it, or call the model on the whole text for each word"
            )
        inner = inner.model
    name = type(inner).__name__
    if not all(hasattr(inner, part) for part in ("start", "decode", "prompted", "config")):
        raise ConfigError(f"{name} generates no text: it has no start and decode, as GPT-2 and T5 have")
    if heads.reads(inner.head) not in ("table", "sequence"):
        head = "no head" if inner.head is None else f"the head {type(inner.head).__name__}"
        raise ConfigError(
            f"{name} with {head} has no logits of words: load it with head=jtl.heads.language_model(), or without "
            "head= from a checkpoint that has one"
        )
    return inner


def prepare(inputs: Mapping[str, Any], network: Any, new: int) -> Prompts:
    """Check and pad inputs.

    Where the inputs are the beginning of the output they are padded on the left, whichever side they came padded on, so
    that all rows go on at the same position. Otherwise they stay where they are.

    Args:
      inputs: `input_ids`, and `attention_mask` unless all are real tokens, both `[batch, length]`.
      network: what generates.
      new: how many tokens are to come.

    Raises:
      DataError: a missing or unknown entry, an id that the model does not have, or a row of padding alone.
      ConfigError: a row and its new tokens are longer than the model's longest text.
    """
    ids, mask = _entries(inputs, network.config.vocab_size)
    longest = getattr(network.config, "max_length", None)
    if network.prompted:
        order = np.argsort(mask, axis=1, kind="stable")  # padding first, then the tokens in their order
        ids, mask = (np.take_along_axis(x, order, axis=1)[:, -_longest(mask) :] for x in (ids, mask))
    else:
        end = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
        ids, mask = ids[:, :end], mask[:, :end]
    most = None if longest is None else longest - new if network.prompted else longest
    _check_length(mask, new, longest, most, network.prompted)
    filler = _bucket(ids.shape[1], most) - ids.shape[1]
    sides = (filler, 0) if network.prompted else (0, filler)
    return Prompts(*(np.pad(x, ((0, 0), sides)) for x in (ids, mask)))


def _entries(inputs: Mapping[str, Any], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    names = set(inputs)
    if "input_ids" not in names or names - {"input_ids", "attention_mask"}:
        raise DataError(f"inputs have {sorted(names)}: expected input_ids and, where there is padding, attention_mask")
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones(ids.shape, bool))).astype(bool)
    if ids.shape == mask.shape and np.issubdtype(ids.dtype, np.integer):
        ids = np.where(mask, ids, 0)  # a tokenizer's padding may be a token that the model does not have
    check_tokens({"input_ids": ids, "attention_mask": mask}, vocabulary=vocabulary)
    if not len(ids):
        raise DataError("inputs have no row")
    return ids.astype(np.int32), mask


def _longest(mask: np.ndarray) -> int:
    return int(mask.sum(axis=1).max())


def _check_length(mask: np.ndarray, new: int, longest: int | None, most: int | None, prompted: bool) -> None:
    if longest is None or most is None:
        return
    if new > longest or (prompted and new >= longest):
        raise ConfigError(f"max_new_tokens={new}: the model's texts have at most {longest} tokens")
    if mask.shape[1] > most:
        row = int(np.argmax(mask.sum(axis=1)))
        beside = f" beside max_new_tokens={new}" if prompted else ""
        raise ConfigError(
            f"row {row} is {mask.shape[1]} tokens long: the model's texts have at most {longest}, so a row at most "
            f"{most}{beside}; truncate the inputs{' on the left, or ask for fewer tokens' if prompted else ''}"
        )


def _bucket(length: int, most: int | None) -> int:
    """The padded length of inputs.

    >>> [_bucket(*lengths) for lengths in ((1, None), (32, None), (33, 100), (65, 90))]
    [32, 32, 64, 90]
    """
    padded = -(-length // STEP) * STEP
    return padded if most is None else min(padded, most)

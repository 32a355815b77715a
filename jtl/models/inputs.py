"""What a model refuses on the host: ids that its tables do not have would silently read other rows, and the like."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jtl.errors import DataError


def check_tokens(
    batch: Mapping[str, Any],
    *,
    vocabulary: int,
    longest: int | None = None,
    types: int | None = None,
    ids: str = "input_ids",
    mask: str = "attention_mask",
) -> None:
    """Refuse token ids that a model cannot mean.

    Args:
      batch: arrays on the host; what it lacks is not checked.
      vocabulary: rows of the table of words.
      longest: the most positions; None where there is no limit.
      types: rows of the table of token types; None where there is none to read.
      ids: the entry of ids, `[batch, length]`.
      mask: the entry that is nonzero for real tokens, `[batch, length]`.

    Raises:
      DataError: says the row, the position and the value, what was expected, and what to do.
    """
    if ids not in batch:
        return
    tokens = np.asarray(batch[ids])
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{ids} are {tokens.dtype}{list(tokens.shape)}: expected integers [batch, length]")
    if longest is not None and tokens.shape[1] > longest:
        raise DataError(
            f"{ids} are {tokens.shape[1]} long, the model has {longest} positions: truncate or window the texts"
        )
    _check_range(ids, tokens, vocabulary, "the tokenizer is not the one that the model was trained with")
    if types is not None and "token_type_ids" in batch:
        _check_range("token_type_ids", np.asarray(batch["token_type_ids"]), types, "leave them out for single texts")
    if mask in batch:
        _check_mask(mask, np.asarray(batch[mask]), tokens.shape, batch.get("weight"))


def check_pictures(batch: Mapping[str, Any]) -> None:
    """Refuse pictures that are still bytes: a model would take 0 to 255 for what it was trained on.

    Args:
      batch: arrays, of which pictures are `[batch, height, width, channels]`.

    Raises:
      DataError: says what to do.
    """
    for name, value in batch.items():
        if np.ndim(value) == 4 and np.dtype(value.dtype).kind in "iub":
            raise DataError(
                f"{name} are {value.dtype}{list(np.shape(value))}: expected floats, normalised as the model's "
                "config.input says; jtl.data.picture_batches gives them, and jtl.augment.normalize on the device"
            )


def _check_range(name: str, values: np.ndarray, count: int, remedy: str) -> None:
    wrong = np.argwhere((values < 0) | (values >= count))
    if len(wrong):
        row, position = wrong[0]
        raise DataError(
            f"{name} of row {row} has {values[row, position]} at position {position}: expected 0 to {count - 1}; "
            f"{remedy}"
        )


def _check_mask(name: str, mask: np.ndarray, shape: tuple[int, ...], weight: Any) -> None:
    if mask.shape != shape:
        raise DataError(f"{name} has shape {list(mask.shape)}, the ids {list(shape)}")
    empty = ~mask.astype(bool).any(axis=1)
    if weight is not None:
        empty &= np.asarray(weight) != 0
    if empty.any():
        raise DataError(f"row {int(np.argmax(empty))} has no token, only padding: leave empty texts out")

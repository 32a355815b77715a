"""Texts longer than a model takes, as overlapping windows, and the mean of what a model says of a text's windows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import text
from jtl.data.text import Ragged

CHUNK = 512
"""Texts cut at a time; a long one becomes many windows."""


class Windows(NamedTuple):
    """W windows of N texts, those of a text one after another.

    Attributes:
      input_ids: the tokens of each window, special ones included, padding not.
      text: int64 `[W]`, which text a window is of.
    """

    input_ids: Ragged
    text: np.ndarray


def encode(tokenizer: Any, texts: Sequence[str], *, max_length: int, stride: int = 0) -> Windows:
    """Encode N texts, each as so many windows of at most `max_length` tokens as it needs.

    To train a classifier, a window takes the label of its text, `labels[windows.text]`, and perhaps a share of its
    weight; `mean` makes of a text's windows one answer.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      texts: N texts.
      max_length: the most tokens of a window, special ones included.
      stride: how many tokens a window has in common with the one before it, as transformers means the word.

    Raises:
      ConfigError: the tokenizer is not a fast one, `max_length` leaves no room beside the special tokens, or `stride`
        no new tokens in a window.
      DataError: no texts, something that is not a string, or a text without a token.
    """
    text.check_room(tokenizer, max_length)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if not 0 <= stride < room:
        raise errors.ConfigError(f"stride={stride}: expected 0 to {room - 1}, fewer than the {room} tokens of a window")
    text.check_texts(texts)
    ids, owners = [], []
    for start, encodings in overflowing(tokenizer, texts, None, max_length=max_length, stride=stride):
        text.check_tokens("text", start, texts, [windows[0] for windows in encodings])
        ids.append([window.ids for windows in encodings for window in windows])
        owners += [row for row, windows in enumerate(encodings, start) for _ in windows]
    return Windows(text.joined(ids, text.padding(tokenizer)), np.array(owners, np.int64))


def mean(outputs: np.ndarray, text: np.ndarray, count: int) -> np.ndarray:
    """The mean over the windows of each text of what a model gives for them, such as logits.

    Args:
      outputs: `[W, ...]`, floats.
      text: int `[W]`, which text a window is of.
      count: N, the number of texts.

    Returns:
      `[N, ...]` of the dtype of `outputs`.

    Raises:
      DataError: other numbers of outputs than windows, or a text without one.

    >>> mean(np.array([[0.0, 2.0], [2.0, 4.0], [5.0, 1.0]]), np.array([0, 0, 1]), 2).tolist()
    [[1.0, 3.0], [5.0, 1.0]]
    """
    outputs, text = np.asarray(outputs), np.asarray(text)
    if len(outputs) != len(text):
        raise errors.DataError(f"{len(outputs)} outputs for {len(text)} windows; expected as many")
    counts = np.bincount(text, minlength=count)
    if len(counts) != count or not counts.all():
        what = f"text {counts.argmin()} has no window" if len(counts) == count else f"a window is of text {text.max()}"
        raise errors.DataError(f"{what}; expected windows of each of {count} texts")
    total = np.zeros((count, *outputs.shape[1:]), np.float64)
    np.add.at(total, text, outputs.astype(np.float64))
    return (total / counts.reshape(-1, *[1] * (outputs.ndim - 1))).astype(outputs.dtype)


def overflowing(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, *, max_length: int, stride: int
) -> Iterator[tuple[int, list[list[Any]]]]:
    """The windows of texts, or of pairs of which the second is cut, as encodings of the library tokenizers.

    Yields:
      The number of the first row of some rows, and the windows of each of them.
    """
    for start in range(0, len(first), CHUNK):
        part = slice(start, start + CHUNK)
        batch = tokenizer(
            list(first[part]),
            None if second is None else list(second[part]),
            truncation=True if second is None else "only_second",
            max_length=max_length,
            stride=stride,
            padding=False,
            return_overflowing_tokens=True,
        )
        rows: list[list[Any]] = [[] for _ in first[part]]
        for row, encoding in zip(batch["overflow_to_sample_mapping"], batch.encodings, strict=True):
            rows[row].append(encoding)
        yield start, rows

"""Token sequences of different lengths: encoding without padding, and the choice of padded lengths."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jtl import errors

CHUNK = 4096
"""Texts encoded at a time: a tokenizer's own objects take some hundred bytes a token, the arrays four."""


class Ragged(NamedTuple):
    """N integer sequences of different lengths, end to end; row i is `values[offsets[i]:offsets[i + 1]]`.

    Attributes:
      values: int32 `[total]`.
      offsets: int64 `[N + 1]`, from 0 to `total`.
      pad: what fills a row up when it becomes part of a rectangular batch.
    """

    values: np.ndarray
    offsets: np.ndarray
    pad: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[N]`: the length of each row."""
        return np.diff(self.offsets)


class Encoded(NamedTuple):
    """Encoded texts.

    Attributes:
      input_ids: the tokens of each text, special tokens included, padding not.
      token_type_ids: of pairs, 0 for the first text and 1 for the second, or as the tokenizer tells them apart; of
        single texts None where the tokenizer has no such thing.
      truncated: how many texts were cut to `max_length`.
    """

    input_ids: Ragged
    token_type_ids: Ragged | None
    truncated: int


def ragged(rows: Iterable[Sequence[int]], pad: int = 0) -> Ragged:
    """Lay rows end to end.

    >>> ragged([[7, 8], [9]]).offsets
    array([0, 2, 3])
    """
    return joined([list(rows)], pad)


def tokenizer(path: str | os.PathLike[str]) -> Any:
    """The Hugging Face tokenizer of a local folder, without network and without code from the folder.

    Args:
      path: a folder with `tokenizer.json`, or the vocabulary files of a tokenizer that transformers knows.

    Raises:
      SourceNotFoundError: there is no such folder.
      ConfigError: the tokenizer needs code of its own, has no fast (Rust) form, or cannot be loaded.
      MissingExtraError: transformers is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise errors.SourceNotFoundError(f"{path}: there is no such folder; expected one with tokenizer.json")
    _refuse_remote_code(path / "tokenizer_config.json")
    _require_vocabulary(path)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise errors.missing_extra("transformers", "text") from error
    with answering(f"{path}: transformers cannot load a tokenizer from this folder"):
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    return fast(loaded)


@contextlib.contextmanager
def answering(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer's library raises over a malformed file into one error that says what failed.

    transformers indexes into these files as it finds them; the library in Rust raises bare exceptions, and panics,
    which Python does not count among exceptions.

    Args:
      what: could not be done.

    Raises:
      ConfigError: it could not.
    """
    try:
        yield
    except errors.JtlError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {error}"
        raise errors.ConfigError(f"{what}: {reason:.400}; get its files again") from error


def encode(tokenizer: Any, texts: Sequence[str], *, max_length: int, pairs: Sequence[str] | None = None) -> Encoded:
    """Encode N texts, or N pairs of texts, without padding.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      texts: N texts.
      max_length: the most tokens of a row, special tokens included; longer ones are cut and counted.
      pairs: the N second texts.

    Raises:
      ConfigError: the tokenizer is not a fast one, or `max_length` leaves no room beside the special tokens.
      DataError: no texts, something that is not a string, a text without a token, or `pairs` of another length.
    """
    check_room(tokenizer, max_length, pair=pairs is not None)
    check_texts(texts, pairs)
    ids, types, truncated = [], [], 0
    for start in range(0, len(texts), CHUNK):
        part = slice(start, start + CHUNK)
        second = None if pairs is None else list(pairs[part])
        typed = True if second is not None else None  # a folder's settings may have forgotten that a model needs them
        with answering("the tokenizer fails on these texts"):
            batch = tokenizer(
                list(texts[part]),
                second,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_token_type_ids=typed,
            )
        check_tokens("text", start, texts, batch.encodings)
        ids.append(batch["input_ids"])
        types.append(batch.get("token_type_ids"))
        truncated += sum(bool(encoding.overflowing) for encoding in batch.encodings)
    token_types = None if types[0] is None else joined(types, 0)
    with answering("the tokenizer gives ids that are none"):
        return Encoded(joined(ids, padding(tokenizer)), token_types, truncated)


def check_room(tokenizer: Any, max_length: int, *, pair: bool = False) -> None:
    """Refuse a tokenizer that is not a fast one, or a length that its special tokens fill.

    Args:
      tokenizer: of Hugging Face.
      max_length: the most tokens of a row.
      pair: whether a row holds two texts.

    Raises:
      ConfigError: says which.
    """
    special = fast(tokenizer).num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise errors.ConfigError(f"max_length={max_length}: expected above {special}, the number of special tokens")


def check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that is not the one a model was trained with, as far as ids can tell.

    Args:
      tokenizer: of Hugging Face.
      config: of the model, with `vocab_size` and perhaps `pad_token_id`.

    Raises:
      ConfigError: a token has no row in the model's table, or the two mean different tokens by padding.
    """
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if last >= config.vocab_size:
        raise errors.ConfigError(
            f"the tokenizer's token {token!r} has the id {last}, and the model knows 0 to {config.vocab_size - 1}: "
            "the tokenizer is not the one that the model was trained with, or tokens were added to it"
        )
    theirs, ours = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    if theirs is not None and ours is not None and theirs != ours:
        raise errors.ConfigError(
            f"padding is {theirs} ({tokenizer.pad_token!r}) to the tokenizer and {ours} to the model: "
            "the tokenizer is not the one that the model was trained with"
        )


def check_tokens(what: str, start: int, texts: Sequence[Any], encodings: Sequence[Any]) -> None:
    """Refuse a row without any token of its text: it would train on its special tokens alone.

    Args:
      what: a row is called.
      start: the number of the first of these rows.
      texts: all rows.
      encodings: of these rows.

    Raises:
      DataError: names the row.
    """
    for row, encoding in enumerate(encodings, start):
        if all(encoding.special_tokens_mask):
            raise errors.DataError(
                f"{what} {row} is {texts[row]!r:.60}, of which the tokenizer makes no token; leave it out"
            )


def padding(tokenizer: Any) -> int:
    """The id that fills rows up: the tokenizer's own, or 0 where it has none."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def buckets(lengths: np.ndarray, *, max_length: int, max_buckets: int = 4) -> tuple[int, ...]:
    """The padded lengths that waste the fewest tokens, from 8, 12, 16, ..., 32, 40, 48, ..., 64, 80, 96, ...

    Each length is one more shape to compile. Of the candidates up to `max_length`, which is one itself, an
    exact search picks at most `max_buckets`, and fewer where more would save nothing.

    Args:
      lengths: int `[N]`, the number of tokens of each row.
      max_length: the largest padded length that the model takes.
      max_buckets: the most lengths to use.

    Returns:
      Increasing lengths, the last of which is at least `lengths.max()`.

    Raises:
      ConfigError: `max_buckets` is below 1.
      DataError: there are no lengths, or one is above `max_length`.

    >>> buckets(np.array([5, 30, 31, 60, 61]), max_length=128, max_buckets=2)
    (32, 64)
    """
    lengths = np.asarray(lengths)
    if max_buckets < 1:
        raise errors.ConfigError(f"max_buckets={max_buckets}: expected at least 1")
    if not lengths.size or lengths.max() > max_length:
        found = f"row {lengths.argmax()} has {lengths.max()} tokens" if lengths.size else "there are no rows"
        raise errors.DataError(f"buckets up to {max_length}: {found}; encode with max_length={max_length} first")
    sizes = _candidates(int(lengths.max()), max_length)
    return _fewest_padded(sizes, np.searchsorted(np.sort(lengths), sizes, side="right"), max_buckets)


def _candidates(longest: int, max_length: int) -> list[int]:
    """Multiples of 4 to 32, of 8 to 64, of 16 to 128, and so on, up to the first that holds `longest`."""
    sizes = [min(8, max_length)]
    while sizes[-1] < min(longest, max_length):
        step = max(4, 1 << (sizes[-1].bit_length() - 3))
        sizes.append(min(sizes[-1] + step, max_length))
    return sizes


def _fewest_padded(sizes: list[int], below: np.ndarray, most: int) -> tuple[int, ...]:
    """Choose at most `most` of `sizes`, the last included; `below[j]` rows fit into `sizes[j]`."""
    # best[j]: (tokens, number of sizes, sizes) for the rows that fit into sizes[j], the last size chosen.
    best = [(int(below[j]) * sizes[j], 1, (sizes[j],)) for j in range(len(sizes))]
    for _ in range(most - 1):
        best = [
            min(
                [best[j]]
                + [
                    (
                        best[i][0] + int(below[j] - below[i]) * sizes[j],
                        best[i][1] + 1,
                        (*best[i][2], sizes[j]),
                    )
                    for i in range(j)
                ]
            )
            for j in range(len(sizes))
        ]
    return best[-1][2]


def joined(chunks: Sequence[Sequence[Sequence[int]]], pad: int) -> Ragged:
    """Rows that come in chunks, laid end to end; see `ragged`."""
    lengths = [len(row) for chunk in chunks for row in chunk]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    parts = [np.fromiter((token for row in chunk for token in row), np.int32) for chunk in chunks]
    return Ragged(np.concatenate(parts), offsets, pad)


def fast(tokenizer: Any) -> Any:
    """The tokenizer, if it is a fast one.

    Raises:
      ConfigError: it has no form in Rust.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise errors.ConfigError(
            f"the tokenizer {type(tokenizer).__name__} has no fast (Rust) form; expected one with tokenizer.json"
        )
    return tokenizer


def _require_vocabulary(folder: Path) -> None:
    # Without one, transformers makes a tokenizer that knows its special tokens and nothing else.
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
    if not any(next(folder.glob(name), None) for name in names):
        raise errors.ConfigError(
            f"{folder} has no tokenizer: cannot load a tokenizer without one of {', '.join(names)}"
        )


def _refuse_remote_code(config: Path) -> None:
    if not config.is_file():
        return
    try:
        settings = json.loads(config.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise errors.ConfigError(f"{config}: not JSON: {error}") from error
    if isinstance(settings, dict) and "AutoTokenizer" in str(settings.get("auto_map")):
        raise errors.ConfigError(
            f"{config}: the tokenizer needs Python code from its checkpoint (auto_map), which is never run; "
            "save it with tokenizer.json alone"
        )


def check_texts(texts: Sequence[Any], pairs: Sequence[Any] | None = None) -> None:
    """Refuse texts that no tokenizer takes.

    Raises:
      DataError: there are none, something is not a string, or `pairs` are not as many.
    """
    if not len(texts):
        raise errors.DataError("there are no texts to encode; expected at least one")
    if pairs is not None and len(pairs) != len(texts):
        raise errors.DataError(f"{len(pairs)} second texts for {len(texts)} first ones; expected as many")
    for name, column in (("texts", texts), ("pairs", pairs or ())):
        for i, text in enumerate(column):
            if not isinstance(text, str):
                raise errors.DataError(f"{name}[{i}] is {text!r} ({type(text).__name__}); expected a string")

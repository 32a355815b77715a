"""Texts of any number, from files or TFDS: read one after another, or tokenised once into files that are mapped.

`tokenised(source, tokenizer, directory).rows` is what `text.encode` gives, but on the disk: it goes into `batches` as
it is, and through `packing.plan` and `packing.fill` into rows without padding.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import tables, tfds
from jtl.data import text as jtext
from jtl.data.examples import Skipped
from jtl.data.text import Ragged
from jtl.weights.digest import sha256
from jtl.weights.folders import new_folder

_VERSION = 1
"""Of the files that are made; another one is another key."""

_CHARACTERS = 1 << 22
"""About so many are tokenised at a time, or so many texts as `text.CHUNK` says."""

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Text(NamedTuple):
    """A text and its place.

    Attributes:
      file: the file, or the TFDS data set.
      row: its 1-based line in the file, or its row; None where the whole file is one text.
      text: what is there.
    """

    file: str
    row: int | None
    text: str


class Corpus(NamedTuple):
    """N tokenised texts.

    Attributes:
      rows: their tokens, mapped from a file: they are read when they are used.
      folder: where the files are.
      new: whether they were made now.
      truncated: how many texts were cut to `max_length`.
      skipped: what was left out.
    """

    rows: Ragged
    folder: Path
    new: bool
    truncated: int
    skipped: tuple[Skipped, ...]


def texts(
    source: Source,
    *,
    text: str = "text",
    per: Literal["line", "file"] = "line",
    skipped: list[Skipped] | None = None,
) -> Iterator[Text]:
    """Read texts one after another; no file is loaded whole.

    Args:
      source: a `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.txt` file, all but Parquet also with `.gz` or `.bz2`; a
        folder, of which all files are read in the order of their names; several of either; or "tfds:NAME:SPLIT".
      text: the column of texts, or the feature.
      per: whether each line of a text file is a text, or the whole file.
      skipped: a list to put bad rows on, where one would be an error.

    Raises:
      SourceNotFoundError: there is no such file, or no data set of this name.
      ConfigError: a file of another kind.
      DataError: a bad row, by file and row; or a file that is empty, cannot be read, or lacks the column.
    """
    for place, found, problem in _of_tfds(source, text) if _is_tfds(source) else _of_files(source, text, per):
        if not problem:
            yield Text(*place, found)
        else:
            _leave_out(Skipped(*place, problem), skipped)


def files(source: Source) -> list[tuple[str, Path]]:
    """The files of a source, each with what it is called there.

    Raises:
      SourceNotFoundError: one does not exist.
      DataError: a folder has none.
    """
    found = []
    for given in [source] if isinstance(source, str | os.PathLike) else source:
        path = Path(given)
        if not path.exists():
            raise errors.SourceNotFoundError(f"{path}: there is no such file or folder")
        inside = [(path.name, path)] if path.is_file() else _inside(path)
        if not inside:
            raise errors.DataError(f"{path}: the folder holds no files; expected texts")
        found += inside
    return found


def tokenised(
    source: Source,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    text: str = "text",
    per: Literal["line", "file"] = "line",
    max_length: int | None = None,
    special_tokens: bool = True,
    eos: bool = False,
    skip_bad: bool = False,
    verify: bool = True,
) -> Corpus:
    """Tokenise a source once, and map the tokens from the disk ever after.

        directory/tokens-<key>/tokens.npy     int32, all texts end to end
                               offsets.npy    int64, where each begins
                               corpus.json    digests, counts, and what was left out

    The key is a digest of the bytes of the source, of the tokenizer and of the settings: where one of them changes,
    other files are made. They appear when they are complete, or not at all.

    Args:
      source: as in `texts`.
      tokenizer: a fast Hugging Face tokenizer.
      directory: where the files go.
      text: the column of texts, or the feature.
      per: whether each line of a text file is a text, or the whole file.
      max_length: longer texts are cut, and counted; None leaves them whole, for `packing` to split.
      special_tokens: whether a text gets the tokenizer's special tokens.
      eos: whether the token that ends a sequence comes after each text, where the tokenizer does not add it itself.
      skip_bad: leave bad texts out, and list them, where one would be an error.
      verify: compare the files with their digests, a pass over all of them; without it, their sizes alone.

    Raises:
      ConfigError: the tokenizer is not a fast one or has no such token, or `max_length` leaves no room.
      DataError: a bad text, by file and row (unless `skip_bad`); no texts; or a damaged file, by its name.
      CacheError: the disk is full, or refuses.
      JtlError: as `texts` raises.
    """
    settings = {"text": text, "per": per, "max_length": max_length, "special_tokens": special_tokens, "eos": eos}
    settings |= {"skip_bad": skip_bad}
    _check(tokenizer, settings)
    parts = {"version": _VERSION, **settings, "tokenizer": _described(tokenizer), "source": _digests(source, text)}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    folder = Path(directory) / f"tokens-{key[:24]}"
    new = not folder.is_dir()
    if new:
        _make(folder, source, tokenizer, settings)
    return _opened(folder, jtext.padding(tokenizer), new, verify)


def _is_tfds(source: Source) -> bool:
    return isinstance(source, str) and source.startswith("tfds:")


def _tfds(source: Source, text: str) -> tfds.Texts:
    name, _, split = str(source).removeprefix("tfds:").partition(":")
    return tfds.texts(name, split or "train", text=text)


_Found = tuple[tuple[str, int | None], str, str]
"""The place of a text, the text, and what is wrong with it."""


def _of_tfds(source: Source, text: str) -> Iterator[_Found]:
    for row, found in enumerate(_tfds(source, text).rows, start=1):
        yield (str(source), row), found, tables.text_problem(text, found)


def _of_files(source: Source, text: str, per: str) -> Iterator[_Found]:
    for _, path in files(source):
        if per == "file" and tables.kind(path) == ".txt":
            with tables.opened(path, newline=None) as file:
                whole = file.read()
            yield (str(path), None), whole, tables.text_problem("the file", whole)
            continue
        for row in tables.rows(path, [text]):
            found = row.fields.get(text, "")
            yield (str(path), row.number), found, row.problem or tables.text_problem(text, found)


def _inside(folder: Path) -> list[tuple[str, Path]]:
    """All files below a folder but hidden ones, in the order of their names."""
    named = [(path.relative_to(folder), path) for path in folder.rglob("*") if path.is_file()]
    return sorted((name.as_posix(), path) for name, path in named if not any(p.startswith(".") for p in name.parts))


def _leave_out(bad: Skipped, skipped: list[Skipped] | None) -> None:
    if skipped is None:
        place = bad.file if bad.row is None else f"{bad.file}, row {bad.row}"
        raise errors.DataError(f"{place}: {bad.reason}")
    skipped.append(bad)


def _check(tokenizer: Any, settings: dict[str, Any]) -> None:
    jtext.fast(tokenizer)
    if settings["eos"] and tokenizer.eos_token_id is None:
        raise errors.ConfigError("eos=True, but the tokenizer has no token that ends a sequence; set its eos_token")
    if settings["per"] not in ("line", "file"):
        raise errors.ConfigError(f"per={settings['per']!r}: expected line or file")
    special = tokenizer.num_special_tokens_to_add(pair=False) if settings["special_tokens"] else 0
    taken, most = special + settings["eos"], settings["max_length"]
    if most is not None and most <= taken:
        raise errors.ConfigError(f"max_length={most}: expected above {taken}, the number of special tokens")


def _described(tokenizer: Any) -> dict[str, Any]:
    """All that decides what a tokenizer gives. How it last cut and padded is a part of its state, and is not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # transformers passes these two on with every call, and keeps them out of the state.
    sides = {name: getattr(tokenizer, name, None) for name in ("truncation_side", "split_special_tokens")}
    return {"state": {**state, "truncation": None, "padding": None}, "eos": tokenizer.eos_token_id, **sides}


def _digests(source: Source, text: str) -> list[list[str]]:
    if _is_tfds(source):
        return [[str(source), ""], *([path.name, sha256(path)] for path in _tfds(source, text).files)]
    return [[name, sha256(path)] for name, path in files(source)]


def _make(folder: Path, source: Source, tokenizer: Any, settings: dict[str, Any]) -> None:
    skipped: list[Skipped] = []
    given = texts(source, text=settings["text"], per=settings["per"], skipped=skipped if settings["skip_bad"] else None)
    try:
        with new_folder(folder) as draft:
            counts = _write(draft, given, tokenizer, settings, skipped)
            names = ("tokens.npy", "offsets.npy")
            kept = {name: [(draft / name).stat().st_size, sha256(draft / name)] for name in names}
            record = {**settings, **counts, "files": kept, "skipped": [list(bad) for bad in skipped]}
            (draft / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except errors.JtlError:
        raise
    except OSError as error:
        if not folder.is_dir():  # else another process made the same files first
            raise errors.CacheError(
                error.errno, f"the tokens cannot be written: {error.strerror}", str(folder)
            ) from error


def _write(
    draft: Path, given: Iterable[Text], tokenizer: Any, settings: dict[str, Any], skipped: list[Skipped]
) -> dict[str, int]:
    """Write the tokens as they come; their number, which the file's header has, is known at the end."""
    lengths, truncated = [np.zeros(1, np.int64)], 0
    with open(draft / "tokens.npy", "wb") as file:
        _header(file, 0)
        for part in _chunks(given):
            rows, cut = _tokens(part, tokenizer, settings, skipped)
            file.write(np.fromiter(itertools.chain.from_iterable(rows), "<i4").tobytes())
            lengths.append(np.array([len(row) for row in rows], np.int64))
            truncated += cut
        offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        if len(offsets) == 1:
            first = f"; the first of {len(skipped)} bad ones: {skipped[0]}" if skipped else ""
            raise errors.DataError(f"there are no texts to tokenise{first}")
        file.seek(0)
        _header(file, int(offsets[-1]))
        file.flush()
        os.fsync(file.fileno())
    np.save(draft / "offsets.npy", offsets, allow_pickle=False)
    return {"texts": len(offsets) - 1, "tokens": int(offsets[-1]), "truncated": truncated}


def _header(file: Any, count: int) -> None:
    # It has room for any count, so that it can be written over.
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (count,)})


def _chunks(given: Iterable[Text]) -> Iterator[list[Text]]:
    part, size = [], 0
    for text in given:
        part.append(text)
        size += len(text.text)
        if size >= _CHARACTERS or len(part) >= jtext.CHUNK:
            yield part
            part, size = [], 0
    if part:
        yield part


def _tokens(
    part: list[Text], tokenizer: Any, settings: dict[str, Any], skipped: list[Skipped]
) -> tuple[list[list[int]], int]:
    """The tokens of some texts, and how many of them were cut."""
    end, most = [tokenizer.eos_token_id] if settings["eos"] else [], settings["max_length"]
    batch = tokenizer(
        [text.text for text in part],
        add_special_tokens=settings["special_tokens"],
        truncation=most is not None,
        max_length=None if most is None else most - len(end),
        padding=False,
        verbose=False,
    )
    rows, truncated = [], 0
    for text, ids, encoding in zip(part, batch["input_ids"], batch.encodings, strict=True):
        if all(encoding.special_tokens_mask):
            bad = Skipped(text.file, text.row, f"the tokenizer makes no token of {text.text!r:.60}")
            _leave_out(bad, skipped if settings["skip_bad"] else None)
            continue
        rows.append(ids + end)
        truncated += bool(encoding.overflowing)
    return rows, truncated


def _opened(folder: Path, pad: int, new: bool, verify: bool) -> Corpus:
    path = folder / "corpus.json"
    try:
        record = json.loads(path.read_text("utf-8"))
        for name, (size, digest) in record["files"].items():
            path = folder / name
            if path.stat().st_size != size or (verify and not new and sha256(path) != digest):
                raise ValueError(f"expected {size} bytes of the digest {digest}")
        values = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        skipped = tuple(Skipped(*bad) for bad in record["skipped"])
        return Corpus(Ragged(values, offsets, pad), folder, new, record["truncated"], skipped)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise errors.DataError(f"{path} is damaged ({reason}); delete {folder}, and it is made again") from error

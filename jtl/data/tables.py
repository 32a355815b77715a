"""Rows of CSV, TSV, JSONL, Parquet and text files, one after another, each with its line number as an editor shows it.

No file is read whole: a row is gone from memory when the next one is asked for.
"""

import bz2
import contextlib
import csv
import difflib
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jtl import errors


class Row(NamedTuple):
    """One record of a table.

    Attributes:
      number: the 1-based line on which it starts.
      fields: its values by column; empty when the record could not be read.
      problem: why it could not be read, else "".
    """

    number: int
    fields: dict[str, Any]
    problem: str = ""


def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a `.csv`, `.tsv`, `.jsonl` or `.txt` file, plain or with `.gz` or `.bz2`, or of a `.parquet` file.

    A tab-separated file is read like a comma-separated one: a field may be quoted, a quote inside is doubled. Of a
    text file, each line is a row with one column, whatever that is called. Blank lines are passed over.

    Args:
      path: the file.
      columns: the columns that a header must have.

    Raises:
      ConfigError: the file's ending is none of these, or several columns are wanted of a text file.
      DataError: the file is empty or cannot be read, its header lacks a column or has one twice, or a quote is never
        closed; when the row is reached.
      MissingExtraError: for Parquet, pyarrow is not installed.
    """
    found = kind(path)
    if found not in KINDS:
        raise errors.ConfigError(
            f"{path}: files of this kind are not read; expected {', '.join(KINDS)} "
            "(also .gz and .bz2 of these, but for .parquet), or a folder"
        )
    if found == ".txt" and len(columns) > 1:
        raise errors.ConfigError(
            f"{path}: a line of a text file is one text, and has no {columns[1]!r}; give a table, or a folder with a "
            "sub-folder of .txt files for each class"
        )
    return KINDS[found](path, columns)


def encoding_problem(text: str) -> str:
    r"""What keeps `text` from being Unicode text, or "".

    Bytes that were not UTF-8 are looked for where `surrogateescape` put them.

    >>> encoding_problem(b"caf\xe9".decode("utf-8", "surrogateescape"))
    'byte 0xE9 is not UTF-8; save the file as UTF-8'
    """
    if "\0" in text:
        return "a NUL byte; save the file as UTF-8 (not UTF-16)"
    found = _SURROGATE.search(text)
    if found is None:
        return ""
    code = ord(found.group())
    if 0xDC80 <= code <= 0xDCFF:
        return f"byte 0x{code - 0xDC00:02X} is not UTF-8; save the file as UTF-8"
    return f"an unpaired surrogate \\u{code:04x}, which is no character"


def text_problem(name: str, value: Any) -> str:
    """What keeps a field from being a text to learn from, or ""."""
    if not isinstance(value, str):
        return f"{name!r} is {value!r} ({type(value).__name__}); expected a string"
    return encoding_problem(value) or blank_problem(repr(name), value)


def blank_problem(what: str, text: str) -> str:
    r"""What is wrong with a text in which nothing can be seen, or "".

    A tokenizer makes no token of white space, control and format characters, such as a space without width.

    >>> blank_problem("the file", "\u200b")
    "the file is '\\u200b', without a visible character; expected text"
    """
    if any(unicodedata.category(letter) not in _UNSEEN for letter in text):  # ends at the first that can be seen
        return ""
    return f"{what} is {f'{text!r:.40}, without a visible character' if text.strip() else 'empty'}; expected text"


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint that names the most similar of `known`, or "" when none is similar.

    >>> nearest("lable", ["text", "label"])
    "; did you mean 'label'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Categories of characters that do not show; those that this Python does not know, or of private use, may well do."""

_SURROGATE = re.compile("[\ud800-\udfff]")

RATIO, FLOOR = 250, 16 << 20
"""How many times its size a compressed file may unpack to, and the bytes to which any may."""

_PARQUET_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""


def kind(path: Path) -> str:
    """The end of a file's name that says what it is, before `.gz` or `.bz2`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def opened(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """A text file, plain or compressed, without its byte order mark.

    Bytes that are not UTF-8 stay in the rows they are in, as `surrogateescape` puts them, so that a row can be
    named, or skipped.

    Args:
      path: the file.
      newline: as `open` has it.

    Raises:
      DataError: it cannot be read.
    """
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix.lower())
    try:
        with (
            open(path, "rb") if opener is None else io.BufferedReader(_Unpacked(path, opener(path, "rb"))) as raw,
            io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline=newline) as file,
        ):
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise errors.DataError(f"{path}: cannot be read: {error}") from error


class _Unpacked(io.RawIOBase):
    """A compressed file that ends with an error where it unpacks to many times of what texts ever do."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file, self._left = path, file, max(FLOOR, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise errors.DataError(
                f"{self._path}: unpacks to more than {RATIO} times its size; if it is not an attack, unpack it yourself"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _empty(path: Path, columns: Sequence[str]) -> errors.DataError:
    return errors.DataError(f"{path}: the file is empty; expected rows with {', '.join(columns)}")


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a field, which is a global setting."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _delimited(delimiter: str) -> Callable[[Path, Sequence[str]], Iterator[Row]]:
    def read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
        # newline="" leaves line ends inside quotes as they are and still counts lines as an editor does.
        with opened(path, newline="") as file:
            records = _records(path, file, delimiter)
            number, header, problem = next(records, (0, [], ""))
            if problem:
                raise errors.DataError(f"{path}, row {number} (the header): {problem}")
            if not "".join(header).strip():
                raise _empty(path, columns)
            problem = next(filter(None, map(encoding_problem, header)), "")
            if problem:
                raise errors.DataError(f"{path}, row {number} (the header): {problem}")
            _check_header(path, header, columns)
            for record in records:
                yield _row(record, header)

    return read


def _records(path: Path, file: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield `(line, fields, problem)` of each record that is not blank."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            with _long_fields():
                fields, problem = next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                # It swallowed every later row, so there is no row that could be skipped.
                raise errors.DataError(f"{path}, row {line}: a quote opens here and is never closed") from error
            fields, problem = [], f"{error}; double a quote inside a quoted field"
        if fields or problem:
            yield line, fields, problem


def _check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise errors.DataError(f"{path}: the header has {', '.join(map(repr, repeated))} more than once")
    for name in columns:
        if name not in header:
            raise errors.DataError(
                f"{path}: there is no column {name!r}; the header has "
                f"{', '.join(map(repr, header))}{nearest(name, header)}"
            )


def _row(record: tuple[int, list[str], str], header: list[str]) -> Row:
    number, values, problem = record
    if not problem and len(values) != len(header):
        problem = (
            f"{len(values)} fields; expected {len(header)} as in the header; "
            "put a field that holds a delimiter in quotes"
        )
    return Row(number, {} if problem else dict(zip(header, values, strict=True)), problem)


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with opened(path, newline="\n") as file:
        for number, line in _not_blank(path, file, columns):
            yield _json_row(number, line, columns)


def _text_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with opened(path, newline=None) as file:
        for number, line in _not_blank(path, file, columns):
            problem = encoding_problem(line)
            yield Row(number, {} if problem else {columns[0]: line.removesuffix("\n")}, problem)


def _not_blank(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    found = False
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = True
            yield number, line
    if not found:
        raise _empty(path, columns)


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise errors.missing_extra("pyarrow", "data") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(path, list(file.schema_arrow.names), columns)
            if not file.metadata.num_rows:
                raise _empty(path, columns)
            _check_size(path, file.metadata)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(dict.fromkeys(columns))):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
    except errors.JtlError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise errors.DataError(f"{path}: cannot be read: {error}") from error


def _check_size(path: Path, metadata: Any) -> None:
    """Refuse a small file of Parquet that stands for very much."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size, rows = path.stat().st_size, metadata.num_rows
    unpacked = sum(group.total_byte_size for group in groups)
    # Rows that differ take a bit each at the very least.
    if unpacked > max(FLOOR, RATIO * size) or rows > max(FLOOR >> 4, 8 * size):
        raise errors.DataError(
            f"{path}: declares {rows:,} rows of {unpacked:,} bytes in a file of {size:,}, expected at most {RATIO} "
            "times its size, and 8 rows a byte; write it again"
        )


def _json_row(number: int, line: str, columns: Sequence[str]) -> Row:
    problem = encoding_problem(line)
    if problem:
        return Row(number, {}, problem)
    try:
        fields = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return Row(number, {}, f"a JSON {_json_type(fields)}; expected an object with {', '.join(columns)}")
    for name in columns:
        if name not in fields:
            present = ", ".join(map(repr, fields))
            return Row(number, {}, f"no field {name!r}; the object has {present}{nearest(name, list(fields))}")
    return Row(number, fields)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def _json_type(value: Any) -> str:
    return {type(None): "null", bool: "boolean", list: "array", dict: "object", str: "string"}.get(
        type(value), "number"
    )


KINDS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".txt": _text_lines,
}
"""Readers of the kinds of files, by the ends of their names."""

"""Rows of CSV, TSV and JSONL files, each with the line number that an editor shows for it."""

import bz2
import codecs
import contextlib
import csv
import difflib
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
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
    """The rows of a `.csv`, `.tsv` or `.jsonl` file, plain or compressed with gzip or bzip2.

    A tab-separated file is read like a comma-separated one: a field may be quoted, a quote inside is doubled.
    Blank lines are passed over.

    Args:
      path: the file.
      columns: the columns that a header must have.

    Raises:
      ConfigError: the file's ending is none of these.
      DataError: the file is empty, its header lacks a column or has one twice, or a quote is never closed.
    """
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise errors.ConfigError(
            f"{path}: files of this kind are not read; expected "
            f"{', '.join(_READERS)} (also .gz and .bz2 of these), or a folder"
        )
    text = _text(path)
    if not text.strip():
        raise errors.DataError(f"{path}: the file is empty; expected rows with {', '.join(columns)}")
    return reader(path, text, columns)


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


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint that names the most similar of `known`, or "" when none is similar.

    >>> nearest("lable", ["text", "label"])
    "; did you mean 'label'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


_SURROGATE = re.compile("[\ud800-\udfff]")


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(path: Path) -> str:
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise errors.DataError(f"{path}: cannot be read: {error}") from error
    # Undecodable bytes stay in the rows they are in, so that the row can be named, or skipped.
    return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a field, which is a global setting."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _delimited(delimiter: str) -> Callable[[Path, str, Sequence[str]], Iterator[Row]]:
    def read(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
        with _long_fields():
            records = list(_records(path, text, delimiter))
        number, header, problem = records[0]
        if problem:
            raise errors.DataError(f"{path}, row {number} (the header): {problem}")
        _check_header(path, header, columns)
        return (_row(record, header) for record in records[1:])

    return read


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield `(line, fields, problem)` of each record that is not blank."""
    # newline="" leaves line ends inside quotes as they are and still counts lines as an editor does.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
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


def _json_lines(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_row(number, line, columns)


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


_READERS = {".csv": _delimited(","), ".tsv": _delimited("\t"), ".jsonl": _json_lines}

"""Labelled examples from a CSV, TSV, JSONL or Parquet file, or from a folder with one sub-folder a class."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl import errors
from jtl.data import folders, tables
from jtl.data.examples import Examples, Skipped, check


def read(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Examples:
    """Read labelled examples, refusing whatever is malformed by file and row.

    A file is `.csv`, `.tsv` or `.jsonl`, plain or with `.gz` or `.bz2`, or `.parquet`; a folder, or a `.zip` of one, is
    read by `jtl.data.folders.read`. Labels are strings or integers, and lose surrounding blanks. Class names are
    sorted, by value when all are integers, unless `classes` declares them.

    Args:
      path: the file or folder.
      text: the column of input texts.
      label: the column of labels.
      group: a column whose values must not be in two parts of a split.
      classes: the class names in order, when the file's own are not to be trusted.
      skip_bad: leave bad rows out, and list them in `skipped`, where a bad row would raise.

    Returns:
      Examples with `columns={"text": [...]}`, or `{"image": [...]}` paths for a folder of pictures.

    Raises:
      SourceNotFoundError: there is no such file or folder.
      ConfigError: the file is of another kind, or `classes` holds a name twice.
      DataError: a malformed row (unless `skip_bad`), a missing or repeated column, no usable rows, or a
        single class.
    """
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise errors.SourceNotFoundError(
            f"{path}: there is no such file or folder{tables.nearest(path.name, siblings)}"
        )
    declared = _declared(classes)
    if path.is_dir() or path.suffix.lower() == ".zip":
        if group is not None:
            raise errors.ConfigError(f"{path}: a folder of classes has no column {group!r} of groups; leave group out")
        return folders.read(path, classes=declared, skip_bad=skip_bad)
    wanted = [text, label] if group is None else [text, label, group]
    kept, skipped = _sort_out(path, tables.rows(path, wanted), _check_row(text, label, group, declared), skip_bad)
    return check(_examples(path, kept, (text, label, group), declared, skipped))


def _declared(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    names = tuple(str(name) for name in classes)
    if len(set(names)) != len(names):
        raise errors.ConfigError(f"classes {names}: a name is there twice; expected distinct names")
    return names


def _check_row(
    text: str, label: str, group: str | None, classes: tuple[str, ...] | None
) -> Callable[[dict[str, Any]], str]:
    def problem(fields: dict[str, Any]) -> str:
        keys = (label,) if group is None else (label, group)
        return (
            tables.text_problem(text, fields[text])
            or next((found for key in keys if (found := _key_problem(key, fields[key]))), "")
            or _class_problem(_key(fields[label]), classes)
        )

    return problem


def _key_problem(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return f"{name!r} is {value!r} ({type(value).__name__}); expected a string or an integer"
    return tables.encoding_problem(_key(value)) or ("" if _key(value) else f"{name!r} is empty; expected a name")


def _class_problem(name: str, classes: tuple[str, ...] | None) -> str:
    if classes is None or name in classes:
        return ""
    hint = tables.nearest(name, classes)
    return f"label {name!r} is not a declared class; expected {', '.join(classes)}{hint}"


def _key(value: str | int) -> str:
    return str(value).strip()


def _sort_out(
    path: Path, rows: Iterable[tables.Row], problem_of: Callable[[dict[str, Any]], str], skip_bad: bool
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """The good rows' fields, and the bad rows; the first bad row raises unless they are to be skipped."""
    kept, skipped = [], []
    for row in rows:
        problem = row.problem or problem_of(row.fields)
        if not problem:
            kept.append(row.fields)
        elif skip_bad:
            skipped.append(Skipped(str(path), row.number, problem))
        else:
            raise errors.DataError(f"{path}, row {row.number}: {problem}")
    if not kept:
        first = (
            f"; the first of {len(skipped)} bad rows is row {skipped[0].row}: {skipped[0].reason}" if skipped else ""
        )
        raise errors.DataError(f"{path}: there are no rows to use{first}")
    return kept, skipped


def _examples(
    path: Path,
    rows: list[dict[str, Any]],
    columns: tuple[str, str, str | None],
    declared: tuple[str, ...] | None,
    skipped: list[Skipped],
) -> Examples:
    text, label, group = columns
    names = [_key(row[label]) for row in rows]
    classes = declared or class_names(names)
    index = {name: i for i, name in enumerate(classes)}
    return Examples(
        columns={"text": [row[text] for row in rows]},
        labels=np.array([index[name] for name in names], np.int32),
        classes=classes,
        groups=None if group is None else np.array([_key(row[group]) for row in rows]),
        name=path.name,
        skipped=tuple(skipped),
    )


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels in order: by value when all are integers, else by name.

    >>> class_names(["10", "9", "10"])
    ('9', '10')
    >>> class_names(["spam", "ham"])
    ('ham', 'spam')
    """
    names = set(labels)
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))

"""Labelled examples from a CSV, TSV, JSONL or Parquet file, or from a folder with one sub-folder a class."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl import errors
from jtl.data import folders, tables
from jtl.data.examples import Examples, Skipped, check
from jtl.data.targets import Target, Task, key, key_problem, target


def read(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    label: str = "label",
    second: str | None = None,
    group: str | None = None,
    classes: Sequence[str] | None = None,
    task: Task = "classification",
    separator: str = ",",
    skip_bad: bool = False,
    held_out: bool = False,
) -> Examples:
    """Read labelled examples, refusing whatever is malformed by file and row.

    A file is `.csv`, `.tsv` or `.jsonl`, plain or with `.gz` or `.bz2`, or `.parquet`; a folder, or a `.zip` of one, is
    read by `jtl.data.folders.read`. Labels are strings or integers, and lose surrounding blanks. Class names are
    sorted, by value when all are integers, unless `classes` declares them.

    Args:
      path: the file or folder.
      text: the column of input texts.
      label: the column of labels.
      second: the column of second texts, where examples are pairs.
      group: a column whose values must not be in two parts of a split.
      classes: the class names in order, when the file's own are not to be trusted.
      task: "classification" for one class of each row; "multilabel" for any number of labels, with a separator
        between them, or in a list, and of which a row may have none; "regression" for a number.
      separator: between the labels of a row.
      skip_bad: leave bad rows out, and list them in `skipped`, where a bad row would raise.
      held_out: whether examples are only evaluated, with the `classes` of those that are trained on: they may all be of
        one class then.

    Returns:
      Examples with `columns={"text": [...]}`, or `{"text": [...], "second": [...]}`, or `{"image": [...]}` paths for a
      folder of pictures.

    Raises:
      SourceNotFoundError: there is no such file or folder.
      ConfigError: the file is of another kind, or `classes` holds a name twice.
      DataError: a malformed row (unless `skip_bad`), a missing or repeated column, no usable rows, or a
        single class (unless `held_out`).
    """
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise errors.SourceNotFoundError(
            f"{path}: there is no such file or folder{tables.nearest(path.name, siblings)}"
        )
    if not path.is_dir() and not path.is_file():
        raise errors.DataError(f"{path}: is a pipe or a device; expected a file or a folder: copy it to a file first")
    declared, aim = _declared(classes), target(task, separator)
    if path.is_dir() or path.suffix.lower() == ".zip":
        for what, given in {"of groups": group, "of second texts": second}.items():
            if given is not None:
                raise errors.ConfigError(f"{path}: a folder of classes has no column {given!r} {what}; leave it out")
        if task != "classification":
            raise errors.ConfigError(f"{path}: a folder has one class for each file; task={task!r} needs a table")
        return folders.read(path, classes=declared, skip_bad=skip_bad, held_out=held_out)
    columns = {"text": text} | ({} if second is None else {"second": second})
    wanted = [*columns.values(), label] if group is None else [*columns.values(), label, group]
    problem = _check_row(list(columns.values()), label, group, aim, declared)
    kept, skipped = _sort_out(path, tables.rows(path, wanted), problem, skip_bad)
    try:
        labels, names = aim.labels([row[label] for row in kept], declared)
    except errors.DataError as error:
        raise errors.DataError(f"{path}: {error}") from error
    return check(
        Examples(
            columns={name: [row[column] for row in kept] for name, column in columns.items()},
            labels=labels,
            classes=names,
            groups=None if group is None else np.array([key(row[group]) for row in kept]),
            name=path.name,
            skipped=tuple(skipped),
        ),
        held_out=held_out,
    )


def _declared(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    names = tuple(key(name) for name in classes)  # as labels are read
    if "" in names:
        raise errors.ConfigError(f"classes {names}: a name is empty; expected names")
    if len(set(names)) != len(names):
        raise errors.ConfigError(f"classes {names}: a name is there twice; expected distinct names")
    return names


def _check_row(
    texts: Sequence[str], label: str, group: str | None, aim: Target, classes: tuple[str, ...] | None
) -> Callable[[dict[str, Any]], str]:
    def problem(fields: dict[str, Any]) -> str:
        wrong = next((found for name in texts if (found := tables.text_problem(name, fields[name]))), "")
        wrong = wrong or aim.problem(label, fields[label], classes)
        return wrong or ("" if group is None else key_problem(group, fields[group]))

    return problem


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

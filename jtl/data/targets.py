"""What a column of labels means: one class of each row, any number of labels, or a number."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jtl import errors
from jtl.data import tables

Task = Literal["classification", "multilabel", "regression"]


class Target(NamedTuple):
    """How a column of labels is read.

    Attributes:
      problem: the column's name, a value and the declared classes to what is wrong with the value, or "".
      labels: all values and the declared classes to `Examples.labels` and `Examples.classes`.
    """

    problem: Callable[[str, Any, tuple[str, ...] | None], str]
    labels: Callable[[Sequence[Any], tuple[str, ...] | None], tuple[np.ndarray, tuple[str, ...]]]


def target(task: Task, separator: str) -> Target:
    """How labels are read for a task.

    Args:
      task: "classification" for a class, "multilabel" for any number of labels, "regression" for a number.
      separator: between labels that are in one string.

    Raises:
      ConfigError: no such task, or an empty separator.
    """
    if not separator:
        raise errors.ConfigError("separator='': expected what stands between labels")
    targets = {"classification": _CLASS, "multilabel": _several(separator), "regression": _NUMBER}
    if task not in targets:
        raise errors.ConfigError(f"task={task!r}: expected one of {', '.join(targets)}")
    return targets[task]


def key_problem(name: str, value: Any) -> str:
    """What keeps a field from being a name, or ""."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return f"{name!r} is {value!r} ({type(value).__name__}); expected a string or an integer"
    return tables.encoding_problem(key(value)) or ("" if key(value) else f"{name!r} is empty; expected a name")


def key(value: str | int) -> str:
    """A field as a name, without blanks around it."""
    return str(value).strip()


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


def _class_problem(column: str, value: Any, classes: tuple[str, ...] | None) -> str:
    problem = key_problem(column, value)
    if problem and isinstance(value, float):
        return f"{problem}; to predict numbers, {_REGRESSION}"
    return problem or _undeclared(key(value), classes)


def _undeclared(name: str, classes: tuple[str, ...] | None) -> str:
    if classes is None or name in classes:
        return ""
    hint = tables.nearest(name, classes)
    return f"label {name!r} is not a declared class; expected {', '.join(classes)}{hint}"


def _classes(values: Sequence[Any], declared: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    names = [key(value) for value in values]
    classes = declared or class_names(names)
    if declared is None:
        _check_no_numbers(names, classes)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int32), classes


def _check_no_numbers(names: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse what is measured: numbers, not all whole ones, of which most occur once."""
    if len(classes) < 20 or 2 * len(classes) < len(names) or not all(_DECIMAL.fullmatch(name) for name in classes):
        return
    broken = next((name for name in names if not re.fullmatch(r"[+-]?[0-9]+", name)), None)
    if broken is not None:
        raise errors.DataError(
            f"the labels are {len(classes)} different numbers in {len(names)} rows, such as {broken}: to predict "
            f"numbers, {_REGRESSION}; if they are names, declare them as classes"
        )


def _several(separator: str) -> Target:
    def listed(value: Any) -> list[Any]:
        if isinstance(value, str):
            return value.split(separator) if value.strip() else []
        return value if isinstance(value, list) else [value]

    def problem(column: str, value: Any, classes: tuple[str, ...] | None) -> str:
        names = listed(value)
        wrong = next((found for name in names if (found := _class_problem(column, name, classes))), "")
        if wrong:
            return wrong
        keys = [key(name) for name in names]
        twice = next((name for name in keys if keys.count(name) > 1), None)
        return "" if twice is None else f"label {twice!r} is there twice"

    def labels(values: Sequence[Any], declared: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
        rows = [[key(name) for name in listed(value)] for value in values]
        classes = declared or class_names(name for row in rows for name in row)
        if not classes:
            raise errors.DataError("no row has a label; expected some that have")
        index, found = {name: i for i, name in enumerate(classes)}, np.zeros((len(rows), len(classes)), np.float32)
        for row, names in enumerate(rows):
            found[row, [index[name] for name in names]] = 1
        return found, classes

    return Target(problem, labels)


_LARGEST = float(np.finfo(np.float32).max)
"""The largest number that float32 has, in which models compute."""


_REGRESSION = "say task='regression' (--task regression)"

_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""A number as tables have it; Python would also read 1_0, and digits of other scripts."""


def _number_problem(column: str, value: Any, classes: tuple[str, ...] | None) -> str:
    try:
        number = math.nan if isinstance(value, (bool, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) and not _DECIMAL.fullmatch(value.strip()):
        number = math.nan
    if not math.isfinite(number):
        return f"{column!r} is {value!r} ({type(value).__name__}); expected a number"
    if abs(number) > _LARGEST:
        return f"{column!r} is {value!r}; expected a number of at most {_LARGEST:.2g}, as float32 has them"
    return ""


def _numbers(values: Sequence[Any], declared: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if declared:
        raise errors.ConfigError(f"classes {', '.join(declared)} were declared, but the labels are numbers")
    return np.array([float(value) for value in values], np.float64), ()


_CLASS, _NUMBER = Target(_class_problem, _classes), Target(_number_problem, _numbers)

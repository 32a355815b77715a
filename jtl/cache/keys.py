"""What decides whether a stored value may be used again: digests of everything it was computed from."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jtl import tree as jtree
from jtl.data import Batches
from jtl.typing import Batch, PyTree


def of_leaves(values: Mapping[tuple[str, str], Any]) -> str:
    """Of arrays by kind and path."""
    return jtree.digest({f"{kind}/{path}": value for (kind, path), value in values.items()})


def of_batches(run: Batches) -> str:
    """Of every row of a data set, in whichever order it is read; files that a column names count by size and time."""
    digest = hashlib.sha256(f"buckets={run.layout.buckets};transform={of_function(run.transform)}".encode())
    for name, column in sorted(run.columns.items()):
        arrays = (column,) if isinstance(column, np.ndarray) else (column.offsets, column.values, np.array(column.pad))
        for array in arrays:
            digest.update(f"{name}:{array.dtype}{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        if isinstance(column, np.ndarray) and column.dtype.kind == "U":
            digest.update("".join(map(_stamp, column.ravel())).encode())
    if run.labels is not None:
        digest.update(run.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def of_content(batches: Iterable[Batch]) -> str:
    """Of all batches as they come."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(jtree.digest(batch).encode())
    return digest.hexdigest()


def of_function(function: Callable[..., Any] | None) -> str:
    """Of a function: its name, code, defaults, and the values that it closes over or is bound to."""
    if function is None:
        return ""
    if isinstance(function, functools.partial):
        parts = [of_function(function.func), *map(_of_value, function.args)]
        return _hash(parts + [f"{name}={_of_value(value)}" for name, value in sorted(function.keywords.items())])
    owner = getattr(function, "__self__", None)
    code = getattr(function, "__code__", None)
    parts = [getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)]
    if owner is not None:
        parts.append(_of_value(vars(owner) if hasattr(owner, "__dict__") else owner))
    if code is None:
        # A callable object: its class and its fields are what it does.
        return _hash([*parts, _of_value(vars(function) if hasattr(function, "__dict__") else function)])
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    used = [function.__globals__[name] for name in code.co_names if name in getattr(function, "__globals__", {})]
    constants = [value for value in used if isinstance(value, int | float | str | tuple | np.ndarray)]
    defaults = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return _hash([*parts, _of_code(code), *map(_of_value, [*defaults, *cells, *constants])])


def _of_code(code: Any) -> str:
    constants = [_of_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return _hash([code.co_code.hex(), *constants, *code.co_names])


def _of_value(value: PyTree) -> str:
    if callable(value):
        return of_function(value)
    if isinstance(value, Mapping):
        return _hash([f"{key}={_of_value(item)}" for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))])
    if isinstance(value, tuple | list):
        return _hash(list(map(_of_value, value)))
    return jtree.digest(value) if hasattr(value, "dtype") and hasattr(value, "shape") else repr(value)


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stamp(path: Any) -> str:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size}:{found.st_mtime_ns};"

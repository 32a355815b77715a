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
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # not copied: it may be mapped
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


def of_function(function: Callable[..., Any] | None, *, inside: tuple[int, ...] = ()) -> str:
    """Of a function: its name, code, defaults, and the values that it closes over or is bound to.

    Args:
      function: any callable; None has a digest, too.
      inside: the ids of the functions that this one was found in; one that leads back to itself is named only.
    """
    if function is None:
        return ""
    name = [getattr(function, "__module__", None) or "", getattr(function, "__qualname__", type(function).__qualname__)]
    if id(function) in inside:
        return _hash(name)

    def of(value: Any) -> str:
        return _of_value(value, (*inside, id(function)))

    if isinstance(function, functools.partial):
        parts = [of(function.func), *map(of, function.args)]
        return _hash(parts + [f"{key}={of(value)}" for key, value in sorted(function.keywords.items())])
    code, owner = getattr(function, "__code__", None), getattr(function, "__self__", None)
    if owner is not None:
        name.append(of(_fields(owner)))
    if code is None:  # a callable object: its class and its fields are what it does
        call = vars(type(function)).get("__call__")
        return _hash([*name, of(_fields(function)), of(call) if hasattr(call, "__code__") else ""])
    world = getattr(function, "__globals__", {})
    used = [world[key] for key in code.co_names if isinstance(world.get(key), int | float | str | tuple | np.ndarray)]
    defaults = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return _hash([*name, _of_code(code), *map(of, [*defaults, *_cells(function), *used])])


def _fields(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else repr(value)


def _cells(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a name that is bound later
            found.append("")
    return found


def _of_code(code: Any) -> str:
    constants = [_of_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return _hash([code.co_code.hex(), *constants, *code.co_names])


def _of_value(value: PyTree, inside: tuple[int, ...]) -> str:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        return of_function(value, inside=inside)
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda pair: str(pair[0]))
        return _hash([f"{key}={_of_value(item, inside)}" for key, item in items])
    if isinstance(value, tuple | list):
        return _hash([_of_value(item, inside) for item in value])
    return jtree.digest(value) if hasattr(value, "dtype") and hasattr(value, "shape") else repr(value)


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stamp(path: Any) -> str:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size}:{found.st_mtime_ns};"

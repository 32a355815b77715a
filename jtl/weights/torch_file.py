"""Reading the state dicts of PyTorch: `.pth`, `.pt` and `.bin` files, in the zip and in the legacy layout.

Such a file holds a pickle, and a pickle is a program that can do anything. Here it is run by a machine that knows the
few opcodes of a dict of tensors and has no way to import or to call; whatever else a file asks for is refused by name.

A file may keep its tensors under one of a few usual keys, beside other things:

    {"conv.weight": tensor, ...}                          or
    {"state_dict": {"conv.weight": tensor, ...}, "epoch": 3, ...}

Reading takes no more memory than four times the file and four MiB; a file that describes more is refused.
"""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights.reading import file_state
from jtl.weights.safetensors import Signature
from jtl.weights.torch_layouts import contents
from jtl.weights.torch_machine import DAMAGED, TENSORS, Allowance, shown
from jtl.weights.torch_rebuild import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
_AVERAGES = "state_dict_ema"  # read where a checkpoint holds no other tensors

_SMALL = 2**22


class View(NamedTuple):
    """Where in a file a tensor lies."""

    tensor: Tensor
    """Its place in its storage."""

    start: int
    """The first byte of its storage."""

    @property
    def signature(self) -> Signature:
        """Its shape and dtype."""
        return Signature(self.tensor.shape, self.tensor.storage.dtype)

    @property
    def first(self) -> int:
        """Bytes from the start of the storage to the first element."""
        return (self.tensor.storage.first + self.tensor.offset) * self.tensor.storage.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.tensor.shape) * self.tensor.storage.itemsize

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        steps = ((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.strides, strict=True))
        return self.nbytes and (1 + sum(steps)) * self.tensor.storage.itemsize

    @property
    def place(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """The same for two names of one tensor."""
        return self.start, self.first, self.tensor.shape, self.tensor.strides


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all tensors of a file.

    Tensors that share a storage in the file share memory here: tied ones, and views of one another. An expanded
    array, whose own elements share memory, is read-only.

    Args:
      path: a file that `torch.save` wrote.

    Returns:
      The tensors by name. Those of dtype bfloat16 have the dtype that `ml_dtypes` registers.

    Raises:
      SourceNotFoundError: there is no such file.
      WeightsError: the file is damaged or of another format, holds something other than tensors, or asks for more
        than a dict of tensors needs.
    """
    with _named(path), open(path, "rb") as file:
        return arrays(file, views(file))


def shapes(path: str | os.PathLike[str]) -> dict[str, Signature]:
    """Read the shape and dtype of each tensor of a file; its storages are not read.

    Args:
      path: as for `read_tensors`.

    Returns:
      A `Signature` by tensor name.

    Raises:
      SourceNotFoundError: as for `read_tensors`.
      WeightsError: as for `read_tensors`.
    """
    return opened(path)[0]


def opened(path: str | os.PathLike[str]) -> tuple[dict[str, Signature], Callable[[str], np.ndarray]]:
    """Read what a file holds, and its tensors later, one at a time.

    Args:
      path: as for `read_tensors`.

    Returns:
      A `Signature` by tensor name, and a function from such a name to a new array. It opens the file again.

    Raises:
      SourceNotFoundError: as for `read_tensors`.
      WeightsError: as for `read_tensors`; the function also where the file has changed, or has no such tensor.
    """
    with _named(path), open(path, "rb") as file:
        found = views(file)
        state = file_state(file)

    def read(name: str) -> np.ndarray:
        with _named(path), open(path, "rb") as file:
            if name not in found:
                raise WeightsError(f"it has no tensor {shown(name)}")
            if file_state(file) != state:
                raise WeightsError("it changed while it was read: read it again")
            return array(file, found[name])

    return {name: view.signature for name, view in found.items()}, read


# Over an open file


def views(file: io.BufferedIOBase) -> dict[str, View]:
    """Find the tensors of an open file without reading them.

    Args:
      file: it can be seeked, and is left anywhere.

    Returns:
      A `View` by tensor name.

    Raises:
      WeightsError: as for `read_tensors`, the message without a file's name.
    """
    size = file.seek(0, io.SEEK_END)
    allowance = Allowance(3 * size + _SMALL)
    found = contents(file, size, allowance)
    tensors = _tensors(found.value)
    allowance.pay(480 * len(tensors))  # for a view, and an array or a signature, and their places in dicts
    located = {name: View(tensor, found.places[tensor.storage.key]) for name, tensor in tensors.items()}
    _check_total(located, 3 * size + _SMALL)
    return located


def array(file: io.BufferedIOBase, view: View) -> np.ndarray:
    """Read one tensor of an open file into memory of its own.

    Args:
      file: as for `views`.
      view: where the tensor lies.

    Raises:
      WeightsError: the file has become shorter.
    """
    data = _read(file, view.start + view.first, view.extent, view.tensor.storage.dtype)
    found = _laid(data, view.tensor, 0)
    # A copy of elements with holes between them lets go of the holes.
    return found.copy() if view.extent > view.nbytes else found


def arrays(file: io.BufferedIOBase, tensors: Mapping[str, View]) -> dict[str, np.ndarray]:
    """Read all tensors of an open file, each storage once.

    Args:
      file: as for `views`.
      tensors: where they lie, by name.

    Raises:
      WeightsError: the file has become shorter.
    """

    def start(name: str) -> int:
        return tensors[name].start

    found: dict[str, np.ndarray] = {}
    for place, group in itertools.groupby(sorted(tensors, key=start), start):
        names = list(group)
        storage = tensors[names[0]].tensor.storage
        data = _read(file, place, storage.nbytes, storage.dtype)
        found |= {name: _laid(data, tensors[name].tensor, tensors[name].first) for name in names}
    return {name: found[name] for name in tensors}


def _read(file: io.BufferedIOBase, start: int, length: int, dtype: str) -> np.ndarray:
    """Bytes of a file that hold elements of a dtype."""
    data = np.empty(length, np.uint8)
    filled = 0
    if length:  # where nothing lies may be anywhere
        file.seek(start)
    while filled < length:  # a system reads at most two GiB at once
        count = file.readinto(data.data[filled:])
        if not count:
            raise WeightsError(f"it ends within a storage, at byte {start + filled}: {DAMAGED}")
        filled += count
    if dtype == "bool":
        np.minimum(data, 1, out=data)  # what numpy does with other bytes is not defined
    return data


def _laid(data: np.ndarray, tensor: Tensor, first: int) -> np.ndarray:
    """Bytes as the elements of a tensor, the first of which lies at byte `first`."""
    dtype = np.dtype(tensor.storage.dtype)
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    # The stride of an axis of one element says nothing, and may be any number.
    steps = zip(tensor.shape, tensor.strides, strict=True)
    strides = tuple(stride * dtype.itemsize if size > 1 else 0 for size, stride in steps)
    found = np.ndarray(tensor.shape, dtype, buffer=data, offset=first, strides=strides)
    found.flags.writeable = 0 not in (stride for stride, size in zip(strides, tensor.shape, strict=True) if size > 1)
    return found


def _check_total(found: Mapping[str, View], limit: int) -> None:
    """Refuse tensors that are several times larger than their file. Tied ones, equal in place and shape, count once.

    They are sorted, not hashed: a file could choose its numbers so that hashing them takes quadratic time.
    """
    last = None
    for place, name in sorted((view.place, name) for name, view in found.items()):
        if place != last:
            last, limit = place, limit - found[name].nbytes
        if limit < 0:
            raise WeightsError(
                f"its tensors are several times larger than the file, among them {shown(name)} of shape "
                f"{found[name].tensor.shape}: save tensor.contiguous() of those that are expanded or overlap"
            )


# What of a file's value is the model


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the one that is kept under a usual key."""
    if not isinstance(value, dict):
        raise WeightsError(f"it holds a {type(value).__name__}, expected a dict of tensors: {TENSORS}")
    held = [
        key for key in (*_WRAPPERS, _AVERAGES) if isinstance(inner := value.get(key), dict) and _holds_tensors(inner)
    ]
    if len(held) > 1 and _AVERAGES in held:
        held.remove(_AVERAGES)
    if len(held) > 1:
        raise WeightsError(f"it holds tensors under each of {_few(held)}, expected one of them: {TENSORS}")
    chosen = value[held[0]] if held else value
    found = {name: entry for name, entry in chosen.items() if type(entry) is Tensor}
    if not found:
        raise WeightsError(f"it holds no tensors under its keys ({_few(value)}) nor under {_few(_WRAPPERS)}: {TENSORS}")
    _check_complete(chosen)
    return found


def _check_complete(chosen: Mapping[str | None, Any]) -> None:
    """Refuse tensors that have no name in a state dict. Numbers, text and settings beside its tensors are left out."""
    if None in chosen:
        raise WeightsError(f"it holds tensors under keys that are not text: {TENSORS}")
    seen: set[int] = set()  # one container may stand under every key
    for name, entry in chosen.items():
        if not isinstance(entry, dict | list | tuple) or id(entry) in seen:
            continue
        seen.add(id(entry))
        if _holds_tensors(entry):
            raise WeightsError(f"beside its tensors, it holds others within its entry {shown(str(name))}: {TENSORS}")


def _holds_tensors(container: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> bool:
    entries = container.values() if isinstance(container, dict) else container
    return any(type(entry) is Tensor for entry in entries)


def _few(keys: Iterable[str | None], limit: int = 8) -> str:
    """Names that a file has, as one short line."""
    names = [shown(str(key), 40) for key in itertools.islice(keys, limit + 1)]
    return ", ".join([*names[:limit], "..."] if len(names) > limit else names) or "none"


# Files


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Complaints about a file with its name in front."""
    try:
        yield
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"no such file: {path}") from error
    except IsADirectoryError as error:
        raise SourceNotFoundError(f"{path} is a folder, expected a file that torch.save wrote") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None

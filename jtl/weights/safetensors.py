"""Reading and writing safetensors: one file, or a folder with a single file or an index of shards.

    folder/
      model.safetensors                                    one file, or
      model.safetensors.index.json                         {"weight_map": {tensor name: shard name}}
      model-00001-of-00002.safetensors ...

The reader is strict: an index must agree with its shards in both directions, and a name in it can only
name a file beside it.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights.json_file import read_json
from jtl.weights.reading import Stream, file_into, file_state

SINGLE = "model.safetensors"
"""The file of an unsharded folder."""

INDEX = "model.safetensors.index.json"
"""The index of a sharded folder."""

# The numpy dtype of each safetensors dtype that is read and written. The floats of 8 bits and fewer are left
# out on purpose: they mean nothing without the scales that their library keeps beside them.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": np.dtype(ml_dtypes.bfloat16).name,  # importing ml_dtypes is what makes numpy know the name
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}

_MOST_HEADER = 8 << 20
"""The largest header that is read, in bytes: of some sixty thousand tensors. It takes fifteen times its size."""

_MOST_AXES = 64  # of numpy's arrays

_T = TypeVar("_T")


class Signature(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """The numpy name of the dtype, `"bfloat16"` among them."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all tensors of a checkpoint.

    Args:
      path: a `.safetensors` file, an index of shards, or a folder with `model.safetensors` or
        `model.safetensors.index.json`. Where a folder has both, the single file is read.

    Returns:
      The tensors by name. Those of dtype bfloat16 have the dtype that `ml_dtypes` registers.

    Raises:
      SourceNotFoundError: the file, the folder's weights or a shard does not exist.
      WeightsError: a file is damaged, has a dtype that numpy cannot hold, or disagrees with its index.
    """
    signatures, read, _ = opened(path)
    return {name: read(name) for name in signatures}


def opened(path: str | os.PathLike[str]) -> tuple[dict[str, Signature], Callable[[str], np.ndarray], Stream]:
    """Open a checkpoint without reading its tensors.

    Args:
      path: as for `read_tensors`.

    Returns:
      A `Signature` by tensor name, a function that reads one tensor by its name, and one that reads rows of it.

    Raises:
      SourceNotFoundError: as for `read_tensors`.
      WeightsError: as for `read_tensors`; the functions also where the file has changed.
    """
    files: dict[str, Path] = {}
    headers: dict[Path, tuple[tuple[int, int], dict[str, int]]] = {}

    def seen(file: Path, name: str, signature: Signature) -> Signature:
        files[name] = file
        if file not in headers:
            headers[file] = _offsets(file)
        return signature

    signatures = _gather(Path(path), seen)

    def stream(name: str, row: int, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        state, offsets = headers[files[name]]
        size = math.prod(signatures[name].shape[1:]) * np.dtype(signatures[name].dtype).itemsize
        return file_into(files[name], state, offsets[name] + row * size, arrays)

    def read(name: str) -> np.ndarray:
        (array,) = stream(name, 0, [np.empty(*signatures[name])])
        return array

    return signatures, read, stream


def _offsets(file: Path) -> tuple[tuple[int, int], dict[str, int]]:
    """A file's state, and where each tensor begins by its header, which the library has found to describe the file."""
    with open(file, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        # An entry is but its offset as soon as it is parsed.
        header = json.loads(stream.read(start - 8), object_hook=_offset)
        return file_state(stream), {name: start + at for name, at in header.items() if name != "__metadata__"}


def _offset(entry: dict[str, Any]) -> Any:
    """Of a tensor's entry, which the parser gives as soon as it has one, what is kept; the rest takes much memory."""
    place = entry.get("data_offsets")
    return place[0] if isinstance(place, list) else entry


def shapes(path: str | os.PathLike[str]) -> dict[str, Signature]:
    """Read the shape and dtype of each tensor of a checkpoint; only headers are read.

    Args:
      path: as for `read_tensors`.

    Returns:
      A `Signature` by tensor name.

    Raises:
      SourceNotFoundError: as for `read_tensors`.
      WeightsError: as for `read_tensors`.
    """
    return _gather(Path(path), lambda file, name, signature: signature)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into one safetensors file, whole or not at all.

    Args:
      path: the file to write or replace; its folder must exist.
      tensors: arrays by name, of any memory layout and byte order.
      metadata: text to keep in the header.

    Raises:
      WeightsError: a tensor has a dtype that safetensors or its numpy reader cannot hold.
    """
    path = Path(path)
    arrays = {name: _writable(name, tensor) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        save_file(arrays, temporary, metadata=None if metadata is None else dict(metadata))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _writable(name: str, tensor: Any) -> np.ndarray:
    array = np.asarray(tensor)
    if array.dtype.name not in _DTYPES.values():
        raise WeightsError(
            f"the tensor {name!r} has dtype {array.dtype}, which cannot be written to safetensors; "
            f"cast it to one of {', '.join(_DTYPES.values())}"
        )
    # safetensors writes the memory of a transposed view as it lies, without a word. `np.ascontiguousarray`
    # would do for that, but it gives a 0-d array a dimension.
    return np.asarray(array, order="C")


def _gather(path: Path, read: Callable[[Path, str, Signature], _T]) -> dict[str, _T]:
    """`read(file, name, signature)` of each tensor, over the one file or all shards."""
    if path.name.endswith(".index.json"):
        return _gather_shards(path, read)
    if not path.is_dir():
        return _gather_file(path, read)
    if (path / SINGLE).is_file():
        return _gather_file(path / SINGLE, read)
    if (path / INDEX).is_file():
        return _gather_shards(path / INDEX, read)
    raise _no_weights(path)


def _gather_file(
    path: Path, read: Callable[[Path, str, Signature], _T], declared: set[str] | None = None
) -> dict[str, _T]:
    signatures = {}
    with _opened(path) as handle:
        names = list(handle.keys())
        if declared is not None:
            check_shard(path, set(names), declared)
        for name in names:
            tensor = handle.get_slice(name)
            kind, shape = tensor.get_dtype(), tensor.get_shape()
            _check_dtype(path, name, kind)
            _check_shape(path, name, shape, np.dtype(_DTYPES[kind]).itemsize)
            signatures[name] = Signature(tuple(shape), _DTYPES[kind])
    return {name: read(path, name, signature) for name, signature in signatures.items()}


def _gather_shards(index: Path, read: Callable[[Path, str, Signature], _T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for file, declared in shards(index).items():
        found |= _gather_file(file, read, declared)
    return found


def shards(index: Path) -> dict[Path, set[str]]:
    """The names of the tensors that an index places in each shard.

    Args:
      index: as safetensors and PyTorch's sharded checkpoints have it.

    Raises:
      SourceNotFoundError: the index or a shard does not exist.
      WeightsError: the index is damaged, or names a file that is not beside it.
    """
    found: dict[Path, set[str]] = {}
    for tensor, shard in sorted(_weight_map(index).items(), key=lambda entry: entry[1]):
        found.setdefault(index.parent / shard, set()).add(tensor)
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise SourceNotFoundError(
            f"{index} names shards that are not beside it: {', '.join(missing)}; fetch the checkpoint again"
        )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to shard, each shard a plain name of a file beside the index."""
    try:
        content = read_json(index, _MOST_HEADER)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"no such index: {index}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(f'{index} has no "weight_map" from tensor names to shard names; fetch it again')
    for shard in weight_map.values():
        if not _is_plain_name(shard):
            raise WeightsError(
                f"{index} names the shard {shard!r:.300}, and a shard must be a file beside its index; "
                "do not use this checkpoint unless its author explains the name"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    r"""Whether a name is one that a file can have, and cannot lead out of its folder, on any system.

    >>> [_is_plain_name(name) for name in ("model-1.safetensors", "../a", "/a", "a\\b", "C:a", "..", "")]
    [True, False, False, False, False, False, False]
    """
    length = len(name.encode("utf-8", "surrogatepass"))
    return name not in ("", ".", "..") and length < 256 and not set(name) & set("/\\:\0") and name.isprintable()


def check_shard(path: Path, held: set[str], declared: set[str]) -> None:
    """Hold a shard to its index.

    Args:
      path: of the shard.
      held: the tensors in it.
      declared: those that the index places there.

    Raises:
      WeightsError: they differ.
    """
    if absent := sorted(declared - held):
        raise WeightsError(f"{path} lacks tensors that its index places there: {_few(absent)}; fetch it again")
    if extra := sorted(held - declared):
        raise WeightsError(
            f"{path} holds tensors that its index does not place there: {_few(extra)}; "
            "the index and the shard are not of the same checkpoint: fetch both again"
        )


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise WeightsError(
            f"{path}: the tensor {name!r} has dtype {dtype}, expected one of {', '.join(_DTYPES)}; "
            "use a checkpoint that is not quantised, or cast it to BF16 with the library that wrote it"
        )


def _check_shape(path: Path, name: str, shape: Sequence[int], itemsize: int) -> None:
    """Refuse what no array can have; only without any element can a file be right about such a shape."""
    if len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) * itemsize > sys.maxsize:
        raise WeightsError(f"{path}: the tensor {name!r} has the shape {shape!s:.80}, too large for an array")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with the reader's own complaints told as jtl's errors."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(_MOST_HEADER, path.stat().st_size):
            raise WeightsError(
                f"{path} is damaged or not a safetensors file: it declares a header of {length:,} bytes, expected at "
                f"most {_MOST_HEADER:,} and no more than the file has; fetch it again"
            )
        with safe_open(path, framework="np") as handle:
            yield handle
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"no such file: {path}") from error
    except (SafetensorError, IsADirectoryError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}; fetch it again") from error


def _no_weights(folder: Path) -> SourceNotFoundError:
    held = sorted(entry.name for entry in folder.iterdir())
    remedy = "check the path"
    if any(name.endswith((".bin", ".pth", ".pt", ".h5", ".msgpack")) for name in held):
        remedy = "its weights are in another format: convert them to safetensors"
    elif any(name.endswith(".safetensors") for name in held):
        remedy = "give the path of the one .safetensors file that is meant"
    return SourceNotFoundError(
        f"{folder} has neither {SINGLE} nor {INDEX}, it holds: {_few(held) or 'nothing'}; {remedy}"
    )


def _few(names: list[str], limit: int = 8) -> str:
    """A list of names that stays readable when it is long.

    >>> _few(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown

"""The tensors of a checkpoint as a mapping that reads each one when it is asked for."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights import keras_file, safetensors, torch_file
from jtl.weights.reading import Memory, Stream
from jtl.weights.safetensors import Signature

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The names that transformers gave its files before safetensors."""

KERAS_SUFFIXES = (".h5", ".hdf5")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, *KERAS_SUFFIXES)
"""The files that hold weights, the preferred first."""


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name; only their shapes and dtypes are held.

    Attributes:
      signatures: shape and dtype by name.
      stream: reads a tensor's rows without holding it whole; None for files that cannot.
    """

    def __init__(
        self, signatures: Mapping[str, Signature], read: Callable[[str], np.ndarray], stream: Stream | None = None
    ):
        self.signatures = dict(signatures)
        self.stream = stream
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.signatures:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.signatures)

    def __len__(self) -> int:
        return len(self.signatures)

    def __contains__(self, name: object) -> bool:
        return name in self.signatures

    def memory(self) -> Memory:
        """Memory for arrays of all tensors, of which the pages are fetched ahead where tensors are read by rows."""
        sizes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.signatures.values())
        # Each array begins at a line of the cache, and a tensor may become several.
        return Memory(sum(sizes) + 512 * len(self) if self.stream else 0)

    def renamed(self, rename: Callable[[str], str], source: str) -> "Tensors":
        """The same tensors under normalised names.

        Args:
          rename: from a name in the checkpoint to the normalised one.
          source: the checkpoint, for messages.

        Raises:
          WeightsError: two tensors have the same normalised name.
        """
        old: dict[str, str] = {}
        for tensor in self:
            twin = old.setdefault(rename(tensor), tensor)
            if twin != tensor:
                raise WeightsError(f"{source} holds {twin} and {tensor}, two spellings of {rename(tensor)}: remove one")
        inner = self.stream
        stream = inner and (lambda name, row, arrays: inner(old[name], row, arrays))
        signatures = {new: self.signatures[name] for new, name in old.items()}
        return Tensors(signatures, lambda name: self._read(old[name]), stream)


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file or folder; only headers are read yet.

    A folder has `model.safetensors`, an index of shards, or a single file of another kind.

    Args:
      path: a file of one of `SUFFIXES`, an index of shards, or a folder.

    Raises:
      SourceNotFoundError: there are no weights.
      WeightsError: a file is damaged, or of a kind that is not read.
    """
    file = _weights_file(path)
    if file.name.endswith(".bin.index.json"):
        return _torch_shards(file)
    if file.suffix in TORCH_SUFFIXES:
        return Tensors(*torch_file.opened(file))
    if file.suffix in KERAS_SUFFIXES:
        return Tensors(*keras_file.opened(file))
    return Tensors(*safetensors.opened(file))


def _weights_file(path: Path) -> Path:
    if not path.is_dir() or any((path / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return path
    for suffix in SUFFIXES:
        if suffix == ".bin" and (path / TORCH_INDEX).is_file() and not (path / TORCH_SINGLE).is_file():
            return path / TORCH_INDEX
        found = sorted(file for file in path.iterdir() if file.suffix == suffix and file.name != "training_args.bin")
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:8])
            raise SourceNotFoundError(f"{path} holds several files of weights, {names}: give the path of the one meant")
    return path


def _torch_shards(index: Path) -> Tensors:
    signatures: dict[str, Signature] = {}
    reader: dict[str, Callable[[str], np.ndarray]] = {}
    for file, declared in safetensors.shards(index).items():
        held, read = torch_file.opened(file)
        safetensors.check_shard(file, set(held), declared)
        signatures |= held
        reader |= dict.fromkeys(held, read)
    return Tensors(signatures, lambda name: reader[name](name))

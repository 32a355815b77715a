"""The tensors of a checkpoint as a mapping that reads each one when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights import keras_file, safetensors, torch_file
from jtl.weights.safetensors import Signature

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
KERAS_SUFFIXES = (".h5", ".hdf5")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, *KERAS_SUFFIXES)
"""The files that hold weights, the preferred first."""


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name; only their shapes and dtypes are held.

    Attributes:
      signatures: shape and dtype by name.
    """

    def __init__(self, signatures: Mapping[str, Signature], read: Callable[[str], np.ndarray]):
        self.signatures = dict(signatures)
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
        return Tensors({new: self.signatures[name] for new, name in old.items()}, lambda name: self._read(old[name]))


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file or folder; only headers are read yet.

    A folder has `model.safetensors`, an index of shards, or a single file of another kind.

    Args:
      path: a file of one of `SUFFIXES`, an index of safetensors shards, or a folder.

    Raises:
      SourceNotFoundError: there are no weights.
      WeightsError: a file is damaged, or of a kind that is not read.
    """
    file = _weights_file(path)
    if file.suffix in TORCH_SUFFIXES:
        return Tensors(*torch_file.opened(file))
    if file.suffix in KERAS_SUFFIXES:
        return Tensors(*keras_file.opened(file))
    return Tensors(*safetensors.opened(file))


def _weights_file(path: Path) -> Path:
    if not path.is_dir() or any((path / name).is_file() for name in (safetensors.SINGLE, safetensors.INDEX)):
        return path
    for suffix in SUFFIXES:
        found = sorted(file for file in path.iterdir() if file.suffix == suffix and file.name != "training_args.bin")
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:8])
            raise SourceNotFoundError(f"{path} holds several files of weights, {names}: give the path of the one meant")
    return path

"""Reading the weights that Keras writes: HDF5 files such as `model.weights.h5`.

    block1/layers/conv2d/vars/0    ->    "block1.layers.conv2d.vars.0"

Only plain arrays of numbers that lie in the file itself are read. What HDF5 has beyond that is refused by name:
links to other places and files, virtual and external data, compression, and types that run through Python objects.
HDF5's own C library parses the file; no attribute of it is read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jtl.errors import SourceNotFoundError, WeightsError, missing_extra
from jtl.weights.safetensors import Signature

_DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "float16"),
    *("uint32", "int32", "float32", "uint64", "int64", "float64"),
)


def opened(path: Path) -> tuple[dict[str, Signature], Callable[[str], np.ndarray]]:
    """Open a file of Keras.

    Args:
      path: a file of HDF5.

    Returns:
      `(signatures, read)`: shape and dtype of each dataset by its path, with `.` for `/`; and a function from
      such a name to its array.

    Raises:
      MissingExtraError: h5py is not installed.
      SourceNotFoundError: there is no such file.
      WeightsError: the file is damaged, not of HDF5, or has something other than plain arrays.
    """
    with _file(path) as file:
        places = _places(path, file)
        signatures = {name: Signature(file[at].shape, file[at].dtype.name) for name, at in places.items()}

    def read(name: str) -> np.ndarray:
        place = places[name]
        with _file(path) as file:
            return np.asarray(file[place][()], dtype=signatures[name].dtype)

    return signatures, read


@contextmanager
def _file(path: Path) -> Iterator[Any]:
    """An HDF5 file, with the library's own complaints told as jtl's errors."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise missing_extra("h5py", "keras") from error
    if not path.is_file():
        raise SourceNotFoundError(f"no such file: {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except WeightsError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged or not an HDF5 file: {error}; fetch it again") from error


def _places(path: Path, file: Any) -> dict[str, str]:
    """Where each dataset lies, by its name with dots; checks all of them."""
    import h5py

    places: dict[str, str] = {}
    groups = [file["/"]]
    seen, total = set(groups), 0  # objects of h5py are equal where they are one in the file
    while groups:
        group = groups.pop()
        for key in group:
            place = f"{group.name.rstrip('/')}/{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise _refused(path, place, "is a link to another place or file")
            item = group[key]
            if item in seen:
                raise _refused(path, place, "is a second name of something else in the file")
            seen.add(item)
            if isinstance(item, h5py.Group):
                groups.append(item)
                continue
            _check_dataset(path, place, item)
            total += item.nbytes
            name = place.strip("/").replace("/", ".")
            if name in places:
                raise _refused(path, place, f"has the same name with dots as {places[name]}")
            places[name] = place
    if total > path.stat().st_size:
        raise WeightsError(f"{path} declares {total} bytes of arrays, more than it holds; fetch it again")
    return dict(sorted(places.items()))


def _check_dataset(path: Path, place: str, item: Any) -> None:
    import h5py

    if not isinstance(item, h5py.Dataset):
        raise _refused(path, place, "is neither a group nor an array")
    if item.dtype.name not in _DTYPES:
        raise _refused(path, place, f"has the dtype {item.dtype}, expected one of {', '.join(_DTYPES)}")
    if item.shape is None:
        raise _refused(path, place, "has no shape")
    if item.is_virtual or item.external:
        raise _refused(path, place, "takes its values from another file or array")
    # A filter may be a plugin, and a compressed array may unfold to more than any memory.
    if item.id.get_create_plist().get_nfilters():
        raise _refused(path, place, "is compressed or otherwise filtered")
    if item.id.get_storage_size() < item.nbytes:
        raise _refused(path, place, f"declares {item.nbytes} bytes and holds {item.id.get_storage_size()}")


def _refused(path: Path, place: str, what: str) -> WeightsError:
    return WeightsError(
        f"{path}: {place} {what}; only plain arrays are read: save the weights with Keras's save_weights"
    )

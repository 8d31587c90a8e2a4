"""A hub on loopback that answers as Hugging Face's does: gates and bearer tokens, large files by a
redirect to another host, ranges, branches that move; and beside it the files of other repositories.

    with Hub() as hub:
        hub.add("o/m", {"config.json": b"{}"}, gated=True)
        hub.tokens["hf_token"] = {"o/m"}     # may read it; another token may not
        ...                                  # HF_ENDPOINT=hub.endpoint
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

LARGE = (".safetensors", ".parquet", ".gz", ".pth", "tokenizer.json")
"""What the hub keeps apart and redirects to."""


class Repository(NamedTuple):
    """A model or a data set at one commit."""

    files: Mapping[str, bytes]
    commit: str
    gated: bool


class Hub:
    """A server, its repositories, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By `models/o/m` or `datasets/o/d`."""
        self.raw: dict[str, bytes] = {}
        """Files of other repositories, by `owner/name/COMMIT/path`."""
        self.tokens: dict[str, set[str]] = {}
        """Which gated models each token may read."""
        self.cut: dict[str, list[int]] = {}
        """By a large file's name: break its next downloads off after so many bytes each."""
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, bearer) of every request."""
        self.ranges: list[tuple[str, str]] = []
        """(file, range) of every request for a part of a large file."""
        hub = self

        class Bound(_Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def store(self) -> str:
        """Where large files come from: the same server by another name."""
        return f"http://localhost:{self.server.server_port}/store"

    @property
    def raw_url(self) -> str:
        """For `data.sources.*.url`, of the repository `o/r`."""
        return f"{self.endpoint}/raw/o/r/{{revision}}/{{file}}"

    def add(
        self, name: str, files: Mapping[str, bytes], *, kind: str = "models", gated: bool = False
    ) -> str:
        """Publish files as the newest commit of a repository's `main`; returns the commit."""
        listed = sorted((file, hashlib.sha256(data).hexdigest()) for file, data in files.items())
        commit = hashlib.sha1(json.dumps([name, listed]).encode()).hexdigest()
        self.repositories[f"{kind}/{name}"] = Repository(files, commit, gated)
        return commit

    def bearers(self, path: str) -> set[str | None]:
        """With which tokens paths that begin so were asked for."""
        return {bearer for _, asked, bearer in self.asked if asked.startswith(path)}

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.asked.append((self.command, path, bearer))
        if path.startswith("/store/"):
            self.large(path.removeprefix("/store/"))
        elif path.startswith("/raw/"):
            found = self.hub.raw.get(path.removeprefix("/raw/"))
            self.refuse(404, "", "") if found is None else self.give(found)
        elif found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path
        ):
            self.told(*found.groups(), bearer)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if found[1] else "models"
            self.resolved(kind, found[2], found[3], found[4], bearer)
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def told(
        self, kind: str, name: str, what: str | None, revision: str | None, bearer: str | None
    ) -> None:
        """What the hub says of a repository to anyone, gated or not."""
        repository = self.open(kind, name, revision, bearer, gate=False)
        if repository is None:
            return
        entries = [
            {
                "rfilename": file,
                "path": file,
                "type": "file",
                "size": len(data),
                **_oids(file, data),
            }
            for file, data in repository.files.items()
        ]
        body: Any = entries
        if what != "tree":
            body = {
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "gated": "manual" if repository.gated else False,
                "private": False,
                "siblings": entries,
            }
        self.give(json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolved(self, kind: str, name: str, revision: str, file: str, bearer: str | None) -> None:
        repository = self.open(kind, name, revision, bearer, gate=True)
        if repository is None:
            return
        data = repository.files.get(file)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif file.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            self.answer(
                302,
                b"",
                {
                    "Location": f"{self.hub.store}/{sha256}",
                    "X-Repo-Commit": repository.commit,
                    "X-Linked-ETag": f'"{sha256}"',
                    "X-Linked-Size": str(len(data)),
                },
            )
        else:
            named = {"ETag": f'"{_oids(file, data)["oid"]}"', "X-Repo-Commit": repository.commit}
            self.give(data, named)

    def open(
        self, kind: str, name: str, revision: str | None, bearer: str | None, *, gate: bool
    ) -> Repository | None:
        """The repository, or None after a refusal."""
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if bearer is not None and bearer not in self.hub.tokens:
            # the words by which the hub's own client knows a token that is none
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif gate and repository.gated and bearer is None:
            self.refuse(401, "GatedRepo", f"Access to {name} is restricted; log in")
        elif gate and repository.gated and name not in self.hub.tokens[bearer or ""]:
            self.refuse(403, "GatedRepo", f"Access to {name} is restricted; ask for it")
        else:
            return repository
        return None

    def large(self, sha256: str) -> None:
        """A large file, from a signed address: it takes no token, and gives any part."""
        file, data = next(
            (file, data)
            for repository in self.hub.repositories.values()
            for file, data in repository.files.items()
            if hashlib.sha256(data).hexdigest() == sha256
        )
        start = 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append((file, asked))
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        cut = self.hub.cut.get(file) if self.command == "GET" else None
        stop = min(len(data), start + (cut.pop(0) if cut else len(data)))
        part = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.send(206 if start else 200, len(data) - start, part)
        if self.command == "GET":
            self.wfile.write(data[start:stop])
        if stop < len(data):
            self.close_connection = True

    def give(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.answer(200, data, headers or {})

    def refuse(self, status: int, code: str, message: str) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, b"", {key: value for key, value in named.items() if value})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def send(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def _oids(file: str, data: bytes) -> dict[str, Any]:
    """As git and git-lfs name a file."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if not file.endswith(LARGE):
        return {"oid": oid}
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
    return {"oid": oid, "lfs": lfs}

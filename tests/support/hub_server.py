"""A Hub on loopback: the part of its protocol that downloading and pushing a model takes, and ways
to fail.

Written from what the real client asks. Large files (`LFS`) are answered as the Hub does, by a
redirect to storage of another origin (here another name of the same host), with the commit in
X-Repo-Commit, size and sha256 in X-Linked-Size and X-Linked-Etag.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt")
TOKEN = "hf_good"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub:
    """Repositories and the requests that came for them.

    Attributes:
        trees: repository -> commit -> files.
        refs: repository -> branch or tag -> commit.
        asked: "METHOD /path" of every request, in order.
        status: repository -> what every request for it is answered with.
        stalls: the parts of a path, e.g. "/storage/", whose requests are never answered.
        drops: the connection is closed in the middle of every file of storage.
        spoils: the last byte of every file of storage is another one.
        delay_s: before every file of storage.
        drips: every file of storage comes byte by byte, slowly, and never ends.
        longer: bytes that every file of storage has beyond its own.
        said: header -> what is sent in its place, wherever it is sent; None: it is left out.
    """

    def __init__(self) -> None:
        self.trees: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.storage: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status: dict[str, int] = {}
        self.stalls: tuple[str, ...] = ()
        self.drops = self.spoils = self.drips = False
        self.delay_s = 0.0
        self.longer = 0
        self.said: dict[str, str | None] = {}
        self.released = threading.Event()  # stalled requests end with the test
        self.port = 0

    def commit(self, repository: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit and let `ref` be it."""
        commit = commit_id(files)
        self.trees.setdefault(repository, {})[commit] = files
        self.refs.setdefault(repository, {})[ref] = commit
        self.storage.update({sha256(content): content for content in files.values()})
        return commit

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return len([line for line in self.asked if re.search(pattern, line)])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if any(part in path for part in self.hub.stalls):
            self.hub.released.wait(60)
            self.close_connection = True
            return
        if (
            self.command in ("POST", "PUT")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            and "/upload/" not in path
        ):
            self._error(401, "", "Invalid username or password.")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            self._stored(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2] or "main")
        elif path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = json.loads(self.body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False}
                for f in files
            ]
            self._json({"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._batch()
        elif match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
            self.hub.storage[sha256(self.body)] = self.body
            self._send(200 if sha256(self.body) == match[1] else 400)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(*match.groups())
        else:
            self._error(404, "", f"{self.command} {path} is not part of this Hub")

    def _mode(self, name: str) -> str:
        return "lfs" if name.endswith(LFS) else "regular"

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            said = self.hub.said.get(name.replace("_", "-"), value)
            if said is not None:
                self.send_header(name.replace("_", "-"), said)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        named = {"X_Error_Code": code} if code else {}
        self._send(status, b"", X_Error_Message=message, **named, **headers)

    def _files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files; None after an error was sent."""
        if repository in self.hub.status:
            code = "RepoNotFound" if self.hub.status[repository] in (401, 404) else ""
            self._error(self.hub.status[repository], code, "Invalid username or password.")
        elif repository not in self.hub.trees:
            self._error(404, "RepoNotFound", "Repository not found")
        else:
            commit = self.hub.refs[repository].get(revision, revision)
            if commit in self.hub.trees[repository]:
                return commit, self.hub.trees[repository][commit]
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        found = self._files(repository, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
            return
        content = files[name]
        if self._mode(name) == "regular":
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._send(
                200,
                content,
                X_Repo_Commit=commit,
                ETag=f'"{oid}"',
                Content_Length=str(len(content)),
            )
            return
        self._send(
            302,
            X_Repo_Commit=commit,
            X_Linked_Size=str(len(content)),
            X_Linked_Etag=f'"{sha256(content)}"',
            Location=f"http://localhost:{self.hub.port}/storage/{sha256(content)}",
        )

    def _stored(self, oid: str) -> None:
        time.sleep(self.hub.delay_s)
        content = self.hub.storage[oid]
        if self.hub.spoils:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.hub.drops:
            self._send(200, content[: len(content) // 2], Content_Length=str(len(content)))
            self.close_connection = True
        elif self.hub.drips:
            self._send(200, content[:1], Content_Length=str(len(content)))
            while not self.hub.released.wait(0.1):
                self.wfile.write(b"x")
        else:
            self._send(200, content + bytes(self.hub.longer))

    def _tree(self, repository: str, revision: str) -> None:
        found = self._files(repository, revision)
        if found is not None:
            self._json(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": sha256(c)[:40]}
                    for p, c in found[1].items()
                ]
            )

    def _info(self, repository: str, revision: str) -> None:
        found = self._files(repository, revision)
        if found is not None:
            siblings = [{"rfilename": name} for name in found[1]]
            self._json(
                {
                    "id": repository,
                    "sha": found[0],
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                }
            )

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repository = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if repository in self.hub.trees else 200
        if status == 200:
            self.hub.commit(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.endpoint}/{repository}", "id": repository}, status)

    def _batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.storage:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/upload/{entry['oid']}"}
                }
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, branch: str) -> None:
        found = self._files(repository, branch)
        if found is None:
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
        commit = self.hub.commit(repository, files, branch)
        self._json(
            {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{commit}", "commitOid": commit}
        )

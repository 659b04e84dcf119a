"""A Hugging Face hub on loopback: downloads and uploads, and a CDN that large files are redirected to.

As on the real hub the CDN is another origin, the redirect carries the large file's SHA-256 and size,
and small files come from the hub itself with a git hash as ETag. Uploads are those of repositories of
models without Xet: large files go to the CDN by Git LFS's batch API, the others with the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<action>[a-z]+)/(?P<revision>[^/]+))?")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Hub:
    """The state of a running hub.

    Attributes:
        files: (repo, name) -> content.
        large: names that lie on the CDN.
        requests: `METHOD path [Range]` of every request, in order.
        cut_at: the CDN's next whole answer breaks off after so many bytes.
        fail_after_cut: after that the CDN answers 500 until this is cleared.
        corrupt: the CDN flips a byte.
        private: repository -> whether it is private, for those that were made by an upload; they are
            read with `TOKEN` only.
        uploads: SHA-256 -> content that was uploaded to the CDN.
        url, cdn: their addresses.
    """

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    cut_at: int | None = None
    fail_after_cut: bool = False
    failing: bool = False
    corrupt: bool = False
    private: dict[str, bool] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    cdn: str = ""

    def downloads(self) -> list[str]:
        """Requests for large content so far."""
        return [line for line in self.requests if line.startswith("GET /cdn/")]

    def repo(self, repo: str) -> dict[str, bytes]:
        """Name -> content of a repository's files."""
        return {name: content for (owner, name), content in self.files.items() if owner == repo}

    def commit(self, repo: str) -> str:
        """The commit that `main` stands for: another one after each upload."""
        if repo not in self.private:
            return COMMIT
        files = sorted((name, _sha256(content)) for name, content in self.repo(repo).items())
        return hashlib.sha1(json.dumps(files).encode(), usedforsecurity=False).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.has_token():
            return self.refuse(401, "")
        path = urlsplit(unquote(self.path)).path
        lines = [json.loads(line) for line in content.splitlines()]
        if path == "/api/repos/create":
            return self.create(lines[0])
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        batch, api = _BATCH.fullmatch(path), _API.fullmatch(path)
        if batch:
            return self.batch(lines[0])
        if api and api["action"] == "preupload":
            return self.preupload(lines[0])
        if api and api["action"] == "commit":
            return self.add_commit(api["repo"], lines)
        return self.refuse(404, "EntryNotFound")

    def answer(self, body: bool) -> None:
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        path = urlsplit(unquote(self.path)).path
        actual, api = _RESOLVE.fullmatch(path), _API.fullmatch(path)
        if path == "/api/whoami-v2":
            if not self.has_token():
                return self.refuse(401, "")
            return self.send_json({"type": "user", "name": "me", "auth": {"type": "access_token"}})
        repo = (actual or api or {"repo": ""})["repo"]
        if self.hub.private.get(repo) and not self.has_token():
            return self.refuse(401, "RepoNotFound")
        if actual:
            return self.resolve(repo, actual["revision"], actual["name"], body)
        if api:
            return self.describe(repo, api["action"] or "revision", api["revision"] or "main")
        return self.refuse(404, "EntryNotFound")

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def has_repo(self, repo: str) -> bool:
        return repo in self.hub.private or bool(self.hub.repo(repo))

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if self.has_repo(repo):
            return self.send_json({"url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.private[repo] = asked.get("visibility") == "private"
        self.hub.files[repo, ".gitattributes"] = b""
        return self.send_json({"url": f"{self.hub.url}/{repo}"})

    def describe(self, repo: str, action: str, revision: str) -> None:
        if not self.has_repo(repo):
            return self.refuse(404, "RepoNotFound")
        commit, files = self.hub.commit(repo), self.hub.repo(repo)
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        if action == "tree":
            return self.send_json([self.entry(name, content) for name, content in files.items()])
        private = self.hub.private.get(repo, False)
        names = [{"rfilename": name} for name in files]
        return self.send_json({"id": repo, "sha": commit, "private": private, "siblings": names})

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
        if name in self.hub.large:
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self.send_json({"files": modes})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for file in asked["objects"]:
            upload = {"href": f"{self.hub.cdn}/upload/{file['oid']}"}
            known = file["oid"] in self.hub.uploads
            objects.append({**file, **({} if known else {"actions": {"upload": upload}})})
        self.send_json({"transfer": "basic", "objects": objects})

    def add_commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        if not self.has_repo(repo):
            return self.refuse(404, "RepoNotFound")
        for line in lines:
            name = line["value"].get("path")
            if line["key"] == "file":
                self.hub.files[repo, name] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo, name] = self.hub.uploads[line["value"]["oid"]]
                self.hub.large.add(name)
            elif line["key"] == "deletedFile":
                del self.hub.files[repo, name]
        commit = self.hub.commit(repo)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return self.send_json({"commitUrl": url, "commitOid": commit})

    def resolve(self, repo: str, revision: str, name: str, body: bool) -> None:
        if not self.hub.repo(repo):
            return self.refuse(404, "RepoNotFound")
        commit = self.hub.commit(repo)
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        content = self.hub.files.get((repo, name))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if name not in self.hub.large:
            etag = _git_hash(content)
            return self.send(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        digest = _sha256(content)
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{repo}/{name}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            # The real hub offers Xet as well; nobody answers that route here.
            "X-Xet-Hash": digest,
            "X-Xet-Refresh-Route": f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}",
        }
        return self.send(302, b"", body, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", False, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send_json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send(status, content, True, {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


class _CdnHandler(_Handler):
    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert _sha256(content) == self.path.rpartition("/")[2]
        self.hub.uploads[_sha256(content)] = content
        self.send(200, b"", True, {})

    def answer(self, body: bool) -> None:
        hub = self.hub
        asked = self.headers.get("Range", "")
        hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        _, _, owner, repo, name = unquote(self.path).split("/", 4)
        content = hub.files[f"{owner}/{repo}", name]
        if hub.failing:
            return self.refuse(500, "")
        if hub.corrupt:
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 255])
            content = content[:middle] + flipped + content[middle + 1 :]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"ETag": '"cdn"'}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if hub.cut_at is None or asked:
            return self.send(206 if asked else 200, content[start:], body, headers)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: hub.cut_at])
        hub.cut_at, hub.failing = None, hub.fail_after_cut
        self.close_connection = True
        return None


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub and its CDN on two loopback ports."""
    hub = Hub()
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"hub": hub}))
        for kind in (_Handler, _CdnHandler)
    ]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()

"""A Hugging Face hub on loopback: the resolve routes, and a CDN that large files are redirected to.

As on the real hub the CDN is another origin, the redirect carries the large file's SHA-256 and size,
and small files come from the hub itself with a git hash as ETag.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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
        url, cdn: their addresses.
    """

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    cut_at: int | None = None
    fail_after_cut: bool = False
    failing: bool = False
    corrupt: bool = False
    url: str = ""
    cdn: str = ""

    def downloads(self) -> list[str]:
        """Requests for large content so far."""
        return [line for line in self.requests if line.startswith("GET /cdn/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        actual = _RESOLVE.fullmatch(unquote(self.path))
        if actual:
            self.resolve(actual["repo"], actual["revision"], actual["name"], body)
        else:
            self.refuse(404, "EntryNotFound")

    def resolve(self, repo: str, revision: str, name: str, body: bool) -> None:
        if not any(key[0] == repo for key in self.hub.files):
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        content = self.hub.files.get((repo, name))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if name not in self.hub.large:
            blob = b"blob %d\0" % len(content) + content
            etag = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
            return self.send(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{repo}/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            # The real hub offers Xet as well; nobody answers that route here.
            "X-Xet-Hash": digest,
            "X-Xet-Refresh-Route": f"{self.hub.url}/api/models/{repo}/xet-read-token/{COMMIT}",
        }
        return self.send(302, b"", body, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", False, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


class _CdnHandler(_Handler):
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

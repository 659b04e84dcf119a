"""A small local page on a run: give a history, see what its models recommend, side by side."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import re
import socket
import socketserver
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from hsft.finished.open_run import OpenRun
from hsft.finished.serve_api import ServeApi
from hsft.utils.errors import InputError, one_line
from hsft.utils.progress import format_seconds
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("serve.html")
LARGEST_BODY = 1 << 20
# A body up to this size is read though it is refused: closing a connection on unread bytes resets
# it, and the client may lose the answer.
LARGEST_READ = 8 << 20
SOCKET_TIMEOUT_S = 30.0
# A computation under way at the end may take this long to finish.
LAST_REQUEST_S = 5.0
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HOST_HEADER = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/@\s]+))(?::[0-9]{1,5})?"
)


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        allow: the methods of the route, for 405.
    """

    def __init__(self, status: HTTPStatus, sentence: str, allow: str = "") -> None:
        super().__init__(sentence)
        self.status, self.allow = status, allow


class PageServer(ThreadingHTTPServer):
    """The HTTP server of a run's page; it listens once it is made.

    The address is taken before the models are built, so that a port in use shows at once, but
    nothing is accepted until they are.

    Attributes:
        api: what answers, None until the models are built.

    Args:
        run: the run.
        port: TCP port; 0 takes a free one.
        host: name or address to bind to.
        topk: recommendations when a request names no number.

    Raises:
        InputError: the port or the host cannot be used, or the run's files are missing.
    """

    daemon_threads = True
    # Two servers on one port would answer in turn.
    allow_reuse_port = False
    request_queue_size = 32

    def __init__(self, run: OpenRun, port: int, host: str = "127.0.0.1", topk: int = 10) -> None:
        if not 0 <= port <= 65535:
            raise InputError(f"--serve {port} is no port; choose 1 to 65535, or 0 for a free one.")
        self.page, self.policy = read_page(PAGE)
        self.address_family, address = _resolve(host, port)
        super().__init__(address, PageHandler, bind_and_activate=False)
        self.host = host
        try:
            self._on_port(port, self.server_bind)
            log.info(
                "building the model%s %s.", "s" * (len(run.models) > 1), " and ".join(run.models)
            )
            began = time.perf_counter()
            self.api = ServeApi(run, topk)
            log.info("built in %s.", format_seconds(time.perf_counter() - began))
            self._on_port(port, self.server_activate)
        except BaseException:
            self.server_close()
            raise

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.server_address[1])

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return ipaddress.ip_address(self._address).is_loopback

    @property
    def url(self) -> str:
        """Where the page is."""
        everywhere = ipaddress.ip_address(self._address).is_unspecified
        host = socket.gethostname() if everywhere else self.host
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.port}/"

    def knows(self, host_header: str | None) -> bool:
        """Say whether a request may be meant for this server, by its Host header.

        A web page elsewhere can have its own name resolve to 127.0.0.1 and so have a browser ask
        this server; such a request carries that name. Ports differ when one is forwarded.
        """
        if not self.loopback:
            return True
        match = _HOST_HEADER.fullmatch(host_header or "")
        if match is None:
            return False
        name = (match["six"] or match["name"]).lower()
        return name in _LOOPBACK_NAMES or name in (self._address, self.host.lower())

    def server_bind(self) -> None:
        """Bind without looking the host's name up, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what broke a connection: a client that has gone is no error."""
        log.debug("a connection broke off", exc_info=True)

    @property
    def _address(self) -> str:
        return str(self.server_address[0]).partition("%")[0]

    def _on_port(self, port: int, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise InputError(
                f"cannot listen on port {port} of {self.host}: {error.strerror or error}; "
                f"choose another port, or 0 for a free one."
            ) from error


class PageHandler(BaseHTTPRequestHandler):
    """Answers one connection. Every answer but the page is JSON; errors are `{"error": SENTENCE}`."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    # 0.9, for a line without a version, would be answered without a status.
    default_request_version = "HTTP/1.0"
    timeout = SOCKET_TIMEOUT_S
    # Bytes of the request's body that are not read yet; None when their number is not known.
    _body_left: int | None = 0

    def answer(self) -> None:
        """Answer a request of any method."""
        self._body_left = self._declared_length()
        try:
            kind, content = self._route()
        except RefusedError as refused:
            self._refuse(refused.status, str(refused), refused.allow)
        except OSError:
            raise
        except Exception:
            log.exception("The request %s %s failed.", self.command, one_line(self.path, 200))
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the log says why.")
        else:
            self._send(HTTPStatus.OK, kind, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = answer
    do_CONNECT = answer

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses: a request it cannot read or of unknown method."""
        self._body_left = 0
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(
                HTTPStatus.METHOD_NOT_ALLOWED, "there is no such method here; use GET.", "GET"
            )
        else:
            said = one_line(message or HTTPStatus(code).phrase, 200)
            self._refuse(HTTPStatus(code), f"the request cannot be read: {said}.")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep requests out of the terminal."""
        log.debug("%s", one_line(format % args))

    def version_string(self) -> str:
        """Name the server without versions."""
        return "hsft"

    def _route(self) -> tuple[str, bytes]:
        if not self.server.knows(self.headers.get("Host")):
            raise RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "the Host header names no address of this machine; open the address that was printed.",
            )
        path, _, query = self.path.partition("?")
        if path == "/":
            self._allow("GET")
            return "text/html; charset=utf-8", self.server.page
        return "application/json", _json(self._call(path, query))

    def _call(self, path: str, query: str) -> dict[str, Any]:
        api = self.server.api
        if path == "/api/recommend":
            self._allow("POST")
            request = self._read_json()
            return _or_refuse(HTTPStatus.BAD_REQUEST, lambda: api.recommend(request))
        plain = {"/api/info": api.info, "/api/random_user": api.random_user}
        searches = {"/api/items": api.items, "/api/users": api.users}
        user_id = path.removeprefix("/api/user/")
        # A slash within an id comes as %2F.
        one_user = user_id != path and user_id != "" and "/" not in user_id
        if path not in plain and path not in searches and not one_user:
            raise RefusedError(
                HTTPStatus.NOT_FOUND, f"there is nothing at {one_line(path, 80)}; open / instead."
            )
        self._allow("GET")
        if path in plain:
            return plain[path]()
        if path in searches:
            return searches[path](parse_qs(query).get("q", [""])[0])
        return _or_refuse(HTTPStatus.NOT_FOUND, lambda: api.user(unquote(user_id)))

    def _allow(self, method: str) -> None:
        if self.command != method:
            raise RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{one_line(self.command, 20)} is not possible here; use {method}.",
                method,
            )

    def _read_json(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "the request's Content-Type is not application/json; set it so.",
            )
        if self._body_left is None:
            raise RefusedError(
                HTTPStatus.LENGTH_REQUIRED, "the request has no usable Content-Length; send one."
            )
        if self._body_left > LARGEST_BODY:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request's body is larger than {LARGEST_BODY >> 20} MiB; send less.",
            )
        length, self._body_left = self._body_left, 0
        try:
            return json.loads(self.rfile.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, "the request's body is not JSON in UTF-8; mend it."
            ) from error

    def _declared_length(self) -> int | None:
        """Return the body's length in bytes, None when the header does not say it."""
        if "Transfer-Encoding" in self.headers:
            return None
        given = self.headers.get_all("Content-Length", [])
        if not given:
            return None if self.command == "POST" else 0
        return int(given[0]) if len(given) == 1 and re.fullmatch("[0-9]{1,15}", given[0]) else None

    def _refuse(self, status: HTTPStatus, sentence: str, allow: str = "") -> None:
        left = self._body_left
        # What follows an unread body cannot be told from the body.
        self.close_connection = self.close_connection or left != 0
        if left is not None and 0 < left <= LARGEST_READ:
            self._body_left = 0
            self.rfile.read(left)
        self._send(status, "application/json", _json({"error": sentence}), allow)

    def _send(self, status: HTTPStatus, kind: str, content: bytes, allow: str = "") -> None:
        self.close_connection = self.close_connection or self._body_left != 0
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if allow:
            self.send_header("Allow", allow)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def serve(run: OpenRun, port: int, host: str = "127.0.0.1", topk: int = 10) -> None:
    """Build the run's models and serve its page until SIGINT or SIGTERM.

    The address is written to standard output once the server listens.

    Args:
        run: the run.
        port: TCP port; 0 takes a free one.
        host: name or address to bind to; anything but loopback lets others in, and is warned of.
        topk: recommendations that the page shows at first, 1 to 100.

    Raises:
        InputError: the port or the host cannot be used, or the run's files are missing.
        Interrupted: a signal ended it.
    """
    with StopSignals(), PageServer(run, port, host, topk) as server:
        if not server.loopback:
            log.warning(
                "--host %s lets anyone who reaches port %d of this machine read the run's items and "
                "users and have recommendations computed; there is no password.",
                host,
                server.port,
            )
        sys.stdout.write(f"serving {run.folder} at {server.url}, Ctrl-C ends it\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        finally:
            # A thread that computes while the interpreter ends can crash it.
            server.api.wait_until_idle(LAST_REQUEST_S)


def read_page(path: Path) -> tuple[bytes, str]:
    """Read the page, and write the policy that lets its own script and style run and nothing else.

    Args:
        path: an HTML file with one `<style>` and one `<script>`, and no other resource.

    Returns:
        The page in UTF-8, and the value of Content-Security-Policy.
    """
    page = path.read_bytes()
    style, script = (
        _source_hash(re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL))
        for tag in (b"style", b"script")
    )
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; "
        # The empty icon, without which browsers ask for /favicon.ico.
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _source_hash(blocks: list[bytes]) -> str:
    (block,) = blocks
    return f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode('ascii')}'"


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ) if host else []  # fmt: skip
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise InputError(
            f"--host '{one_line(host, 80)}' is no address or name of this machine; "
            f"use 127.0.0.1, or 0.0.0.0 for all of its addresses."
        )
    return found[0][0], found[0][4]


def _or_refuse(status: HTTPStatus, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except InputError as error:
        raise RefusedError(status, one_line(error)) from error


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii")

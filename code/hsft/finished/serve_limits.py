"""What stands before a served run's routes: headers, the API key, and limits, as ASGI middleware."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 1 << 20
# A body up to this size is read though it is refused: closing a connection on unread bytes resets
# it, and the client may lose the answer.
LARGEST_READ = 8 << 20
BODY_TIMEOUT_S = 30.0
# Requests under way at once; each may hold a body of the largest size.
MOST_AT_ONCE = 512
# Whoever watches the server need not know its key, and is answered however busy it is.
HEALTH = "/health"


def problem(status: int, sentence: str, headers: Any = None) -> JSONResponse:
    """Return the answer to a request that is refused."""
    return JSONResponse({"error": sentence}, status, headers)


class SecurityHeaders:
    """ASGI middleware: every answer tells browsers to keep it to itself and to load nothing else.

    Args:
        app: the application.
        policy: the value of Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app = app
        self._headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class ApiKey:
    """ASGI middleware: a request carries the key, but for `/health`.

    The key is the token of `Authorization: Bearer`, or the password of `Authorization: Basic`, with
    which browsers ask for it by themselves.

    Args:
        app: the application.
        key: the key; None lets every request pass.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._key is None or scope["type"] != "http" or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        given = _given_key(Headers(scope=scope).get("authorization", ""))
        if hmac.compare_digest(given, self._key.encode()):
            await self._app(scope, receive, send)
            return
        challenge = {"WWW-Authenticate": 'Basic realm="HSFT", charset="UTF-8"'}
        sentence = "the request lacks the server's API key; send it as Authorization: Bearer KEY."
        await problem(HTTPStatus.UNAUTHORIZED, sentence, challenge)(scope, receive, send)


def _given_key(authorization: str) -> bytes:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (ValueError, binascii.Error):
        return b""


class RequestLimit:
    """ASGI middleware: refuses requests beyond a number under way, but for `/health`.

    Args:
        app: the application.
        most: requests under way at once.
    """

    def __init__(self, app: ASGIApp, most: int = MOST_AT_ONCE) -> None:
        self._app, self._most, self._count = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        if self._count >= self._most:
            sentence = f"the server has {self._most} requests under way; send it again later."
            busy = problem(HTTPStatus.SERVICE_UNAVAILABLE, sentence, {"Retry-After": "1"})
            await busy(scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1


class BodyLimits:
    """ASGI middleware: a request's body is JSON, of at most 1 MiB, and comes within 30 seconds.

    JSON is insisted on because browsers send other types to this server from any web page.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose body is read here, as a whole."""
        if scope["type"] != "http":
            return
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_TIMEOUT_S)
        except ConnectionResetError:
            return
        except TimeoutError:
            refusal = problem(
                HTTPStatus.REQUEST_TIMEOUT,
                "the request's body did not come in time; send it again.",
            )
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if body is None:
            refusal = problem(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request's body is larger than {LARGEST_BODY >> 20} MiB; send less.",
            )
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
        elif body and kind != "application/json":
            await problem(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "the request's Content-Type is not application/json; set it so.",
            )(scope, receive, send)
        else:
            await self._app(scope, _receive_once(body, receive), send)


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body; None when it is too large.

    Raises:
        ConnectionResetError: the client has gone.
    """
    parts, length = [], 0
    while length <= LARGEST_READ:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > LARGEST_BODY:
            parts.clear()
        if not message.get("more_body", False):
            break
    return b"".join(parts) if length <= LARGEST_BODY else None


def _receive_once(body: bytes, receive: Receive) -> Receive:
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def content_policy(*pages: str) -> str:
    """Return a Content-Security-Policy by which pages' own scripts and styles run, and no others.

    Args:
        pages: HTML with at most one `<style>` and one `<script>` each, and no other resource.
    """

    def allowed(tag: str) -> str:
        blocks = [
            block for page in pages for block in re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page)
        ]
        hashes = (hashlib.sha256(block.encode()).digest() for block in blocks)
        return " ".join(f"'sha256-{base64.b64encode(one).decode('ascii')}'" for one in hashes)

    return (
        f"default-src 'none'; style-src {allowed('style')}; script-src {allowed('script')}; "
        # The empty icon, without which browsers ask for /favicon.ico.
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

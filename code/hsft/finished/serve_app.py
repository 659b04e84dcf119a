"""The web application of a run: routes, limits and headers, on FastAPI and uvicorn."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from markupsafe import escape
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hsft.finished.serve_api import (
    LONGEST_QUERY,
    History,
    Info,
    Items,
    Recommended,
    RecommendRequest,
    ServeApi,
    Users,
)
from hsft.utils.errors import InputError, one_line

PAGE = Path(__file__).with_name("serve.html")
LARGEST_BODY = 1 << 20
# A body up to this size is read though it is refused: closing a connection on unread bytes resets
# it, and the client may lose the answer.
LARGEST_READ = 8 << 20
BODY_TIMEOUT_S = 30.0

Search = Annotated[str, Query(description="words; without any, the first ones are returned")]


class RunServer(uvicorn.Server):
    """A uvicorn server of one application on a socket that is bound already.

    Args:
        app: the application.
        api: what answers.
        bound: the socket; the server closes it.
        url: where the page is.
        on_ready: called once the server listens.
        last_request_s: seconds that requests under way at the end are waited for.

    Attributes:
        api, url: as given.
        port: the TCP port.
    """

    def __init__(
        self,
        app: ASGIApp,
        api: ServeApi,
        bound: socket.socket,
        url: str,
        on_ready: Callable[[], None],
        last_request_s: int,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=last_request_s,
            )
        )
        self.api, self.url = api, url
        self.port = int(bound.getsockname()[1])
        self._bound, self._on_ready = bound, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_ready()

    def serve_until_signal(self) -> None:
        """Serve until SIGINT or SIGTERM, in the main thread, or until `should_exit` is set."""
        with self._bound:
            self.run(sockets=[self._bound])


def make_app(api: ServeApi, *, allowed_hosts: Sequence[str]) -> ASGIApp:
    """Return the application: the page, its API, and a page that lists the API's routes.

    Every answer but the two pages is JSON; errors are `{"error": SENTENCE}`. The exceptions are
    what Starlette refuses by its Host header and uvicorn as no HTTP, both in plain text.

    Args:
        api: what answers.
        allowed_hosts: names that a request's Host header may have, `*` for any. A web page
            elsewhere can have its own name resolve to 127.0.0.1 and so have a browser ask this
            server; such a request carries that name.
    """
    app = FastAPI(
        title="HSFT",
        description="Recommendations of one run.",
        # FastAPI's own pages load scripts from another server.
        docs_url=None,
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_routes(app, api)
    page = PAGE.read_text(encoding="utf-8")
    listing = _list_routes(app.openapi())

    @app.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/docs", include_in_schema=False)
    def show_routes() -> HTMLResponse:
        return HTMLResponse(listing)

    guarded = TrustedHostMiddleware(BodyLimits(app), allowed_hosts, www_redirect=False)
    return SecurityHeaders(guarded, content_policy(page, listing))


def _add_routes(app: FastAPI, api: ServeApi) -> None:
    @app.get("/info", response_model=Info)
    def info() -> Any:
        """Say what is served."""
        return api.info()

    @app.get("/items", response_model=Items, response_model_exclude_unset=True)
    def items(q: Search = "") -> Any:
        """Search items by the words of their titles, or by their ids."""
        return api.items(q[:LONGEST_QUERY])

    @app.get("/users", response_model=Users)
    def users(q: Search = "") -> Any:
        """Search users by their ids."""
        return api.users(q[:LONGEST_QUERY])

    @app.get("/users/{user_id:path}", response_model=History, response_model_exclude_unset=True)
    def user(user_id: str) -> Any:
        """Return all items of a user, oldest first."""
        try:
            return api.user(user_id)
        except InputError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, one_line(error)) from error

    @app.get("/random_user", response_model=History, response_model_exclude_unset=True)
    def random_user() -> Any:
        """Return all items of a user drawn at random."""
        return api.random_user()

    @app.post("/recommend", response_model=Recommended, response_model_exclude_unset=True)
    def recommend(request: RecommendRequest) -> Any:
        """Return every model's best items for a history."""
        return api.recommend(request)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(InputError)
    def refuse_input(request: Request, error: Exception) -> JSONResponse:
        return _error(HTTPStatus.BAD_REQUEST, one_line(error))

    @app.exception_handler(RequestValidationError)
    def refuse_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _error(HTTPStatus.BAD_REQUEST, _sentence(error.errors()[0]))

    @app.exception_handler(HTTPException)
    def refuse_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = one_line(request.url.path, 80)
        sentence = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND and sentence == "Not Found":
            sentence = f"there is nothing at {path}; /docs lists what there is."
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "GET")
            sentence = f"{one_line(request.method, 20)} is not possible here; use {allowed}."
        return _error(error.status_code, sentence, error.headers)

    @app.exception_handler(Exception)
    def hide_defect(request: Request, error: Exception) -> JSONResponse:
        # uvicorn logs it.
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the log says why.")


def _sentence(problem: Any) -> str:
    """Write what pydantic says of a request in one sentence."""
    if problem["type"] == "json_invalid":
        return "the request's body is not JSON; send a JSON object with the key history."
    where = ".".join(map(str, problem["loc"][1:])) or "the request's body"
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = ", ".join(RecommendRequest.model_fields)
        return f"the request has an unknown key '{one_line(where, 40)}'; it takes {known}."
    return f"{one_line(where, 40)}: {said[:1].lower()}{said[1:].rstrip('.')}; change it."


def _error(status: int, sentence: str, headers: Any = None) -> JSONResponse:
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
            refusal = _error(
                HTTPStatus.REQUEST_TIMEOUT,
                "the request's body did not come in time; send it again.",
            )
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if body is None:
            refusal = _error(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request's body is larger than {LARGEST_BODY >> 20} MiB; send less.",
            )
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
        elif body and kind != "application/json":
            await _error(
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


def _list_routes(schema: dict[str, Any]) -> str:
    """Return an HTML page that lists the routes of an OpenAPI description and loads nothing."""
    routes = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            named = [
                f"<code>{escape(parameter['name'])}</code>: "
                f"{escape(parameter.get('description') or parameter['in'])}"
                for parameter in route.get("parameters", [])
            ]
            if "requestBody" in route:
                body = schema["components"]["schemas"]["RecommendRequest"]["properties"]
                named += [
                    f"<code>{escape(name)}</code>: {escape(field.get('description', ''))}"
                    for name, field in body.items()
                ]
            lines = "".join(f"<li>{text}</li>" for text in named)
            routes.append(
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
                f"<p>{escape(route.get('description', ''))}</p><ul>{lines}</ul>"
            )
    example = json.dumps({"history": ["1", "2"], "topk": 3})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>HSFT: API</title>'
        '<link rel="icon" href="data:,">'
        "<style>:root { color-scheme: light dark; } body { font: 1rem/1.5 system-ui, sans-serif; "
        "max-width: 48rem; margin: 0 auto; padding: 1.5rem 1rem; overflow-wrap: anywhere; } "
        "h2 { font-size: 1.05rem; margin: 1.5rem 0 0; } p, ul { margin: .25rem 0; } "
        "pre { white-space: pre-wrap; }</style></head>"
        '<body><h1>HSFT: API</h1><p>The whole description is <a href="/openapi.json">'
        "/openapi.json</a>, in the OpenAPI format. A request by hand:</p>"
        f"<pre>curl -H 'Content-Type: application/json' -d '{escape(example)}' "
        "http://ADDRESS/recommend</pre>"
        f"{''.join(routes)}</body></html>\n"
    )

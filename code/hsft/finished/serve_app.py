"""The web application of a run: routes, limits and headers, on FastAPI and uvicorn."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from markupsafe import escape
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

from hsft.finished.serve_api import LONGEST_QUERY, ServeApi
from hsft.finished.serve_batches import Unavailable
from hsft.finished.serve_limits import (
    ApiKey,
    BodyLimits,
    RequestLimit,
    SecurityHeaders,
    content_policy,
    problem,
)
from hsft.finished.serve_metrics import CountRequests, ServeMetrics
from hsft.finished.serve_schema import (
    Added,
    AddRequest,
    Health,
    History,
    Info,
    Items,
    NewItem,
    Problem,
    Recommended,
    RecommendRequest,
    SimilarRequest,
    Users,
)
from hsft.utils.errors import InputError, one_line

PAGE = Path(__file__).with_name("serve.html")
# Threads that read requests, wait for the models and write answers.
_THREADS = 128
_BODIES: dict[str, type[BaseModel]] = {
    "/items": AddRequest,
    "/recommend": RecommendRequest,
    "/similar": SimilarRequest,
}

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
                # What is tested, whichever other parsers are installed.
                http="h11",
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=last_request_s,
            )
        )
        self.api, self.url = api, url
        self.port = int(bound.getsockname()[1])
        self._bound, self._on_ready = bound, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        await super().startup(sockets)
        self._on_ready()

    def serve_until_signal(self) -> None:
        """Serve until SIGINT or SIGTERM, in the main thread, or until `should_exit` is set."""
        with self._bound:
            self.run(sockets=[self._bound])


def make_app(
    api: ServeApi, metrics: ServeMetrics, *, allowed_hosts: Sequence[str], api_key: str | None
) -> ASGIApp:
    """Return the application: the page, its API, and a page that lists the API's routes.

    Every answer but the two pages and the metrics is JSON; errors are `{"error": SENTENCE}`. The
    exceptions are what Starlette refuses by its Host header and uvicorn as no HTTP, both in plain
    text.

    Args:
        api: what answers.
        metrics: where requests are counted.
        allowed_hosts: names that a request's Host header may have, `*` for any. A web page
            elsewhere can have its own name resolve to 127.0.0.1 and so have a browser ask this
            server; such a request carries that name.
        api_key: what requests have to carry; None: nothing.
    """
    app = FastAPI(
        title="HSFT",
        description="Recommendations of one run.",
        # FastAPI's own pages load scripts from another server.
        docs_url=None,
        redoc_url=None,
        # A redirect would have no sentence, and an address that the request's Host header names.
        redirect_slashes=False,
        # `ApiKey` checks it; this describes it in /openapi.json.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if api_key else [],
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
    )
    _add_error_handlers(app)
    _add_routes(app, api, metrics)
    page = PAGE.read_text(encoding="utf-8")
    listing = _list_routes(app.openapi(), with_key=api_key is not None)

    @app.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/docs", include_in_schema=False)
    def show_routes() -> HTMLResponse:
        return HTMLResponse(listing)

    limited = RequestLimit(ApiKey(BodyLimits(app), api_key))
    guarded = TrustedHostMiddleware(limited, allowed_hosts, www_redirect=False)
    policy = content_policy(page, listing)
    return CountRequests(SecurityHeaders(guarded, policy), metrics)


def _add_routes(app: FastAPI, api: ServeApi, metrics: ServeMetrics) -> None:
    # Answered without a thread, all of which may wait for the models.
    @app.get("/health", response_model=Health)
    async def health() -> Any:
        """Say that the server answers; needs no API key."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> PlainTextResponse:
        """Return counts of requests, batches and seconds, in Prometheus' text format."""
        return PlainTextResponse(metrics.as_text(), media_type="text/plain; version=0.0.4")

    @app.get("/info", response_model=Info)
    def info() -> Any:
        """Say what is served."""
        return api.info()

    @app.get("/items", response_model=Items, response_model_exclude_unset=True)
    def items(q: Search = "") -> Any:
        """Search items by the words of their titles, or by their ids."""
        return api.items(q[:LONGEST_QUERY])

    @app.post("/items", response_model=Added, status_code=HTTPStatus.CREATED)
    def add_items(request: AddRequest) -> Any:
        """Add items until the server ends: texts are encoded by the ItemLLM, or vectors given."""
        return api.add_items(request)

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
        """Return every model's best items for a user or a history."""
        return api.recommend(request)

    @app.post("/similar", response_model=Recommended, response_model_exclude_unset=True)
    def similar(request: SimilarRequest) -> Any:
        """Return the items whose vectors are nearest to an item's, by cosine, for every model."""
        return api.similar(request)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(InputError)
    def refuse_input(request: Request, error: Exception) -> JSONResponse:
        return problem(HTTPStatus.BAD_REQUEST, one_line(error))

    @app.exception_handler(Unavailable)
    def put_off(request: Request, error: Exception) -> JSONResponse:
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, one_line(error), {"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    def refuse_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem(HTTPStatus.BAD_REQUEST, _sentence(error.errors()[0], request.url.path))

    @app.exception_handler(HTTPException)
    def refuse_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = one_line(request.url.path, 80)
        sentence = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND and sentence == "Not Found":
            sentence = f"there is nothing at {path}; /docs lists what there is."
        if sentence == "There was an error parsing the body":
            sentence = (
                "the request's body is not JSON in UTF-8, nests too deep or has a number of "
                "thousands of digits; send a JSON object."
            )
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "GET")
            sentence = f"{one_line(request.method, 20)} is not possible here; use {allowed}."
        return problem(error.status_code, sentence, error.headers)

    @app.exception_handler(Exception)
    def hide_defect(request: Request, error: Exception) -> JSONResponse:
        # uvicorn logs it.
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the log says why.")


def _sentence(detail: Any, path: str) -> str:
    """Write what pydantic says of a request to a route in one sentence."""
    if detail["type"] == "json_invalid":
        return "the request's body is not JSON; send a JSON object."
    where = one_line(".".join(map(str, detail["loc"][1:])) or "the request's body", 40)
    said = one_line(detail["msg"].removeprefix("Value error, "), 200)
    if detail["type"] == "extra_forbidden":
        body = NewItem if len(detail["loc"]) > 2 else _BODIES[path]
        takes = f"it takes {', '.join(body.model_fields)}"
        return f"the request has an unknown key '{where}'; {takes}."
    return f"{where}: {said[:1].lower()}{said[1:].rstrip('.')}; change it."


def _list_routes(schema: dict[str, Any], *, with_key: bool) -> str:
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
                content = route["requestBody"]["content"]["application/json"]["schema"]
                kind = content["$ref"].rpartition("/")[2]
                body = schema["components"]["schemas"][kind]["properties"]
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
    key = "-H 'Authorization: Bearer KEY' " if with_key else ""
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
        f"<pre>curl {escape(key)}-H 'Content-Type: application/json' -d '{escape(example)}' "
        "http://ADDRESS/recommend</pre>"
        f"{''.join(routes)}</body></html>\n"
    )

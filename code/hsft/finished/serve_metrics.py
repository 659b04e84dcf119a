"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServeMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "hsft_requests",
            "Requests answered, by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "hsft_request_seconds",
            "Seconds from a request's arrival to the end of its answer, by route.",
            ["route"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._batch_requests = Histogram(
            "hsft_batch_requests",
            "Requests computed together.",
            registry=self._registry,
            buckets=_REQUESTS,
        )
        self._batch_seconds = Histogram(
            "hsft_batch_seconds",
            "Seconds that the models took for a batch of requests.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._waiting = self._gauge("hsft_requests_waiting", "Requests that wait for the models.")
        self._items = self._gauge("hsft_items", "Items that can be recommended.")

    def watch(self, waiting: Callable[[], float], items: Callable[[], float]) -> None:
        """Read these numbers whenever the metrics are asked for."""
        self._waiting.set_function(waiting)
        self._items.set_function(items)

    def on_batch(self, requests: int, seconds: float) -> None:
        """Count a batch that the models have computed."""
        self._batch_requests.observe(requests)
        self._batch_seconds.observe(seconds)

    def on_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def as_text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, registry=self._registry)


class CountRequests:
    """ASGI middleware: counts requests and their seconds.

    Routes are counted as the application names them, and others together, so that clients cannot
    fill the metrics with names of their own.

    Args:
        app: the application.
        metrics: where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            # A client that has gone before its answer began has the status 0.
            self._metrics.on_request(route, method, status, time.perf_counter() - began)

"""Serve a run: a local page that shows what its models recommend, and the API behind it."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsft.finished.open_run import OpenRun
from hsft.finished.serve_api import ServeApi
from hsft.utils.errors import InputError, one_line
from hsft.utils.progress import format_seconds
from hsft.utils.signals import StopSignals

if TYPE_CHECKING:
    from hsft.finished.serve_app import RunServer

log = logging.getLogger(__name__)

# A computation under way at the end may take this long to finish.
LAST_REQUEST_S = 5
# Environment variable with the key that requests have to carry.
KEY_VARIABLE = "HSFT_API_KEY"
_SHORTEST_KEY = 16
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


def serve(run: OpenRun, port: int, host: str = "127.0.0.1", topk: int = 10) -> None:
    """Build the run's models and serve its page until SIGINT or SIGTERM.

    The address is written to standard output once the server listens.

    Args:
        run: the run.
        port: TCP port; 0 takes a free one.
        host: name or address to bind to; anything but loopback lets others in and needs an API key
            in the environment variable `HSFT_API_KEY`.
        topk: recommendations that the page shows at first, 1 to 100.

    Raises:
        InputError: a package is not installed, there is no API key where one is needed, the port or
            the host cannot be used, or the run's files are missing.
        Interrupted: a signal ended it.
    """
    # uvicorn handles signals while it runs, and raises them again once it has closed.
    with StopSignals():
        server = make_server(run, port, host, topk)
        try:
            server.serve_until_signal()
        finally:
            # A thread that computes while the interpreter ends can crash it.
            server.api.close(LAST_REQUEST_S)


def make_server(run: OpenRun, port: int, host: str = "127.0.0.1", topk: int = 10) -> RunServer:
    """Take the address, build the run's models and return a server that does not listen yet.

    The address is taken first, so that a port in use shows at once, but nothing is accepted until
    the models are there.

    Args:
        run, port, host, topk: as for `serve`.

    Raises:
        InputError: as `serve`.
    """
    require_packages()
    from hsft.finished.serve_app import RunServer, make_app
    from hsft.finished.serve_metrics import ServeMetrics

    bound = _bind(host, port)
    try:
        loopback = _address(bound).is_loopback
        key = read_api_key(host, loopback=loopback)
        names = ["*"]
        if loopback:
            names = [*_LOOPBACK_NAMES, str(_address(bound)), host.lower()]
        log.info("building the model%s %s.", "s" * (len(run.models) > 1), " and ".join(run.models))
        began = time.perf_counter()
        metrics = ServeMetrics()
        api = ServeApi(run, topk, metrics.on_batch)
        metrics.watch(lambda: api.waiting, lambda: api.num_items)
        log.info("built in %s.", format_seconds(time.perf_counter() - began))
        if not loopback:
            log.warning(
                "--host %s lets others reach port %d of this machine: requests need the key in %s, "
                "and the connection is not encrypted; put a proxy with TLS in front of it.",
                host,
                bound.getsockname()[1],
                KEY_VARIABLE,
            )
        url = _url(bound, host)
        return RunServer(
            make_app(api, metrics, allowed_hosts=names, api_key=key),
            api,
            bound,
            url,
            lambda: _announce(run.folder, url),
            LAST_REQUEST_S,
        )
    except BaseException:
        bound.close()
        raise


def read_api_key(host: str, *, loopback: bool) -> str | None:
    """Read the key that requests have to carry from the environment.

    Args:
        host: what the server is bound to, for the error.
        loopback: whether only this machine can reach it; then a key is not needed.

    Raises:
        InputError: there is none and one is needed, or it is short or has characters that a header
            cannot carry.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not loopback:
        raise InputError(
            f"--host {one_line(host, 80)} lets others reach this machine, and there is no API key "
            f"for them; set {KEY_VARIABLE} to one of {_SHORTEST_KEY} characters or more, or serve on "
            f"127.0.0.1."
        )
    sound = all("!" <= char <= "~" for char in key)
    if key and (len(key) < _SHORTEST_KEY or not sound):
        raise InputError(
            f"the API key in {KEY_VARIABLE} must have {_SHORTEST_KEY} or more letters, digits and "
            f"signs of ASCII without blanks; make one with: openssl rand -hex 32."
        )
    return key or None


def require_packages() -> None:
    """Check that what serves is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--serve needs the packages fastapi, prometheus-client and uvicorn, and {error.name} is "
            f"not installed; install them with pip install 'hsft[serve]'."
        ) from error


def _announce(folder: Path, url: str) -> None:
    sys.stdout.write(f"serving {folder} at {url}, its API at {url}docs, Ctrl-C ends it\n")
    sys.stdout.flush()


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"--serve {port} is no port; choose 1 to 65535, or 0 for a free one.")
    family, address = _resolve(host, port)
    # asyncio sends at once (TCP_NODELAY) only on sockets that name TCP; else answers, of two parts,
    # wait 40 ms for the client's acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Only where it does not let two servers share a port.
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}; "
            f"choose another port, or 0 for a free one."
        ) from error
    return bound


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    addresses: list[Any] = []
    if host:
        try:
            addresses = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, UnicodeError):
            addresses = []
    if not addresses:
        raise InputError(
            f"--host '{one_line(host, 80)}' is no address or name of this machine; "
            f"use 127.0.0.1, or 0.0.0.0 for all of its addresses."
        )
    return addresses[0][0], addresses[0][4]


def _address(bound: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(str(bound.getsockname()[0]).partition("%")[0])


def _url(bound: socket.socket, host: str) -> str:
    shown = socket.gethostname() if _address(bound).is_unspecified else host
    name = f"[{shown}]" if ":" in shown else shown
    return f"http://{name}:{bound.getsockname()[1]}/"

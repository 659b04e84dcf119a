"""The page on a run: its answers, its limits, and the page itself in a browser."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hsft.finished import serve_limits
from hsft.finished.open_run import OpenRun, open_run
from hsft.finished.serve import KEY_VARIABLE, make_server
from hsft.finished.serve_api import ServeApi, TextSearch
from hsft.finished.serve_app import RunServer
from hsft.finished.serve_batches import Unavailable
from hsft.finished.serve_schema import RecommendRequest
from hsft.report.result import read_ranks
from hsft.utils.errors import InputError
from hsft.utils.program import run_program
from main import main
from recommend import main as recommend_main
from tests.browser import open_browser
from tests.conftest import Project
from tests.helpers import ROOT, make_cache, make_dataset
from tests.served_runs import listening

if TYPE_CHECKING:
    from selenium import webdriver

JSON = {"Content-Type": "application/json"}
ATTACK = "<img src=x onerror=\"document.title='taken'\">"
KEY = "a-key-of-sixteen-characters"
ENTER, DOWN, ESCAPE = "\ue007", "\ue015", "\ue00c"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A run of the untrained and the fine-tuned tiny Llama, and the server of its page."""

    run: OpenRun
    server: RunServer

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        url = f"http://127.0.0.1:{self.server.port}{path}"
        request = urllib.request.Request(url, body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def recommend(self, **request: Any) -> Any:
        answer = self.ask("/recommend", json.dumps(request).encode(), JSON)
        assert answer.status == 200, answer.body
        return answer.json["models"]


@pytest.fixture(scope="module")
def served(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = make_dataset(tmp_path_factory.mktemp("serve"))
    make_cache(root / "dataset" / "tiny_item_embeddings.safetensors")
    rows = (root / "information" / "tiny.csv").read_text().splitlines()
    rows[1 + 3] = """i3,"<img src=x onerror=""document.title='taken'"">",0,0"""
    rows[1 + 4] = "i4,,0,0"
    rows[1 + 5] = "i5,Die ÉCOLE,0,0"
    (root / "information" / "tiny.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        arguments = [
            *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/HLLM/HLLM.yaml"),
            *("--dataset", "tiny", "--user_pretrain_dir", str(llama), "--run_name", "run"),
            *("--MAX_ITEM_LIST_LENGTH", "8", "--precision", "32-true", "--show_progress", "False"),
            *("--use_qlora", "True", "--epochs", "1", "--optim_args.learning_rate", "1e-2"),
        ]
        assert run_program(main, arguments) == 0
        # The program's handlers write to this fixture's captured streams.
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
        run = open_run(root / "saved" / "run")
        with listening(make_server(run, 0, topk=5)) as server:
            yield Served(run, server)


def test_search_by_hand() -> None:
    catalogue = TextSearch(
        ["7", "70", "a7", "x"], ["Star Trek", "A Star Is Born, 7", "", "Big star: TREK 2"]
    )
    assert catalogue.search("STAR") == [0, 1, 3]
    assert catalogue.search("trek star") == [0, 3]
    # The id itself, then what begins so, then what contains it.
    assert catalogue.search("7") == [0, 1, 2]
    assert catalogue.search("a7") == [2]
    assert catalogue.search("big") == [3]
    assert catalogue.search("a") == [1, 2, 0, 3]
    assert catalogue.search("  ") == [0, 1, 2, 3]
    assert catalogue.search("", most=2) == catalogue.search("s", most=2) == [0, 1]
    # Not across the end of a title and the id.
    assert catalogue.search("trek7") == []


def test_items_and_users_are_found(served: Served) -> None:
    info = served.ask("/info").json
    assert info["models"] == ["untrained", "fine-tuned"]
    assert (info["dataset"], info["run"]) == ("tiny", "run")
    assert (info["items"], info["users"], info["max_length"], info["topk"]) == (20, 30, 8, 5)

    assert served.ask("/items?q=" + urllib.parse.quote("école")).json == {
        "items": [{"item_id": "i5", "title": "Die ÉCOLE"}]
    }
    assert served.ask("/items?q=I4").json["items"][0] == {"item_id": "i4", "title": ""}
    assert served.ask("/items?q=nothing").json == {"items": []}
    # The most frequent items first.
    counts = np.bincount(served.run.data.interactions.items, minlength=21)
    numbers = served.run.item_numbers(
        [item["item_id"] for item in served.ask("/items").json["items"]]
    )
    assert counts[numbers].tolist() == sorted(counts[1:], reverse=True)

    users = served.ask("/users?q=u2").json["users"]
    assert [user["user_id"] for user in users] == ["u2", *(f"u2{n}" for n in range(10))]
    assert users[0]["items"] == 10
    some = served.ask("/users").json["users"]
    assert [user["user_id"] for user in some] == [f"u{n}" for n in range(20)]


def test_a_user_with_its_history(served: Served) -> None:
    ids = served.run.data.interactions.item_ids
    history = served.ask("/users/u2").json["history"]
    assert [item["item_id"] for item in history] == ids[served.run.history("u2")].tolist()
    assert {"item_id": "i3", "title": ATTACK} in served.ask("/users/u0").json["history"]
    drawn = served.ask("/random_user").json
    assert drawn == served.ask(f"/users/{drawn['user_id']}").json


@pytest.mark.parametrize(
    ("history", "topk", "exclude_seen"),
    [(["i1"], 3, True), (["i1", "i2", "i19", "i4", "i3"], 20, True), (["i7", "i8"], 20, False)],
)
def test_recommendations_are_those_of_the_run(
    served: Served, history: list[str], topk: int, exclude_seen: bool
) -> None:
    run, data = served.run, served.run.data.interactions
    models = served.recommend(history=history, topk=topk, exclude_seen=exclude_seen)
    assert [model["name"] for model in models] == list(run.models)
    for model in models:
        actual = run.recommend(
            run.build(model["name"]), [run.item_numbers(history)], topk, exclude_seen
        )
        left = actual.items[0] > 0
        assert left.sum() == min(topk, 20 - exclude_seen * len(history))
        assert [item["item_id"] for item in model["items"]] == data.item_ids[
            actual.items[0][left]
        ].tolist()
        assert [item["score"] for item in model["items"]] == pytest.approx(actual.scores[0][left])
        assert all(item["title"] == run.titles[item["item_id"]] for item in model["items"])
        assert "found" not in model
    assert models[0]["items"] != models[1]["items"]


def test_the_left_out_item_has_the_rank_of_evaluation(served: Served) -> None:
    data = served.run.data.interactions
    ranks = {name: read_ranks(served.run.folder, name) for name in served.run.models}
    for user in range(0, data.num_users, 3):
        items = data.item_ids[served.run.history(data.user_ids[user])].tolist()
        for model in served.recommend(history=items[:-1], find=items[-1], topk=2):
            users, expected = ranks[model["name"]]
            assert model["found"] == {
                "rank": int(expected[users == user][0]),
                "candidates": 20 - (len(items) - 1),
            }
            assert len(model["items"]) == 2
    (untrained, tuned) = served.recommend(history=["i1", "i2"], find="i1")
    assert untrained["found"] is None
    assert tuned["found"] is None


def test_a_reference_model_alone_and_items_without_interactions(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    run = open_run("saved/run")
    ids = run.data.interactions.item_ids
    # As after adding an item that nobody has met.
    object.__setattr__(run.data.interactions, "item_ids", np.append(ids, "fresh"))
    api = ServeApi(run, 10)
    assert api.info()["models"] == ["pop"]
    (model,) = api.recommend(RecommendRequest(history=["i1"]))["models"]
    assert model["name"] == "pop"
    assert len(model["items"]) == 10
    assert api.items("fresh") == {"items": [{"item_id": "fresh", "title": "", "new": True}]}


def test_every_answer_carries_the_security_headers(served: Served) -> None:
    for path, status in (("/", 200), ("/info", 200), ("/users/nobody", 404), ("/x", 404)):
        answer = served.ask(path)
        assert answer.status == status
        headers = answer.headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "server" not in {name.lower() for name in headers}
    assert served.ask("/").headers["content-type"] == "text/html; charset=utf-8"
    assert served.ask("/info").headers["content-type"] == "application/json"


BAD_BODIES = {
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b'{"history": ["\xff"]}', "body is not JSON in UTF-8, nests too deep or"),
    "too deep": (b"[" * 100_000, "body is not JSON in UTF-8, nests too deep or"),
    "empty": (b"", "the request's body: field required"),
    "a list": (b"[]", "the request's body: input should be a valid dictionary"),
    "neither": (b"{}", "either a user or a history, and not both"),
    "both": (b'{"history": ["i1"], "user": "u1"}', "either a user or a history, and not both"),
    "numbers": (b'{"history": [1]}', "history.0: input should be a valid string"),
    "text": (b'{"history": "i1"}', "history: input should be a valid list"),
    "nothing": (b'{"history": []}', "history: list should have at least 1 item"),
    "too many": (b'{"history": [' + b'"i1",' * 10_000 + b'"i1"]}', "at most 10000 items"),
    "unknown item": (b'{"history": ["i1", "i99"]}', "no item 'i99'"),
    "line break": (b'{"history": ["a\\nb"]}', r"no item 'a\nb'"),
    "half a surrogate": (b'{"history": ["\\ud800"]}', "history.0: input should be a valid str"),
    "padding": (b'{"history": ["[PAD]"]}', "no item '[PAD]'"),
    "topk 0": (b'{"history": ["i1"], "topk": 0}', "topk: input should be greater than or equal"),
    "topk 101": (b'{"history": ["i1"], "topk": 101}', "less than or equal to 100"),
    "topk true": (b'{"history": ["i1"], "topk": true}', "topk: input should be a valid integer"),
    "topk 1.5": (b'{"history": ["i1"], "topk": 1.5}', "topk: input should be a valid integer"),
    "exclude_seen": (b'{"history": ["i1"], "exclude_seen": 1}', "exclude_seen: input should be a"),
    "find": (b'{"history": ["i1"], "find": 1}', "find: input should be a valid string"),
    "find unknown": (b'{"history": ["i1"], "find": "i99"}', "no item 'i99'"),
    "unknown key": (b'{"history": ["i1"], "top_k": 1}', "unknown key 'top_k'"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(served: Served, case: str) -> None:
    body, said = BAD_BODIES[case]
    answer = served.ask("/recommend", body, JSON)
    assert answer.status == 400
    assert list(answer.json) == ["error"]
    assert said in answer.json["error"]


BIG = b'{"history": ["' + b"x" * (6 << 20) + b'"]}'
BAD_REQUESTS: dict[str, tuple[str, str, dict[str, str], bytes | None, int, str]] = {
    "unknown route": ("GET", "/nothing", {}, None, 404, "nothing at /nothing"),
    "slash": ("POST", "/recommend/", JSON, b"{}", 404, "nothing at /recommend/"),
    "a folder": ("GET", "/../code/", {}, None, 404, "nothing at"),
    "this module": ("GET", "/serve.py", {}, None, 404, "nothing at"),
    "no user": ("GET", "/users/", {}, None, 404, "no user ''"),
    "unknown user": ("GET", "/users/u%2F99", {}, None, 404, "no user 'u/99'"),
    "GET recommend": ("GET", "/recommend", {}, None, 405, "use POST"),
    "POST page": ("POST", "/", JSON, b"{}", 405, "use GET"),
    "PUT": ("PUT", "/recommend", JSON, b"{}", 405, "use POST"),
    "OPTIONS": ("OPTIONS", "/recommend", {}, None, 405, "use POST"),
    "DELETE": ("DELETE", "/users/u1", {}, None, 405, "use GET"),
    "no such method": ("BREW", "/", {}, None, 405, "use GET"),
    "a form": (
        *("POST", "/recommend", {"Content-Type": "text/plain"}, b'{"history": ["i1"]}'),
        *(415, "Content-Type is not application/json"),
    ),
    "too large": ("POST", "/recommend", JSON, BIG, 413, "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(served: Served, case: str) -> None:
    method, path, headers, body, status, said = BAD_REQUESTS[case]
    answer = served.ask(path, body, headers, method)
    assert answer.status == status
    assert said in answer.json["error"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:99", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("evil.example:8000", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1@evil.example", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_names_of_other_hosts_are_refused(served: Served, host: str, status: int) -> None:
    for path in ("/", "/info"):
        assert served.ask(path, headers={"Host": host}).status == status


def raw(served: Served, sent: bytes, *, end: bool = False) -> bytes:
    """Send bytes over a connection of their own and return all that comes back.

    `end`: say that nothing follows, after which uvicorn answers no more.
    """
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=30) as client:
        client.sendall(sent)
        if end:
            client.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while part := client.recv(65536):
                received += part
        return received


POST = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CLOSE = POST + b"Connection: close\r\n"

WEB_SOCKET = (
    b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

GARBAGE = {
    "nothing": (b"", b""),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
    "words": (b"one two three four\r\n\r\n", b"400"),
    "version": (b"GET / HTTP/9.9\r\n\r\n", b"400"),
    "long path": (b"GET /" + b"x" * 90_000 + b" HTTP/1.1\r\n\r\n", b"400"),
    "long header": (b"GET / HTTP/1.1\r\nX: " + b"x" * 90_000 + b"\r\n\r\n", b"400"),
    "no URL": (b"GET //[ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
    "no host": (b"GET / HTTP/1.0\r\n\r\n", b"400"),
    # Answered as if it were not asked for.
    "web socket": (WEB_SOCKET, b"200"),
    "short body": (POST + b"Content-Length: 100\r\n\r\n{", b""),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", b"400"),
    "chunks": (CLOSE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_answered_and_the_server_goes_on(
    served: Served, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sent, status = GARBAGE[case]
    received = raw(served, sent, end=not status)
    assert received[9:12] == status
    assert served.ask("/info").status == 200
    assert "Traceback" not in "".join(capfd.readouterr())


def test_one_connection_serves_several_requests(served: Served) -> None:
    body = b'{"history": ["i99"]}'
    bad = POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    good = b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    received = raw(served, bad + good)
    assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"400", b"200"]
    # A body is not taken for a request.
    unread = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(good)
    )
    assert raw(served, unread + good).count(b"HTTP/1.1 ") == 1


def test_clients_that_go_or_wait(
    served: Served, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"history": ["i1"], "topk": 20}'
    request = POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served.server.port)) as client:
            client.sendall(request)
            # Closing then resets the connection.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    monkeypatch.setattr(serve_limits, "BODY_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=30) as client:
        client.sendall(request[:-5])
        assert client.recv(100)[9:12] == b"408"
    assert served.ask("/info").status == 200
    assert "Traceback" not in "".join(capfd.readouterr())


def test_openapi_describes_the_routes_and_docs_lists_them_without_a_script(served: Served) -> None:
    schema = served.ask("/openapi.json").json
    assert set(schema["paths"]) == {
        *("/info", "/items", "/users", "/users/{user_id}", "/random_user", "/recommend"),
        *("/similar", "/health", "/metrics"),
    }
    request = schema["paths"]["/recommend"]["post"]
    assert "RecommendRequest" in schema["components"]["schemas"]
    assert set(request["responses"]) == {"200", "4XX", "5XX"}
    page = served.ask("/docs").body.decode()
    assert "POST /recommend" in page
    assert "item ids, oldest first" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://ADDRESS/recommend", "")
    assert served.ask("/redoc").status == 404


def test_a_missing_extra_is_one_sentence(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"uvicorn is not installed; install .*hsft\[serve\]"):
        make_server(served.run, 0)


def test_a_defect_is_logged_and_not_shown(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.server.api, "info", broken)
    answer = served.ask("/info")
    assert answer.status == 500
    assert answer.json == {"error": "the request failed; the log says why."}
    # uvicorn writes it after the answer.
    for _ in range(100):
        if "secret" in caplog.text:
            break
        time.sleep(0.05)
    assert "secret" in caplog.text


def test_what_cannot_be_listened_on(served: Served) -> None:
    run = served.run
    with pytest.raises(InputError, match=rf"port {served.server.port} of 127\.0\.0\.1: Address"):
        make_server(run, served.server.port)
    with pytest.raises(InputError, match="--serve 65536 is no port"):
        make_server(run, 65536)
    for host in ("nobody.invalid", "", "a b", "\0"):
        with pytest.raises(InputError, match="is no address or name of this machine"):
            make_server(run, 0, host)
    # An address of documentation examples, which no machine has.
    with pytest.raises(InputError, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        make_server(run, 0, "192.0.2.1")
    with pytest.raises(InputError, match="--topk 101 is out of range"):
        make_server(run, 0, topk=101)


def test_beyond_loopback_an_api_key_is_needed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no API key for them; set HSFT_API_KEY"):
        make_server(served.run, 0, "0.0.0.0")
    for bad in ("short", "with a blank in its middle", "not-äscii-but-long-enough"):
        monkeypatch.setenv(KEY_VARIABLE, bad)
        with pytest.raises(InputError, match="must have 16 or more letters"):
            make_server(served.run, 0)


def test_requests_that_wait_are_computed_together(served: Served) -> None:
    """Histories of unlike lengths in one forward pass score as each does alone."""
    histories = [[f"i{n}" for n in range(first, first + 1 + first % 9)] for first in range(10)]
    requests: list[dict[str, Any]] = [
        {"history": history, "topk": 20, "exclude_seen": bool(n % 2), "find": "i19"}
        for n, history in enumerate(histories)
    ]
    alone = [served.recommend(**request) for request in requests]
    batches: list[int] = []
    api = ServeApi(served.run, 5, lambda count, seconds: batches.append(count))
    together: dict[int, Any] = {}

    def ask(number: int) -> None:
        together[number] = api.recommend(RecommendRequest.model_validate(requests[number]))[
            "models"
        ]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(requests))]
    with api._busy:
        threads[0].start()
        # The first is taken at once; the others wait for it.
        while not (threads[0].ident and api._recommending.waiting == 0):
            time.sleep(0.01)
        time.sleep(0.1)
        for thread in threads[1:]:
            thread.start()
        while api.waiting < len(requests) - 1:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert api.close(10)
    assert batches == [1, len(requests) - 1]
    for n, models in enumerate(alone):
        for model, actual in zip(models, together[n], strict=True):
            expected = {item["item_id"]: item["score"] for item in model["items"]}
            scores = {item["item_id"]: item["score"] for item in actual["items"]}
            assert scores == pytest.approx(expected, abs=1e-5)
            assert model.get("found") == actual["found"]
    with pytest.raises(Unavailable, match="the server is ending"):
        api.recommend(RecommendRequest.model_validate(requests[0]))


@pytest.mark.parametrize(
    ("number", "host", "code"),
    [(signal.SIGINT, "127.0.0.1", 130), (signal.SIGTERM, "0.0.0.0", 143)],
)
def test_a_signal_ends_it(
    served: Served,
    number: signal.Signals,
    host: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(served.run.folder.parents[1])
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    statuses = []

    def stop() -> None:
        while True:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/",
                headers={"Host": "other.example", "Authorization": f"Bearer {KEY}"},
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)
            except OSError:
                time.sleep(0.05)
                continue
            os.kill(os.getpid(), number)
            return

    thread = threading.Thread(target=stop)
    thread.start()

    command = ["--run", "saved/run", "--serve", str(port), "--host", host]
    assert run_program(recommend_main, command) == code
    thread.join()
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)
    out, err = capsys.readouterr()
    assert f":{port}/, its API at http" in out
    assert f"interrupted: stopped by {number.name}" in err
    assert "Traceback" not in err
    warned = "--host 0.0.0.0 lets others reach port" in err
    assert (warned, statuses) == ((True, [200]) if host == "0.0.0.0" else (False, [400]))
    # The port is free again.
    with socket.create_server((host, port)):
        pass


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("chrome")) as browser:
        yield browser


@pytest.fixture
def page(chrome: webdriver.Chrome, served: Served) -> Iterator[Page]:
    chrome.get(served.server.url)
    page = Page(chrome, served)
    page.wait(lambda: "Run run, data set tiny: 20 items, 30 users" in page.text("about"))
    yield page
    assert page.errors() == []


@dataclass(frozen=True)
class Page:
    """The page in a browser, read as a person would."""

    chrome: webdriver.Chrome
    served: Served

    def wait(self, condition: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.chrome, 30, poll_frequency=0.05).until(lambda _: condition())

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def text(self, name: str) -> str:
        return self.chrome.find_element("id", name).text

    def value(self, name: str) -> str:
        return str(self.chrome.find_element("id", name).get_property("value"))

    def type(self, name: str, *keys: str) -> None:
        self.chrome.find_element("id", name).send_keys(*keys)

    def take(self, title: str) -> None:
        """Add the item of this title, or id, and wait until it is there."""
        self.type("item", title, ENTER)
        self.wait(lambda: self.history()[-1:] == [title])

    def click(self, selector: str) -> None:
        self.chrome.find_element("css selector", selector).click()

    def options(self, name: str) -> list[str]:
        return self.texts(f"#{name}-choices:not([hidden]) [role=option] .name")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
        return self.chrome.execute_script(script, selector)

    def history(self) -> list[str]:
        return self.texts("#history .name")

    def columns(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return name, and rank, title and score of every row, of each column as shown."""
        script = """return [...document.querySelectorAll("#columns:not([hidden], [aria-busy]) section")].map(
            (section) => [section.querySelector("h2").innerText,
                [...section.querySelectorAll("li")].map((row) =>
                    [".rank", ".text", ".score"].map((part) => row.querySelector(part).innerText))])"""
        actual = self.chrome.execute_script(script)
        return [(name, [tuple(row) for row in rows]) for name, rows in actual]

    def expect(self, history: list[str], **more: Any) -> Any:
        """Wait until the columns are the API's for these item ids, and return the API's models."""
        models = self.served.recommend(history=history, **more)
        expected = [
            (
                model["name"],
                [
                    (str(rank), item["title"] or item["item_id"], f"{item['score']:.4f}")
                    for rank, item in enumerate(model["items"], start=1)
                ],
            )
            for model in models
        ]
        with suppress(Exception):
            self.wait(lambda: self.columns() == expected)
        assert self.columns() == expected
        return models


def test_page_by_keyboard(page: Page) -> None:
    assert page.text("empty") == "The history is empty. Take a user's, or add items."
    assert page.columns() == []
    page.type("item", "item 1")
    # Six of them: i1 and i10 to i19, by frequency; the arrow leads to the second.
    page.wait(lambda: len(page.options("item")) == 11)
    second = page.options("item")[1].removeprefix("item ")
    page.type("item", DOWN, ENTER)
    page.expect([f"i{second}"])
    # Enter before the list is there takes the first match.
    page.type("item", "item 7", ENTER)
    models = page.expect([f"i{second}", "i7"])
    assert page.history() == [f"item {second}", "item 7"]
    assert page.text("status") == "For a history of 2 items."
    # Items that both list are marked in both.
    first, other = ({item["item_id"] for item in model["items"]} for model in models)
    assert len(page.texts("#columns .badge")) == 2 * len(first & other) > 0
    assert set(page.texts("#columns .badge")) == {"in both"}

    for end in ("escape", "clear"):
        page.type("item", "no such thing")
        page.wait(lambda: page.text("item-note") == 'Nothing found for "no such thing".')
        assert page.options("item") == []
        page.type("item", ENTER)
        if end == "escape":
            page.type("item", ESCAPE)
        else:
            before = page.history()
            page.click("#clear")
            page.wait(lambda: page.history() == [])
            assert page.value("item") == ""
            for title in before:
                page.take(title)
        assert page.text("item-note") == ""
    assert page.history() == [f"item {second}", "item 7"]


def test_page_edits_the_history(page: Page) -> None:
    for title in ("item 7", "i4", "item 9"):
        page.take(title)
    page.expect(["i7", "i4", "i9"])
    page.click("#history li:nth-child(3) button[aria-label='Move item 9 up']")
    page.expect(["i7", "i9", "i4"])
    page.click("#history button[aria-label='Remove item 9']")
    page.expect(["i7", "i4"])
    assert page.history() == ["item 7", "i4"]
    page.click("#exclude")
    page.expect(["i7", "i4"], exclude_seen=False)
    page.click("#topk option[value='20']")
    page.expect(["i7", "i4"], exclude_seen=False, topk=20)
    assert page.texts("#columns .badge").count("in history") == 4
    page.click("#clear")
    page.wait(lambda: page.text("empty") != "")
    assert page.columns() == []
    assert page.history() == []


def test_page_takes_a_user_and_finds_the_left_out_item(page: Page) -> None:
    ids = page.served.run.data.interactions.item_ids
    items = ids[page.served.run.history("u2")].tolist()
    page.type("user", "U2", ENTER)
    models = page.expect(items[:-1], find=items[-1])
    title = page.served.run.titles[items[-1]] or items[-1]
    assert page.text("held") == f"User u2. Left out: {title}."
    assert page.value("user") == "u2"
    assert page.texts("#columns .heads") == ["rank\nitem\nscore\nadd"] * 2
    assert [item for item in page.texts("#columns p") if item.startswith("The left-out")] == [
        f"The left-out item is at rank {model['found']['rank']} of 11." for model in models
    ]
    page.click("#topk option[value='20']")
    page.expect(items[:-1], find=items[-1], topk=20)
    marked = page.texts("#columns li.held .text")
    assert marked == [title, title]
    # Of nine items the models read eight.
    assert len(page.texts("#history .unread")) == 1
    assert page.text("status") == "For the last 8 of 9 items."
    page.click("#leave-out")
    page.expect(items, topk=20)
    assert page.text("held") == "User u2, whole history."
    assert page.texts("#columns li.held") == []
    page.click("#leave-out")
    page.expect(items[:-1], find=items[-1], topk=20)
    # A further id takes the place of the one that is shown.
    page.click("#user")
    page.type("user", "u3", ENTER)
    page.wait(lambda: "User u3." in page.text("held"))
    page.click("#random")
    page.wait(lambda: "User u3." not in page.text("held"))
    assert page.text("held").startswith(f"User {page.value('user')}.")
    page.click("#clear")
    page.wait(lambda: page.value("user") == "")


def test_page_shows_html_in_titles_as_text(page: Page) -> None:
    page.type("item", "onerror")
    page.wait(lambda: page.options("item") == [ATTACK])
    page.type("item", ENTER)
    page.click("#exclude")
    page.click("#topk option[value='20']")
    page.expect(["i3"], exclude_seen=False, topk=20)
    assert page.history() == [ATTACK]
    assert page.texts("#columns .text").count(ATTACK) == 2
    assert page.chrome.find_elements("css selector", "main img") == []
    assert page.chrome.title == "HSFT: recommendations"


def test_page_says_what_fails_and_goes_on(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: object) -> None:
        raise InputError("no luck today; try tomorrow.")

    with monkeypatch.context() as patch:
        patch.setattr(page.served.server.api, "recommend", broken)
        page.type("item", "item 7", ENTER)
        page.wait(lambda: page.text("error") == "No luck today; try tomorrow.")
    assert page.columns() == []
    # The browser's own note of the status, and nothing else.
    (entry,) = page.errors()
    assert "400 (Bad Request)" in entry
    page.type("item", "item 9", ENTER)
    page.expect(["i7", "i9"])
    assert page.text("error") == ""


def test_page_goes_on_when_the_server_is_back(chrome: webdriver.Chrome, served: Served) -> None:
    first = make_server(served.run, 0, topk=5)
    with listening(first):
        chrome.get(first.url)
        page = Page(chrome, served)
        page.take("item 7")
        page.expect(["i7"])
    page.type("item", "item 9")
    page.wait(lambda: chrome.find_element("id", "away").is_displayed())
    assert page.text("error") == ""
    with listening(make_server(served.run, first.port, topk=5)):
        page.wait(lambda: not chrome.find_element("id", "away").is_displayed())
        page.expect(["i7"])
        page.type("item", ENTER)
        page.expect(["i7", "i9"])
    # The browser's own notes of refused connections, and nothing else.
    assert all("ERR_CONNECTION_REFUSED" in entry for entry in page.errors())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_narrow_window(page: Page, scheme: str) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    page.type("item", "item 7", ENTER)
    page.expect(["i7"])
    wide = page.chrome.execute_script("return document.documentElement.scrollWidth")
    back = page.chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert wide == 400
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_page_sends_the_times_of_a_history(chrome: webdriver.Chrome, project: Project) -> None:
    file = project.root / "dataset" / "tiny.csv"
    # Seconds since 1970, a step of about a day.
    dated = re.sub(r",1(\d{3})$", r",16\g<1>00000", file.read_text(), flags=re.MULTILINE)
    file.write_text(dated)
    more = ["--use_timestamps", "True", "--predict_at", "target", "--use_qlora", "True"]
    code, _, err = project.run(*more, "--epochs", "1", "--run_name", "run")
    assert code == 0, err
    run = open_run("saved/run")
    with listening(make_server(run, 0, topk=5)) as server:
        chrome.get(server.url)
        page = Page(chrome, Served(run, server))
        page.wait(lambda: "Run run" in page.text("about"))
        page.type("user", "u2", ENTER)
        # The left-out item has the rank of evaluation, which knows for when it predicts.
        row = int(np.flatnonzero(run.data.interactions.user_ids == "u2")[0])
        left = 20 - (len(run.history("u2")) - 1)
        ranks = [read_ranks(run.folder, name) for name in run.models]
        expected = [
            f"The left-out item is at rank {int(rank[users == row][0])} of {left}."
            for users, rank in ranks
        ]
        page.wait(lambda: set(expected) <= set(page.texts("#columns p")))
        page.take("item 7")
        page.wait(lambda: len(page.columns()) == 2)
        assert page.text("error") == ""

"""A served run under bad input, under a kill and at its end: no traceback, nothing half done."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsft.finished.open_run import OpenRun
from hsft.finished.serve import KEY_VARIABLE, make_server
from hsft.finished.serve_api import ServeApi
from hsft.finished.serve_app import make_app
from hsft.finished.serve_metrics import ServeMetrics
from hsft.finished.serve_schema import AddRequest, NewItem, RecommendRequest, SimilarRequest
from tests.bad_requests import KEY, KINDS, BadRequest, draw, request
from tests.helpers import ROOT, make_cache, make_dataset
from tests.served_runs import knn_run, listening

JSON = {"Content-Type": "application/json"}
EXAMPLES = int(os.environ.get("HSFT_FUZZ_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenRun]:
    root = make_dataset(tmp_path_factory.mktemp("faults"))
    make_cache(root / "dataset" / "tiny_item_embeddings.safetensors", dim=8)
    with knn_run(root) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(run: OpenRun) -> TestClient:
    metrics = ServeMetrics()
    app = make_app(ServeApi(run, 5), metrics, allowed_hosts=["*"], api_key=None)
    return TestClient(app, raise_server_exceptions=False)


TEXTS = st.sampled_from(["i1", "i2", "u1", "tag", "title", "item_knn", "", "[PAD]", "2020-01-01"])
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.text(st.characters(), max_size=20)
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    {
        name
        for model in (RecommendRequest, SimilarRequest, AddRequest, NewItem)
        for name in model.model_fields
    }
)
# Requests near valid ones: known keys, some with values that the key takes.
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "history": st.lists(st.sampled_from(["i1", "i2"]) | ATOMS, max_size=3) | VALUES,
        "user": st.just("u1") | VALUES,
        "item": st.just("i1") | VALUES,
        "topk": st.integers(-1, 101) | VALUES,
        "exclude": st.lists(TEXTS, max_size=3) | VALUES,
        "filter": st.dictionaries(TEXTS, st.lists(TEXTS, max_size=2), max_size=2) | VALUES,
        "diversify": st.floats(-0.5, 1.5) | VALUES,
        "find": TEXTS | VALUES,
        "items": st.lists(
            st.fixed_dictionaries(
                {"item_id": TEXTS | VALUES},
                optional={
                    "text": st.dictionaries(TEXTS, ATOMS, max_size=2) | VALUES,
                    "embedding": st.lists(st.floats(width=64), max_size=9) | VALUES,
                },
            ),
            max_size=3,
        ),
    },
)
BODIES = (
    (NEAR | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES) | VALUES)
    .map(json.dumps)
    .map(str.encode)
)


def check(answer: Any) -> None:
    """Check that an answer is a result, or one sentence about what is wrong with the request."""
    assert answer.status_code in (200, 201, 400, 404, 405, 413, 415), answer.text
    assert "Traceback" not in answer.text
    content = answer.json()
    if answer.status_code >= 400:
        assert list(content) == ["error"]
        sentence = content["error"]
        assert sentence.endswith(".")
        assert sentence.isprintable()
        assert 10 < len(sentence) < 1000


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(["/recommend", "/similar", "/items"]), body=BODIES | st.binary())
def test_drawn_bodies_have_one_sentence_or_a_result(
    client: TestClient, path: str, body: bytes
) -> None:
    check(client.post(path, content=body, headers=JSON))


@settings(max_examples=EXAMPLES // 3, derandomize=True, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    path=st.sampled_from(["/items?q=", "/users?q=", "/users/", "/similar/", "/items/", "/"]),
    text=st.text(max_size=30),
)
def test_drawn_paths_have_one_sentence_or_a_result(
    client: TestClient, method: str, path: str, text: str
) -> None:
    answer = client.request(method, path + urllib.parse.quote(text, safe=""))
    if answer.headers["content-type"].startswith("text/html"):
        assert answer.status_code == 200
    else:
        check(answer)


@dataclass
class Tally:
    """What came of requests: answers by kind and status, and items that were added."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    added: int = 0
    good: int = 0

    @property
    def refused(self) -> int:
        return sum(count for (_, status), count in self.answers.items() if not 200 <= status < 300)


class Client:
    """Sends requests as bytes, over one connection as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._connection: socket.socket | None = None

    def send(self, asked: BadRequest) -> tuple[int, bytes]:
        """Return the status of the answer, 0 where there is none, and its content."""
        if not asked.framed:
            with socket.create_connection(self._address, timeout=60) as alone:
                return self._exchange(alone, asked)
        if self._connection is None:
            self._connection = socket.create_connection(self._address, timeout=60)
        return self._exchange(self._connection, asked)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _exchange(self, connection: socket.socket, asked: BadRequest) -> tuple[int, bytes]:
        # A server may close on what it has not read, and reset what is on its way.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(asked.sent)
            if asked.ends:
                connection.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(connection, method="HEAD" if asked.head else "GET")
        try:
            answer.begin()
            status, content, is_last = answer.status, answer.read(), answer.will_close
        except (http.client.BadStatusLine, ConnectionResetError):
            status, content, is_last = 0, b"", True
        answer.close()
        if is_last and connection is self._connection:
            self.close()
        return status, content


GOOD = {"history": ["i1", "i2"], "topk": 100, "filter": {"tag": ["0", "1", "2", "3"]}}
# HSFT_BAD_REQUESTS=10000 takes a minute or two of one core.
BATTERY = int(os.environ.get("HSFT_BAD_REQUESTS", "1500"))


def send_bad_requests(
    port: int, number: int, most: int, expected: dict[str, float], tally: Tally
) -> None:
    """Send requests until so many were refused, with good ones between them.

    Args:
        port: of a server with the key `KEY`.
        number: of this client, the seed.
        most: requests to be refused.
        expected: scores of the catalogue's first items in answer to `GOOD`.
        tally: what the answers are added to.
    """
    rng, client = random.Random(number), Client(port)
    sent = 0
    while tally.refused < most:
        asked = draw(rng)
        status, content = client.send(asked)
        sent += 1
        about = f"client {number}, request {sent}, {asked.kind}: {status} {asked.sent[:2000]!r}"
        assert status in asked.statuses, f"{about} -> {content[:500]!r}"
        check_sentence(status, content, asked, about)
        tally.answers[asked.kind, status] += 1
        if status == 201:
            tally.added += json.loads(content)["added"]
        if sent % 100 == 0:
            item = {"item_id": f"good-{number}-{sent}", "embedding": [1.0] * 8}
            body = json.dumps({"items": [item]}).encode()
            assert client.send(BadRequest("good", request(body, "/items")))[0] == 201, about
            tally.added += 1
            body = json.dumps({"history": [item["item_id"]]}).encode()
            assert client.send(BadRequest("good", request(body)))[0] == 200, about
        if sent % 20 == 0:
            status, content = client.send(BadRequest("good", request(json.dumps(GOOD).encode())))
            assert status == 200, f"{about}, and then {content!r}"
            by_item = scores(json.loads(content))
            assert {item: by_item[item] for item in expected} == pytest.approx(expected, abs=1e-6)
            tally.good += 1
    client.close()


def check_sentence(status: int, content: bytes, asked: BadRequest, about: str) -> None:
    """Check that a refusal is one sentence, as JSON but where no route is reached."""
    assert b"Traceback" not in content, about
    if status < 400 or asked.head or asked.kind == "HTTP":
        return
    if asked.kind == "host" or content == b"Invalid HTTP request received.":
        assert content.isascii(), about
        return
    answer = json.loads(content)
    assert list(answer) == ["error"], about
    assert answer["error"].endswith("."), about
    assert answer["error"].isprintable(), about
    assert 10 < len(answer["error"]) < 1000, about


def test_bad_requests_are_refused_and_good_ones_between_them_answered(
    run: OpenRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    clients = 4
    tallies = [Tally() for _ in range(clients)]
    with listening(make_server(run, 0, topk=5)) as server:
        body = request(json.dumps(GOOD).encode())
        expected = scores(json.loads(Client(server.port).send(BadRequest("good", body))[1]))
        with ThreadPoolExecutor(clients) as pool:
            sending = [
                pool.submit(
                    send_bad_requests, server.port, n, BATTERY // clients, expected, tallies[n]
                )
                for n in range(clients)
            ]
        for one in sending:
            one.result()
        assert server.api.num_items == 20 + sum(tally.added for tally in tallies)
        metrics = Client(server.port).send(BadRequest("good", request(b"", "/metrics", "GET")))[1]
        assert b'status="5' not in metrics
    assert sum(tally.refused for tally in tallies) >= BATTERY
    # Every kind was refused, and every kind of answer but 200 was one that its kind allows.
    assert {kind for tally in tallies for kind, _ in tally.answers} == set(KINDS)
    assert not [record for record in caplog.records if record.exc_info]
    assert "Traceback" not in "".join(capfd.readouterr())


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ask(port: int, content: dict[str, Any], path: str = "/recommend") -> Any:
    url = f"http://127.0.0.1:{port}{path}"
    made = urllib.request.Request(url, json.dumps(content).encode(), JSON)
    with urllib.request.urlopen(made, timeout=60) as answer:
        return json.loads(answer.read())


def scores(answer: Any) -> dict[str, float]:
    (model,) = answer["models"]
    return {item["item_id"]: item["score"] for item in model["items"]}


def post_items(port: int, *items: str) -> Any:
    """Add items to a server without a key, each with a vector of its own."""
    entries = [{"item_id": item, "embedding": [1.0, *[0.0] * 7]} for item in items]
    return ask(port, {"items": entries}, "/items")


def test_a_killed_server_leaves_the_run_as_it_was(run: OpenRun) -> None:
    """Requests break off or are whole; the next server on the same port answers them the same."""
    root = run.folder.absolute().parents[1]
    before = digest(root)
    command = [sys.executable, f"{ROOT}/code/recommend.py", "--run", "saved/run", "--serve", "0"]
    answers: list[Any] = []
    added: list[str] = []
    broken: list[BaseException] = []
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("http://127.0.0.1:")[1].split("/")[0])

        def keep_asking() -> None:
            while True:
                try:
                    answers.append(ask(port, GOOD))
                except (OSError, ValueError, EOFError) as error:
                    broken.append(error)
                    return

        def keep_adding(client: int) -> None:
            for number in itertools.count():
                items = [f"n{client}-{number}-{place}" for place in range(2)]
                try:
                    post_items(port, *items)
                except (OSError, ValueError, EOFError) as error:
                    broken.append(error)
                    return
                added.extend(items)

        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        threads += [threading.Thread(target=keep_adding, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        while len(answers) < 8 or len(added) < 8:
            time.sleep(0.01)
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()
    assert len(broken) == 5
    # Not bit by bit: requests are computed together in batches of several sizes.
    assert all(scores(one) == pytest.approx(scores(answers[0]), abs=1e-6) for one in answers)
    assert digest(root) == before
    with listening(make_server(run, port, topk=5)) as again:
        assert scores(ask(port, GOOD)) == pytest.approx(scores(answers[0]), abs=1e-6)
        # Items are the server's as long as it lives: the same ones can be sent again.
        for first in range(0, len(added), 2):
            post_items(port, *added[first : first + 2])
        assert again.api.num_items == 20 + len(added)


CLIENT = """
import json, socket, sys, time
vector = [1.0] + [0.0] * 7
connections = []
for item, left_out in (("whole", 0), ("half", 30)):
    body = json.dumps({"items": [{"item_id": item, "embedding": vector}]}).encode()
    sent = b"POST /items HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
    sent += b"Content-Length: %d\\r\\n\\r\\n%s" % (len(body), body)
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    connection.sendall(sent[: len(sent) - left_out])
    connections.append(connection)
print("sent", flush=True)
time.sleep(600)
"""


def test_a_client_that_is_killed_adds_all_of_its_items_or_none(
    run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(make_server(run, 0, topk=5)) as server:
        command = [sys.executable, "-c", CLIENT, str(server.port)]
        # The client does not live to read its answer.
        with (
            server.api._adding,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client,
        ):
            assert client.stdout is not None
            assert client.stdout.readline() == "sent\n"
            client.send_signal(signal.SIGKILL)
        while server.api.num_items == 20:
            time.sleep(0.01)
        assert "half" not in scores(ask(server.port, GOOD | {"filter": {}}))
        assert "whole" in scores(ask(server.port, GOOD | {"filter": {}}))
        assert post_items(server.port, "half") == {"added": 1, "items": 22}
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_under_way_at_the_end_is_answered(run: OpenRun) -> None:
    answers: list[Any] = []
    taken = threading.Event()
    with listening(make_server(run, 0, topk=5)) as server:
        rank = server.api._recommending._compute

        def note_and_rank(asked: Any) -> Any:
            taken.set()
            return rank(asked)

        server.api._recommending._compute = note_and_rank
        asking = threading.Thread(
            target=lambda: answers.append(ask(server.port, {"history": ["i1"]}))
        )
        with server.api._busy:
            asking.start()
            assert taken.wait(60)
            server.should_exit = True
            time.sleep(0.2)
        asking.join()
    (answer,) = answers
    assert len(answer["models"][0]["items"]) == 5

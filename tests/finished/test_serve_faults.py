"""A served run under bad input, under a kill and at its end: no traceback, nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsft.finished.open_run import OpenRun
from hsft.finished.serve import make_server
from hsft.finished.serve_api import ServeApi
from hsft.finished.serve_app import make_app
from hsft.finished.serve_metrics import ServeMetrics
from hsft.finished.serve_schema import AddRequest, NewItem, RecommendRequest, SimilarRequest
from tests.helpers import ROOT, make_cache, make_dataset
from tests.served_runs import knn_run

JSON = {"Content-Type": "application/json"}
EXAMPLES = int(os.environ.get("HSFT_FUZZ_EXAMPLES", "150"))


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


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ask(port: int, request: dict[str, Any]) -> Any:
    url = f"http://127.0.0.1:{port}/recommend"
    made = urllib.request.Request(url, json.dumps(request).encode(), JSON)
    with urllib.request.urlopen(made, timeout=60) as answer:
        return json.loads(answer.read())


def scores(answer: Any) -> dict[str, float]:
    (model,) = answer["models"]
    return {item["item_id"]: item["score"] for item in model["items"]}


def test_a_killed_server_leaves_the_run_as_it_was(run: OpenRun) -> None:
    """Requests break off or are whole; the next server on the same port answers them the same."""
    root = run.folder.absolute().parents[1]
    before = digest(root)
    command = [sys.executable, f"{ROOT}/code/recommend.py", "--run", "saved/run", "--serve", "0"]
    answers: list[Any] = []
    broken: list[BaseException] = []
    request = {"history": ["i1", "i2"], "topk": 10}
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("http://127.0.0.1:")[1].split("/")[0])

        def keep_asking() -> None:
            while True:
                try:
                    answers.append(ask(port, request))
                except (OSError, ValueError, EOFError) as error:
                    broken.append(error)
                    return

        threads = [threading.Thread(target=keep_asking) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(answers) < 8:
            time.sleep(0.01)
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()
    assert len(broken) == 4
    # Not bit by bit: requests are computed together in batches of several sizes.
    assert all(scores(one) == pytest.approx(scores(answers[0]), abs=1e-6) for one in answers)
    assert digest(root) == before
    again = make_server(run, port, topk=5)
    thread = threading.Thread(target=again.serve_until_signal)
    thread.start()
    try:
        while not again.started:
            time.sleep(0.01)
        answer = ask(port, request)
    finally:
        again.should_exit = True
        thread.join()
    assert scores(answer) == pytest.approx(scores(answers[0]), abs=1e-6)


def test_a_request_under_way_at_the_end_is_answered(run: OpenRun) -> None:
    server = make_server(run, 0, topk=5)
    thread = threading.Thread(target=server.serve_until_signal)
    thread.start()
    answers: list[Any] = []
    taken = threading.Event()
    rank = server.api._recommending._compute

    def note_and_rank(asked: Any) -> Any:
        taken.set()
        return rank(asked)

    server.api._recommending._compute = note_and_rank
    asking = threading.Thread(target=lambda: answers.append(ask(server.port, {"history": ["i1"]})))
    with server.api._busy:
        while not server.started:
            time.sleep(0.01)
        asking.start()
        assert taken.wait(60)
        server.should_exit = True
        time.sleep(0.2)
    asking.join()
    thread.join()
    (answer,) = answers
    assert len(answer["models"][0]["items"]) == 5

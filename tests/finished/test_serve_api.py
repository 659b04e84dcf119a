"""The API of a served run: users, times, exclusions, filters, similar items, key, metrics."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from hsft.finished import serve_limits
from hsft.finished.open_run import OpenRun, open_run
from hsft.finished.serve_api import ServeApi
from hsft.finished.serve_app import make_app
from hsft.finished.serve_metrics import ServeMetrics
from tests.conftest import Project
from tests.helpers import make_cache, make_dataset
from tests.served_runs import knn_run

KEY = "a-key-of-sixteen-characters"


def client_of(run: OpenRun, key: str | None = None) -> TestClient:
    metrics = ServeMetrics()
    api = ServeApi(run, 5, metrics.on_batch)
    metrics.watch(lambda: api.waiting, lambda: api.num_items)
    return TestClient(
        make_app(api, metrics, allowed_hosts=["*"], api_key=key), raise_server_exceptions=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenRun]:
    """A run of item_knn, which needs no training: scores are cosines to the last item."""
    root = make_dataset(tmp_path_factory.mktemp("api"))
    make_cache(root / "dataset" / "tiny_item_embeddings.safetensors", dim=8)
    file = root / "information" / "tiny.csv"
    rows = file.read_text().splitlines()
    rows[1:4] = ["i0,item 0,Comedy,0", 'i1,item 1,"Drama, Comedy",1', "i2,item 2,war|drama,2"]
    file.write_text("\n".join(rows) + "\n")
    with knn_run(root) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(run: OpenRun) -> TestClient:
    return client_of(run)


def post(client: TestClient, path: str, **request: Any) -> Any:
    answer = client.post(path, json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()["models"]


def listed(client: TestClient, path: str, **request: Any) -> list[str]:
    (model,) = post(client, path, **request)
    return [item["item_id"] for item in model["items"]]


def refused(client: TestClient, path: str, **request: Any) -> str:
    answer = client.post(path, json=request)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


def test_a_user_stands_for_its_history(client: TestClient, run: OpenRun) -> None:
    ids = run.data.interactions.item_ids[run.history("u3")].tolist()
    assert post(client, "/recommend", user="u3") == post(client, "/recommend", history=ids)
    assert "no user 'u99'" in refused(client, "/recommend", user="u99")
    assert "either a user or a history" in refused(client, "/recommend", topk=3)


def test_exclusions_and_models(client: TestClient) -> None:
    everything = listed(client, "/recommend", history=["i1"], topk=100)
    assert len(everything) == 19
    best = everything[:3]
    left = listed(client, "/recommend", history=["i1"], topk=100, exclude=best, model="item_knn")
    assert left == everything[3:]
    assert "no item 'i99'" in refused(client, "/recommend", history=["i1"], exclude=["i99"])
    assert "there is no 'x'; the run has item_knn" in refused(
        client, "/similar", item="i1", model="x"
    )


def test_filters_by_columns_of_the_information(client: TestClient) -> None:
    assert client.get("/info").json()["filters"] == ["title", "tag", "description"]

    def tagged(**columns: list[str]) -> set[str]:
        request = {"history": ["i9"], "topk": 100, "filter": columns}
        return set(listed(client, "/recommend", **request))

    assert tagged(tag=["comedy"]) == {"i0", "i1"}
    assert tagged(tag=["Drama"]) == {"i1", "i2"}
    assert tagged(tag=[" drama, COMEDY "]) == {"i1"}
    assert tagged(tag=["War", "comedy"]) == {"i0", "i1", "i2"}
    assert tagged(tag=["comedy", "drama"], description=["1"]) == {"i1"}
    assert tagged(tag=["western"]) == set()
    assert "no column 'genre'; the item information has title, tag, description" in refused(
        client, "/recommend", history=["i1"], filter={"genre": ["x"]}
    )
    assert "filter.tag: list should have at least 1 item" in refused(
        client, "/recommend", history=["i1"], filter={"tag": []}
    )


def test_similar_items_are_the_nearest_by_cosine(client: TestClient, run: OpenRun) -> None:
    cache = run.data.cache
    assert cache is not None
    vectors = cache.embeddings.numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = dict(zip(cache.item_ids, unit @ unit[cache.item_ids.index("i4")], strict=True))
    (model,) = post(client, "/similar", item="i4", topk=4)
    expected = sorted(cosines, key=lambda item: -cosines[item])[1:5]
    assert [item["item_id"] for item in model["items"]] == expected
    assert [item["score"] for item in model["items"]] == pytest.approx(
        [cosines[item] for item in expected], abs=1e-6
    )
    assert listed(client, "/similar", item="i4", topk=3, exclude=expected[:1]) == expected[1:]
    assert "no item 'i99'" in refused(client, "/similar", item="i99")
    assert "item: field required" in refused(client, "/similar")


def test_diversity_changes_the_list_and_not_its_first_item(client: TestClient) -> None:
    plain = listed(client, "/recommend", history=["i1"], topk=5)
    diverse = listed(client, "/recommend", history=["i1"], topk=5, diversify=0.7)
    assert diverse[0] == plain[0]
    assert set(diverse) != set(plain)
    assert "diversify: input should be less than or equal to 1" in refused(
        client, "/recommend", history=["i1"], diversify=1.5
    )


def test_a_run_without_times_takes_none(client: TestClient) -> None:
    assert "times: the run's model reads no times" in refused(
        client, "/recommend", history=["i1"], times=[1]
    )
    assert "predict_at: the run does not know" in refused(
        client, "/recommend", history=["i1"], predict_at=1
    )
    assert "a user's items have times of their own" in refused(
        client, "/recommend", user="u1", times=[1]
    )


def test_popularity_has_no_item_vectors(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    client = client_of(open_run("saved/run"))
    said = "a run of pop has no item vectors to compare"
    assert said in refused(client, "/similar", item="i1")
    assert said in refused(client, "/recommend", history=["i1"], diversify=0.5)
    # Without an information file there is nothing to filter by.
    (project.root / "information" / "tiny.csv").unlink()
    client = client_of(open_run("saved/run"))
    assert client.get("/info").json()["filters"] == []
    assert "no column 'tag'; the item information has none" in refused(
        client, "/recommend", history=["i1"], filter={"tag": ["x"]}
    )


@pytest.mark.parametrize("predict_at", ["unknown", "target"])
def test_a_run_that_reads_times(project: Project, predict_at: str) -> None:
    file = project.root / "dataset" / "tiny.csv"
    header, *rows = file.read_text().splitlines()
    # A day a step, from 2020-09-13 on, in milliseconds.
    days = [row.rsplit(",", 1) for row in rows]
    rows = [f"{row},{(1_600_000_000 + (int(step) - 1000) * 86_400) * 1000}" for row, step in days]
    file.write_text("\n".join([header, *rows]) + "\n")
    more = ["--use_timestamps", "True", "--predict_at", predict_at, "--use_qlora", "True"]
    more += ["--epochs", "1", "--optim_args.learning_rate", "1e-2", "--run_name", "run"]
    code, _, err = project.run(*more)
    assert code == 0, err
    run = open_run("saved/run")
    client = client_of(run)
    info = client.get("/info").json()
    assert info["reads_times"]
    assert info["predicts_at"] == (predict_at == "target")
    history = client.get("/users/u0").json()["history"]
    assert [item["time"] for item in history[:2]] == [
        "2020-09-13T12:26:40Z",
        "2020-09-14T12:26:40Z",
    ]
    at = {"predict_at": "2020-10-01"} if predict_at == "target" else {}
    by_user = post(client, "/recommend", user="u0", topk=20, **at)
    ids, times = ([item[key] for item in history] for key in ("item_id", "time"))
    assert post(client, "/recommend", history=ids, times=times, topk=20, **at) == by_user
    numbers = [1_600_000_000_000 + day * 86_400_000 for day in range(len(ids))]
    assert post(client, "/recommend", history=ids, times=numbers, topk=20, **at) == by_user
    # As the command recommends.
    at_times = run.history_times("u0", at.get("predict_at"))
    assert at_times is not None
    tuned = next(model for model in by_user if model["name"] == "fine-tuned")
    expected = run.recommend(
        run.build("fine-tuned"),
        [run.history("u0")],
        20,
        times=[at_times],
    )
    scores = dict(zip(expected.items[0], expected.scores[0], strict=True))
    number = {str(item): n for n, item in enumerate(run.data.interactions.item_ids)}
    assert [item["score"] for item in tuned["items"]] == pytest.approx(
        [scores[number[item["item_id"]]] for item in tuned["items"]], abs=1e-5
    )
    other = [f"2021-03-{day:02}" for day in range(1, len(ids) + 1)]
    assert post(client, "/recommend", history=ids, times=other, topk=20, **at) != by_user
    bad: list[tuple[Any, str]] = [
        (None, "so 2 are needed for its 2 items and there are none"),
        ([1], "there are 1"),
        ([True, 2], "times.0: a time is a date in ISO 8601 or a number"),
        (["today", 2], "times.0: 'today' is no time"),
        ([1_600_000_000, 1_600_000_001], "times.0: '1600000000' is no time of 1990 to 2099"),
        (["2021-03-02", "2021-03-01"], "times.1 is earlier than the one before it"),
    ]
    for given, said in bad:
        assert said in refused(client, "/recommend", history=["i1", "i2"], times=given)


def test_the_api_key_is_asked_for_except_for_health(run: OpenRun) -> None:
    client = client_of(run, KEY)
    assert client.get("/health").json() == {"status": "ok"}

    def basic(password: str) -> str:
        return "Basic " + base64.b64encode(f"someone:{password}".encode()).decode()

    for path in ("/", "/info", "/docs", "/metrics", "/openapi.json", "/nothing"):
        for given in (None, "Bearer", f"Bearer {KEY}x", KEY, basic("x"), "Basic ??", "Bearer é"):
            headers = {} if given is None else {b"Authorization": given.encode()}
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert "API key" in answer.json()["error"]
            assert answer.headers["www-authenticate"].startswith("Basic realm=")
            assert KEY not in answer.text
    assert client.post("/recommend", content=b"{").status_code == 401
    for given in (f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)):
        assert client.get("/info", headers={"Authorization": given}).status_code == 200
    schema = client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert schema["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"}
    }


def test_metrics_count_requests_by_route(run: OpenRun) -> None:
    client = client_of(run)
    listed(client, "/recommend", history=["i1"])
    refused(client, "/recommend", history=["i99"])
    for name in ("u1", "u2", "nobody"):
        client.get(f"/users/{name}")
    client.get("/made-up")
    client.request("BREW", "/")
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    counts = {
        (sample.labels["route"], sample.labels["method"], sample.labels["status"]): sample.value
        for sample in families["hsft_requests"].samples
        if sample.name.endswith("_total")
    }
    assert counts == {
        ("/recommend", "POST", "200"): 1,
        ("/recommend", "POST", "400"): 1,
        ("/users/{user_id:path}", "GET", "200"): 2,
        ("/users/{user_id:path}", "GET", "404"): 1,
        ("other", "GET", "404"): 1,
        ("/", "other", "405"): 1,
    }
    values = {
        sample.name: sample.value for family in families.values() for sample in family.samples
    }
    assert values["hsft_items"] == 20
    assert values["hsft_requests_waiting"] == 0
    assert values["hsft_batch_requests_count"] == values["hsft_batch_requests_sum"] == 1


def test_requests_beyond_a_number_are_put_off(
    run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_limits.RequestLimit.__init__, "__defaults__", (0,))
    client = client_of(run)
    answer = client.get("/info")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "has 0 requests under way; send it again later" in answer.json()["error"]
    assert client.get("/health").status_code == 200


def test_lists_have_limits(client: TestClient) -> None:
    long = ["i1"] * 10_001
    for request, said in (
        ({"history": ["i1"], "exclude": long}, "exclude: list should have at most 10000 items"),
        ({"history": ["x" * 1001]}, "history.0: string should have at most 1000 characters"),
        ({"history": ["i1"], "filter": {"tag": ["x"] * 101}}, "filter.tag: list should have at"),
        (
            {"history": ["i1"], "filter": {str(n): ["x"] for n in range(11)}},
            "filter: dictionary should have at most 10 items",
        ),
        ({"history": ["i1"], "find": "x" * 1001}, "find: string should have at most"),
    ):
        assert said in refused(client, "/recommend", **request)


def test_what_the_page_says_of_the_answers(client: TestClient, tmp_path: Path) -> None:
    page = client.get("/docs").text
    for text in ("POST /similar", "GET /metrics", "weight of being unlike", "column of the item"):
        assert text in page
    assert json.dumps({"history": ["1", "2"], "topk": 3}).replace('"', "&#34;") in page

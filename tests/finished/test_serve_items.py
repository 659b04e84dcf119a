"""Items that are added to a served run, by text and by vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hsft.config import Config
from hsft.encoding.item_llm import ItemEncoder
from hsft.finished.new_items import add_items
from hsft.finished.open_run import OpenRun, open_run
from hsft.finished.serve_api import ServeApi
from hsft.finished.serve_schema import AddRequest, RecommendRequest, SimilarRequest
from hsft.inputs.cache_items import load_text_encoder
from hsft.utils.errors import InputError
from item_caching import main as cache_main
from tests.conftest import Project

TEXTS = [
    {"item_id": "n1", "text": {"title": "item 31", "tag": "2, new", "description": "5"}},
    {"item_id": "n2", "text": {"title": 'item "7"\nitem 8', "tag": "1"}},
]


@pytest.fixture
def trained(project: Project) -> OpenRun:
    """A fine-tuned run with the cache that its tiny Llama made."""
    cache = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache.unlink()
    made = ("--item_pretrain_dir", str(project.llama), "--item_cache_dtype", "float32")
    assert project.call(cache_main, [*project.arguments, *made])[0] == 0
    more = ["--item_embedding_transform", "standardize", "--use_qlora", "True", "--epochs", "1"]
    code, _, err = project.run(*made[:2], "--nce_thres", "1.01", "--run_name", "run", *more)
    assert code == 0, err
    return open_run("saved/run")


def scores(api: ServeApi, *history: str, **more: Any) -> dict[str, dict[str, float]]:
    request = RecommendRequest(history=list(history), topk=100, **more)
    return {
        model["name"]: {item["item_id"]: item["score"] for item in model["items"]}
        for model in api.recommend(request)["models"]
    }


def add(api: ServeApi, *items: dict[str, Any]) -> dict[str, Any]:
    return api.add_items(AddRequest.model_validate({"items": list(items)}))


def test_added_items_score_as_with_the_command(trained: OpenRun, project: Project) -> None:
    (project.root / "new.csv").write_text(
        'item_id,title,tag,description\nn1,item 31,"2, new",5\nn2,"item ""7""\nitem 8",1,\n'
    )
    expected = ServeApi(add_items(trained, "new.csv"), 5)
    api = ServeApi(trained, 5)
    before = scores(api, "i3", "i4")
    assert add(api, *TEXTS) == {"added": 2, "items": 22}
    after = scores(api, "i3", "n1", "i4")
    for name, by_item in scores(expected, "i3", "n1", "i4").items():
        assert after[name] == pytest.approx(by_item, abs=1e-5)
        assert "n2" in by_item
    for name, by_item in scores(api, "i3", "i4").items():
        assert set(by_item) - set(before[name]) == {"n1", "n2"}
        assert {item: by_item[item] for item in before[name]} == pytest.approx(
            before[name], abs=1e-5
        )
    # A vector from the cache: an item like i5 in everything but its id.
    cache = trained.data.cache
    assert cache is not None
    vector = cache.embeddings[cache.rows_of(["i5"])[0]].tolist()
    twin = {"item_id": "n3", "embedding": vector, "text": {"title": "like i5", "tag": "new"}}
    assert add(api, twin) == {"added": 1, "items": 23}
    for by_item in scores(api, "i3", "n2").values():
        assert by_item["n3"] == pytest.approx(by_item["i5"], abs=1e-6)
    # It is found by its title, its tag and its vector.
    assert api.items("like i5")["items"] == [{"item_id": "n3", "title": "like i5", "new": True}]
    for by_item in scores(api, "i3", filter={"tag": ["new"]}).values():
        assert set(by_item) == {"n1", "n3"}
    for model in api.similar(SimilarRequest(item="n3", topk=3))["models"]:
        cosines = {item["item_id"]: item["score"] for item in model["items"]}
        assert cosines["i5"] == pytest.approx(1, abs=1e-5)
    assert api.info()["items"] == 23


def test_the_item_llm_is_loaded_once(trained: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(config: Config) -> ItemEncoder:
        loaded.append(config.item_pretrain_dir)
        return load_text_encoder(config)

    monkeypatch.setattr("hsft.finished.new_items.load_text_encoder", load)
    api = ServeApi(trained, 5)
    assert not loaded
    add(api, TEXTS[0])
    # Encoded as if it had come alone, though a text of another length came before.
    add(api, TEXTS[1])
    assert len(loaded) == 1
    alone = ServeApi(trained, 5)
    add(alone, TEXTS[1])
    expected, actual = scores(alone, "i3", "i4"), scores(api, "i3", "i4")
    for name, by_item in expected.items():
        assert actual[name]["n2"] == pytest.approx(by_item["n2"], abs=1e-5)


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "known": ([TEXTS[0], {**TEXTS[1], "item_id": "i1"}], "in the catalogue of tiny already"),
    "twice": ([TEXTS[0], TEXTS[0]], "items.1.item_id 'n1' comes twice"),
    "blank": ([{**TEXTS[0], "item_id": " n1"}], "items.0.item_id ' n1' begins or ends with"),
    "no id": ([{**TEXTS[0], "item_id": ""}], "items.0.item_id is empty"),
    "no text": ([{"item_id": "n1"}], "items.0 has neither an embedding nor a text"),
    "empty": ([{"item_id": "n1", "text": {"title": " "}}], "items.0 has neither an embedding nor"),
    "column": (
        [{"item_id": "n1", "text": {"name": "x"}}],
        "items.0.text: there is no column 'name'",
    ),
    "NUL": ([{"item_id": "n1", "text": {"title": "\0"}}], "items.0.text.title holds a NUL"),
    "short": ([{"item_id": "n1", "embedding": [1.0]}], "embedding has 1 numbers, and the run's"),
    "zeros": ([{"item_id": "n1", "embedding": [0.0] * 64}], "items.0.embedding is all zeros"),
    "huge": ([{"item_id": "n1", "embedding": [1e300] * 64}], "or too large for float32"),
}


def test_bad_items_are_refused_and_none_is_added(project: Project) -> None:
    assert project.run("--model", "item_knn", "--run_name", "run")[0] == 0
    api = ServeApi(open_run("saved/run"), 5)
    for items, said in BAD.values():
        with pytest.raises(InputError, match=said.replace("'", ".")):
            add(api, *items)
    # Without an ItemLLM nothing can be encoded, and the sentence names no temporary file.
    with pytest.raises(InputError, match="no ItemLLM is named"):
        add(api, TEXTS[0])
    assert api.info()["items"] == 20
    vector = np.ones(64).tolist()
    assert add(api, {"item_id": "n1", "embedding": vector}) == {"added": 1, "items": 21}
    (model,) = api.recommend(RecommendRequest(history=["n1"], topk=1))["models"]
    cache = api._run.data.cache
    assert cache is not None
    unit = torch.nn.functional.normalize(cache.embeddings.float(), dim=-1)
    best = int((unit[:20] @ unit[20]).argmax())
    assert model["items"][0]["item_id"] == cache.item_ids[best]


def test_a_run_that_knows_items_by_ids_takes_none(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    api = ServeApi(open_run("saved/run"), 5)
    with pytest.raises(InputError, match="knows items by their ids and cannot score new ones"):
        add(api, TEXTS[0])

"""Cold start: items that were held out from a run's data are ranked by their text alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cold_start import main as cold_start_main
from hsft.data.cache import open_cache, save_cache
from hsft.data.interactions import read_interactions, renumber
from hsft.finished import write_report
from hsft.finished.cold_start import ColdOnly, cold_start
from hsft.finished.open_run import open_run
from hsft.model.reference import ItemKNN
from report import main as report_main
from tests.conftest import Project
from tests.helpers import ROOT, make_dataset

RUN = "saved/run"
FULL_CACHE = "dataset/tiny_item_embeddings.safetensors"
COLD = ("i17", "i18", "i3")


def hold_out(project: Project) -> None:
    """Write dataset/warm.csv: tiny without the interactions of the cold items."""
    lines = (project.root / "dataset" / "tiny.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[0] not in COLD]
    (project.root / "dataset" / "warm.csv").write_text("\n".join(kept) + "\n")


def warm_run(project: Project, *more: str) -> None:
    hold_out(project)
    where = ("--dataset", "warm", "--item_cache_path", FULL_CACHE, "--run_name", "run")
    code, _, err = project.run(*where, *more)
    assert code == 0, err


def histories(root: Path) -> dict[str, list[str]]:
    """User id -> item ids, oldest first; the file is in that order."""
    actual: dict[str, list[str]] = {}
    for line in (root / "dataset" / "tiny.csv").read_text().splitlines()[1:]:
        item, user, _ = line.split(",")
        actual.setdefault(user, []).append(item)
    return actual


def test_only_cold_items_compete() -> None:
    # Items 1 and 2 are the run's own, 3 to 5 are cold. Cosines to item 1: 0.8, 0, 0.6, -1.
    table = torch.tensor([[0.0, 0], [1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8], [-1, 0]])
    scorer = ColdOnly(ItemKNN(table, "last"), own_items=2)
    user = scorer.user_vectors(torch.tensor([[2, 1]]), torch.tensor([2]))
    scores = (user @ scorer.item_slice(0, 6).T)[0]
    assert scores[3:].tolist() == pytest.approx([0, 0.6, -1])
    assert scores[:3].max() < -1e29
    assert torch.equal(scorer.item_vectors(torch.tensor([1, 4])), scorer.item_slice(0, 6)[[1, 4]])


def test_renumber_keeps_every_interaction(project: Project) -> None:
    data = read_interactions(project.root / "dataset" / "tiny.csv")
    ids = np.concatenate([data.item_ids[:1], data.item_ids[:0:-1], ["other"]]).astype(object)
    again = renumber(data, ids)
    assert again.item_ids[again.items].tolist() == data.item_ids[data.items].tolist()
    assert again.items.dtype == np.int32
    assert again.num_items == data.num_items + 1


def test_every_number_by_hand(project: Project) -> None:
    warm_run(project, "--model", "item_knn")
    code, out, err = project.call(cold_start_main, ["--run", RUN, "--dataset", "tiny", "--json"])
    assert code == 0, err
    rows = {(row["model"], row["candidates"]): row for row in json.loads(out)}
    assert [key[0] for key in rows] == ["item_knn", "pop", "random"] * 2
    cache = open_cache(project.root / FULL_CACHE)
    vectors = cache.embeddings.numpy()
    unit = dict(
        zip(cache.item_ids, vectors / np.linalg.norm(vectors, axis=1)[:, None], strict=True)
    )
    ranks: dict[str, list[int]] = {"all items": [], "cold items": []}
    for *history, target in histories(project.root).values():
        if target not in COLD:
            continue
        score = {item: float(unit[item] @ unit[history[-1]]) for item in unit}
        for kind, pool in (("all items", tuple(unit)), ("cold items", COLD)):
            rivals = [item for item in pool if item not in history and item != target]
            ranks[kind].append(1 + sum(score[item] >= score[target] for item in rivals))
    for kind, items in (("all items", 20), ("cold items", 3)):
        actual = np.array(ranks[kind])
        row = rows["item_knn", kind]
        assert (row["users"], row["items"]) == (len(actual), items)
        assert 0 < len(actual) < 30
        for k in (5, 10):
            entry = row["metrics"][f"Recall@{k}"]
            assert entry["value"] == pytest.approx((actual <= k).mean())
            assert entry["low"] <= entry["value"] <= entry["high"]
            gain = np.where(actual <= k, 1 / np.log2(actual + 1), 0).mean()
            assert row["metrics"][f"NDCG@{k}"]["value"] == pytest.approx(gain)
    # pop counts 0 for every cold item, and ties count against it: the unseen cold items are above.
    pop = np.array(
        [
            sum(item not in history for item in COLD)
            for *history, target in histories(project.root).values()
            if target in COLD
        ]
    )
    entry = rows["pop", "cold items"]["metrics"]["NDCG@5"]
    assert entry["value"] == pytest.approx((1 / np.log2(pop + 1)).mean())
    assert rows["pop", "all items"]["metrics"]["Recall@5"]["value"] == 0


@pytest.mark.parametrize("transform", ["none", "whiten"])
def test_the_fine_tuned_model_on_cold_items(project: Project, transform: str) -> None:
    more = ("--use_qlora", "True", "--epochs", "2", "--optim_args.learning_rate", "1e-2")
    adapter = ("--item_adapter", "linear", "--item_embedding_transform", transform)
    warm_run(project, *more, *adapter, "--eval_protocol", "sampled", "--eval_neg_sample_num", "3")
    rows = cold_start(RUN, "tiny")
    assert [row["model"] for row in rows] == [
        *("untrained", "fine-tuned", "pop", "random", "item_knn")
    ] * 2
    run = open_run(RUN)
    cache = run.data.cache
    assert cache is not None
    rest = [item for item in cache.item_ids if item in COLD]
    new = type(cache)(rest, cache.embeddings[torch.from_numpy(cache.rows_of(rest))])
    extended = run.with_items(new)
    users = [items for items in histories(project.root).values() if items[-1] in COLD]
    past = [extended.item_numbers(items[:-1]) for items in users]
    targets = extended.item_numbers([items[-1] for items in users])
    for row in rows[:2]:
        actual = extended.recommend(extended.build(row["model"]), past, topk=5)
        hits = (actual.items == targets[:, None]).any(axis=1)
        assert row["metrics"]["Recall@5"]["value"] == pytest.approx(hits.mean())
        assert row["users"] == len(users)


def test_the_table(project: Project) -> None:
    warm_run(project, "--val_only", "True")
    code, out, err = project.call(cold_start_main, ["--run", RUN, "--dataset", "tiny"])
    assert code == 0, err
    assert "ranked among all 20 items, seen ones masked:" in out
    assert "ranked among the 3 cold items, seen ones masked:" in out
    assert out.count("| untrained | ") == 2
    assert out.count("| pop | ") == 2


def test_a_warm_cache_does_not_do_but_another_can_be_named(project: Project) -> None:
    hold_out(project)
    full = open_cache(project.root / FULL_CACHE)
    rows = [row for row, item in enumerate(full.item_ids) if item not in COLD]
    save_cache(
        project.root / "dataset" / "warm_item_embeddings.safetensors",
        [full.item_ids[row] for row in rows],
        full.embeddings[rows],
        {},
    )
    assert project.run("--dataset", "warm", "--val_only", "True", "--run_name", "run")[0] == 0
    line = ["--run", RUN, "--dataset", "tiny"]
    code, out, err = project.call(cold_start_main, line)
    assert (code, out) == (2, "")
    assert "3 items of tiny are not in the item cache" in err
    assert "item_caching.py" in err
    assert "--item_cache_path" in err
    code, out, err = project.call(cold_start_main, [*line, "--item_cache_path", FULL_CACHE])
    assert code == 0, err


def test_what_cannot_be_measured(project: Project) -> None:
    warm_run(project, "--val_only", "True")
    make_dataset(project.root, "small", items=5)
    make_dataset(project.root, "other", users=29)
    shutil.copy(project.root / "dataset/warm.csv", project.root / "dataset/copy.csv")
    for name, words in (
        ("none", "unknown dataset 'none'"),
        ("small", "no part of small: that lacks 13 of its 17 items"),
        ("other", "no part of other: that lacks 1 of its 30 users"),
        ("warm", "saved/run was trained on warm itself, so none of its items is new to it; make a"),
        ("copy", "no user's test target in copy is an item that warm lacks"),
    ):
        code, out, err = project.call(cold_start_main, ["--run", RUN, "--dataset", name])
        assert (code, out) == (2, ""), name
        assert words in err.splitlines()[-1]
    config = ("--config_file", f"{ROOT}/code/baselines/sasrec.yaml")
    assert project.run(*config, "--epochs", "1", "--run_name", "ids")[0] == 0
    code, _, err = project.call(cold_start_main, ["--run", "saved/ids", "--dataset", "tiny"])
    assert code == 2
    assert "knows items by their ids" in err


def test_the_report_has_the_same_numbers(project: Project) -> None:
    warm_run(project, "--val_only", "True")
    code, _, err = project.call(
        report_main, [RUN, "--out", "page.html", "--examples", "0", "--cold_start", "tiny"]
    )
    assert code == 0, err
    assert err.count("users are too short to train") == 1
    page = (project.root / "page.html").read_text()
    rows = cold_start(RUN, "tiny")
    section = page[page.index("Cold start") :]
    assert f"{rows[0]['users']} users of tiny" in section
    for row in rows:
        for value in row["metrics"].values():
            assert f"{value['value']:.4f}" in section
            assert f"[{value['low']:.4f}, {value['high']:.4f}]" in section
    assert project.run("--model", "pop", "--dataset", "warm", "--run_name", "pop")[0] == 0
    code, _, err = project.call(
        report_main, ["saved/pop", "--out", "p.html", "--cold_start", "tiny"]
    )
    assert code == 2
    assert "none of the runs reads item embeddings" in err
    assert not (project.root / "p.html").exists()


def test_the_report_looks_at_the_cold_items_before_the_examples(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_run(project, "--val_only", "True")

    def too_late(*_: object) -> None:
        raise AssertionError("the examples came first")

    monkeypatch.setattr(write_report, "choose_models", too_late)
    code, _, err = project.call(report_main, [RUN, "--out", "p.html", "--cold_start", "warm"])
    assert code == 2
    assert "was trained on warm itself" in err
    assert "prepare_data.py hold-out --dataset warm" in err
    assert not (project.root / "p.html").exists()

"""The benchmark programs: a whole small run, and both sides computing the same things."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import index, naive, report, serve, stages, synthetic
from hsft.data.cache import open_cache
from hsft.data.dataset import (
    CachedEmbeddingEvalDataset,
    CachedEmbeddingTrainDataset,
    EvalCollate,
    TrainCollate,
)
from hsft.data.interactions import read_interactions
from hsft.data.split import Split, leave_one_out
from hsft.encoding.item_llm import load_item_encoder
from hsft.model.item_table import table_from_cache
from tests.helpers import ROOT

SIZE = synthetic.SIZES["small"]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> stages.Context:
    context = stages.Context(SIZE, tmp_path_factory.mktemp("work"), 1, 7, quick=True)
    stages.prepare(context)
    return context


@pytest.fixture(scope="module")
def split(context: stages.Context) -> Split:
    return leave_one_out(read_interactions(context.csv))


@pytest.fixture(scope="module")
def histories(context: stages.Context) -> naive.Histories:
    return naive.load(context.csv)


def named(split: Split, rows: np.ndarray) -> list[str]:
    return split.interactions.item_ids[rows].tolist()


def test_a_small_run_writes_json_and_markdown(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "benchmarks/run.py", "--size", "small", "--stages", "rank"),
        *("--repeats", "2", "--threads", "1", "--work", str(tmp_path), "--out", str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    actual = json.loads((tmp_path / "results.json").read_text())
    assert actual["size"]["users"] == SIZE.users
    assert actual["versions"]["torch"] == torch.__version__
    assert actual["machine"]["threads"] == 1
    assert actual["seed"] == synthetic.SEED
    assert [result["side"] for result in actual["results"]] == list(stages.STAGES["rank"])
    for result in actual["results"]:
        assert result["peak_rss_mb"] > 0
        for figure in result["figures"]:
            assert len(figure["values"]) == 2
            assert figure["min"] <= figure["median"] <= figure["max"]
            assert figure["min"] > 0
    assert actual["agreement"] == {f"ranks, D {SIZE.dim}": "40 of 40 equal"}
    text = (tmp_path / "results.md").read_text()
    assert text == done.stdout
    assert "| full ranking, 400 items, D 32 | users/s |" in text
    assert "40 of 40 equal" in text


@pytest.mark.parametrize(
    ("stage", "side"),
    [
        (stage, side)
        for stage in ("load", "cache", "collate", "memory")
        for side in stages.STAGES[stage]
        if Path("/proc/self/clear_refs").exists()
    ],
)
def test_other_stages_measure_something(context: stages.Context, stage: str, side: str) -> None:
    figures = stages.STAGES[stage][side](context)
    assert figures
    assert all(np.isfinite(figure.values).all() for figure in figures)
    cases = [figure.case for figure in figures]
    assert len(set(cases)) == len(cases)
    if side == "naive":
        assert cases == [figure.case for figure in stages.STAGES[stage]["hsft"](context)]


def test_a_stage_without_its_files_is_skipped_in_the_open(
    context: stages.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "DEMO_TEXTS", ROOT / "information" / "nothing.csv")
    with pytest.raises(stages.Skipped, match=r"information/nothing\.csv is not there"):
        stages.items_hsft(context)
    result = {"stage": "items", "side": "hsft", "skipped": "no file"}
    assert report._table([result]) == ["hsft: skipped, no file"]


def test_the_table_has_medians_ranges_and_ratios() -> None:
    def side(name: str, seconds: list[float]) -> dict:
        figure = stages.Figure("load", "s", seconds).as_dict()
        return {"stage": "load", "side": name, "figures": [figure], "peak_rss_mb": 1.0}

    lines = report._table([side("hsft", [2.0, 4.0, 3.0]), side("naive", [30.0])])
    assert lines[2] == "| load | s | 3.00 (2.00 to 4.00) | 30.0 | 10.0x |"
    figure = stages.Figure("f", "users/s", [50.0]).as_dict()
    assert report._ratio(figure, {**figure, "median": 10.0}, "users/s") == "5.00x"


def test_tables_are_copied_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- begin small -->", "<!-- end small -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.copy_into(page, "small", "new\n")
    report.copy_into(page, "small", "newer\n")
    assert page.read_text() == f"before\n{begin}\nnewer\n{end}\nafter\n"
    with pytest.raises(ValueError, match="begin pixel8m"):
        report.copy_into(page, "pixel8m", "new\n")


def test_synthetic_data_is_seeded_and_of_the_size_asked_for(tmp_path: Path) -> None:
    paths = [synthetic.make_interactions(SIZE, tmp_path / name, 3) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    actual = read_interactions(paths[0])
    assert (actual.num_users, actual.num_items, len(actual)) == (
        SIZE.users,
        SIZE.items,
        SIZE.interactions,
    )
    assert actual.lengths.min() >= 4
    owners = np.repeat(np.arange(actual.num_users), actual.lengths)
    assert len(np.unique(owners * 10_000 + actual.items)) == len(actual)
    counts = np.sort(np.bincount(actual.items)[1:])[::-1]
    # The most popular tenth has several times the share of the least popular half.
    assert counts[: SIZE.items // 10].sum() > 1.5 * counts[SIZE.items // 2 :].sum()
    first = paths[0].stat().st_mtime_ns
    assert synthetic.make_interactions(SIZE, tmp_path / "a", 3).stat().st_mtime_ns == first
    synthetic.make_interactions(SIZE, tmp_path / "a", 4)
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_both_sides_split_alike(
    context: stages.Context, split: Split, histories: naive.Histories
) -> None:
    data = split.interactions
    assert naive.load_tuned(context.csv) == histories
    assert histories.items == data.item_ids[1:].tolist()
    for number, user in enumerate(data.user_ids):
        items = named(split, data.items[data.offsets[number] : data.offsets[number + 1]])
        assert histories.full[user] == items
        assert histories.train[user] == items[:-2]
        assert histories.valid[user] == items[-2:-1]
        assert histories.test[user] == items[-1:]


@pytest.mark.parametrize("length", [10, 4])
def test_both_sides_make_the_same_training_batch(
    context: stages.Context, split: Split, histories: naive.Histories, length: int
) -> None:
    native = open_cache(stages.native_cache_path(context))
    cache = naive.load_cache(stages.naive_cache_path(context))
    table = table_from_cache(native, split.interactions.item_ids).float()
    ours = CachedEmbeddingTrainDataset(split, length)
    theirs = naive.TrainDataset(histories, cache, length)
    assert len(ours) == len(theirs)
    # The naive side goes through users in the file's order as well, from oldest piece to newest.
    rows = np.random.default_rng(0).integers(0, len(ours), size=6)
    batch = TrainCollate(ours)(rows)
    other = naive.collate_train([theirs[int(row)] for row in rows])
    width = batch.history.shape[1]
    assert other["history"].shape == (6, length, SIZE.dim)
    assert torch.equal(table[batch.history], other["history"][:, :width])
    assert not other["history"][:, width:].any()
    assert torch.equal(batch.attention_mask, other["mask"][:, :width])
    last = table[batch.targets[torch.arange(6), batch.attention_mask.sum(dim=1) - 1]]
    assert other["candidates"].shape == (6, 6, SIZE.dim)
    assert torch.equal(other["candidates"][:, 0], last)
    for row in range(6):
        rest = torch.cat([last[:row], last[row + 1 :]])
        assert torch.equal(other["candidates"][row, 1:], rest)


def test_both_sides_make_the_same_evaluation_batch(
    context: stages.Context, split: Split, histories: naive.Histories
) -> None:
    native = open_cache(stages.native_cache_path(context))
    table = table_from_cache(native, split.interactions.item_ids).float()
    ours = CachedEmbeddingEvalDataset(split, "test", 7)
    theirs = naive.EvalDataset(histories, naive.load_cache(stages.naive_cache_path(context)), 7)
    # Users of the naive side stand in the order of its groups.
    row_of = {tuple(items): row for row, items in enumerate(theirs.histories)}
    rows = np.arange(5)
    users = [row_of[tuple(named(split, ours[int(row)]))] for row in rows]
    batch = EvalCollate(ours)(rows)
    other = naive.collate_eval([theirs[user] for user in users])
    width = batch.history.shape[1]
    assert torch.equal(table[batch.history], other["history"][:, :width])
    assert torch.equal(batch.lengths, other["lengths"])
    # Item numbers begin at 1, the naive side's rows at 0.
    assert torch.equal(batch.targets, other["targets"] + 1)
    for row in range(5):
        assert torch.equal(batch.seen_items[batch.seen_rows == row], other["seen"][row] + 1)


def test_naive_negatives_are_unseen(histories: naive.Histories) -> None:
    random.seed(0)
    seen = set(histories.items[:390])
    drawn = naive.draw_negatives(histories.items, seen, 50)
    assert len(drawn) == 50
    assert not seen & set(drawn)


def test_both_sides_encode_items_alike(llama: Path) -> None:
    encoder = load_item_encoder(
        llama,
        item_emb_token_n=0,
        max_text_length=6,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="sdpa",
    )
    encoder.tokenizer.pad_token = "[UNK]"
    texts = [f"title : item {n} " + "tag 3 " * (n % 4) for n in range(9)]
    ours = encoder.encode(encoder.tokenize(texts))
    for fixed_width in (False, True):
        theirs = naive.encode_texts(
            encoder.model, encoder.tokenizer, texts, 6, batch_size=4, fixed_width=fixed_width
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_naive_training_step_trains(llama: Path) -> None:
    from hsft.model.backbone import load_decoder

    decoder = load_decoder(llama, dtype=torch.float32, attention="sdpa")
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "history": torch.randn(3, 5, 64, generator=generator),
        "mask": torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]], dtype=torch.bool),
        "candidates": torch.randn(3, 3, 64, generator=generator),
    }
    losses = [naive.train_step(decoder, batch, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"
)
def test_the_index_benchmark_measures_an_index(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (hsft[index])")
    arguments = ["--tiny", "True", "--kinds", "ivf", "--repeats", "1", "--out", str(tmp_path)]
    assert index.main(arguments) == 0
    (row,) = json.loads((tmp_path / "index.json").read_text())["rows"]
    assert (row["kind"], row["items"]) == ("ivf", 2_000)
    assert 0.9 < row["recall@10"] <= 1
    # 2,000 vectors of 16 numbers, and the cells.
    assert 0.128 < row["file_mb"] < 0.2
    assert row["queries_per_s"] > 0
    assert (tmp_path / "index.md").read_text().count("\n| 2,000 | ivf | ") == 1


def test_the_load_benchmark_measures_a_server(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (hsft[serve])")
    assert serve.main(["--tiny", "True", "--clients", "4", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert row["clients"] == 4
    assert row["requests"] > 0
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    # Every request of the clients is in a batch, and no batch has more than there are clients.
    assert 1 <= row["requests_per_batch"] <= 4
    assert (tmp_path / "serve.md").read_text().count("\n| 4 | ") == 1


def test_the_exact_items_of_the_index_benchmark(tmp_path: Path) -> None:
    index.make_vectors(tmp_path, 300, 20, 8)
    items = index.read(tmp_path, 8, 0, 300)
    users = np.fromfile(tmp_path / "users.f32", np.float32).reshape(20, 8)
    exact = np.fromfile(tmp_path / "exact.i64", np.int64).reshape(20, 10)
    assert np.linalg.norm(items, axis=1) == pytest.approx(1, rel=1e-5)
    best = np.argsort(-(users @ items.T), axis=1)[:, :10]
    assert np.sort(exact, axis=1).tolist() == np.sort(best, axis=1).tolist()

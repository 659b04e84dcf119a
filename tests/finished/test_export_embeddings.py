"""Exported vectors and their index: read with other libraries, they recommend as the run does."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from export import main as export_main
from hsft.data.cache import open_cache
from hsft.finished import export_embeddings
from hsft.finished.item_index import IndexedScorer
from hsft.finished.open_run import OpenRun, open_run
from recommend import main as recommend_main
from tests.conftest import Project

TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
    *("--epochs", "1", "--optim_args.learning_rate", "3e-2", "--item_adapter", "linear"),
)
OUT = "saved/run/export-embeddings"


@pytest.fixture(autouse=True)
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="faiss-cpu is not installed (hsft[index])")


def train(project: Project, *more: str) -> None:
    code, _, err = project.run(*TRAIN, *more, "--run_name", "run")
    assert code == 0, err


def export(project: Project, *more: str) -> tuple[int, str]:
    asked = ["--run", "saved/run", "--format", "embeddings", *more]
    code, _, err = project.call(export_main, asked)
    return code, err


def ask(project: Project, *more: str) -> list[tuple[str, float]]:
    code, out, err = project.call(recommend_main, ["--run", "saved/run", "--json", *more])
    assert code == 0, err
    best = json.loads(out)["recommendations"]
    return [(entry["item_id"], entry["score"]) for entry in best]


def ranked(item_ids: list[str], scores: np.ndarray, left_out: set[str]) -> list[tuple[str, float]]:
    order = np.argsort(-scores, kind="stable")
    return [(item_ids[row], float(scores[row])) for row in order if item_ids[row] not in left_out]


def assert_same(
    actual: list[tuple[str, float]], expected: list[tuple[str, float]], rtol: float = 1e-4
) -> None:
    assert [item for item, _ in actual] == [item for item, _ in expected]
    np.testing.assert_allclose([s for _, s in actual], [s for _, s in expected], rtol, 1e-6)


def run_snippet(folder: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
    with monkeypatch.context() as patch:
        Path("snippet.py").write_text(code)
        script = str(Path("snippet.py").absolute())
        patch.chdir(folder)
        return runpy.run_path(script)


@pytest.mark.parametrize("loss", ["nce", "bce"])
def test_files_and_index_recommend_as_the_run(
    project: Project, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(project, "--loss", loss)
    code, err = export(project, "--index", "hnsw" if loss == "nce" else "ivf")
    assert code == 0, err
    names = ("README.md", "config.yaml", "export.json", "items.faiss")
    assert {path.name for path in Path(OUT).iterdir()} == {
        *(*names, "items.safetensors", "users.safetensors")
    }
    read = run_snippet(OUT, monkeypatch)
    item_ids, items, user_ids, users = (
        read[name] for name in ("item_ids", "items", "user_ids", "users")
    )
    run = open_run("saved/run")
    assert item_ids == run.data.interactions.item_ids[1:].tolist()
    assert user_ids == run.data.interactions.user_ids.tolist()
    assert (items.shape, users.shape, users.dtype) == ((20, 64), (30, 64), np.float32)
    if loss == "nce":
        np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, rtol=1e-5)
    # The trained adapter is in the vectors.
    raw = open_cache("dataset/tiny_item_embeddings.safetensors")
    rows = raw.rows_of(item_ids)
    cosines = (raw.embeddings.numpy()[rows] * items).sum(1)
    cosines /= np.linalg.norm(items, axis=1) * np.linalg.norm(raw.embeddings.numpy()[rows], axis=1)
    assert cosines.max() < 0.999

    for user in ("u0", "u7", "u29"):
        scores = items @ users[user_ids.index(user)]
        seen = {item_ids[n - 1] for n in run.history(user)}
        expected = ranked(item_ids, scores, seen)[:4]
        more = ("--user", user, "--topk", "4")
        assert_same(ask(project, *more), expected)
        assert_same(ask(project, *more, "--index", OUT), expected)
        everything = ("--exclude_seen", "False")
        asked = ask(project, *more, "--index", OUT, *everything)
        assert_same(asked, ranked(item_ids, scores, set())[:4])
        # By FAISS alone.
        _, rows = read["index"].search(users[user_ids.index(user)][None], 4)
        assert [item_ids[row] for row in rows[0]] == [item for item, _ in asked]
    assert Path("snippet.py").is_file()


def test_parquet_without_an_index(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (hsft[parquet])")
    train(project)
    assert export(project)[0] == 0
    items = load_file(f"{OUT}/items.safetensors")["embeddings"]
    users = load_file(f"{OUT}/users.safetensors")["embeddings"]
    code, err = export(project, "--vector_files", "parquet", "--index", "none")
    assert code == 2
    assert "set --overwrite True" in err
    more = ("--vector_files", "parquet", "--index", "none", "--dtype", "float16")
    code, err = export(project, *more, "--overwrite", "True")
    assert code == 0, err
    assert {path.suffix for path in Path(OUT).iterdir()} == {".md", ".yaml", ".json", ".parquet"}
    read = run_snippet(OUT, monkeypatch)
    np.testing.assert_array_equal(read["items"], items.astype(np.float16))
    np.testing.assert_array_equal(read["users"], users.astype(np.float16))
    # As an item cache, too.
    cache = open_cache(f"{OUT}/items.parquet")
    assert cache.item_ids == read["item_ids"]
    np.testing.assert_array_equal(cache.embeddings.numpy(), read["items"])
    code, _, err = project.call(
        recommend_main, ["--run", "saved/run", "--user", "u1", "--index", OUT]
    )
    assert code == 2
    assert "has no index of items" in err


def test_recall_and_the_run_s_table_are_in_the_card(project: Project) -> None:
    train(project, "--eval_baseline", "True")
    code, err = export(project, "--model", "untrained")
    assert code == 0, err
    about = json.loads(Path(OUT, "export.json").read_text())
    assert about["index"]["kind"] == "flat"
    assert about["index"]["recall@10"] == 1.0
    assert about["index"]["users"] == 15
    assert (about["items"], about["users"], about["dim"]) == (20, 30, 64)
    card = Path(OUT, "README.md").read_text()
    assert "it returns what exact search does" in card
    assert "returns 1.0000 (recall@10, 15 users of the run)" in card
    assert "by the model untrained of this run" in card
    result = json.loads(Path("saved/run/result.json").read_text())
    for entry in result["rows"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| {entry['name']} |"))
        assert f"| {entry['metrics']['NDCG@10']:.4f}" in row
    header: Any = ModelCard(card).data
    assert header.datasets == ["tiny"]
    assert str(project.root) not in card + Path(OUT, "config.yaml").read_text()
    # Its model is the default then, and no other can have it.
    run = open_run("saved/run").with_index(OUT)
    assert isinstance(run.build("untrained"), IndexedScorer)
    assert not isinstance(run.build("fine-tuned"), IndexedScorer)
    assert_same(
        ask(project, "--user", "u1", "--index", OUT),
        ask(project, "--user", "u1", "--model", "untrained"),
    )
    more = ["--user", "u1", "--index", OUT, "--model", "fine-tuned"]
    code, _, err = project.call(recommend_main, ["--run", "saved/run", *more])
    assert code == 2
    assert "is of the model untrained, not of fine-tuned" in err


def batches(run: OpenRun, topk: int) -> list[np.ndarray]:
    scorer = run.build("fine-tuned")
    histories = [run.history(str(user)) for user in run.data.interactions.user_ids[:9]]
    times = [run.history_times(str(user)) for user in run.data.interactions.user_ids[:9]]
    given = None if times[0] is None else [time for time in times if time is not None]
    return [*run.recommend(scorer, histories, topk, times=given).items]


def test_several_users_with_times(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are read from times as exact search reads them, and running short is made up for."""
    dates = Path("dataset/tiny.csv").read_text().replace(",10", ",17000000")
    Path("dataset/tiny.csv").write_text(dates)
    train(project, "--use_timestamps", "True", "--eval_batch_size", "4")
    code, err = export(project, "--index", "ivf")
    assert code == 0, err
    run = open_run("saved/run")
    indexed = run.with_index(OUT)
    for topk in (3, 9, 99):
        np.testing.assert_array_equal(batches(indexed, topk), batches(run, topk))
    assert indexed.index is not None
    asked = []
    best = type(indexed.index).best

    def short(self: Any, users: np.ndarray, *more: Any) -> Any:
        asked.append(len(users))
        found, whole = best(self, users, *more)
        found.items[2:5] = 0
        whole[2:5] = False
        return found, whole

    monkeypatch.setattr(type(indexed.index), "best", short)
    np.testing.assert_array_equal(batches(indexed, 3), batches(run, 3))
    assert asked == [9]


def test_an_index_of_something_else_is_refused(project: Project, faiss: Any) -> None:
    train(project)
    assert export(project)[0] == 0

    def refused(*more: str) -> str:
        asked = ["--run", "saved/run", "--user", "u1", "--index", OUT, *more]
        code, out, err = project.call(recommend_main, asked)
        assert (code, out) == (2, "")
        assert err.count("error:") == 1
        return err

    assert "none of --add_items" in refused("--add_items", "new.csv")
    assert "is no export of embeddings" in refused("--index", "saved/run")
    # Another training gives the adapter other weights.
    code, _, err = project.run(*TRAIN, "--seed", "7", "--run_name", "other")
    assert code == 0, err
    assert "is not of the items and the model" in refused("--run", "saved/other")
    code, _, err = project.run("--model", "sasrec", "--epochs", "1", "--run_name", "sasrec")
    assert code == 0, err
    assert "the model 'fine-tuned'" in refused("--run", "saved/sasrec")
    about = json.loads(Path(OUT, "export.json").read_text())
    Path(OUT, "export.json").write_text(json.dumps({**about, "item_ids_sha256": "0" * 64}))
    assert "is not of the items" in refused()
    Path(OUT, "export.json").write_text(json.dumps(about))
    Path(OUT, "items.faiss").write_bytes(b"nothing")
    assert "items.faiss is damaged" in refused()
    Path(OUT, "items.faiss").unlink()
    assert "items.faiss does not exist" in refused()


@pytest.mark.parametrize("kind", ["hstu", "llm_id"])
def test_models_on_item_ids_give_their_vectors(
    project: Project, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--model", kind, "--epochs", "1", "--run_name", "run")
    assert project.run(*more, "--hstu.hidden_size", "32", "--llm_id.item_width", "16")[0] == 0
    code, err = export(project)
    assert code == 0, err
    read = run_snippet(OUT, monkeypatch)
    run = open_run("saved/run")
    seen = {read["item_ids"][n - 1] for n in run.history("u7")}
    scores = read["items"] @ read["users"][read["user_ids"].index("u7")]
    expected = ranked(read["item_ids"], scores, seen)[:4]
    assert_same(ask(project, "--user", "u7", "--topk", "4"), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_stopped_export_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as without a stop, and no user is encoded twice."""
    # 2 of the 8 batches are in one block.
    monkeypatch.setattr(export_embeddings, "_BATCHES_AT_A_TIME", 2)
    users = export_embeddings._Vectors.users
    asked: list[np.ndarray] = []
    stop_at = 3

    def counting(vectors: Any, rows: np.ndarray) -> np.ndarray:
        if len(asked) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(rows)
        return users(vectors, rows)

    def same(folder: str, other: str) -> bool:
        names = ("items.safetensors", "users.safetensors")
        return all(
            Path(folder, name).read_bytes() == Path(other, name).read_bytes() for name in names
        )

    train(project, "--eval_batch_size", "4")
    more = ("--index", "none", "--out")
    assert export(project, *more, "whole")[0] == 0
    monkeypatch.setattr(export_embeddings._Vectors, "users", counting)
    code, err = export(project, *more, "stopped")
    assert code == 143
    assert "so far are kept, and the same command goes on from there" in err.splitlines()[-1]
    assert not Path("stopped").exists()
    stop_at = -1
    assert export(project, *more, "stopped")[0] == 0
    assert len(asked) == 8
    assert sorted(np.concatenate(asked)) == list(range(30))
    assert same("stopped", "whole")
    assert not Path("stopped.parts").exists()
    # Stopped, and then trained again: nothing of before is taken.
    asked.clear()
    stop_at = 3
    assert export(project, *more, "older")[0] == 143
    assert len(list(Path("older.parts").glob("part-*"))) == 1
    stop_at = -1
    train(project, "--eval_batch_size", "4", "--overwrite", "True", "--seed", "3")
    asked.clear()
    assert export(project, *more, "older")[0] == 0
    assert len(asked) == 8
    assert export(project, *more, "newer")[0] == 0
    assert same("older", "newer")
    assert not same("older", "whole")


def test_what_cannot_be_exported(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    assert "is a run of model: pop" in export(project)[1]
    assert project.run("--model", "item_knn", "--run_name", "run", "--overwrite", "True")[0] == 0
    for more, said in (
        (("--dtype", "bfloat16"), "use float32 or float16"),
        (("--evaluate", "True"), "leave it out with --format embeddings"),
        (("--model", "fine-tuned"), "has no model 'fine-tuned'"),
        (("--out", "saved/run", "--overwrite", "True"), "is no export"),
        (("--format", "merged", "--index", "flat"), "--index has no meaning without"),
    ):
        code, err = export(project, *more)
        assert code == 2, more
        assert said in err
    for package, files in (("faiss", "safetensors"), ("pyarrow", "parquet")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            code, err = export(project, "--vector_files", files)
        assert code == 2
        assert "pip install 'hsft[" in err.replace("\n", " ")
    assert not Path(OUT).exists()
    # Of a model without an LLM, and without FAISS.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        code, err = export(project, "--index", "none")
    assert code == 0, err
    vectors = load_file(f"{OUT}/items.safetensors")["embeddings"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not [path.name for path in Path("saved/run").iterdir() if path.name.startswith(".")]

"""`model: ensemble`: finished runs whose standardised scores are summed, weighed on validation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import hsft
from cold_start import main as cold_start_main
from compare import main as compare_main
from export import main as export_main
from hsft.finished.open_run import open_run
from hsft.report.result import read_ranks, read_result
from recommend import main as recommend_main
from report import main as report_main
from tests.conftest import Project
from tests.helpers import ROOT

SASREC = (
    *("--config_file", f"{ROOT}/code/baselines/sasrec.yaml", "--epochs", "3", "--run_name", "ids"),
    # Each model reads histories of its own length, and may have been scored on validation only.
    *("--MAX_ITEM_LIST_LENGTH", "4", "--eval_phase", "valid"),
)
KNN = ("--model", "item_knn", "--knn_history", "mean", "--run_name", "text")


def z_scores(folder: str, phase: str) -> np.ndarray:
    """Standardise a run's scores over the catalogue for every user of a phase: float64 [E, I]."""
    run = open_run(folder)
    segments = run.data.split.eval_segments(phase)  # type: ignore[arg-type]
    items = run.data.interactions.items
    histories = [
        items[start : end - 1] for start, end in zip(segments.starts, segments.ends, strict=True)
    ]
    everything = run.data.interactions.num_items
    best = run.recommend(run.build(run.models[-1]), histories, everything, exclude_seen=False)
    scores = np.zeros((len(histories), everything))
    np.put_along_axis(scores, best.items - 1, best.scores.astype(np.float64), axis=1)
    return (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)


def rank_targets(folder: str, phase: str, scores: np.ndarray) -> np.ndarray:
    """Rank each user's target among the items that are not in the history: int64 [E]."""
    run = open_run(folder)
    segments = run.data.split.eval_segments(phase)  # type: ignore[arg-type]
    items = run.data.interactions.items
    ranks = []
    for row, start, end in zip(scores, segments.starts, segments.ends, strict=True):
        seen, target = items[start : end - 1] - 1, items[end - 1] - 1
        masked = row.copy()
        masked[seen] = -np.inf
        ranks.append((masked >= masked[target]).sum() if target not in seen else 10**9)
    return np.array(ranks)


def ndcg(ranks: np.ndarray) -> float:
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0).mean())


@pytest.mark.parametrize(
    "protocol", [(), ("--eval_protocol", "sampled", "--eval_neg_sample_num", "5")]
)
def test_the_best_weight_on_validation_ranks_the_test_items(
    project: Project, protocol: tuple[str, ...]
) -> None:
    assert project.run(*SASREC, *protocol)[0] == 0
    assert project.run(*KNN, *protocol)[0] == 0
    both = ("--model", "ensemble", "--runs", "saved/ids", "saved/text", "--run_name", "both")
    code, out, err = project.run(*both, "--logits_budget_mb", "1", *protocol)
    assert code == 0, err
    assert "ensemble" in out
    assert "has the highest validation NDCG@10" in err
    result = read_result("saved/both")
    chosen = result["ensemble"]
    assert chosen["runs"] == ["saved/ids", "saved/text"]
    assert chosen["models"] == ["sasrec", "item_knn"]
    assert result["config"]["MAX_ITEM_LIST_LENGTH"] == 8
    if protocol:
        return
    parts = [z_scores(run, "valid") for run in chosen["runs"]]
    for tried in chosen["tried"]:
        first, second = tried["weights"]
        ranks = rank_targets("saved/text", "valid", first * parts[0] + second * parts[1])
        # Rounding may swap two neighbours of one user.
        assert tried["value"] == pytest.approx(ndcg(ranks), abs=0.02)
    values = [tried["value"] for tried in chosen["tried"]]
    assert chosen["weights"] == chosen["tried"][int(np.argmax(values))]["weights"]
    parts = [z_scores(run, "test") for run in chosen["runs"]]
    summed = chosen["weights"][0] * parts[0] + chosen["weights"][1] * parts[1]
    _, ranks = read_ranks("saved/both", "ensemble")
    assert (ranks == rank_targets("saved/text", "test", summed)).mean() > 0.9


def test_an_ensemble_is_a_run_like_others(project: Project) -> None:
    train = (
        "--use_qlora",
        "True",
        "--epochs",
        "1",
        "--item_adapter",
        "linear",
        "--run_name",
        "llm",
    )
    assert project.run(*train)[0] == 0
    assert project.run("--model", "pop", "--run_name", "pop")[0] == 0
    assert project.run("--model", "tfidf", "--run_name", "words")[0] == 0
    runs = ["saved/llm", "saved/pop", "saved/words"]
    code, _, err = project.run("--model", "ensemble", "--runs", *runs, "--run_name", "three")
    assert code == 0, err
    recorded = read_result("saved/three")["ensemble"]
    assert recorded["models"] == ["fine-tuned", "pop", "tfidf"]
    assert len(recorded["tried"]) == 66
    # What it recommends is what it ranks by.
    run = open_run("saved/three")
    user = str(run.data.interactions.user_ids[0])
    code, out, err = project.call(
        recommend_main, ["--run", "saved/three", "--user", user, "--topk", "3", "--json"]
    )
    assert code == 0, err
    answer = json.loads(out)
    assert answer["model"] == "ensemble"
    summed = sum(
        weight * z_scores(folder, "test")[0]
        for folder, weight in zip(runs, recorded["weights"], strict=True)
    )
    assert isinstance(summed, np.ndarray)
    history = run.data.interactions.items[: run.data.split.eval_segments("test").ends[0] - 1]
    best = run.recommend(run.build("ensemble"), [history], 5, exclude_seen=False)
    assert summed[best.items[0] - 1] == pytest.approx(np.sort(summed)[::-1][:5], abs=1e-4)
    code, out, err = project.call(compare_main, ["saved/llm", "saved/pop", "saved/three"])
    assert code == 0, err
    assert "three" in out
    code, _, err = project.call(report_main, ["saved/three", "--out", "page.html"])
    assert code == 0, err
    assert "saved/words" in Path("page.html").read_text()
    opened = hsft.open_run("saved/three")
    assert list(opened.recommend(user=user, topk=2).columns) == ["item_id", "title", "score"]
    for program, argv, sentence in (
        (export_main, ["--run", "saved/three"], "a run of model: ensemble"),
        (cold_start_main, ["--run", "saved/three", "--dataset", "tiny"], "is an ensemble"),
    ):
        code, _, err = project.call(program, argv)
        assert code == 2
        assert sentence in err


def test_runs_that_do_not_fit_together_are_refused(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "pop")[0] == 0
    assert project.run("--model", "random", "--run_name", "random")[0] == 0
    assert project.run("--model", "ensemble", "--runs", "saved/pop", "saved/random")[0] == 0
    sampled = ("--eval_protocol", "sampled", "--eval_neg_sample_num", "5")
    assert project.run("--model", "pop", *sampled, "--run_name", "sampled")[0] == 0
    lines = Path("dataset/tiny.csv").read_text().splitlines()
    Path("dataset/other.csv").write_text("\n".join(lines) + "\n")
    assert project.run("--model", "pop", "--dataset", "other", "--run_name", "other")[0] == 0
    Path("dataset/tiny.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert project.run("--model", "pop", "--run_name", "shorter")[0] == 0
    Path("dataset/tiny.csv").write_text("\n".join(lines) + "\n")
    stopped = Path("saved/stopped")
    stopped.mkdir()
    (stopped / "config.yaml").write_bytes(Path("saved/pop/config.yaml").read_bytes())
    for other, sentence in {
        "sampled": "saved/sampled was scored on other protocol",
        "other": "saved/other is a run on other, not on tiny",
        "shorter": "saved/shorter was scored on other held-out items, histories",
        "tiny-ensemble": "saved/tiny-ensemble is an ensemble itself",
        "stopped": "saved/stopped is no finished run",
        "nowhere": "saved/nowhere does not exist",
    }.items():
        for more in ((), ("--check", "True")):
            runs = ("--runs", "saved/random", f"saved/{other}", "--run_name", "none")
            code, out, err = project.run("--model", "ensemble", *runs, *more)
            assert (code, out) == (2, ""), err
            assert sentence in err
            assert err.strip().count("\n") == 0 or not more
            assert not Path("saved/none").exists()
    # What the weights were chosen with is what is opened: a changed run is not.
    Path("saved/random/result.json").unlink()
    code, _, err = project.call(recommend_main, ["--run", "saved/tiny-ensemble", "--user", "u1"])
    assert code == 2
    assert "saved/random is no finished run" in err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--model", "ensemble"), "model: ensemble needs runs"),
        (("--runs", "a", "b"), "runs belongs to model: ensemble, not to HLLM"),
        (("--model", "ensemble", "--runs", "a"), "'runs'"),
        (("--model", "ensemble", "--runs", "a", "a"), "repeated entry"),
        (("--model", "ensemble", "--runs", "a", "b", "c", "d"), "'runs'"),
    ],
)
def test_runs_are_two_or_three(project: Project, more: tuple[str, ...], sentence: str) -> None:
    code, out, err = project.run(*more)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1

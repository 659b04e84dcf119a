"""Comparisons of runs: records by hand, what is refused, Markdown, terminal, files."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compare import main as compare_main
from hsft.config import Config
from hsft.evaluator.intervals import wilson_interval
from hsft.evaluator.metrics import UNRANKED
from hsft.report import compare
from hsft.report.compare import Comparison, Row, load_comparison
from hsft.report.comparison_files import csv_text, markdown
from hsft.report.result import read_ranks
from hsft.report.terminal import Blocks, MetricCell, MetricTable, as_markdown, write_blocks
from report import main as report_main
from tests.conftest import Project
from tests.helpers import make_cache

TRAIN = ("--use_qlora", "True", "--epochs", "2", "--optim_args.learning_rate", "1e-2")


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def shown_on_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    table = MetricTable(["run", "NDCG@5"], [("a|b [x]", [MetricCell(0.1, 0.05, 0.15, "*+")])])
    blocks: Blocks = ["title", table, "    a command | with a bar"]
    terminal, pipe = Terminal(), io.StringIO()
    write_blocks(blocks, terminal)
    write_blocks(blocks, pipe)
    assert pipe.getvalue() == as_markdown(blocks) == (
        "title\n\n| run | NDCG@5 |\n| --- | ---: |\n"
        "| a\\|b [x] | 0.1000*+ [0.0500, 0.1500] |\n\n    a command | with a bar\n"
    )  # fmt: skip
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    return [line.rstrip() for line in plain.splitlines()]


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_on_terminal(80, monkeypatch)
    assert [shown[0], shown[-1]] == ["title", "    a command | with a bar"]
    assert shown[2].split() == ["run", "NDCG@5"]
    assert [line.split() for line in shown[4:6]] == [
        ["a|b", "[x]", "0.1000*+"],
        ["[0.0500,", "0.1500]"],
    ]
    narrow = shown_on_terminal(20, monkeypatch)
    assert [line.split() for line in narrow[4:7]] == [
        ["a|b", "[x]", "0.1000*+"],
        ["[0.0500,"],
        ["0.1500]"],
    ]
    assert all(len(line) <= 20 for line in narrow[2:7])


def comparison(**ranks: np.ndarray) -> Comparison:
    users = np.arange(200)
    rows = [Row(name, users, values) for name, values in ranks.items()]
    return Comparison("title", rows, [("Recall", 10)], ["x is left out: it is y."])


@pytest.fixture
def four_rows() -> Comparison:
    # Of the base's users half are hits, so that there is something to be lower than.
    half = np.where(np.arange(200) % 2, 1, 20)
    return comparison(base=half, better=np.full(200, 1), worse=np.full(200, 90), same=half)


def test_marks_say_which_way_rows_differ_and_what_is_left_out(four_rows: Comparison) -> None:
    text = markdown(four_rows)
    cells = {
        line.split()[1]: line.split()[3] for line in text.splitlines() if line.startswith("| ")
    }
    assert cells["base"] == cells["same"] == "0.5000"
    assert (cells["better"], cells["worse"]) == ("1.0000*+", "0.0000*-")
    assert (
        "*+ higher, *- lower than base (paired randomisation test, p < 0.05, by Holm's correction for "
        "3 tests a metric)."
    ) in text
    assert "\nx is left out: it is y.\n" in text


def test_every_row_is_compared_with_the_best_other(four_rows: Comparison) -> None:
    (base,), (better,), (worse,), (same,) = four_rows.records
    assert [record.best for record in (base, better, worse, same)] == [False, True, False, False]
    assert better.against_best_other is not None
    assert (better.against_best_other.other, better.against_best_other.gain) == ("base", "+100.0%")
    for record in (base, worse, same):
        assert record.against_best_other is not None
        assert record.against_best_other.other == "better"
        assert record.against_best_other.p_value < 0.001
    assert base.against_first is None
    assert same.against_first is not None
    assert same.against_first.p_value == 1.0
    lines = list(csv.DictReader(io.StringIO(csv_text(four_rows))))
    assert [line["best_other"] for line in lines] == ["better", "base", "better", "better"]
    assert (lines[0]["gain"], lines[1]["gain"]) == ("", "+100.0%")


def test_p_values_are_corrected_for_the_number_of_rows() -> None:
    half = np.where(np.arange(200) % 2, 1, 20)
    slight, more = half.copy(), half.copy()
    # Six users gain and none loses: 2 of 64 sign patterns are as extreme.
    slight[:12:2] = 1
    more[:40:2] = 1
    alone = comparison(base=half, slight=slight)
    (test,) = (records[0].against_first for records in alone.records[1:])
    assert test is not None
    assert test.p_value == test.p_holm == pytest.approx(1 / 32, abs=0.01)
    assert "| slight | 0.5300*+ [" in markdown(alone)
    table = comparison(base=half, slight=slight, more=more, same=half)
    first = [records[0].against_first for records in table.records]
    assert [None if one is None else one.p_holm for one in first] == [
        None,
        # Of three tests the smallest is more's.
        2 * test.p_value,
        pytest.approx(3e-4, rel=0.01),
        1.0,
    ]
    assert "| slight | 0.5300 [" in markdown(table)
    # more against slight is one test, which counts for both of them.
    best = [records[0].against_best_other for records in table.records]
    assert [None if one is None else one.other for one in best] == [
        "more",
        "more",
        "slight",
        "more",
    ]
    p_values = [one.p_holm for one in best if one is not None]
    assert p_values[1] == p_values[2]
    assert p_values[0] == p_values[3] == pytest.approx(3e-4, rel=0.01)
    line = next(csv.DictReader(io.StringIO(csv_text(table))))
    assert {"p_value", "p_holm", "p_value_best_other", "p_holm_best_other"} <= set(line)


def test_records_are_computed_once(
    four_rows: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hsft.report.comparison_files import save_comparison

    calls = []
    test = compare.paired_p_value

    def counted(*given: Any) -> float:
        calls.append(given)
        return test(*given)

    monkeypatch.setattr(compare, "paired_p_value", counted)
    save_comparison(four_rows, tmp_path)
    markdown(four_rows)
    # Three rows against the first, and two more against the best other.
    assert len(calls) == 3 + 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("hits", "users"), [(0, 200), (3, 200), (198, 200), (10, 30), (30, 30)])
def test_wilson_where_users_hits_or_misses_are_few(hits: int, users: int) -> None:
    ranks = np.array([1] * hits + [UNRANKED] * (users - hits))
    (record,) = Comparison("", [Row("", np.arange(users), ranks)], [("Recall", 10)]).records[0]
    share = hits / users
    assert record.low <= share <= record.high
    assert record.high - record.low > 0
    # The interval's ends are the two proportions from which the share is 1.96 standard errors away.
    for end in (record.low, record.high):
        error = np.sqrt(end * (1 - end) / users)
        assert abs(share - end) == pytest.approx(1.959964 * error, abs=1e-8)


def test_wilson_is_not_used_where_the_bootstrap_serves() -> None:
    (record,) = comparison(half=np.where(np.arange(200) % 2, 1, 20)).records[0]
    wilson = wilson_interval(0.5, 200)
    assert (record.low, record.high) != pytest.approx(wilson, abs=1e-4)
    assert (record.low, record.high) == pytest.approx(wilson, abs=0.01)


def test_compare_prints_and_saves_the_table(project: Project) -> None:
    project.run("--model", "pop")
    project.run(*TRAIN)
    code, out, err = project.call(compare_main, ["saved/tiny-pop", "saved/tiny-qlora"])
    assert code == 0, err
    assert "| tiny-pop |" in out
    assert "| tiny-qlora: fine-tuned |" in out
    assert "tiny-qlora: fine-tuned: epochs 2," in out
    assert f"tiny-qlora: untrained: user_pretrain_dir {project.llama}," in out
    assert "qlora_r 8" in out
    saved = project.root / "saved" / "tiny-qlora"
    assert {"comparison.md", "comparison.csv", "comparison.png"} <= {
        p.name for p in saved.iterdir()
    }
    # The untrained rows of both runs are one.
    project.run("--val_only", "True")
    code, out, err = project.call(compare_main, ["saved/tiny-baseline", "saved/tiny-qlora"])
    assert code == 0, err
    assert (
        "\ntiny-qlora: untrained is left out: every user's item has the same rank as in "
        "tiny-baseline.\n"
    ) in out
    project.run("--model", "pop", "--eval_phase", "valid", "--run_name", "other")
    code, _, err = project.call(compare_main, ["saved/tiny-pop", "saved/other"])
    assert code == 2
    assert "phase" in err


def test_metrics_of_lists_are_recorded_compared_and_reported(project: Project) -> None:
    lists = ("--list_metrics", "True", "--metrics", "Recall", "NDCG", "AUC")
    code, out, err = project.run("--model", "pop", *lists)
    assert code == 0, err
    assert re.search(r"(?m)^IntraListSimilarity@20 +\S+$", out)
    assert project.run("--val_only", "True", *lists)[0] == 0
    make_cache(project.root / "other.safetensors", pooling="mean", seed=1)
    other = ("--item_cache_path", "other.safetensors", "--run_name", "other")
    assert project.run("--model", "item_knn", *lists, *other)[0] == 0
    code, _, err = project.run("--model", "random", *lists, "--item_cache_path", "none.safetensors")
    assert code == 0, err
    assert "list_metrics: no intra-list similarity: item cache none.safetensors" in err
    runs = ["tiny-pop", "tiny-baseline", "other", "tiny-random"]
    results = {run: json.loads(Path(f"saved/{run}/result.json").read_text()) for run in runs}
    metrics = {run: result["rows"][0]["metrics"] for run, result in results.items()}
    assert set(metrics["tiny-random"]) == {
        name for name in metrics["tiny-pop"] if not name.startswith("IntraList")
    }
    for k in (5, 10, 20):
        # No lists are more popular than those of the most popular items.
        popularity = {run: values[f"AveragePopularity@{k}"] for run, values in metrics.items()}
        assert popularity["tiny-pop"] == max(popularity.values())
        mean = results["tiny-pop"]["list_metrics"]["history_popularity"]
        assert metrics["tiny-pop"][f"PopularityLift@{k}"] == pytest.approx(
            popularity["tiny-pop"] / mean - 1
        )
    # At 20 the lists of any model hold all items that the users have not seen.
    assert metrics["tiny-pop"]["GiniIndex@20"] == metrics["tiny-random"]["GiniIndex@20"]
    assert metrics["tiny-pop"]["GiniIndex@5"] > metrics["tiny-random"]["GiniIndex@5"]

    code, out, err = project.call(compare_main, [f"saved/{run}" for run in runs])
    assert code == 0, err
    header = next(line for line in out.splitlines() if "Novelty@10" in line)
    assert header.startswith("| run | Coverage@10 | GiniIndex@10 | ShannonEntropy@10 |")
    assert "\nLists of 10, all users together:\n" in out
    assert "\nWhole rankings, all users together:\n\n| run | AUC |\n" in out
    assert (
        "\nsaved/other: IntraListSimilarity is by other item embeddings than that of saved/tiny-pop"
    )
    written = Path("saved/tiny-random/comparison.csv").read_text()
    table = {row["metric"]: row for row in csv.DictReader(io.StringIO(written))}
    assert float(table["Novelty@5"]["value"]) == pytest.approx(metrics["tiny-random"]["Novelty@5"])
    assert table["Novelty@5"]["low"] == ""

    argv = [*(f"saved/{run}" for run in runs), "--examples", "0", "--out", "report.html"]
    code, _, err = project.call(report_main, argv)
    assert code == 0, err
    page = Path("report.html").read_text()
    assert "Lists of 10, all users together" in page
    columns = page.partition("Lists of 10, all users together")[2].partition("</tr>")[0]
    assert re.findall(r'<th scope="col">(?:<span>)?(\w+)', columns)[:3] == [
        *("model", "Coverage", "GiniIndex"),
    ]
    assert "Novelty: mean self-information of a listed item, in bits" in page
    value = f"{metrics['tiny-pop']['TailPercentage@10']:.4f}"
    assert f"<td>{value}</td>" in page


def test_lists_of_candidates_are_refused(project: Project) -> None:
    code, _, err = project.run(
        "--model", "pop", "--list_metrics", "True", "--eval_protocol", "sampled"
    )
    assert code == 2
    assert "list_metrics are of lists of the whole catalogue" in err
    code, _, err = project.run(
        *("--model", "pop", "--eval_protocol", "sampled", "--metrics", "[NDCG, Coverage]")
    )
    assert code == 2
    assert "Coverage is of lists of the whole catalogue" in err


def rows_of_file(project: Project) -> list[list[str]]:
    return [line.split(",") for line in Path("dataset/tiny.csv").read_text().split()[1:]]


def evaluate_on(project: Project, run: str, rows: list[list[str]], *more: str) -> None:
    """Evaluate `pop` on other interactions under the same name."""
    folder = Path(f"data-{run}")
    folder.mkdir()
    lines = ["item_id,user_id,timestamp", *(",".join(row) for row in rows)]
    (folder / "tiny.csv").write_text("\n".join(lines) + "\n")
    code, _, err = project.run(
        "--model", "pop", "--run_name", run, "--data_path", str(folder), *more
    )
    assert code == 0, err


def swap_last_two(rows: list[list[str]], user: str) -> list[list[str]]:
    """Exchange the items of a user's last two interactions: as many of everything as before."""
    changed = [list(row) for row in rows]
    *_, one, two = (row for row in changed if row[1] == user)
    one[0], two[0] = two[0], one[0]
    return changed


def test_runs_on_unlike_things_are_refused_by_name(project: Project) -> None:
    rows = rows_of_file(project)
    evaluate_on(project, "first", rows)
    evaluate_on(project, "again", sorted(rows, key=lambda row: (row[1], row[2])))
    evaluate_on(project, "target", swap_last_two(rows, "u3"))
    renamed = [["new" if row[0] == "i7" else row[0], *row[1:]] for row in rows]
    evaluate_on(project, "catalogue", renamed)
    evaluate_on(project, "more", [*rows, ["i1", "u1", "1"]])
    sampled = ("--eval_protocol", "sampled", "--eval_neg_sample_num", "5")
    evaluate_on(project, "sampled", rows, *sampled)
    evaluate_on(project, "seed", rows, *sampled, "--seed", "1")
    cases = {
        ("first", "target"): "they differ in held-out items and histories;",
        ("first", "catalogue"): "they differ in held-out items, catalogue and histories;",
        ("first", "more"): "they differ in histories;",
        # The same interactions: stored ranks are paired by the users' order.
        ("first", "again"): "they differ in order of users;",
        ("first", "sampled"): "its protocol is '5 sampled negatives",
        ("sampled", "seed"): "(seed 1)', not '5 sampled negatives",
    }
    for (one, two), words in cases.items():
        code, out, err = project.call(compare_main, [f"saved/{one}", f"saved/{two}"])
        assert (code, out) == (2, ""), (two, err)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert f"saved/{two} cannot be compared with saved/{one}: " in line
        assert words in line, (two, line)


def make_format_1(run: str) -> None:
    """Turn a run's result into one of an earlier version, which recorded no fingerprint."""
    path = Path("saved", run, "result.json")
    result = json.loads(path.read_text())
    del result["fingerprint"]
    path.write_text(json.dumps({**result, "format": 1}))


def test_results_without_a_fingerprint_are_compared_by_what_is_known(project: Project) -> None:
    rows = rows_of_file(project)
    evaluate_on(project, "new", rows)
    evaluate_on(project, "old", swap_last_two(rows, "u3"))
    evaluate_on(project, "fewer", rows[:-1])
    make_format_1("old")
    make_format_1("fewer")
    code, out, err = project.call(compare_main, ["saved/new", "saved/old"])
    assert code == 0, err
    assert "\nsaved/old: made before results recorded which items were held out, so that" in out
    code, _, err = project.call(compare_main, ["saved/new", "saved/fewer"])
    assert code == 2
    assert "they differ in number of interactions (" in err


def test_a_masked_target_is_a_miss_where_the_catalogue_is_smaller_than_k(project: Project) -> None:
    rows = rows_of_file(project)
    last = next(row for row in reversed(rows) if row[1] == "u0")
    first = next(row for row in rows if row[1] == "u0")
    last[0] = first[0]
    evaluate_on(project, "run", rows, "--topk", "5", "100", "--valid_metric", "NDCG@5")
    users, ranks = read_ranks("saved/run", "pop")
    index = users.tolist().index(0)
    assert ranks[index] == UNRANKED
    assert np.delete(ranks, index).max() <= 20
    metrics = json.loads(Path("saved/run/result.json").read_text())["rows"][0]["metrics"]
    assert metrics["Recall@100"] == pytest.approx(29 / 30)
    table = load_comparison(["saved/run"])
    recall = [record for record in table.records[0] if record.metric == "Recall@100"]
    assert recall[0].value == pytest.approx(29 / 30)
    # Results of earlier versions have the rank after the last item there.
    from safetensors.numpy import load_file, save_file

    arrays = load_file("saved/run/ranks.safetensors")
    arrays["pop.ranks"][index] = 21
    save_file(arrays, "saved/run/ranks.safetensors")
    make_format_1("run")
    assert read_ranks("saved/run", "pop")[1].tolist() == ranks.tolist()


def test_optional_parts_of_a_training_are_named_where_they_are_set() -> None:
    set_keys = {"item_id_embedding": True, "item_dropout": 0.2, "encoder": "models/encoder"}
    for changes in ({}, set_keys):
        config = Config(**changes, negatives="in_batch").model_dump(mode="json")
        named = compare._settings({"config": config}, compare.TUNED)
        for key, value in set_keys.items():
            assert (f"{key} {value}" in named) == bool(changes)
        assert "negatives_logq" not in named
        assert "temperature" not in named
    named = compare._settings({"config": Config().model_dump(mode="json")}, compare.TUNED)
    assert "negatives sampled, num_negatives 512" in named
    assert "negatives_logq True" in named
    sasrec = Config(model="sasrec", similarity="cosine", temperature=0.1).model_dump(mode="json")
    assert "temperature 0.1" in compare._settings({"config": sasrec}, "sasrec")
    timed = Config(model="hstu", use_timestamps=True, predict_at="target").model_dump(mode="json")
    named = compare._settings({"config": timed}, "hstu")
    assert "use_timestamps True, predict_at target" in named
    on_ids = Config(model="llm_id", user_pretrain_dir="llama").model_dump(mode="json")
    assert "user_pretrain_dir llama" in compare._settings({"config": on_ids}, "llm_id")

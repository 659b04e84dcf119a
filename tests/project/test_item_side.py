"""experiments/item_side.py: what it measures of finished trials."""

from __future__ import annotations

import json

import pytest

from experiments import item_side
from hsft.report.result import read_result
from tests.conftest import Project
from tests.helpers import make_cache, make_dataset

METRICS = [
    f"{name}@10"
    for name in ("Recall", "Coverage", "AveragePopularity", "PopularityLift", "IntraListSimilarity")
]


def test_lists_measures_what_the_runs_say_themselves(project: Project) -> None:
    make_dataset(project.root, "beauty")
    make_cache(project.root / "cache" / "beauty_minilm.safetensors")
    own, trials = {}, []
    for family, more in {"pop": ("--model", "pop"), "text": ("--val_only", "True")}.items():
        name = f"beauty-{family}-0"
        # With metrics of its lists, which the trials do not have.
        code, _, err = project.run(
            *("--dataset", "beauty", "--item_cache_path", "cache/beauty_minilm.safetensors", *more),
            *("--checkpoint_dir", f"runs/{name}", "--run_name", "run", "--eval_phase", "valid"),
            *("--list_metrics", "True"),
        )
        assert code == 0, err
        own[family] = read_result(project.root / "runs" / name / "run")["rows"][-1]["metrics"]
        trials.append({"name": name, "data": "beauty", "family": family, "valid": 0.1})
    out = project.root / "out"
    out.mkdir()
    (out / "trials.jsonl").write_text("".join(f"{json.dumps(trial)}\n" for trial in trials))

    code, shown, err = project.call(
        item_side.main, ["lists", "--folder", str(project.root), "--out", str(out)]
    )
    assert code == 0, err
    title, header, _, *rows = [s for s in shown.splitlines() if s.startswith(("beauty", "|"))]
    assert title == "beauty, 30 validation users, 20 items:"
    columns, *values = [[cell.strip() for cell in row[1:-1].split("|")] for row in (header, *rows)]
    assert len(values) == 2
    for row, family in zip(values, ("pop", "text"), strict=True):
        cells = dict(zip(columns, row, strict=True))
        assert cells["model"] == item_side._TITLES[family]
        for metric in METRICS:
            assert float(cells[metric]) == pytest.approx(own[family][metric], abs=5e-3, rel=1e-2)
    written = [json.loads(line) for line in (out / "lists.jsonl").read_text().splitlines()]
    assert [row["name"] for row in written] == ["beauty-pop-0", "beauty-text-0"]
    assert [row["metrics"] for row in written] == [
        pytest.approx(own["pop"]),
        pytest.approx(own["text"]),
    ]

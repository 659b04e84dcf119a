"""A sweep looks at no test item, goes on as if it had not been interrupted, and refuses bad plans."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsft.config.loader import load_config, parse_command_line
from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.finished import sweep as sweep_module
from hsft.finished.sweep_plan import read_plan
from hsft.utils.errors import InputError, Interrupted
from sweep import main as sweep_main
from tests.conftest import Project
from tests.helpers import ROOT

pytest.importorskip("optuna", reason="optuna is not installed (hsft[sweep])")

FILES = [f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/HLLM/HLLM.yaml"]


def plan_of(project: Project, search: Mapping[str, Any], **more: Any) -> Path:
    """Write a plan of tiny runs."""
    fixed = {
        "dataset": "tiny",
        "user_pretrain_dir": str(project.llama),
        "MAX_ITEM_LIST_LENGTH": 8,
        "precision": "32-true",
        "show_progress": False,
        "use_qlora": True,
        "qlora_quant_type": "none",
        "user_llm_layers": 1,
        "epochs": 1,
        "train_batch_size": 16,
        "metrics": ["NDCG"],
        "topk": [5, 10],
    } | more.pop("fixed", {})
    content = {"config_file": FILES, "fixed": fixed, "search": dict(search), **more}
    path = project.root / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def sweep(project: Project, path: Path) -> tuple[int, str, str]:
    return project.call(sweep_main, [str(path)])


def rows(project: Project) -> list[dict[str, str]]:
    with (project.root / "runs/sweep/sweep.csv").open() as stream:
        return list(csv.DictReader(stream))


def result(project: Project, name: str) -> dict[str, Any]:
    return json.loads((project.root / "runs/sweep/trials" / name / "result.json").read_text())


SEARCH = {
    "optim_args": {"learning_rate": {"low": 0.001, "high": 0.1, "log": True}},
    "qlora_r": {"low": 1, "high": 4},
    "qlora_target_modules": [["q_proj", "v_proj"], ["all-linear"]],
}


def test_trials_are_compared_on_validation_only(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    make = CachedEmbeddingEvalDataset.__init__

    def noted(self: Any, split: Any, phase: Any, *more: Any, **named: Any) -> None:
        phases.append(phase)
        make(self, split, phase, *more, **named)

    monkeypatch.setattr(CachedEmbeddingEvalDataset, "__init__", noted)
    code, out, err = sweep(project, plan_of(project, SEARCH, trials=3, metric="NDCG@5"))
    assert code == 0, err
    assert len(phases) == 6
    assert set(phases) == {"valid"}

    names = [f"trial-{number:04d}" for number in range(3)]
    values = {}
    for name in names:
        actual = result(project, name)
        assert actual["phase"] == "valid"
        assert [row["name"] for row in actual["rows"]] == ["fine-tuned"]
        values[name] = actual["rows"][0]["metrics"]["NDCG@5"]
    best_first = sorted(names, key=lambda name: -values[name])
    table = rows(project)
    assert list(dict.fromkeys(row["run"] for row in table)) == best_first
    for row in table:
        actual = result(project, row["run"])
        assert float(row["value"]) == pytest.approx(actual["rows"][0]["metrics"][row["metric"]])
        rate = actual["config"]["optim_args"]["learning_rate"]
        assert float(row["optim_args.learning_rate"]) == rate
    written = (project.root / "runs/sweep/sweep.md").read_text()
    assert written in out
    lines = [line for line in written.splitlines() if line.startswith("| trial-")]
    assert [line.split()[1] for line in lines] == best_first
    kept = [name for name in names if (project.root / f"runs/sweep/trials/{name}/best").exists()]
    assert kept == best_first[:1]

    # Numbers are short for people only.
    rates = re.findall(r"trial-\d+: optim_args.learning_rate (\S+),", written)
    assert len(rates) == 3
    exact = [result(project, name)["config"]["optim_args"]["learning_rate"] for name in best_first]
    assert rates == [f"{rate:.4g}" for rate in exact]
    assert rates != list(map(str, exact))
    assert "This command trains again" in written
    best = f"runs/sweep/trials/{best_first[0]}"
    assert f"are kept in {best}/best: recommend.py and export.py take --run {best}." in written

    # The command for the test users gives the best trial's configuration.
    command = next(line for line in written.splitlines() if line.startswith("    python "))
    given = parse_command_line(shlex.split(command)[2:])
    config = load_config(given.config_files, given.overrides)[0].model_dump(mode="json")
    tried = result(project, best_first[0])["config"]
    differing = {key for key in config if config[key] != tried[key]}
    assert differing == {
        *("auto_resume", "checkpoint_dir", "eval_baseline", "eval_phase", "run_name"),
    }
    assert config["eval_phase"] == "test"


def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_of(project, SEARCH, trials=2, sampler="random", fixed={"epochs": 2}, dir="whole")
    assert sweep(project, whole)[0] == 0
    real = sweep_module.train_and_rank
    begun: list[str] = []

    def interrupted(config: Any, keep_going: Any) -> Any:
        begun.append(config.run_name)
        if len(begun) != 2:
            return real(config, keep_going)

        def stop_after_one(epoch: int, metrics: Mapping[str, float]) -> bool:
            keep_going(epoch, metrics)
            raise Interrupted("stopped by SIGTERM; say more", 143)

        return real(config, stop_after_one)

    monkeypatch.setattr(sweep_module, "train_and_rank", interrupted)
    cut = plan_of(project, SEARCH, trials=2, sampler="random", fixed={"epochs": 2})
    code, _, err = sweep(project, cut)
    assert code == 143
    assert "interrupted: stopped by SIGTERM; start the same command again to go on" in err
    code, _, err = sweep(project, cut)
    assert code == 0, err
    assert begun == ["trial-0000", "trial-0001", "trial-0001"]
    # It went on from its checkpoint.
    assert result(project, "trial-0001")["training"]["resumed_from"] == [2]
    for name in ("trial-0000", "trial-0001"):
        before = json.loads((project.root / "whole/trials" / name / "result.json").read_text())
        after = result(project, name)
        assert after["rows"][0]["metrics"] == before["rows"][0]["metrics"]
        assert after["config"]["qlora_r"] == before["config"]["qlora_r"]
    # Nothing is left to do; more trials can be asked for, another search cannot.
    assert sweep(project, cut)[0] == 0
    assert len(begun) == 3
    assert (
        sweep(project, plan_of(project, SEARCH, trials=3, sampler="random", fixed={"epochs": 2}))[0]
        == 0
    )
    assert begun[3:] == ["trial-0002"]
    code, _, err = sweep(project, plan_of(project, {"qlora_r": [1, 2]}, sampler="random"))
    assert code == 2
    assert "holds a sweep with search" in err
    code, _, err = sweep(project, plan_of(project, SEARCH, trials=3, sampler="random"))
    assert code == 2
    assert "holds a sweep with epochs 2, now it is 1" in err


def test_a_grid_takes_each_point_once_and_failures_are_told(project: Project) -> None:
    # bce has no full softmax: one of the four points is no configuration.
    search = {"loss": ["bce", "nce"], "negatives": ["catalogue", "in_batch"]}
    code, out, err = sweep(project, plan_of(project, search, sampler="grid", trials=9))
    assert code == 0, err
    table = rows(project)
    actual = {(row["loss"], row["negatives"]): row for row in table}
    assert len(actual) == 4
    failed = actual["bce", "catalogue"]
    assert failed["state"] == "failed"
    assert "is a full softmax and needs loss: nce" in failed["problem"]
    assert f"{failed['run']} failed: " in out
    assert sum(row["state"] == "complete" for row in actual.values()) == 3


def test_a_trial_below_the_others_is_ended_early(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    asked: list[int] = []

    def prune(self: Any, study: Any, trial: Any) -> bool:
        asked.append(trial.last_step)
        return bool(trial.number == 1)

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", prune)
    path = plan_of(
        project, {"qlora_r": [1, 2]}, sampler="grid", pruner="median", fixed={"epochs": 2}
    )
    code, out, err = sweep(project, path)
    assert code == 0, err
    assert asked == [1, 2, 1]
    assert [len(result(project, f"trial-000{n}")["training"]["history"]) for n in (0, 1)] == [2, 1]
    assert {row["run"]: row["state"] for row in rows(project)} == {
        "trial-0000": "complete",
        "trial-0001": "pruned",
    }
    assert "| trial-0001 (pruned) |" in out


def test_values_that_come_again_are_not_run_again(project: Project) -> None:
    path = plan_of(
        project, {"knn_history": ["last", "mean"]}, trials=6, fixed={"model": "item_knn"}
    )
    code, _, err = sweep(project, path)
    assert code == 0, err
    assert len(list((project.root / "runs/sweep/trials").glob("trial-*"))) == 2
    assert "whose result it takes" in err


@pytest.mark.parametrize(
    ("search", "more", "message"),
    [
        ({"qlora_rank": [1]}, {}, "unknown search key 'qlora_rank'; did you mean"),
        ({"qlora_r": [0]}, {}, "search key 'qlora_r': 0: input should be greater than or equal"),
        ({"qlora_r": {"low": 1.5, "high": 3}}, {}, "1.5"),
        ({"qlora_r": {"low": 4, "high": 3}}, {}, r"low \(4\) must be less than high \(3\)"),
        ({"loss": {"low": 1, "high": 3}}, {}, "takes no numbers"),
        ({"qlora_r": 3}, {}, "write a list of values, or low and high"),
        ({"qlora_dropout": {"low": 0, "high": 0.5, "log": True}}, {}, "log needs a low above 0"),
        ({"topk": [[5], [10]]}, {}, "cannot be compared"),
        ({"valid_users": [5, 10]}, {}, "differ in valid_users cannot be compared"),
        ({"split": ["leave_one_out", "global_time"]}, {}, "differ in split cannot be compared"),
        ({"split_time": [0.8, 0.9]}, {}, "differ in split_time cannot be compared"),
        ({"item_data": ["tiny", None]}, {}, "differ in item_data cannot be compared"),
        ({"predict_at": ["unknown", "target"]}, {}, "differ in predict_at cannot be compared"),
        ({"seed": [1, 2]}, {"fixed": {"valid_users": 5}}, "seed decides which users valid_users"),
        ({"seed": [1, 2]}, {"fixed": {"tie_order": "shuffle"}}, "seed decides the held-out items"),
        ({"eval_phase": ["test"]}, {}, "eval_phase is set by the sweep itself"),
        ({"qlora_r": [1]}, {"fixed": {"eval_phase": "test"}}, "eval_phase is set by the sweep"),
        ({"qlora_r": [1]}, {"fixed": {"epoch": 1}}, r"unknown key 'epoch' in sweep\.yaml"),
        ({"epochs": [1]}, {}, "epochs is under fixed and under search"),
        ({"qlora_r": [1]}, {"metric": "NDCG@7"}, "do not contain it"),
        ({"qlora_dropout": {"low": 0, "high": 0.5}}, {"sampler": "grid"}, "give a list or a step"),
        ({"qlora_r": [1]}, {"trial": 3}, "unknown key 'trial'; the keys of a sweep are"),
        ({}, {}, "search: dictionary should have at least 1 item"),
    ],
)
def test_bad_plans_are_refused(
    project: Project, search: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    plan_of(project, search, **more)
    with pytest.raises(InputError, match=message):
        read_plan("sweep.yaml")


def test_nothing_starts_where_every_trial_would_fail(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plan_of(project, {"qlora_r": [1, 2]}, fixed={"user_pretrain_dir": "nowhere"})
    code, _, err = sweep(project, path)
    assert code == 2
    assert "model folder nowhere does not exist" in err
    assert not (project.root / "runs").exists()

    def fails(config: Any, keep_going: Any) -> None:
        raise InputError(f"{config.qlora_r} is no good.")

    monkeypatch.setattr(sweep_module, "train_and_rank", fails)
    code, _, err = sweep(project, plan_of(project, {"qlora_r": {"low": 1, "high": 999}}))
    assert code == 2
    assert "all of the first 5 trials failed; the last one: " in err
    (project.root / "runs/sweep/study.db").unlink()
    (project.root / "runs/sweep/trials/trial-0000").mkdir(parents=True)
    code, _, err = sweep(project, path := plan_of(project, {"qlora_r": [1]}))
    assert code == 2
    assert "holds trials of another sweep" in err
    (project.root / "runs/sweep/study.db").write_text("no data base" * 100)
    code, _, err = sweep(project, path)
    assert code == 2
    assert "cannot be used by optuna" in err


def test_help_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep_main(["--help"])
    shown = capsys.readouterr().out
    keys = yaml.safe_load(Path(ROOT, "code/overall/sweep_example.yaml").read_text())
    listed = re.findall(
        r"(?m)^  (\w+) +\S.*$", shown[shown.index("keys of") :].partition("\n\n")[0]
    )
    assert listed == list(keys)
    assert "none, or median: end a training" in shown


def test_a_search_over_what_auto_becomes_is_a_plan(project: Project) -> None:
    plan = read_plan(plan_of(project, {"negatives": ["auto", "catalogue"]}))
    assert (plan.first, plan.base.negatives) == ({"negatives": "auto"}, "sampled")
    kinds = [plan.config({"negatives": kind}, "r").negatives for kind in ("auto", "catalogue")]
    assert kinds == ["sampled", "catalogue"]
    plan = read_plan(plan_of(project, {"num_negatives": [None, 64]}))
    assert (plan.first, plan.base.num_negatives) == ({"num_negatives": None}, 512)


def test_the_example_is_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_plan("code/overall/sweep_example.yaml")
    assert plan.base.eval_phase == "valid"
    assert len(plan.search) == 4

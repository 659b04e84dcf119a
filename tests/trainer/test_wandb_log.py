"""The training's scalars at Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from hsft.trainer import loop
from hsft.trainer.step import Learner
from hsft.trainer.wandb_log import ID_FILE
from hsft.utils.signals import StopSignals
from tests.conftest import Project

SASREC = (
    *("--model", "sasrec", "--sasrec.hidden_size", "16", "--epochs", "2", "--run_name", "run"),
    *("--num_threads", "1"),
)

QLORA = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "1", "--run_name", "run"),
    *("--num_threads", "1"),
)

WANDB = ("--log_wandb", "True")

# Writes what it is given to a file, one JSON line a call, as separate sessions would.
FAKE = """
import json, os

def note(kind, **values):
    with open(os.environ["FAKE_WANDB"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **values}) + "\\n")
    if os.environ.get("FAKE_WANDB_FAILS_AT") == kind:
        raise RuntimeError("the server\\nis away.")

class Summary:
    def update(self, values):
        note("summary", values=values)

class Run:
    summary = Summary()
    def define_metric(self, name, step_metric=None):
        note("define_metric", name=name, step_metric=step_metric)
    def log(self, values):
        note("log", values=values)
    def finish(self, exit_code=None):
        note("finish", exit_code=exit_code)

def init(**settings):
    note("init", **settings)
    return Run()
"""

Calls = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put a small `wandb` first on sys.path; returns what it was called with, by kind."""
    package = tmp_path / "packages"
    package.mkdir()
    (package / "wandb.py").write_text(FAKE)
    record = tmp_path / "calls.jsonl"
    record.touch()
    monkeypatch.syspath_prepend(str(package))
    forget_wandb(monkeypatch)
    monkeypatch.setenv("FAKE_WANDB", str(record))

    def calls(kind: str) -> list[dict[str, Any]]:
        actual = [json.loads(line) for line in record.read_text().splitlines()]
        return [call for call in actual if call["kind"] == kind]

    return calls


def forget_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have wandb imported again, and what is imported gone again after the test."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")


def scalars(project: Project) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(project.root / "saved" / "run" / "tensorboard")).Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }


def logged(calls: Calls) -> dict[tuple[str, int], float]:
    actual = {}
    for call in calls("log"):
        step = call["values"].pop("optimizer_step")
        for tag, value in call["values"].items():
            assert (tag, step) not in actual
            actual[tag, step] = value
    return actual


def test_wandb_gets_what_tensorboard_gets(project: Project, fake_wandb: Calls) -> None:
    code, _, err = project.run(*SASREC, *WANDB, "--wandb_project", "mine")
    assert code == 0, err
    (begun,) = fake_wandb("init")
    folder = project.root / "saved" / "run"
    assert begun["project"] == "mine"
    assert begun["name"] == "run"
    assert (project.root / begun["dir"]) == folder
    assert begun["id"] == (folder / ID_FILE).read_text().strip()
    assert begun["resume"] == "allow"
    actual = json.loads((folder / "result.json").read_text())
    assert begun["config"] == actual["config"]
    assert {(call["name"], call["step_metric"]) for call in fake_wandb("define_metric")} == {
        ("train/*", "optimizer_step"),
        ("valid/*", "optimizer_step"),
    }
    there, here = logged(fake_wandb), scalars(project)
    assert {("train/loss", 8), ("train/learning_rate", 1), ("valid/NDCG@10", 4)} <= there.keys()
    assert there == pytest.approx(here)
    (summary,) = fake_wandb("summary")
    assert summary["values"] == {
        f"test/{name}": value for name, value in actual["rows"][-1]["metrics"].items()
    }
    assert [call["exit_code"] for call in fake_wandb("finish")] == [0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_resumed_run_goes_on_at_wandb(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop.update

    def stopping(learner: Learner) -> Any:
        if learner.schedule.last_epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", stopping)
        assert project.run(*SASREC, *WANDB)[0] == 143
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 0, err
    first, second = fake_wandb("init")
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [call["exit_code"] for call in fake_wandb("finish")] == [1, 0]
    there = logged(fake_wandb)
    assert [step for tag, step in there if tag == "train/loss"] == list(range(1, 9))
    assert there == pytest.approx(scalars(project))


def interrupt(project: Project, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Do a run that is interrupted at the end of its first epoch."""

    def fail(self: StopSignals, done: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "raise_if_received", fail)
        assert project.run(*flags)[0] == 130


def test_wandb_may_be_asked_for_later(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(project, monkeypatch, *SASREC)
    assert not fake_wandb("init")
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 0, err
    assert [step for tag, step in logged(fake_wandb) if tag == "train/loss"] == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["log", "finish", "summary"])
def test_a_failure_of_wandb_does_not_stop_training(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", kind)
    code, _, err = project.run(*SASREC, *WANDB)
    assert code == 0, err
    assert err.count("Weights & Biases failed") == 1
    assert "no more values of this run: the server is away. TensorBoard's are complete." in err
    assert (project.root / "saved" / "run" / "result.json").is_file()
    assert len([tag for tag, _ in scalars(project) if tag == "train/loss"]) == 8
    assert len(fake_wandb(kind)) == 1


def test_wandb_that_does_not_start_is_said_before_the_work(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", "init")
    code, _, err = project.run(*QLORA, *WANDB)
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: Weights & Biases does not start: the server is away; log in with wandb login, set "
        "WANDB_MODE=offline in the environment, or set --log_wandb False."
    )
    assert not (project.root / "saved" / "run").exists()


def test_a_damaged_run_id_is_refused(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(project, monkeypatch, *SASREC, *WANDB)
    (project.root / "saved" / "run" / ID_FILE).write_text("a/b\n")
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 2
    assert f"{ID_FILE} holds no run id of W&B; remove it" in err.splitlines()[-1]
    assert (project.root / "saved" / "run" / "checkpoints").is_dir()


def test_a_missing_wandb_is_said_at_the_start(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail, whether or not the package is installed.
    monkeypatch.setitem(sys.modules, "wandb", None)
    for more in ((), ("--check", "True")):
        code, out, err = project.run(*SASREC, *WANDB, *more)
        assert code == 2
        assert not out
        (line,) = err.splitlines()
        assert line.startswith("error: log_wandb: True needs the package wandb")
        assert line.endswith("install it with pip install wandb, or set --log_wandb False.")
    assert not (project.root / "saved").exists()
    # What does not train has nothing to log.
    assert project.run("--model", "pop", *WANDB)[0] == 0


def test_a_folder_called_wandb_is_not_the_package(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_wandb(monkeypatch)
    (project.root / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(project.root)])
    code, _, err = project.run(*SASREC, *WANDB)
    assert code == 2
    assert "only a folder of that name was found" in err


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = project.run(*SASREC, *WANDB, "--wandb_project", "mine")
    assert code == 0, err
    assert "Weights & Biases failed" not in err
    folder = project.root / "saved" / "run"
    name = (folder / ID_FILE).read_text().strip()
    assert list(folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))

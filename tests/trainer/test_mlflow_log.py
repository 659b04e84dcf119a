"""The training's scalars and the configuration at MLflow."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from hsft.trainer import loop
from hsft.trainer.mlflow_log import ID_FILE
from hsft.trainer.step import Learner
from tests.conftest import Project

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

SASREC = (
    *("--model", "sasrec", "--sasrec.hidden_size", "16", "--epochs", "2", "--run_name", "run"),
    *("--num_threads", "1", "--log_mlflow", "True"),
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local store for the tests of this file; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def _local_mlflow(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def run_folder(project: Project) -> Path:
    return project.root / "saved" / "run"


def run_id(project: Project) -> str:
    return (run_folder(project) / ID_FILE).read_text().strip()


def logged(client: Any, run: str, names: set[str]) -> dict[tuple[str, int], float]:
    """Return (metric, step) -> value; each of them has to be there once."""
    points = [
        ((name, point.step), point.value)
        for name in names
        for point in client.get_metric_history(run, name)
    ]
    assert len(dict(points)) == len(points)
    return dict(points)


def tensorboard(project: Project) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(run_folder(project) / "tensorboard")).Reload()
    return {
        (tag.replace("@", "_at_"), event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }


@pytest.mark.parametrize("store", ["database", "files"])
def test_mlflow_gets_metrics_and_configuration(
    project: Project, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store == "files":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (project.root / "mlruns").as_uri())
        # MLflow 3 refuses its local file store without.
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    code, _, err = project.run(*SASREC, "--mlflow_experiment", "mine")
    assert code == 0, err
    assert "MLflow failed" not in err
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == run_id(project)
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["sasrec.hidden_size"] == "16"
    assert run.data.params["dataset"] == "tiny"
    names = {name for name in run.data.metrics if not name.startswith("test/")}
    there, here = logged(client, run.info.run_id, names), tensorboard(project)
    assert {("train/loss", 8), ("train/learning_rate", 1), ("valid/NDCG_at_10", 4)} <= there.keys()
    assert there == pytest.approx(here)
    (row,) = json.loads((run_folder(project) / "result.json").read_text())["rows"]
    assert {name: value for name, value in run.data.metrics.items() if name not in names} == (
        pytest.approx({f"test/{k.replace('@', '_at_')}": v for k, v in row["metrics"].items()})
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_resumed_run_goes_on_at_mlflow(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    update = loop.update

    def stopping(learner: Learner) -> Any:
        if learner.schedule.last_epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner)

    client = mlflow.MlflowClient()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", stopping)
        assert project.run(*SASREC)[0] == 143
    first = run_id(project)
    assert client.get_run(first).info.status == "KILLED"
    # A key that may change keeps the value that is logged.
    code, _, err = project.run(*SASREC, "--auto_resume", "True", "--num_threads", "2")
    assert code == 0, err
    assert run_id(project) == first
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params["num_threads"] == "1"
    losses = logged(client, first, {"train/loss"})
    assert sorted(losses) == [("train/loss", step) for step in range(1, 9)]


def test_an_unknown_run_of_mlflow_is_refused_before_the_work(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hsft.utils.signals.StopSignals.raise_if_received", fail)
        assert project.run(*SASREC)[0] == 130
    for text, message in (("0" * 32, "Run with id=" + "0" * 32), ("a/b", "holds no run id")):
        (run_folder(project) / ID_FILE).write_text(f"{text}\n")
        code, _, err = project.run(*SASREC, "--auto_resume", "True")
        assert code == 2
        assert message in err.splitlines()[-1]
        assert (run_folder(project) / "checkpoints").is_dir()


@pytest.mark.parametrize("method", ["log_batch", "set_terminated"])
def test_a_failure_of_mlflow_does_not_stop_training(
    project: Project, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    working = getattr(mlflow.MlflowClient, method)

    def fail(client: Any, *given: Any, **named: Any) -> Any:
        if "params" in named:
            return working(client, *given, **named)
        raise RuntimeError("the server\nis away.")

    monkeypatch.setattr(mlflow.MlflowClient, method, fail)
    code, _, err = project.run(*SASREC)
    assert code == 0, err
    assert err.count("MLflow failed") == 1
    assert "no more values of this run: the server is away. TensorBoard's are complete." in err
    assert len([tag for tag, _ in tensorboard(project) if tag == "train/loss"]) == 8


def test_a_server_that_is_down_is_said_before_the_work(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    code, _, err = project.run(*SASREC)
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: MLflow at http://127.0.0.1:9 does not start: ")
    assert line.endswith("check MLFLOW_TRACKING_URI, or set --log_mlflow False.")
    assert "secret" not in err
    assert not run_folder(project).exists()


@pytest.mark.skipif(
    not hasattr(mlflow.environment_variables, "MLFLOW_ALLOW_FILE_STORE"),
    reason="this version of MLflow takes folders",
)
def test_a_refused_file_store_is_one_sentence(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (project.root / "mlruns").as_uri())
    code, _, err = project.run(*SASREC)
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: MLflow at file://")
    assert "set `MLFLOW_ALLOW_FILE_STORE=true`" in line
    assert not run_folder(project).exists()


def test_a_missing_mlflow_is_said_at_the_start(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail, whether or not the package is installed.
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for more in ((), ("--check", "True")):
        code, out, err = project.run(*SASREC, *more)
        assert code == 2
        assert not out
        (line,) = err.splitlines()
        assert line.startswith("error: log_mlflow: True needs the package mlflow-skinny")
        assert line.endswith("mlflow-skinny sqlalchemy alembic, or set --log_mlflow False.")
    assert not (project.root / "saved").exists()
    # What does not train has nothing to log.
    assert project.run("--model", "pop", "--log_mlflow", "True")[0] == 0

"""The training's scalars and the configuration at MLflow, for those who ask for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hsft.config import Config
from hsft.config.loader import flat_values
from hsft.trainer.tracker import Tracker, import_tracker, read_run_id, without_password
from hsft.utils.errors import InputError, Interrupted, brief
from hsft.utils.files import is_file, write_text

log = logging.getLogger(__name__)

# The id of MLflow's run, in the run's folder: a resumed run goes on under it.
ID_FILE = "mlflow_id"

# Limits of MLflow's server: values of a request, and characters of a parameter (in 2.x).
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_PARAM_LENGTH = 500


def load_mlflow() -> Any:
    """Import mlflow.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    return import_tracker(
        "mlflow",
        "MlflowClient",
        key="log_mlflow",
        package="mlflow-skinny",
        lookalike="a folder called mlflow",
        install="mlflow-skinny sqlalchemy alembic",
    )


def metric_name(name: str) -> str:
    """Return a metric's name as MLflow takes it: `valid/NDCG@10` is `valid/NDCG_at_10` there."""
    return name.replace("@", "_at_")


class MlflowLog(Tracker):
    """A run at MLflow: its metrics by optimizer step, and every key of the configuration.

    Values are sent by a thread of their own, so that training does not wait for the server: one
    request carries what came in while the one before it was under way.
    """

    service = "MLflow"

    def __init__(self) -> None:
        super().__init__()
        self._mlflow: Any = None
        self._client: Any = None
        self._run_id = ""
        self._unsent: list[Any] = []
        self._lock = threading.Lock()
        self._sender: ThreadPoolExecutor | None = None
        self._request: Future[None] | None = None

    def _start(self, config: Config, folder: Path) -> None:
        self._mlflow = load_mlflow()
        uri = self._mlflow.get_tracking_uri()
        path = folder / ID_FILE
        log.info("logging to MLflow at %s.", without_password(uri))
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            known = read_run_id(path, "MLflow") if is_file(path) else None
            if known is None:
                run = self._client.create_run(self._experiment_id(config), run_name=folder.name)
                write_text(path, f"{run.info.run_id}\n")
            else:
                run = self._client.get_run(known)
                self._client.update_run(known, status="RUNNING")
            self._run_id = run.info.run_id
            self._log_params(config, run.data.params)
        except InputError:
            raise
        except Exception as error:  # mlflow's errors and those of its stores have no common base
            raise InputError(
                f"MLflow at {without_password(uri)} does not start: "
                f"{brief(without_password(error))}; check MLFLOW_TRACKING_URI, or set "
                f"--log_mlflow False."
            ) from error
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")

    def _experiment_id(self, config: Config) -> str:
        given = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if config.mlflow_experiment is None and given:
            return given
        name = config.mlflow_experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def _log_params(self, config: Config, logged: Mapping[str, str]) -> None:
        """Log the keys that are not logged yet: MLflow refuses another value for one that is."""
        param = self._mlflow.entities.Param
        values = flat_values(config.model_dump(mode="json"))
        params = [
            param(key, str(value)[:_PARAM_LENGTH])
            for key, value in values.items()
            if key not in logged
        ]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            part = params[first : first + _PARAMS_PER_REQUEST]
            self._client.log_batch(self._run_id, params=part)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        with self._lock:
            self._unsent += [
                metric(metric_name(name), value, now, step) for name, value in values.items()
            ]
        assert self._sender is not None
        if self._request is None or self._request.done():
            self._raise_failure()
            self._request = self._sender.submit(self._send)

    def _log_summary(self, values: Mapping[str, float]) -> None:
        # Step 0: these are values of the run, not of a step.
        self._log(values, 0)

    def _finish(self, kind: type[BaseException] | None) -> None:
        assert self._sender is not None
        self._sender.shutdown(wait=True)
        self._raise_failure()
        self._send()
        self._client.set_terminated(self._run_id, status=_status(kind))

    def _raise_failure(self) -> None:
        if self._request is not None:
            self._request.result()

    def _send(self) -> None:
        for metrics in iter(self._take_unsent, []):
            self._client.log_batch(self._run_id, metrics=metrics)

    def _take_unsent(self) -> list[Any]:
        with self._lock:
            taken = self._unsent[:_METRICS_PER_REQUEST]
            del self._unsent[: len(taken)]
        return taken


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, (Interrupted, KeyboardInterrupt)) else "FAILED"

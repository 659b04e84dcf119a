"""The training's scalars at Weights & Biases, for those who ask for it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsft.config import Config
from hsft.trainer.tracker import Tracker, import_tracker, read_run_id
from hsft.utils.errors import InputError, brief
from hsft.utils.files import is_file, write_text

# The name of W&B's run, in the run's folder: a resumed run goes on under it.
ID_FILE = "wandb_id"

# The horizontal axis of all charts.
STEP = "optimizer_step"


def load_wandb() -> Any:
    """Import wandb.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    # wandb itself leaves a folder of its name behind.
    return import_tracker(
        "wandb",
        "init",
        key="log_wandb",
        package="wandb",
        lookalike="a folder of that name",
        install="wandb",
    )


class WandbLog(Tracker):
    """A run at W&B."""

    service = "Weights & Biases"

    def __init__(self) -> None:
        super().__init__()
        self._run: Any = None

    def _start(self, config: Config, folder: Path) -> None:
        wandb = load_wandb()
        name = _run_id(folder)
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=folder.name,
                id=name,
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
                allow_val_change=True,
                # Otherwise every frame of the live display would be sent as a line.
                settings={"console": "off"},
            )
            for tags in ("train/*", "valid/*"):
                self._run.define_metric(tags, step_metric=STEP)
        except Exception as error:  # wandb's errors and those of its connection have no common base
            raise InputError(
                f"Weights & Biases does not start: {brief(error)}; log in with wandb login, set "
                f"WANDB_MODE=offline in the environment, or set --log_wandb False."
            ) from error

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def _log_summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def _finish(self, kind: type[BaseException] | None) -> None:
        self._run.finish(exit_code=int(kind is not None))


def _run_id(folder: Path) -> str:
    path = folder / ID_FILE
    if not is_file(path):
        write_text(path, f"{secrets.token_hex(4)}\n")
    return read_run_id(path, "W&B")

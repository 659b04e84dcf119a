"""A small fine-tuning run that tests interrupt, and what it leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsft.trainer import loop
from hsft.trainer.checkpoint import (
    Checkpoints,
)
from hsft.trainer.step import Learner
from tests.conftest import Project

RUN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--qlora_dropout", "0.2"),
    *("--optim_args.learning_rate", "1e-2", "--epochs", "2", "--num_threads", "1"),
    *("--negatives", "catalogue", "--run_name", "run"),
)

STEPS = 8  # 30 sequences in batches of 8, two epochs

RESUME = ("--auto_resume", "True")


class Crash(BaseException):
    """Stands for a killed process: nothing in the program catches it."""


def at_step(number: int, action: Callable[[], object]) -> Callable[[Any], Any]:
    """Wrap the loop's `update` to act in the middle of optimizer step `number`, from 1."""
    update = loop.update

    def acting(learner: Learner) -> Any:
        if learner.schedule.last_epoch + 1 == number:
            action()
        return update(learner)

    return acting


def crash() -> None:
    raise Crash


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def folder(project: Project, run: str = "run") -> Path:
    return project.root / "saved" / run


def result(project: Project, run: str = "run") -> dict[str, Any]:
    return dict(json.loads((folder(project, run) / "result.json").read_text()))


def outcome(project: Project, run: str = "run") -> dict[str, Any]:
    actual = result(project, run)
    adapter = folder(project, run) / "best/adapter/adapter_model.safetensors"
    return {
        "metrics": [row["metrics"] for row in actual["rows"]],
        "history": actual["training"]["history"],
        "adapter": adapter.read_bytes(),
    }


def steps_saved(project: Project) -> list[int]:
    saved = Checkpoints(folder(project) / "checkpoints", 2).list()
    return [int(path.name.rpartition("-")[2]) for path in saved]


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

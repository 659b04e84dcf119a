"""What one run of `main.py` consists of besides data and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hsft.config import Config
from hsft.trainer.checkpoint import Checkpoints
from hsft.trainer.session import Session
from hsft.trainer.tracker import Tracker
from hsft.utils.signals import StopSignals

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Called after each validation with the epoch's number, from 1, and the metrics; False ends training.
KeepGoing = Callable[[int, Mapping[str, float]], bool]


@dataclass(frozen=True)
class RunContext:
    """What the parts of one run share.

    Attributes:
        config: the configuration.
        fabric: Lightning Fabric, launched.
        folder: the run's folder.
        resume: an earlier session in this folder is continued.
        checkpoints: the run's resumable checkpoints.
        stop: notices SIGINT and SIGTERM.
        session: time and memory.
        trackers: the run at the experiment trackers that the configuration asks for; opened in
            process 0 only.
        keep_going: called after each validation; None trains to the end.
        user_llm_fingerprint: of `user_pretrain_dir` when the run began; None for other models.
    """

    config: Config
    fabric: Fabric
    folder: Path
    resume: bool
    checkpoints: Checkpoints
    stop: StopSignals
    session: Session
    trackers: Sequence[Tracker]
    keep_going: KeepGoing | None = None
    user_llm_fingerprint: str | None = None

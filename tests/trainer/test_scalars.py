"""TensorBoard's files over several sessions of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from hsft.trainer import loop
from hsft.trainer.checkpoint import (
    Checkpoints,
)
from hsft.trainer.scalars import open_scalars
from tests.conftest import Project
from tests.training_runs import (
    RESUME,
    RUN,
    STEPS,
    Crash,
    at_step,
    crash,
    folder,
    spoil,
)


def test_tensorboard_has_every_step_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, crash))
        with pytest.raises(Crash):
            project.run(*RUN, "--checkpoint_every", "3")
    # The crashed session wrote up to step 4, its last checkpoint; go back to step 3.
    saved = Checkpoints(folder(project) / "checkpoints", 2).list()
    spoil(saved[-1] / "state.pt")
    assert project.run(*RUN, *RESUME)[0] == 0
    events = EventAccumulator(str(folder(project) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("valid/NDCG@10")] == [4, 8]


def test_sessions_of_scalars_are_read_in_their_order(tmp_path: Path) -> None:
    for session in range(3):
        with open_scalars(tmp_path, [], 1 if session else None) as scalars:
            scalars.log({"loss": float(session)}, 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]

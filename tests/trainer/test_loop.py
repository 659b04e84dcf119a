"""The loop: what stops it, and what a full disk does to it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsft.data.dataset import TrainBatch, TrainCollate
from hsft.evaluator.evaluator import Evaluation, Evaluator
from hsft.model.recommender import Recommender
from hsft.trainer import loop
from hsft.trainer.checkpoint import (
    Checkpoints,
    verify,
)
from tests.conftest import Project
from tests.training_runs import (
    RESUME,
    RUN,
    at_step,
    folder,
)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_with_the_step_the_users_and_the_last_good_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    forward, collate = Recommender.forward, TrainCollate.__call__
    batches: list[list[str]] = []

    def watched(self: TrainCollate, indices: Any) -> TrainBatch:
        users = self.dataset.segments.users[list(indices)]
        batches.append([str(self.dataset.interactions.user_ids[user]) for user in users])
        return collate(self, indices)

    def poisoned(self: Recommender, batch: TrainBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if len(batches) != 6:
            return loss
        # The root's value at 0 is a number, its slope is none.
        return loss * torch.nan if kind == "loss" else loss + (self.logit_scale[0] * 0).sqrt()

    monkeypatch.setattr(TrainCollate, "__call__", watched)
    monkeypatch.setattr(Recommender, "forward", poisoned)
    code, out, err = project.run(*RUN, "--checkpoint_every", "1")
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert f"the {kind} became NaN or infinite in optimizer step 6 (epoch 2, batch 2, " in line
    assert f"users {', '.join(batches[5][:5])} and 3 more)" in line
    assert "--optim_args.learning_rate" in line
    assert "Traceback" not in err
    saved = Checkpoints(folder(project) / "checkpoints", 2)
    newest = saved.newest()
    assert newest is not None
    assert f"the last good checkpoint is {newest.relative_to(project.root)}" in line
    assert newest.name.endswith("-step-5")
    assert all(value.isfinite().all() for value in saved.load(newest).weights.values())


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(
    project: Project,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("size=80m")
    where = ("--checkpoint_dir", str(disk), "--checkpoint_every", "2")
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(1 << 16))
            except OSError:
                pass

    for step in (1, 3, 6):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "update", at_step(step, fill))
            code, out, err = project.run(*RUN, *where, *RESUME)
        assert code == 2, err
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith(f"error: cannot write {disk / 'run'}")
        assert "No space left on device" in line
        assert "Traceback" not in err
        filler.unlink()
        saved = Checkpoints(disk / "run" / "checkpoints", 2).list()
        assert bool(saved) == (step > 1)
        for path in saved:
            verify(path)
        assert not [p for p in disk.rglob(".*") if p.suffix == ".tmp"]
    # The very start of a run on a disk that is full already.
    fill()
    code, _, err = project.run(*RUN, *where, "--run_name", "other")
    assert code == 2
    assert "free some space" in err.splitlines()[-1]
    assert {path.name for path in disk.iterdir()} == {"filler", "run"}
    filler.unlink()
    code, _, err = project.run(*RUN, *where, *RESUME)
    assert code == 0, err
    actual = json.loads((disk / "run" / "result.json").read_text())
    assert [row["metrics"] for row in actual["rows"]] == undisturbed["metrics"]
    assert actual["training"]["history"] == undisturbed["history"]


def test_a_read_only_folder_is_one_clear_line(
    project: Project, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("ro")
    for where in (disk, disk / "new"):
        code, out, err = project.run("--model", "pop", "--checkpoint_dir", str(where))
        assert code == 2
        assert out == ""
        line = err.splitlines()[-1]
        assert str(where) in line
        assert "not writable" in line
        assert "Traceback" not in err


@pytest.mark.parametrize(("tie", "best"), [("earlier", 1), ("later", 2)])
def test_equal_validation_metrics_keep_the_epoch_of_valid_tie(
    project: Project, monkeypatch: pytest.MonkeyPatch, tie: str, best: int
) -> None:
    values = itertools.repeat(0.3)
    run = Evaluator.run

    def scored(self: Evaluator, *args: Any, **kwargs: Any) -> Evaluation:
        evaluation = run(self, *args, **kwargs)
        return replace(evaluation, metrics={**evaluation.metrics, "NDCG@10": next(values)})

    monkeypatch.setattr(Evaluator, "run", scored)
    code, _, err = project.run(*RUN, "--eval_baseline", "False", "--valid_tie", tie)
    assert code == 0, err
    result = json.loads((folder(project) / "result.json").read_text())
    assert result["training"]["best_epoch"] == best
    assert result["training"]["bad_validations"] == 2 - best

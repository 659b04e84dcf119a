"""One optimizer step: a batch that does not fit is split, with the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from hsft.config import Config
from hsft.data.dataset import TrainBatch
from hsft.evaluator.evaluator import Evaluator
from hsft.model.recommender import LossSettings, Recommender
from hsft.trainer.micro_batch import split_batch
from hsft.trainer.step import accumulate, group_batches, make_learner
from tests.conftest import Project
from tests.decoders import build
from tests.training_runs import (
    RUN,
    folder,
    outcome,
    result,
)


def out_of_memory_above(rows: int) -> Callable[[Recommender, TrainBatch], torch.Tensor]:
    forward = Recommender.forward

    def failing(self: Recommender, batch: TrainBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if len(batch.history) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    return failing


def test_out_of_memory_halves_the_batch_once_told(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without dropout both ways of computing a step are the same up to rounding.
    for name, rows in (("split", 2), ("plain", 99)):
        with monkeypatch.context() as patch:
            patch.setattr(Recommender, "forward", out_of_memory_above(rows))
            more = ("--run_name", name, "--qlora_dropout", "0")
            code, _, err = project.run(*RUN, *more)
        assert code == 0, err
        assert err.count("CUDA ran out of memory in optimizer step 1") == (2 if rows == 2 else 0)
    assert result(project, "split")["training"]["micro_batch"] == 2
    assert result(project, "plain")["training"]["micro_batch"] is None
    for one, other in zip(
        outcome(project, "split")["history"], outcome(project, "plain")["history"], strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_out_of_memory_with_one_sequence_is_one_clear_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "forward", out_of_memory_above(0))
        code, _, err = project.run(*RUN)
    assert code == 2
    assert "with a single sequence" in err.splitlines()[-1]
    assert not folder(project).exists()

    def failing(self: Evaluator, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Evaluator, "run", failing)
    code, _, err = project.run("--val_only", "True")
    assert code == 2
    assert "lower --eval_batch_size" in err.splitlines()[-1]


NCE = LossSettings("nce", "sampled", 0.99, 1 << 28, "cosine")


@pytest.mark.parametrize(
    "settings",
    [
        NCE,
        replace(NCE, negatives="catalogue"),
        replace(NCE, loss="bce", similarity="dot"),
    ],
    ids=["nce sampled", "nce catalogue", "bce sampled"],
)
def test_a_split_batch_has_the_whole_batch_s_gradient(llama: Path, settings: LossSettings) -> None:
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0], [3, 0, 0, 0], [2, 9, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0], [8, 9, 1, 0], [5, 0, 0, 0], [9, 3, 0, 0]])
    # Some are targets too: bce leaves those pairs out.
    negatives = torch.tensor([[8, 8], [4, 11], [12, 9], [13, 14], [15, 8]])
    batch = TrainBatch(history, history > 0, targets, history > 0, negatives)
    gradients = []
    for rows in (None, 2):
        model = build(llama, settings=settings, adapter="linear")
        for part in split_batch(batch, rows, settings):
            (model(part.batch) * part.weight).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("mean", "shares"), [("positions", (6 / 7, 1 / 7)), ("batches", (0.5, 0.5))]
)
def test_accumulated_batches_have_the_weight_of_loss_mean(
    llama: Path, mean: Any, shares: tuple[float, float]
) -> None:
    config = Config(loss_mean=mean, gradient_accumulation_steps=2)
    fabric = Fabric(accelerator="cpu", devices=1)
    rows = torch.tensor([[1, 2, 3], [5, 6, 7]]), torch.tensor([[8, 0, 0]])
    group = [
        TrainBatch(row, row > 0, (row + 1) * (row > 0), row > 0, torch.tensor([[9, 10]]))
        for row in rows
    ]
    model = build(llama, settings=replace(NCE, mean=mean))
    learner = make_learner(config, fabric, model, 1)
    [(batches, positions)] = group_batches(learner, iter(group))
    assert positions == [6, 1]
    losses, _ = accumulate(learner, batches, positions, None)
    assert model.logit_scale.grad is not None
    gradients = []
    for batch in group:
        alone = build(llama, settings=NCE)
        alone(batch).backward()
        assert alone.logit_scale.grad is not None
        gradients.append(alone.logit_scale.grad)
    expected = shares[0] * gradients[0] + shares[1] * gradients[1]
    torch.testing.assert_close(model.logit_scale.grad, expected, rtol=1e-4, atol=1e-7)
    assert len(losses) == 2

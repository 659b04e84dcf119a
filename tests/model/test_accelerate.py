"""Captured steps: gradients are those of computing kernel by kernel, whatever comes in between."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainBatch, TrainCollate
from hsft.data.dataset.packing import Buckets
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.model.accelerate import (
    Acceleration,
    StepGraphs,
    _Captured,
    choose_acceleration,
    compile_layers,
)
from hsft.model.backbone import load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM
from tests.conftest import Project

CPU = torch.device("cpu")


class Replayed:
    """In a CUDA graph's place: computes the step again from the same buffers."""

    def __init__(self, graphs: StepGraphs, batch: TrainBatch, weight: Any, loss: Any) -> None:
        self.given = (graphs, batch, weight, loss)

    def replay(self) -> None:
        graphs, batch, weight, loss = self.given
        value = graphs._loss_of(batch)
        graphs._backward(value * weight)
        loss.copy_(value.detach())


class EmulatedGraphs(StepGraphs):
    """Captures nothing: a replay computes."""

    def _capture(self, batch: TrainBatch) -> _Captured:
        fixed = TrainBatch(*(part.clone() for part in batch))
        weight, loss = torch.ones(()), torch.zeros(())
        self._attach_gradients()
        return _Captured(Replayed(self, fixed, weight, loss), fixed, weight, loss)


def batches() -> list[TrainBatch]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 12, 24)
    data = Interactions(
        item_ids=np.array(["", *(f"i{n}" for n in range(20))]),
        user_ids=np.array([f"u{n}" for n in range(24)]),
        items=rng.integers(1, 21, sizes.sum()).astype(np.int32),
        timestamps=np.arange(sizes.sum()),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )
    collate = TrainCollate(
        CachedEmbeddingTrainDataset(leave_one_out(data), max_length=9),
        single_row=True,
        buckets=Buckets(16, 4, 9),
    )
    return [collate(np.arange(start, start + 4)) for start in range(0, 24, 4)]


def recommender(llama: Path) -> Recommender:
    torch.manual_seed(0)
    decoder = load_decoder(llama, dtype=torch.float32, attention="varlen")
    loss = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")
    return Recommender(UserLLM(decoder, ItemTable(torch.randn(21, 64)), max_length=9), loss)


def trained(llama: Path, captured: bool) -> tuple[list[float], list[torch.Tensor], int]:
    model = recommender(llama)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs = EmulatedGraphs(model, torch.Tensor.backward, model.parameters(), CPU)
    losses = []
    for epoch in range(3):
        for number, batch in enumerate(batches()):
            if captured:
                loss = graphs.step(batch, 0.5)
            else:
                loss = model(batch)
                (loss * 0.5).backward()
            losses.append(loss.item())
            # Gradients of two batches are added up, but for the first step of each epoch.
            if number % 2 or not number:
                optimizer.step()
                optimizer.zero_grad(set_to_none=epoch != 1)
    return losses, [p.detach().clone() for p in model.parameters()], graphs.graphs


@pytest.mark.usefixtures("emulated_varlen")
def test_training_is_the_same(llama: Path) -> None:
    expected, weights, _ = trained(llama, captured=False)
    actual, own_weights, graphs = trained(llama, captured=True)
    assert graphs >= 1
    assert actual == pytest.approx(expected, rel=1e-5)
    for weight, other in zip(own_weights, weights, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("emulated_varlen")
def test_a_failing_capture_costs_nothing_but_a_line(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = recommender(llama)
    # Without a GPU a capture fails.
    graphs = StepGraphs(model, torch.Tensor.backward, model.parameters(), CPU)
    given = batches()[0]
    for _ in range(5):
        loss = graphs.step(given)
    expected = model(given)
    assert loss.item() == pytest.approx(expected.item())
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    accumulated = [p.grad for p in model.parameters() if p.requires_grad]
    for actual, one in zip(accumulated, gradients, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, 5 * one, rtol=1e-4, atol=1e-5)
    assert not graphs.enabled
    assert sum("could not be captured" in line for line in caplog.messages) == 1


class OutOfMemory(StepGraphs):
    """Runs out of memory in the middle of a capture."""

    activations: weakref.ref[torch.Tensor]
    freed = False

    def _capture(self, batch: TrainBatch) -> _Captured:
        held = torch.ones(3)
        self.activations = weakref.ref(held)
        raise torch.OutOfMemoryError("no memory")

    def release(self) -> None:
        super().release()
        self.freed = self.activations() is None


@pytest.mark.usefixtures("emulated_varlen")
def test_a_capture_that_runs_out_of_memory_holds_none_of_it(llama: Path) -> None:
    model = recommender(llama)
    graphs = OutOfMemory(model, torch.Tensor.backward, model.parameters(), CPU)
    for _ in range(3):
        loss = graphs.step(batches()[0])
    assert graphs.freed
    assert not graphs.enabled
    assert loss.item() == pytest.approx(model(batches()[0]).item())


def choose(asked: str, **more: Any) -> tuple[Acceleration, str]:
    given = {"single_row": True, "processes": 1, "steps": 1000, "obstacle": "", **more}
    return choose_acceleration(asked, more.pop("device", torch.device("cuda")), **given)


def test_what_compile_comes_to() -> None:
    assert choose("auto") == (Acceleration(graph=True), "")
    assert choose("off") == (Acceleration(), "")
    assert choose("layers") == (Acceleration(layers=True), "")
    assert choose("graph", steps=3)[0].graph
    assert choose("layers_graph") == (Acceleration(layers=True, graph=True), "")
    assert choose("layers_graph", processes=2)[0] == Acceleration(layers=True)
    for more, word in (
        ({"steps": 3}, "too short"),
        ({"single_row": False}, "one row"),
        ({"processes": 2}, "single process"),
        ({"obstacle": "CUDA graphs need tea"}, "need tea"),
    ):
        chosen, reason = choose("auto", **more)
        assert not chosen.graph
        assert word in reason
    assert (
        "CUDA device"
        in choose_acceleration("graph", CPU, single_row=True, processes=1, steps=9, obstacle="")[1]
    )


def test_layers_that_do_not_compile_run_as_they_are(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no compiler")

        return fail

    decoder: nn.Module = load_decoder(llama, dtype=torch.float32, attention="sdpa")
    vectors = torch.randn(1, 4, 64)
    expected = decoder(inputs_embeds=vectors).last_hidden_state
    names = set(decoder.state_dict())
    monkeypatch.setattr(torch, "compile", broken)
    assert compile_layers(decoder) == 2
    torch.testing.assert_close(decoder(inputs_embeds=vectors).last_hidden_state, expected)
    assert set(decoder.state_dict()) == names
    assert sum("no compiler" in line for line in caplog.messages) == 1


@pytest.mark.usefixtures("emulated_varlen")
def test_a_whole_run_in_single_rows_is_that_of_masked_rows(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--use_qlora", "True", "--epochs", "2", "--qlora_dropout", "0.0")
    results = []
    for kernel in ("sdpa", "varlen"):
        if kernel == "varlen":
            monkeypatch.setattr("hsft.model.attention.varlen_obstacle", lambda *_: None)
        run = ("--attn_implementation", kernel, "--run_name", kernel)
        code, _, err = project.run(*common, *run)
        assert code == 0, err
        results.append(json.loads((project.root / "saved" / kernel / "result.json").read_text()))
    masked, rows = results
    for name in ("loss", "valid"):
        for epoch, other in zip(
            rows["training"]["history"], masked["training"]["history"], strict=True
        ):
            assert epoch[name] == pytest.approx(other[name], rel=1e-4)
    assert [row["metrics"] for row in rows["rows"]] == [row["metrics"] for row in masked["rows"]]


def test_validation_on_a_sample_and_a_costly_catalogue(project: Project) -> None:
    common = ("--use_qlora", "True", "--epochs", "2", "--valid_users", "7")
    few = ("--negatives", "catalogue", "--train_batch_size", "1")
    code, _, err = project.run(*common, *few, "--run_name", "plain")
    assert code == 0, err
    assert "valid: a sample of 7 of 30 users is scored." in err
    # By hand, a position: 6 x 20 x 64 against 4 x 2 x (64 x (64 + 32 + 32 + 64) + 3 x 64 x 128),
    # which is 295,000.
    assert "the softmax over all" not in err
    result = json.loads((project.root / "saved/plain/result.json").read_text())
    assert all(row["users"] == 30 for row in result["rows"])
    hits = [record["valid"]["Recall@10"] * 7 for record in result["training"]["history"]]
    assert hits == pytest.approx([round(count) for count in hits])
    more = ("--item_adapter", "lowrank", "--item_adapter_rank", "512")
    code, _, err = project.run(*common, *few, *more, "--run_name", "adapter")
    assert code == 0, err
    # 6 x 2 x 64 x 512 for each of 20 items, against 295,000 for each of 8 positions at most.
    assert "the softmax over all 20 items takes about" in err


@pytest.mark.usefixtures("emulated_varlen")
def test_a_bucket_counts_positions_exactly_under_mixed_precision(llama: Path) -> None:
    # Fabric converts floating-point inputs to bfloat16, which has no 301.
    data = Interactions(
        item_ids=np.array(["", *(f"i{n}" for n in range(20))]),
        user_ids=np.array([f"u{n}" for n in range(43)]),
        items=np.random.default_rng(0).integers(1, 21, 43 * 10).astype(np.int32),
        timestamps=np.arange(43 * 10),
        offsets=np.arange(44) * 10,
    )
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), max_length=9)
    plain = TrainCollate(dataset, single_row=True)(np.arange(43))
    padded = TrainCollate(dataset, single_row=True, buckets=Buckets(16, 43, 9))(np.arange(43))
    # 43 sequences of 7 transitions: bfloat16 would round to 300.
    assert len(plain.scored) == 301
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    wrapped = fabric.setup(recommender(llama))
    torch.testing.assert_close(wrapped(padded), wrapped(plain), rtol=1e-4, atol=0)

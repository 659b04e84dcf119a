"""`residual_items`: a user's vector starts as that of the last item."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export import main as export_main
from hsft.finished.open_run import open_run
from hsft.model.residual import HistoryResidual
from hsft.report.result import read_ranks, read_result
from hsft.trainer import loop
from recommend import main as recommend_main
from tests.conftest import Project
from tests.training_runs import at_step, send

RESIDUAL = ("--residual_items", "3")
TRAIN = (
    *("--epochs", "2", "--use_qlora", "False", "--negatives", "catalogue"),
    *("--optim_args.learning_rate", "1e-3", "--eval_baseline", "False"),
)


@pytest.mark.parametrize("items", [1, 3, 9])
def test_it_equals_its_formula_in_float64(items: int) -> None:
    rng = np.random.default_rng(0)
    states, vectors = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 4))
    # The second row holds two histories.
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    weight, lags = rng.normal(size=(4, 4)), rng.normal(size=items - 1)
    residual = HistoryResidual(4, items)
    with torch.no_grad():
        residual.weight.copy_(torch.from_numpy(weight))
        if residual.lags is not None:
            torch.testing.assert_close(residual.lags[:2], torch.tensor([0.8, 0.64]))
            residual.lags.copy_(torch.from_numpy(lags))
        tensors = [torch.from_numpy(values) for values in (states, vectors, positions)]
        actual = residual(*tensors).numpy()
        alone = residual(*(values[:1] for values in tensors[:2])).numpy()
    expected = np.zeros((2, 5, 4))
    for row, column in np.ndindex(2, 5):
        h = states[row, column]
        expected[row, column] = weight @ (h / np.sqrt(h @ h))
        for lag, factor in enumerate([1.0, *lags]):
            if lag <= positions[row, column]:
                x = vectors[row, column - lag]
                expected[row, column] += factor * x / np.sqrt(x @ x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-4, atol=1e-6)


def test_an_untrained_model_ranks_as_item_knn_by_the_last_item(project: Project) -> None:
    knn = ("--model", "item_knn", "--knn_history", "last", "--run_name", "knn")
    assert project.run(*knn)[0] == 0
    # A learning rate of nothing leaves the map at zero.
    still = (
        *TRAIN,
        "--residual_items",
        "1",
        "--optim_args.learning_rate",
        "1e-30",
        "--epochs",
        "1",
    )
    code, _, err = project.run(*still, "--run_name", "still")
    assert code == 0, err
    _, knn_ranks = read_ranks("saved/knn", "item_knn")
    _, ranks = read_ranks("saved/still", "fine-tuned")
    assert (ranks == knn_ranks).all()
    assert len(set(ranks.tolist())) > 5


def test_the_first_gradient_reaches_the_map_and_packing_changes_nothing(project: Project) -> None:
    losses = {}
    for pack in ("True", "False"):
        code, _, err = project.run(*TRAIN, *RESIDUAL, "--pack_sequences", pack, "--run_name", pack)
        assert code == 0, err
        history = read_result(f"saved/{pack}")["training"]["history"]
        losses[pack] = [epoch["loss"] for epoch in history]
        weights = load_file(f"saved/{pack}/best/trained.safetensors")
        assert weights["encoder.residual.weight"].abs().max() > 0
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-4)
    assert losses["True"][1] < losses["True"][0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_stopped_run_goes_on_and_the_run_opens_as_it_was_scored(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.run(*TRAIN, *RESIDUAL, "--run_name", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(3, send(signal.SIGTERM)))
        assert project.run(*TRAIN, *RESIDUAL, "--run_name", "stopped")[0] == 143
    code, _, err = project.run(*TRAIN, *RESIDUAL, "--run_name", "stopped", "--auto_resume", "True")
    assert code == 0, err
    whole, again = (
        load_file(f"saved/{run}/best/trained.safetensors") for run in ("whole", "stopped")
    )
    assert torch.equal(whole["encoder.residual.weight"], again["encoder.residual.weight"])
    run = open_run("saved/whole")
    segments = run.data.split.eval_segments("test")
    items = run.data.interactions.items
    ranges = list(zip(segments.starts, segments.ends, strict=True))
    histories = [items[start : end - 1] for start, end in ranges]
    best = run.recommend(run.build("fine-tuned"), histories, 5)
    _, ranks = read_ranks("saved/whole", "fine-tuned")
    hits = [row for row in range(len(ranges)) if ranks[row] <= 5]
    assert hits
    for row in hits:
        assert best.items[row, ranks[row] - 1] == items[ranges[row][1] - 1]


def test_what_it_has_no_meaning_for_is_refused(project: Project) -> None:
    for more in (("--val_only", "True"), ("--model", "sasrec")):
        code, _, err = project.run(*RESIDUAL, *more)
        assert code == 2
        assert "residual_items adds what is trained to the UserLLM" in err
    assert project.run(*TRAIN, *RESIDUAL, "--epochs", "1", "--run_name", "run")[0] == 0
    code, _, err = project.call(export_main, ["--run", "saved/run"])
    assert code == 2
    assert "saved/run was trained with residual_items" in err
    assert not Path("saved/run/export").exists()
    code, _, err = project.call(recommend_main, ["--run", "saved/run", "--history", "i1,i2"])
    assert code == 0, err

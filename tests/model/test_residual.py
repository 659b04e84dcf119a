"""`residual_items`: a user's vector starts as that of the last item."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import main as export_main
from hsft.config import Config
from hsft.finished.open_run import open_run
from hsft.model.backbone import read_extra
from hsft.model.residual import HistoryResidual, make_residual
from hsft.report.result import read_ranks, read_result
from hsft.trainer import loop
from hsft.utils.errors import InputError
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


def test_it_is_without_effect_where_nothing_is_trained_with_it(project: Project) -> None:
    ranks = []
    for more in ((), RESIDUAL):
        name = f"evaluated{len(more)}"
        code, _, err = project.run("--val_only", "True", *more, "--run_name", name)
        assert code == 0, err
        ranks.append(read_ranks(f"saved/{name}", "untrained")[1].tolist())
    assert ranks[0] == ranks[1]
    for model in ("sasrec", "hstu", "llm_id", "pop", "item_knn"):
        code, _, err = project.run(*RESIDUAL, "--model", model, "--check", "True")
        assert code == 0, err
    for model in ("HLLM", "llm_id"):
        code, _, err = project.run(*RESIDUAL, "--model", model, "--dry_run", "True")
        assert code == 0, err


@pytest.mark.parametrize("items", [1, 3])
def test_an_export_scores_as_the_run_and_training_goes_on_from_it(
    project: Project, items: int
) -> None:
    train = (*TRAIN, "--epochs", "1", "--optim_args.learning_rate", "1e-2")
    number = str(items)
    code, _, err = project.run(*train, "--residual_items", number, "--run_name", "run")
    assert code == 0, err
    exported = ["--run", "saved/run", "--dtype", "float32", "--evaluate", "True"]
    code, _, err = project.call(export_main, exported)
    assert code == 0, err
    out = "saved/run/export"
    about = json.loads(Path(out, "export.json").read_text())
    assert (about["exported"]["other_ranks"], about["residual_items"]) == (0, items)
    start = load_file(f"{out}/hllm_extra.safetensors")
    names = {"residual.weight", *(["residual.lags"] if items > 1 else [])}
    assert {name for name in start if name.startswith("residual.")} == names
    trained = load_file("saved/run/best/trained.safetensors")
    assert all(torch.equal(start[name], trained[f"encoder.{name}"]) for name in names)
    assert start["residual.weight"].abs().max() > 0
    there = ("--user_pretrain_dir", out)
    again = ("--config_file", f"{out}/config.yaml", *there, "--run_name", "again")
    code, _, err = project.run(*again)
    assert code == 0, err
    ranks = read_ranks("saved/again", "untrained")[1]
    assert ranks.tolist() == read_ranks("saved/run", "fine-tuned")[1].tolist()
    # It differs from the output alone.
    extra = {name: value for name, value in start.items() if name not in names}
    copytree(out, "without")
    save_file(extra, "without/hllm_extra.safetensors")
    alone = ("--user_pretrain_dir", "without", "--val_only", "True", "--run_name", "alone")
    assert project.run(*alone)[0] == 0
    assert ranks.tolist() != read_ranks("saved/alone", "untrained")[1].tolist()

    for kept in ("0", number):
        more = ("--residual_items", kept, "--run_name", f"from{kept}")
        code, _, err = project.run(*train, *there, *more)
        assert code == 0, err
        residual: Any = open_run(f"saved/from{kept}").build("fine-tuned").encoder.residual  # type: ignore[attr-defined]
        assert torch.equal(residual.weight, start["residual.weight"]) == (kept == "0")
        # Trained from there and not from zero: a few steps go not far.
        assert torch.allclose(residual.weight, start["residual.weight"], atol=0.2)
    # Exported once more, a frozen one goes along.
    code, _, err = project.call(export_main, ["--run", "saved/from0", "--dtype", "float32"])
    assert code == 0, err
    kept_tensors = load_file("saved/from0/export/hllm_extra.safetensors")
    assert all(torch.equal(kept_tensors[name], start[name]) for name in names)
    for check in ("True", "False"):
        code, _, err = project.run(*train, *there, "--residual_items", "5", "--check", check)
        assert code == 2
        said = f"was trained with residual_items {items}, which residual_items 5 cannot go on from"
        assert said in " ".join(err.split())
        assert err.count("error:") == 1


_SQUARE = torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(64, 32)}, "residual.weight has shape (64, 32)"),
        ({"weight": torch.full((64, 64), torch.nan)}, "residual.weight holds NaN"),
        ({"lags": torch.ones(2)}, "lacks residual.weight"),
        ({"weight": _SQUARE, "lags": torch.ones(2, 1)}, "residual.lags has shape (2, 1)"),
        ({"weight": _SQUARE, "lags": torch.ones(0)}, "residual.lags has shape (0,)"),
        ({"weight": _SQUARE, "lags": torch.tensor([torch.inf])}, "residual.lags holds NaN"),
        ({"weight": _SQUARE, "bias": torch.ones(64)}, "residual.bias, which is no part"),
    ],
)
def test_a_stored_residual_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    path = tmp_path / "hllm_extra.safetensors"
    save_file({f"residual.{name}": value for name, value in tensors.items()}, path)
    with pytest.raises(InputError) as refusal:
        make_residual(Config(dataset="tiny"), read_extra(tmp_path), tmp_path, 64, train=False)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_recommend_reads_the_run(project: Project) -> None:
    assert project.run(*TRAIN, *RESIDUAL, "--epochs", "1", "--run_name", "run")[0] == 0
    code, _, err = project.call(recommend_main, ["--run", "saved/run", "--history", "i1,i2"])
    assert code == 0, err

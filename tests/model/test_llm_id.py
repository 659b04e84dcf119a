"""`model: llm_id`: an LLM, random or pretrained, on trained vectors of item ids."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from hsft.config import Config
from hsft.data.dataset import TrainBatch
from hsft.finished.open_run import open_run
from hsft.model.id_model import IdTable
from hsft.model.losses import catalogue_softmax
from hsft.report.memory import GIB, estimate
from hsft.report.result import read_ranks
from hsft.run.dry_run import assumed_shape
from hsft.run.setup import build_id_model, load_data
from hsft.trainer import loop
from hsft.trainer.fabric import make_fabric
from hsft.utils.errors import InputError
from recommend import main as recommend_main
from tests.conftest import Project
from tests.helpers import ROOT
from tests.training_runs import at_step, send

FILES = (
    *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/IDNet/llama_id.yaml"),
    *("--llm_id.item_width", "8", "--train_batch_size", "8", "--optim_args.learning_rate", "1e-2"),
)


def built(project: Project, **values: object) -> Config:
    """Return a configuration of the model on the project's data."""
    return Config.model_validate(
        {
            "model": "llm_id",
            "dataset": "tiny",
            "user_pretrain_dir": str(project.llama),
            "precision": "32-true",
            "MAX_ITEM_LIST_LENGTH": 8,
            **values,
        }
    )


def test_a_table_of_another_width_is_mapped_in_inputs_and_targets_alike() -> None:
    torch.manual_seed(0)
    table = IdTable(6, 3, 2).double()
    assert table.projection is not None
    expected = table.weight.detach().numpy() @ table.projection.weight.detach().numpy().T
    items = torch.tensor([[4, 1], [6, 0]])
    with torch.no_grad():
        np.testing.assert_allclose(table(items).numpy(), expected[items.numpy()])
        np.testing.assert_allclose(table.slice(2, 5).numpy(), expected[2:5])
        pieces = np.concatenate([piece().numpy() for piece in table.chunks(4)])
    np.testing.assert_allclose(pieces, expected[1:])
    assert (table.num_items, table.dim) == (6, 3)


def test_the_full_softmax_trains_the_map() -> None:
    torch.manual_seed(0)
    table, queries = IdTable(6, 3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    targets, scale = torch.tensor([0, 5, 2, 2]), torch.tensor(1.0)
    # So small a budget that the catalogue comes in several chunks.
    loss = catalogue_softmax(queries, table, targets, scale, budget_bytes=512)
    vectors = torch.nn.functional.normalize(table(torch.arange(1, 7)), dim=-1)
    units = torch.nn.functional.normalize(queries, dim=-1)
    plain = torch.nn.functional.cross_entropy(scale.exp() * units @ vectors.T, targets)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    weights = list(table.parameters())
    for one, two in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_random_weights_need_no_more_than_a_configuration(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(project.llama / "config.json", folder)
    code, _, err = project.run(
        *(*FILES, "--user_pretrain_dir", str(folder), "--epochs", "8", "--run_name", "run")
    )
    assert code == 0, err
    result = json.loads((project.root / "saved/run/result.json").read_text())
    history = result["training"]["history"]
    assert [row["name"] for row in result["rows"]] == ["llm_id"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert result["rows"][0]["metrics"]["NDCG@5"] > 0.5
    code, out, err = project.call(recommend_main, ["--run", "saved/run", "--user", "u1"])
    assert code == 0, err
    assert "llm_id" in out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(InputError, match="is not the one that saved/run was made with"):
        open_run("saved/run").build("llm_id")
    for more, sentence in {
        ("--use_qlora", "True"): "set user_llm_init: True or drop use_qlora",
        ("--user_llm_init", "True"): "holds no weights",
        ("--val_only", "True"): "model: llm_id has nothing to evaluate untrained",
        ("--user_pretrain_dir", "nowhere"): "model folder nowhere does not exist",
        ("--user_llm_layers", "3"): "has only 2 layers",
    }.items():
        command = (*FILES, "--user_pretrain_dir", str(folder), *more)
        code, _, err = project.run(*command)
        assert code == 2
        assert sentence in err


def test_pretrained_weights_are_read_and_adapted(project: Project) -> None:
    fabric = make_fabric(Config(device="cpu", precision="32-true"))
    config = built(project, user_llm_init=True)
    data = load_data(config, need_cache=False)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_id_model(config, data, fabric)
        states.append({name: part for name, part in model.state_dict().items() if "layers" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    lora = ("--use_qlora", "True", "--qlora_quant_type", "none", "--user_llm_init", "True")
    code, _, err = project.run(*FILES, *lora, "--epochs", "1", "--run_name", "run")
    assert code == 0, err
    saved = project.root / "saved/run/best"
    assert (saved / "adapter").is_dir()
    assert open_run("saved/run").build("llm_id").num_items == 20


def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(project: Project) -> None:
    config = built(project, llm_id={"item_width": 8}, use_timestamps=False)
    fabric = make_fabric(config)
    torch.manual_seed(0)
    model = build_id_model(config, load_data(config, need_cache=False), fabric)
    assert model.encoder.separates_sequences()
    history, targets = torch.tensor([[4, 2, 7], [1, 3, 0]]), torch.tensor([[2, 7, 5], [3, 6, 0]])
    rows, next_items = torch.tensor([[4, 2, 7, 1, 3]]), torch.tensor([[2, 7, 5, 3, 6]])
    none = torch.empty(2, 0, dtype=torch.int64)
    separate = TrainBatch(history, history > 0, targets, history > 0, none)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = TrainBatch(rows, rows > 0, next_items, rows > 0, none, positions)
    losses = [model(batch) for batch in (separate, packed)]
    torch.testing.assert_close(losses[0], losses[1])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for one, two in zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_after_an_interruption(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*FILES, "--epochs", "2", "--item_dropout", "0.2", "--run_name")
    assert project.run(*run, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, send(signal.SIGTERM)))
        assert project.run(*run, "stopped")[0] == 143
    code, _, err = project.run(*run, "stopped", "--auto_resume", "True")
    assert code == 0, err
    ranks = [read_ranks(f"saved/{name}", "llm_id")[1] for name in ("whole", "stopped")]
    np.testing.assert_array_equal(ranks[0], ranks[1])


def test_memory_counts_the_item_vectors_with_gradients_and_optimizer_states(
    project: Project,
) -> None:
    small, large = (
        assumed_shape(built(project, llm_id={"item_width": width}))[0] for width in (8, 1008)
    )
    assert (small.items, small.adapter, large.trained_items) == (20, "linear", True)
    before, after = (estimate(shape, 4, (0.0, 0.0)) for shape in (small, large))
    # 1,000 numbers more for each of 21 rows, and for each of the map's 64 outputs.
    assert after.item_table - before.item_table == 21 * 1000 * 4
    assert after.gradients - before.gradients == (21 + 64) * 1000 * 4
    assert after.optimizer - before.optimizer == (21 + 64) * 1000 * 8
    code, out, err = project.run(*FILES, "--dry_run", "True")
    assert code == 0, err
    assert "20 items in the catalogue" in out
    assert estimate(small, 4, (0.0, 0.0)).total < 2 * GIB
    code, out, err = project.run(*FILES, "--check", "True")
    assert code == 0, err

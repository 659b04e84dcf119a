"""What is exported and read again scores as the run did, whatever the weights were trained in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import GPT2Config

from export import main as export_main
from hsft.finished.open_run import open_run
from hsft.report.result import read_ranks
from tests.conftest import Project
from tests.helpers import make_model

LORA = ("--use_qlora", "True", "--qlora_quant_type")
# How it is trained, the number type of the merged weights, and whether these are the run's exactly.
RUNS = {
    "nf4": ((*LORA, "nf4", "--item_adapter", "lowrank"), "float32", True),
    "bf16": (
        ("--use_qlora", "False", "--precision", "bf16-true", "--residual_items", "3"),
        "bfloat16",
        True,
    ),
    "bf16 lora": ((*LORA, "none", "--precision", "bf16-mixed"), "bfloat16", False),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_reloaded_export_scores_as_the_run(project: Project, kind: str) -> None:
    train, dtype, exact = RUNS[kind]
    precision = train[train.index("--precision") + 1] if "--precision" in train else "32-true"
    steps = ("--epochs", "1", "--optim_args.learning_rate", "1e-3", "--eval_baseline", "False")
    code, _, err = project.run(*train, *steps, "--run_name", "run")
    assert code == 0, err

    # Merged: measured at the export, and again by a run that starts from the folder.
    asked = ["--run", "saved/run", "--dtype", dtype, "--evaluate", "True"]
    code, _, err = project.call(export_main, asked)
    assert code == 0, err
    out = Path("saved/run/export")
    measured = json.loads((out / "export.json").read_text())["exported"]
    code, _, err = project.run(
        *("--config_file", str(out / "config.yaml"), "--user_pretrain_dir", str(out)),
        *("--precision", precision, "--run_name", "again"),
    )
    assert code == 0, err
    users, again = read_ranks("saved/again", "untrained")
    before, ranks = read_ranks("saved/run", "fine-tuned")
    assert users.tolist() == before.tolist()
    # LoRA merged into 16-bit weights is rounded once more.
    assert int((again != ranks).sum()) == measured["other_ranks"]
    assert measured["other_ranks"] == 0 or not exact
    assert np.abs(again - ranks).mean() < 2
    assert len(set(ranks.tolist())) > 5
    (row,) = json.loads(Path("saved/again/result.json").read_text())["rows"]
    assert row["metrics"] == measured["metrics"]

    # Vectors: every score of users as the run's own model gives it.
    asked = ["--run", "saved/run", "--format", "embeddings", "--index", "none"]
    code, _, err = project.call(export_main, asked)
    assert code == 0, err
    folder = Path("saved/run/export-embeddings")
    items = load_file(folder / "items.safetensors")["embeddings"]
    vectors = load_file(folder / "users.safetensors")["embeddings"]
    run = open_run("saved/run")
    histories = [run.history(str(user)) for user in run.data.interactions.user_ids]
    best = run.recommend(run.build("fine-tuned"), histories, 20, exclude_seen=False)
    scores = np.take_along_axis(vectors @ items.T, best.items - 1, axis=1)
    # bfloat16 has 8 bits, and batches of other lengths are rounded otherwise.
    np.testing.assert_allclose(scores, best.scores, atol=1e-5 if kind == "nf4" else 2e-2)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_merged_gpt2_keeps_the_rounding(
    project: Project, tmp_path: Path, quant_type: str
) -> None:
    """Its matrices are stored the other way round."""
    gpt2 = GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    folder = str(make_model(tmp_path / "gpt2", gpt2))
    code, _, err = project.run(
        *("--user_pretrain_dir", folder, *LORA, quant_type, "--qlora_target_modules", "[c_attn]"),
        *("--epochs", "1", "--optim_args.learning_rate", "1e-2", "--eval_baseline", "False"),
        *("--run_name", "run"),
    )
    assert code == 0, err
    asked = ["--run", "saved/run", "--dtype", "float32", "--evaluate", "True"]
    code, _, err = project.call(export_main, asked)
    assert code == 0, err
    export = Path("saved/run/export")
    assert json.loads((export / "export.json").read_text())["exported"]["other_ranks"] == 0
    stored, base = (load_file(Path(where) / "model.safetensors") for where in (export, folder))
    (name,) = (name for name in stored if name.endswith("0.mlp.c_fc.weight"))
    (of_base,) = (weight for key, weight in base.items() if key.endswith("0.mlp.c_fc.weight"))
    # Rounded, though LoRA has no part in it.
    assert 1e-5 < np.abs(stored[name] - of_base).max() < np.abs(of_base).max() / 5

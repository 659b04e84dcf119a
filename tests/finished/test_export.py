"""Exporting a run: what is written scores as the run did, and the card says what was measured."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel

from compare import main as compare_main
from export import main as export_main
from hsft.finished.open_run import open_run
from hsft.report.result import read_ranks
from report import main as report_main
from tests.conftest import Project
from tests.helpers import make_cache

TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
    *("--epochs", "2", "--optim_args.learning_rate", "3e-2"),
)


def train(project: Project, *more: str) -> Path:
    code, _, err = project.run(*TRAIN, *more, "--run_name", "run")
    assert code == 0, err
    return project.root / "saved" / "run"


def export(project: Project, *more: str) -> tuple[int, str]:
    code, _, err = project.call(export_main, ["--run", "saved/run", *more])
    return code, err


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> dict[str, Any]:
    """Run the card's Python code in the exported folder and return its names."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    script = folder.parent / "snippet.py"
    here = code[0].replace(f'"PATH/TO/{base.name}"', repr(str(base)))
    assert "PATH/TO" not in here
    # After loading, which draws LoRA's initial values.
    script.write_text(
        here.replace("history = torch.randn", "torch.manual_seed(0)\nhistory = torch.randn")
    )
    monkeypatch.chdir(folder)
    return runpy.run_path(str(script))


def user_vector(model: Any) -> torch.Tensor:
    """A run's own vector for the history that `run_snippet` draws: float32 [1, D]."""
    torch.manual_seed(0)
    history = model.encoder.items._adapt(torch.randn(1, 5, 64))
    residual = model.encoder.residual
    with torch.no_grad():
        states = model.encoder.decoder(inputs_embeds=history).last_hidden_state.float()
        return (states if residual is None else residual(states, history))[:, -1]


@pytest.mark.parametrize(
    "more",
    [
        ("--user_llm_layers", "1"),
        ("--item_adapter", "lowrank", "--item_adapter_rank", "3", "--residual_items", "3"),
        ("--use_qlora", "False", "--loss", "bce", "--item_adapter", "linear"),
    ],
    ids=["lora", "lowrank", "full"],
)
def test_a_merged_model_is_the_run(
    project: Project, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(project, *more)
    code, err = export(project, "--dtype", "float32", "--evaluate", "True")
    assert code == 0, err
    out = run / "export"
    assert manifest(out)["exported"]["other_ranks"] == 0
    layers = 1 if "--user_llm_layers" in more else 2
    assert AutoModel.from_pretrained(out).config.num_hidden_layers == layers
    assert sum(path.name.startswith("model") for path in out.iterdir()) == 1
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1

    # As a user_pretrain_dir, with the settings that lie beside it.
    code, _, err = project.run(
        *("--config_file", str(out / "config.yaml"), "--user_pretrain_dir", str(out)),
        *("--run_name", "again"),
    )
    assert code == 0, err
    users, ranks = read_ranks("saved/again", "untrained")
    before, expected = read_ranks(run, "fine-tuned")
    assert users.tolist() == before.tolist()
    assert ranks.tolist() == expected.tolist()
    assert "evaluating the fine-tuned UserLLM exported from run." in err
    code, text, err = project.call(compare_main, ["saved/run", "saved/again"])
    assert code == 0, err
    assert "\nagain: fine-tuned, exported from run, user_pretrain_dir " in text
    code, _, err = project.call(
        report_main, ["saved/run", "saved/again", "--examples", "0", "--out", "page.html"]
    )
    assert code == 0, err
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<p>again is a fine-tuned UserLLM: it was exported from the run run.</p>" in page

    # As a plain transformers model.
    model = open_run(run).build("fine-tuned")
    actual = run_snippet(out, monkeypatch, project.llama)["user_vector"]
    torch.testing.assert_close(actual, user_vector(model), rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_an_exported_item_adapter(project: Project) -> None:
    train(project, "--item_adapter", "linear", "--epochs", "1")
    assert export(project, "--dtype", "float32")[0] == 0
    start = load_file("saved/run/export/hllm_extra.safetensors")["item_adapter.weight"]
    assert start.abs().max() > 0
    from_there = ("--user_pretrain_dir", "saved/run/export", "--epochs", "1")
    for kind in ("linear", "none"):
        code, _, err = project.run(*TRAIN, *from_there, "--item_adapter", kind, "--run_name", kind)
        assert code == 0, err
        adapter = open_run(f"saved/{kind}").build("fine-tuned").encoder.items.adapter  # type: ignore[attr-defined]
        assert torch.equal(adapter.weight, start) == (kind == "none")
        assert not torch.equal(adapter.weight, torch.zeros_like(start))
    code, err = export(project, "--run", "saved/none", "--format", "adapter")
    assert code == 2
    assert "comes with an item adapter" in err
    code, _, err = project.run(*TRAIN, *from_there, "--item_adapter", "lowrank")
    assert code == 2
    assert "comes with a trained item adapter (linear)" in err
    assert err.count("error:") == 1


def test_the_merged_model_of_qlora_is_measured(project: Project) -> None:
    run = train(project, "--qlora_quant_type", "nf4", "--eval_baseline", "True")
    assert export(project)[0] == 0
    out = run / "export"
    card = (out / "README.md").read_text()
    assert "trained against nf4 weights" in card
    assert "What this folder itself scores was not measured" in card
    assert "model-index" not in card
    assert AutoModel.from_pretrained(out).dtype == torch.bfloat16
    code, err = export(project, "--evaluate", "True")
    assert code == 2
    assert "exists; give another --out or set --overwrite True" in err
    code, err = export(project, "--evaluate", "True", "--dtype", "float16", "--overwrite", "True")
    assert code == 0, err
    content = (out / "README.md").read_text()
    measured = manifest(out)["exported"]
    users = len(read_ranks(run, "fine-tuned")[0])
    assert f"elsewhere for {measured['other_ranks']} of {users} users" in content
    row = next(line for line in content.splitlines() if line.startswith("| exported |"))
    values = re.findall(r"\| (\d\.\d{4})", row)
    assert values == [f"{value:.4f}" for value in measured["metrics"].values()]
    result = json.loads((run / "result.json").read_text())
    for entry in result["rows"]:
        row = next(line for line in content.splitlines() if line.startswith(f"| {entry['name']} |"))
        assert f"| {entry['metrics']['NDCG@10']:.4f}" in row
    header: Any = ModelCard(content).data
    assert header.library_name == "transformers"
    assert header.license is None
    listed = {actual.metric_type: actual.metric_value for actual in header.eval_results}
    assert listed == {name: round(value, 6) for name, value in measured["metrics"].items()}


def test_an_adapter_is_peft_s(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--item_adapter", "linear", "--residual_items", "1")
    run = train(project, "--qlora_quant_type", "nf4", *more)
    assert export(project)[0] == 0
    # Beside the other one.
    code, err = export(project, "--format", "adapter")
    assert code == 0, err
    out = run / "export-adapter"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "export.json",
        "trained.safetensors",
    ]
    written = "".join(path.read_text() for path in out.iterdir() if path.suffix != ".safetensors")
    assert str(project.root) not in written
    assert str(project.llama.parent) not in written
    assert yaml.safe_load((out / "config.yaml").read_text())["qlora_quant_type"] == "nf4"
    header: Any = ModelCard((out / "README.md").read_text()).data
    assert header.library_name == "peft"
    assert {actual.metric_type for actual in header.eval_results} >= {"NDCG@10", "Recall@20"}
    model = open_run(run).build("fine-tuned")
    actual = run_snippet(out, monkeypatch, project.llama)["user_vector"]
    torch.testing.assert_close(actual.float(), user_vector(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_card_names_an_item_cache_of_its_own(project: Project, absolute: bool) -> None:
    path = make_cache(project.root / "caches" / "own.safetensors")
    given = str(path) if absolute else "caches/own.safetensors"
    train(project, "--item_cache_path", given, "--epochs", "1")
    assert export(project)[0] == 0
    card = Path("saved/run/export/README.md").read_text()
    shown = "PATH/TO/own.safetensors" if absolute else given
    assert f"--user_pretrain_dir FOLDER \\\n    --item_cache_path {shown}\n```" in card
    assert str(project.root) not in card


def test_merging_into_quantised_weights_needs_bitsandbytes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(project, "--qlora_quant_type", "nf4")
    obstacle = "bitsandbytes is not installed"
    monkeypatch.setattr("hsft.finished.export.quantization_obstacle", lambda device: obstacle)
    code, err = export(project)
    assert code == 2
    assert "trained on weights rounded to nf4" in err
    assert f"and {obstacle}; export on a machine that has it, or use --format adapter." in err
    assert not (run / "export").exists()
    assert export(project, "--format", "adapter")[0] == 0


def test_what_cannot_be_exported(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    code, err = export(project)
    assert code == 2
    assert "is a run of model: pop, so it has no trained UserLLM" in err
    assert project.run("--val_only", "True", "--run_name", "run", "--overwrite", "True")[0] == 0
    code, err = export(project)
    assert code == 2
    assert "evaluated only" in err
    assert export(project, "--run", "saved")[1].startswith("error: saved is no run")
    train(project, "--use_qlora", "False", "--overwrite", "True", "--epochs", "1")
    code, err = export(project, "--format", "adapter")
    assert code == 2
    assert "use --format merged" in err
    code, err = export(project, "--out", "saved/run", "--overwrite", "True")
    assert code == 2
    assert "is no export" in err
    code, err = export(project, "--user_pretrain_dir", "nowhere")
    assert code == 2
    assert "nowhere" in err
    assert not [path.name for path in Path("saved/run").iterdir() if "export" in path.name]
    (project.root / "saved/run/best/trained.safetensors").write_bytes(b"no")
    code, err = export(project)
    assert code == 2
    assert "damaged" in err
    assert not [path.name for path in Path("saved/run").iterdir() if "export" in path.name]

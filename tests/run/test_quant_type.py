"""`qlora_quant_type: auto`: what it takes on a card of a given size, and that a run keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsft.config import load_config
from hsft.data.interactions import load_interactions
from hsft.data.split import leave_one_out
from hsft.report.memory import GIB, estimate
from hsft.run import quant_type
from hsft.run.dry_run import choose_quant_type
from hsft.run.quant_type import resolve_quant_type
from hsft.trainer import loop
from tests.conftest import Project
from tests.decoders import shape
from tests.training_runs import RESUME, RUN, Crash, at_step, crash, folder, outcome, result

AUTO = (*RUN, "--qlora_quant_type", "auto")


def test_plain_weights_are_taken_from_nine_tenths_of_the_card_on(llama: Path) -> None:
    nf4 = shape(llama, dtype=torch.bfloat16)
    needed = estimate(shape(llama, dtype=torch.bfloat16, quant_type="none"), 8).total
    # By hand: 600 MiB of CUDA's own and a few of the model, of which 9/10 are 0.65 GiB.
    assert 600 << 20 < needed < 640 << 20
    taken, sentence = choose_quant_type(nf4, 8, int(needed / 0.9) + 1)
    assert taken == "none"
    assert (
        f"bfloat16 weights is estimated at {needed / GIB:.2f} GiB, which is within 90%" in sentence
    )
    taken, sentence = choose_quant_type(nf4, 8, int(needed / 0.9) - 1)
    assert taken == "nf4"
    assert "more than 90% of the 0.6" in sentence


@pytest.mark.parametrize(("free", "expected"), [(2 * GIB, "none"), (GIB // 2, "nf4")])
def test_a_cards_free_memory_decides(
    project: Project, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    values = {
        "dataset": "tiny",
        "user_pretrain_dir": str(project.llama),
        "use_qlora": True,
        "qlora_quant_type": "auto",
    }
    config, _ = load_config([], values)
    monkeypatch.setattr(quant_type, "least_free_memory", lambda device: free)
    split = leave_one_out(load_interactions(config))
    resolved, sentence = resolve_quant_type(config, split, torch.device("cuda"))
    assert resolved.qlora_quant_type == expected
    assert f"auto takes {expected}" in sentence
    assert f"of the {free / GIB:.2f} GiB that are free" in sentence
    along = config.model_copy(update={"train_item_llm": "lora"})
    resolved, sentence = resolve_quant_type(along, split, torch.device("cuda"))
    assert resolved.qlora_quant_type == "nf4"
    assert "trained along" in sentence
    given = config.model_copy(update={"qlora_quant_type": "fp4"})
    assert resolve_quant_type(given, split, torch.device("cuda")) == (given, "")
    monkeypatch.setattr(quant_type, "quantization_obstacle", lambda device: f"no {device}")
    resolved, sentence = resolve_quant_type(config, split, torch.device("cuda"))
    assert resolved.qlora_quant_type == "none"
    assert "auto takes none (plain LoRA): no cuda." in sentence


def test_on_the_cpu_auto_is_nf4_and_the_result_says_so(project: Project) -> None:
    code, _, err = project.run(*AUTO, "--epochs", "1")
    assert code == 0, err
    assert err.count("qlora_quant_type: auto takes nf4") == 1
    assert result(project)["config"]["qlora_quant_type"] == "nf4"
    assert "qlora_quant_type: nf4" in (folder(project) / "config.yaml").read_text()
    assert "auto takes nf4" in (folder(project) / "run.log").read_text()


def test_a_continued_run_keeps_what_it_took(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.run(*RUN, "--run_name", "whole")[0] == 0
    taken = iter([("none", "auto takes none."), ("nf4", "auto takes nf4.")])
    monkeypatch.setattr(quant_type, "_choose", lambda *_: next(taken))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, crash))
        with pytest.raises(Crash):
            project.run(*AUTO, "--checkpoint_every", "5")
    code, _, err = project.run(*AUTO, "--checkpoint_every", "5", *RESUME)
    assert code == 0, err
    assert "auto stays none, as the run began" in err
    assert outcome(project) == outcome(project, "whole")
    assert result(project)["config"]["qlora_quant_type"] == "none"
    assert result(project)["training"]["resumed_from"] == [5]


def test_dry_run_says_where_auto_takes_plain_lora(project: Project) -> None:
    dry = ("--dry_run", "True", "--use_qlora", "True", "--precision", "auto")
    code, out, err = project.run(*dry, "--qlora_quant_type", "none")
    assert code == 0, err
    total = next(line for line in out.splitlines() if line.startswith("total")).split()[1]
    code, out, err = project.run(*dry, "--qlora_quant_type", "auto")
    assert code == 0, err
    needed = float(total.replace(",", "")) / 1024
    assert f"the step with bfloat16 weights is estimated at {needed:.2f} GiB" in out
    assert f"auto takes none (plain LoRA) where {needed / 0.9:.2f} GiB are free" in out
    as_nf4 = project.run(*dry, "--qlora_quant_type", "nf4")[1]
    before, _, after = out.partition("qlora_quant_type: auto")
    assert before + after.partition("\n\n")[2] == as_nf4

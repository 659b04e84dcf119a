"""`train_batch_size: auto` in a run: what is taken, what is said, and that a run keeps to it."""

from __future__ import annotations

import pytest
import torch

from hsft.config import load_config
from hsft.data.interactions import load_interactions
from hsft.data.split import leave_one_out
from hsft.report import batch_size as rule
from hsft.run import batch_size
from hsft.run.batch_size import resolve_batch_size
from hsft.trainer import loop
from tests.conftest import Project
from tests.training_runs import RESUME, RUN, Crash, at_step, crash, folder, outcome, result

AUTO = (*RUN, "--train_batch_size", "auto")


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let 4 steps be enough, and no share of the catalogue be small enough: 30 users in 2 batches."""
    monkeypatch.setattr(rule, "FEWEST_STEPS", 4)
    monkeypatch.setattr(rule, "_FIXED_SHARE", -1.0)
    return monkeypatch


def test_a_short_run_takes_the_smallest(project: Project) -> None:
    assert project.run(*RUN, "--run_name", "given", "--train_batch_size", "8")[0] == 0
    code, _, err = project.run(*AUTO)
    assert code == 0, err
    assert err.count("train_batch_size: auto takes 8: items' vectors") == 1
    assert "up to 8 would leave the run 500 optimizer steps" in err
    assert result(project)["config"]["train_batch_size"] == 8
    assert outcome(project) == outcome(project, "given")


def test_a_continued_run_keeps_its_number(project: Project, larger: pytest.MonkeyPatch) -> None:
    assert project.run(*RUN, "--run_name", "given", "--train_batch_size", "16")[0] == 0
    with larger.context() as patch:
        patch.setattr(loop, "update", at_step(3, crash))
        with pytest.raises(Crash):
            project.run(*AUTO, "--checkpoint_every", "2")
    assert "train_batch_size: 16" in (folder(project) / "config.yaml").read_text()
    larger.undo()
    larger.chdir(project.root)
    code, _, err = project.run(*AUTO, "--checkpoint_every", "2", *RESUME)
    assert code == 0, err
    assert "train_batch_size: auto stays 16, as the run began" in err
    assert result(project)["config"]["train_batch_size"] == 16
    assert result(project)["training"]["resumed_from"] == [2]
    assert outcome(project) == outcome(project, "given")


def test_checks_say_it(project: Project, larger: pytest.MonkeyPatch) -> None:
    auto = ("--train_batch_size", "auto", "--use_qlora", "True")
    code, out, err = project.run(*auto, "--check", "True")
    assert code == 0, err
    # Of 10 epochs of 30 users 16 leave 20 steps.
    assert "train_batch_size: auto takes 16" in out
    code, out, err = project.run(*auto, "--dry_run", "True", "--epochs", "2")
    assert code == 0, err
    assert "train_batch_size: auto takes 16, as estimated here" in out
    assert "training step: batch 16 x 8 items" in out
    code, out, err = project.run(*auto, "--check", "True", "--user_pretrain_dir", "none")
    assert (code, "takes" in out + err) == (2, False)


def test_a_cards_free_memory_decides(project: Project, larger: pytest.MonkeyPatch) -> None:
    values = {
        "dataset": "tiny",
        "user_pretrain_dir": str(project.llama),
        "use_qlora": True,
        "qlora_quant_type": "auto",
        "train_batch_size": "auto",
    }
    config, _ = load_config([], values)
    split = leave_one_out(load_interactions(config))
    for free, expected in ((2 << 30, 16), (100 << 20, 1)):
        larger.setattr(batch_size, "least_free_memory", lambda device, free=free: free)
        resolved, sentence = resolve_batch_size(config, split, torch.device("cuda"))
        assert resolved.train_batch_size == expected
        assert f"auto takes {expected}: about" in sentence
        assert f"(of {0.9 * free / 2**30:.2f})" in sentence
    given = config.model_copy(update={"train_batch_size": 5})
    assert resolve_batch_size(given, split, torch.device("cuda")) == (given, "")


def test_models_on_item_ids_are_estimated_too(project: Project) -> None:
    auto = ("--train_batch_size", "auto", "--loss", "nce", "--dry_run", "True")
    for model in ("sasrec", "hstu"):
        code, out, err = project.run(*auto, "--model", model)
        assert code == 0, err
        assert "train_batch_size: auto takes 8" in out


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--strategy", "deepspeed"), "strategy: deepspeed is not"),
        (
            ("--train_item_llm", "lora", "--item_pretrain_dir", "item"),
            "train_item_llm: lora is not",
        ),
    ],
)
def test_where_nothing_is_estimated_a_number_is_asked_for(
    project: Project, more: tuple[str, ...], word: str
) -> None:
    code, _, err = project.run("--train_batch_size", "auto", *more)
    assert (code, err.count("error: ")) == (2, 1)
    assert word in err
    assert "set a number" in err
    code, _, err = project.run("--train_batch_size", "many")
    assert code == 2
    assert "must be auto or a whole number from 1 to 1000000, but it is 'many'" in err

"""The Python interface: the same runs as the programs', as objects."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

import hsft
from hsft.evaluator.metrics import per_user
from hsft.utils.files import read_json
from tests.conftest import Project
from tests.helpers import ROOT


def settings(project: Project, **more: Any) -> hsft.Config:
    return hsft.load_config(
        "overall/LLM_ddp.yaml",
        "HLLM/HLLM.yaml",
        dataset="tiny",
        user_pretrain_dir=str(project.llama),
        MAX_ITEM_LIST_LENGTH=8,
        precision="32-true",
        show_progress=False,
        **more,
    )


def test_importing_is_light_and_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import logging, os, signal, sys\n"
        "def state():\n"
        "    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n"
        "    root = logging.getLogger()\n"
        "    return (dict(os.environ), handlers, list(root.handlers), root.level)\n"
        "before = state()\n"
        "import hsft\n"
        "hsft.load_config, hsft.train, hsft.Run, hsft.InputError\n"
        "assert state() == before\n"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "code"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there() -> None:
    assert set(hsft.__all__) <= set(dir(hsft))
    for name in hsft.__all__:
        assert getattr(hsft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        hsft.fit  # noqa: B018


def test_shipped_files_are_found_by_name_and_own_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = hsft.load_config("baselines/sasrec.yaml")
    assert shipped.model == "sasrec"
    assert hsft.load_config("code/baselines/sasrec.yaml") == shipped
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines/sasrec.yaml").write_text("model: pop\n")
    assert hsft.load_config("baselines/sasrec.yaml").model == "pop"


def test_overrides_are_nested_or_dotted() -> None:
    nested = hsft.load_config(optim_args={"learning_rate": 2e-3}, seed=7)
    dotted = hsft.load_config(**{"optim_args.learning_rate": 2e-3}, seed=7)
    assert nested == dotted
    assert nested.optim_args.learning_rate == 2e-3
    # The other key of the section keeps its default.
    assert nested.optim_args.weight_decay == hsft.Config().optim_args.weight_decay


def test_errors_are_exceptions_that_say_where() -> None:
    with pytest.raises(hsft.InputError, match=r"unknown key 'epoch' .*did you mean 'epochs'"):
        hsft.load_config(epoch=3)
    with pytest.raises(hsft.InputErrors) as several:
        hsft.load_config(epochs=0, seed="x")
    assert len(several.value.problems) == 2
    with pytest.raises(hsft.InputError, match="call evaluate"):
        hsft.train(hsft.load_config(model="pop"))
    with pytest.raises(hsft.InputError, match="call train"):
        hsft.evaluate(hsft.load_config(model="sasrec"))


def test_a_whole_walk(project: Project) -> None:
    config = settings(project, use_qlora=True, qlora_quant_type="none", epochs=2, topk=[1, 10])
    before = hsft.evaluate(config)
    run = hsft.train(config)
    assert before.folder.name == "tiny-baseline"
    assert run.folder.name == "tiny-qlora"
    # The same untrained model on the same users.
    pd.testing.assert_frame_equal(before.metrics, run.metrics.loc[["untrained"]])

    stored = load_file(run.folder / "ranks.safetensors")
    assert list(run.ranks.columns) == ["untrained", "fine-tuned"]
    assert run.ranks["fine-tuned"].tolist() == stored["fine-tuned.ranks"].tolist()
    for metric in run.metrics.columns:
        name, _, k = metric.partition("@")
        mean = per_user(name, run.ranks["fine-tuned"].to_numpy(), int(k)).mean()
        assert run.metrics.loc["fine-tuned", metric] == pytest.approx(mean, abs=1e-12)

    assert list(run.history.index) == [1, 2]
    assert run.history["loss"].notna().all()
    assert "NDCG@10" in run.history.columns
    assert before.history.empty

    # The same numbers from the folder, and from the command.
    again = hsft.open_run(run.folder)
    pd.testing.assert_frame_equal(again.metrics, run.metrics)
    assert again.config == run.config

    actual = again.recommend(user="u3", topk=4)
    assert actual.index.tolist() == [1, 2, 3, 4]
    assert actual["score"].is_monotonic_decreasing
    seen = {f"i{n}" for n in range(20)} - set(again.recommend(user="u3", topk=20)["item_id"])
    data = again.data.interactions
    row = data.user_ids.tolist().index("u3")
    items = data.items[data.offsets[row] : data.offsets[row + 1]]
    assert seen == {str(data.item_ids[n]) for n in items}
    assert again.recommend(history=["i1", "i2"], topk=3, model="untrained").shape == (3, 3)

    out = run.export()
    assert (out / "model.safetensors").is_file() or list(out.glob("*.safetensors"))

    table = hsft.compare(before, run)
    assert list(table["run"].unique()) == ["tiny-baseline", "tiny-qlora: fine-tuned"]
    first = table[table["run"] == "tiny-baseline"].set_index("metric")
    for metric in run.metrics.columns:
        assert first.loc[metric, "value"] == pytest.approx(before.metrics.loc["untrained", metric])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either user or history"),
        ({"user": "u1", "history": ["i1"]}, "either user or history"),
        ({"user": "nobody"}, "has no user 'nobody'"),
        ({"history": ["i99"]}, "has no item 'i99'"),
        ({"history": []}, "history is empty"),
        ({"user": "u1", "topk": 0}, "topk is 0"),
        ({"user": "u1", "model": "best"}, "no model 'best'"),
    ],
)
def test_bad_questions(project: Project, arguments: dict[str, Any], words: str) -> None:
    run = hsft.evaluate(settings(project, model="pop"))
    with pytest.raises(hsft.InputError, match=words):
        run.recommend(**arguments)


def test_a_missing_package_is_an_input_error(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hsft.run.check", None)  # ours: a defect, not an input
    with pytest.raises(ModuleNotFoundError):
        hsft.evaluate(settings(project, model="pop"))
    monkeypatch.undo()
    monkeypatch.chdir(project.root)

    def needs_peft(_: object) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft.tuners")

    monkeypatch.setattr("hsft.run.check.quick_problems", needs_peft)
    with pytest.raises(hsft.InputError, match="the package peft is missing; run pip install"):
        hsft.evaluate(settings(project, model="pop"))


def test_an_interruption_is_pythons_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise hsft.Interrupted("stopped by SIGINT; to continue, ...")

    monkeypatch.setattr("hsft.run.train_and_rank.train_and_rank", interrupted)
    with pytest.raises(KeyboardInterrupt, match="to continue"):
        hsft.evaluate(settings(project, model="pop"))


def test_a_run_must_be_finished(tmp_path: Path) -> None:
    with pytest.raises(hsft.InputError, match="does not exist"):
        hsft.open_run(tmp_path / "none")


def test_items_are_cached(project: Project) -> None:
    (project.root / "dataset/tiny_item_embeddings.safetensors").unlink()
    config = settings(project, item_pretrain_dir=str(project.llama), item_cache_dtype="float32")
    cache = hsft.cache_items(config)
    assert cache.item_ids[:2] == ["i0", "i1"]
    assert cache.embeddings.shape == (20, 64)
    assert torch.isfinite(cache.embeddings).all()
    missing = settings(project, item_pretrain_dir="nowhere")
    with pytest.raises(hsft.InputError, match="nowhere"):
        hsft.cache_items(missing)


def test_logging_is_left_as_it_was(project: Project) -> None:
    def state() -> tuple[Any, ...]:
        ours, root = logging.getLogger("hsft"), logging.getLogger()
        return ours.level, list(ours.handlers), root.level, list(root.handlers)

    before = state()
    run = hsft.evaluate(settings(project, model="pop"))
    assert state() == before
    assert read_json(run.folder / "result.json")["model"] == "pop"


def test_lines_are_shown_and_kept_where_nobody_set_up_logging(project: Project) -> None:
    code = (
        "import hsft\n"
        "config = hsft.load_config('baselines/sasrec.yaml', dataset='tiny', epochs=1)\n"
        "for name in ('a', 'b'):\n"
        "    hsft.train(config.model_copy(update={'run_name': name}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env={"PYTHONPATH": str(ROOT / "code"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = "tiny: 30 users, 20 items, 330 interactions"
    assert done.stderr.count(line) == 2
    assert done.stderr.count("Warning") == 0
    # Each run has its own lines.
    for name in ("a", "b"):
        log = (project.root / "saved" / name / "run.log").read_text()
        assert log.count("epoch 1: loss") == 1, log

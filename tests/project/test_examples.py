"""The changes shown in docs/architecture.md: each applies to the code as it is, and works."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.helpers import ROOT, make_cache, make_dataset

EXAMPLES = ROOT / "tests" / "examples"
PAGE = ROOT / "docs" / "architecture.md"
NAMES = ("new_loss", "new_metric", "new_llm", "new_model", "new_dataset")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git applies the changes")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all the changes, in a folder with tiny data."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "code", root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prepare_data.py", root)
    # A repository of its own: inside another one, git would apply the changes to that.
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True, capture_output=True)
    for name in NAMES:
        command = ["git", "apply", "--whitespace=error", str(EXAMPLES / f"{name}.diff")]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}.diff no longer applies: {done.stderr}"
    return make_dataset(root)


def python(root: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_change(name: str) -> None:
    shown = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert (EXAMPLES / f"{name}.diff").read_text(encoding="utf-8") in shown


def test_the_page_names_every_module_and_no_other() -> None:
    named: set[str] = set()
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        package, _, text = section.partition("\n")
        folder = "" if package.strip() == "hsft" else f"{package.strip()}/"
        named |= {f"{folder}{name}" for name in re.findall(r"\*\*([\w/]+\.py)\*\*", text)}
    code = ROOT / "code" / "hsft"
    there = {
        path.relative_to(code).as_posix()
        for path in code.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


def test_a_new_loss_metric_and_llm_train_together(changed: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    GPTNeoXForCausalLM(config).save_pretrained(changed / "model_checkpoints" / "pythia-410m")
    make_cache(changed / "dataset" / "tiny_item_embeddings.safetensors")
    python(
        changed,
        *("code/main.py", "--config_file", "code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml"),
        *("code/HLLM/gpt_neox.yaml", "--dataset", "tiny", "--use_qlora", "True"),
        *("--loss", "bpr", "--metrics", "Recall", "F1", "NDCG", "--epochs", "6"),
        *("--optim_args.learning_rate", "1e-2", "--MAX_ITEM_LIST_LENGTH", "8"),
        *("--item_adapter", "linear", "--precision", "32-true", "--run_name", "run"),
    )
    result = json.loads((changed / "saved" / "run" / "result.json").read_text())
    before, after = (row["metrics"] for row in result["rows"])
    for row in (before, after):
        assert row["F1@5"] == pytest.approx(row["Recall@5"] / 3)
    losses = [record["loss"] for record in result["training"]["history"]]
    assert losses[-1] < losses[0]
    assert after["Recall@5"] > before["Recall@5"]


def test_the_new_loss_by_hand(changed: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'code'); import torch; from hsft.model.losses import bpr\n"
        "q, p, n = torch.tensor([[1., 0]]), torch.tensor([[2., 1]]), torch.tensor([[3., 0], [0., 9]])\n"
        "print(float(bpr(q, p, n, torch.tensor([[False, False]]))))\n"
        "print(float(bpr(q, p, n, torch.tensor([[False, True]]))))\n"
    )
    # Scores: positive 2, negatives 3 and 0; softplus(1) and softplus(-2).
    one, two = np.log1p(np.exp(1)), np.log1p(np.exp(-2))
    actual = [float(line) for line in python(changed, "-c", program).split()]
    assert actual == pytest.approx([(one + two) / 2, one], rel=1e-6)


def test_a_model_of_ones_own_trains_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = EXAMPLES / "own_model.py"
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert program.read_text(encoding="utf-8") in re.findall(
        r"```python\n(.*?)```", page, flags=re.DOTALL
    )
    make_dataset(tmp_path)
    make_cache(tmp_path / "dataset" / "tiny_item_embeddings.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "tiny"])
    runpy.run_path(str(program))
    epochs = [
        json.loads(text.replace("'", '"')) for text in re.findall(r"{.*}", capsys.readouterr().out)
    ]
    assert len(epochs) == 5
    # Users walk along the items, which the order of a history tells and popularity does not.
    assert epochs[-1]["NDCG@10"] > max(epochs[0]["NDCG@10"], 0.6)


def test_a_new_model_trains_and_is_opened_again(changed: Path) -> None:
    make_cache(changed / "dataset" / "tiny_item_embeddings.safetensors")
    python(
        changed,
        *("code/main.py", "--config_file", "code/overall/LLM_ddp.yaml", "--dataset", "tiny"),
        *("--model", "gru", "--epochs", "6", "--optim_args.learning_rate", "1e-2"),
        *("--MAX_ITEM_LIST_LENGTH", "8", "--precision", "32-true", "--run_name", "gru"),
    )
    result = json.loads((changed / "saved" / "gru" / "result.json").read_text())
    # Users walk along the items: the next one is certain from the last.
    assert result["rows"][0]["metrics"]["Recall@5"] == 1.0
    out = python(changed, "code/recommend.py", "--run", "saved/gru", "--history", "i4,i5", "--json")
    assert json.loads(out)["recommendations"][0]["item_id"] == "i6"


def test_a_new_dataset_is_prepared(changed: Path) -> None:
    (changed / "orders.csv").write_text("ann,p1,100\nbob,p2,50\nann,p2,90\n")
    (changed / "products.csv").write_text("p1;Tea;Drinks\np2;Cup;\n")
    out = python(
        changed, "prepare_data.py", "shop", "--orders", "orders.csv", "--products", "products.csv"
    )
    assert re.search(r"users +2\n", out)
    rows = (changed / "dataset" / "shop.csv").read_text().splitlines()
    assert sorted(rows[1:]) == ["p1,ann,100", "p2,ann,90", "p2,bob,50"]
    assert "p1,Tea,Drinks," in (changed / "information" / "shop.csv").read_text()

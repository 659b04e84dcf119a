"""The ONNX graphs: ONNX Runtime ranks the run's targets where the run did."""

from __future__ import annotations

import json
import logging
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import main as export_main
from hsft.data.cache import open_cache
from hsft.finished.export_onnx import _add_residual
from hsft.finished.open_run import open_run
from hsft.model.residual import HistoryResidual
from hsft.report.result import read_ranks
from tests.conftest import Project
from tests.helpers import make_cache

TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
    *("--epochs", "1", "--optim_args.learning_rate", "3e-2", "--run_name", "run"),
)
OUT = Path("saved/run/export-onnx")


def export(project: Project, *more: str) -> tuple[int, str]:
    asked = ["--run", "saved/run", "--format", "onnx", *more]
    code, _, err = project.call(export_main, asked)
    return code, err


@pytest.mark.parametrize(
    "parts",
    [(), ("--item_id_embedding", "True", "--residual_items", "3")],
    ids=["text", "ids and last items"],
)
def test_onnx_runtime_ranks_as_the_run(
    project: Project, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of another width than the UserLLM's, so that the projection is in both graphs."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed (hsft[onnx])")
    import onnxruntime

    # torch describes every step of the export to whoever listens to all loggers, as pytest does.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    cache = open_cache(make_cache(Path("dataset/tiny_item_embeddings.safetensors"), dim=24))
    more = ("--item_adapter", "lowrank", "--item_adapter_rank", "8", "--user_llm_layers", "1")
    code, _, err = project.run(*TRAIN, *more, *parts)
    assert code == 0, err
    code, err = export(project, "--evaluate", "True")
    assert code == 0, err
    about = json.loads((OUT / "export.json").read_text())
    assert (about["format"], about["dtype"]) == ("onnx", "float32")
    assert about["exported"]["other_ranks"] == 0
    card = (OUT / "README.md").read_text()
    assert "in ONNX Runtime: the target ranks elsewhere for 0 of 30 users" in card

    # By ONNX Runtime and numpy alone: each user's last item, ranked among those not in the history.
    users, ranks = read_ranks("saved/run", "fine-tuned")
    run = open_run("saved/run")
    data = run.data.interactions
    embeddings = cache.embeddings.numpy()[cache.rows_of(data.item_ids[1:])]
    has_ids = "--item_id_embedding" in parts
    assert (OUT / "item_id_vectors.safetensors").is_file() == has_ids
    ids: dict[str, np.ndarray] = {}
    if has_ids:
        stored = open_cache(OUT / "item_id_vectors.safetensors")
        ids["id_vectors"] = stored.embeddings.numpy()[stored.rows_of(data.item_ids[1:])]
        assert np.abs(ids["id_vectors"]).max() > 1e-3
    session = onnxruntime.InferenceSession(OUT / "items.onnx")
    (items,) = session.run(None, {"embeddings": embeddings, **ids})
    session = onnxruntime.InferenceSession(OUT / "user_llm.onnx")
    actual = []
    for user in users:
        whole = run.history(str(data.user_ids[user])) - 1
        history, target = whole[:-1], whole[-1]
        # Padded to any length.
        padding = ((0, 0), (0, int(user) % 3), (0, 0))
        padded = {
            name: np.pad(table[history[-8:]][None], padding)
            for name, table in {"embeddings": embeddings, **ids}.items()
        }
        lengths = np.array([len(history[-8:])])
        (vectors,) = session.run(None, {**padded, "lengths": lengths})
        scores = items @ vectors[0]
        scores[history] = -np.inf
        actual.append(int((scores >= scores[target]).sum()))
    assert actual == ranks.tolist()
    assert len(set(actual)) > 3

    (code_block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    script = Path("snippet.py").absolute()
    script.write_text(code_block)
    monkeypatch.chdir(OUT)
    names: dict[str, Any] = runpy.run_path(str(script))
    assert names["scores"].shape == (2, 100)
    np.testing.assert_allclose(np.linalg.norm(names["user_vectors"], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("items", [1, 3])
def test_the_last_items_are_added_as_in_training(items: int) -> None:
    torch.manual_seed(0)
    residual = HistoryResidual(8, items)
    torch.nn.init.normal_(residual.weight)
    states, vectors = torch.randn(2, 4, 5, 8)
    ends = torch.tensor([0, 1, 2, 4])
    with torch.no_grad():
        expected = residual(states, vectors)[torch.arange(4), ends]
        last = states[torch.arange(4), ends]
        actual = _add_residual(residual, last, vectors, torch.arange(4), ends)
    torch.testing.assert_close(actual, expected)


def test_what_cannot_be_written(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = project.run(*TRAIN)
    assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        code, err = export(project)
    assert code == 2
    assert "pip install 'hsft[onnx]'" in err.replace("\n", " ")
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed (hsft[onnx])")
    code, err = export(project, "--dtype", "float16")
    assert code == 2
    assert "writes float32 and not float16" in err
    assert not OUT.exists()

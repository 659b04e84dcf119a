"""The notebook runs from its first cell to its last, on tiny data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.encoders import make_sentence_folder
from tests.helpers import ROOT

NOTEBOOK = ROOT / "demo" / "demo.ipynb"
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (hsft[dev])")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (hsft[dev])")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (hsft[dev])")


def test_the_notebook_is_saved_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for name in ("load_config", "cache_items", "evaluate", "train", "compare"):
        assert f"hsft.{name}(" in code


@pytest.mark.slow
def test_the_notebook_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "dataset/tiny_item_embeddings.safetensors").unlink()
    encoder = make_sentence_folder(project.root / "encoder", {"pooling_mode_mean_tokens": True})
    keys = {
        "dataset": "tiny",
        "encoder": str(encoder),
        "user_pretrain_dir": str(project.llama),
        "qlora_quant_type": "none",
        "precision": "32-true",
        "epochs": 2,
    }
    monkeypatch.setenv("HSFT_ROOT", str(ROOT))
    monkeypatch.setenv("HSFT_DEMO_KEYS", json.dumps(keys))
    monkeypatch.setenv("IPYTHONDIR", str(project.root / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(project.root)}},
    )
    client.execute(env=dict(os.environ))

    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in shown if "data" in output]
    assert sum("image/png" in entry for entry in data) == 3
    tables = [entry["text/html"] for entry in data if "<table" in entry.get("text/html", "")]
    assert any("NDCG@10" in table and "fine-tuned" in table for table in tables)
    assert any("item_id" in table and "title" in table for table in tables)
    # What the package writes while it works appears below the cell.
    lines = "".join(output["text"] for output in shown if output["output_type"] == "stream")
    assert "epoch 2: loss" in lines
    assert "Warning" not in lines
    assert (project.root / "runs/demo/notebook-qlora/export/config.json").is_file()
    assert written_in(project.root) <= {"dataset", "information", "runs", "ipython", "encoder"}


def written_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}

"""What an imported folder says of where it came from, and the warning that follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hsft.hub.manifest import pretraining_overlap
from hsft.report.compare import load_comparison
from report import main as report_main
from tests.conftest import Project
from tests.helpers import make_cache, make_dataset


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    manifest = {"files": {}, "source": source, "base": {}, "dtype": "float32"}
    (folder / "import.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("source", "dataset", "name"),
    [
        ({"repo": "ByteDance/HLLM", "file": "1B_Pixel8M/x.bin"}, "Pixel200K", "Pixel8M"),
        ({"path": "/models/1B_Pixel8M.bin"}, "my_pixel1m", "Pixel8M"),
        ({"repo": "ByteDance/HLLM", "file": "7B_books/x.bin"}, "amazon_books", "Amazon Books"),
        ({"repo": "ByteDance/HLLM", "file": "1B_Pixel8M/x.bin"}, "ml-100k", None),
        ({"repo": "ByteDance/HLLM", "file": "7B_books/x.bin"}, "Pixel200K", None),
        ({"path": "/models/other.bin"}, "Pixel200K", None),
    ],
)
def test_checkpoints_of_the_same_log_are_named(
    tmp_path: Path, source: dict[str, str], dataset: str, name: str | None
) -> None:
    write_manifest(tmp_path, source)
    warning = pretraining_overlap(tmp_path, dataset)
    assert (warning is None) == (name is None)
    if warning is not None:
        assert f"was trained on {name}," in warning
        assert dataset in warning


def test_folders_that_were_not_imported_give_no_warning(tmp_path: Path) -> None:
    assert pretraining_overlap(tmp_path, "Pixel200K") is None


def test_log_check_result_and_comparison_warn(project: Project, llama: Path) -> None:
    make_dataset(project.root, "pixel-tiny")
    make_cache(project.root / "dataset" / "pixel-tiny_item_embeddings.safetensors")
    model = project.root / "Pixel-LLM"
    shutil.copytree(llama, model)
    write_manifest(model, {"repo": "ByteDance/HLLM", "file": "1B_Pixel8M/pytorch_model.bin"})
    given = ("--dataset", "pixel-tiny", "--user_pretrain_dir", str(model), "--val_only", "True")
    code, out, err = project.run(*given, "--check", "True")
    assert (code, err) == (0, "")
    assert f"warning: {model} is a checkpoint that was trained on Pixel8M" in out
    code, _, err = project.run(*given, "--run_name", "run")
    assert code == 0
    assert "it may have been trained on the items that are held out here" in err
    run = project.root / "saved" / "run"
    recorded = json.loads((run / "result.json").read_text())["pretraining_overlap"]
    assert recorded == pretraining_overlap(model, "pixel-tiny")
    assert load_comparison([run]).notes == [f"run: {recorded}"]
    code, _, err = project.call(report_main, ["saved/run", "--examples", "0", "--out", "page.html"])
    assert code == 0, err
    assert "that was trained on Pixel8M" in (project.root / "page.html").read_text()

"""The two fixed commands, as written, with the demo's real data and real Llama at their paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import EVALUATE, FINE_TUNE, ROOT

LLM = "model_checkpoints/SmolLM2-135M-Instruct"
USERS = 10


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command.split()], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def pixel(demo_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo root with the first users of MovieLens-100K standing in for Pixel200K.

    The fixed commands train all 30 layers for ten epochs, which is why there are few users.
    """
    root = tmp_path_factory.mktemp("pixel")
    (root / "code").symlink_to(ROOT / "code")
    (root / "item_caching.py").symlink_to(ROOT / "item_caching.py")
    for name in ("dataset", "information", "model_checkpoints"):
        (root / name).mkdir()
    for name in ("UserLLM_complete", "ItemLLM_complete"):
        (root / "model_checkpoints" / name).symlink_to(demo_files / LLM)
    lines = (demo_files / "dataset/ml-100k.csv").read_text().splitlines()
    kept, counts = [lines[0]], dict[str, int]()
    for line in lines[1:]:
        user = line.split(",")[1]
        if (user in counts or len(counts) < USERS) and counts.get(user, 0) < 8:
            counts[user] = counts.get(user, 0) + 1
            kept.append(line)
    items = {line.split(",")[0] for line in kept[1:]}
    (root / "dataset/Pixel200K.csv").write_text("\n".join(kept) + "\n")
    information = (demo_files / "information/ml-100k.csv").read_text().splitlines()
    described = [line for line in information[1:] if line.split(",")[0] in items]
    (root / "information/Pixel200K.csv").write_text("\n".join([information[0], *described]) + "\n")
    return root


@pytest.mark.slow
def test_the_two_commands_work_as_written(pixel: Path) -> None:
    caching = (
        "item_caching.py --dataset Pixel200K --item_pretrain_dir model_checkpoints/ItemLLM_complete"
    )
    done = run(pixel, caching)
    assert done.returncode == 0, done.stderr
    done = run(pixel, EVALUATE)
    assert done.returncode == 0, done.stderr
    assert "Recall@10" in done.stdout
    done = run(pixel, FINE_TUNE)
    assert done.returncode == 0, done.stderr
    assert "gain" in done.stdout
    evaluated = json.loads((pixel / "saved/Pixel200K-baseline/result.json").read_text())
    tuned = json.loads((pixel / "saved/Pixel200K-qlora/result.json").read_text())
    assert evaluated["rows"][0]["users"] == tuned["rows"][1]["users"] == USERS
    assert tuned["rows"][0]["metrics"] == evaluated["rows"][0]["metrics"]
    assert tuned["config"]["loss"] == "bce"
    history = tuned["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]

"""Runs killed with SIGKILL at many moments and resumed equal an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from hsft.trainer.checkpoint import Checkpoints, verify
from tests.helpers import ROOT, ForkServer, make_cache, make_dataset

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")

KILLED = -9
KILLS = 20
# Dropout, drawn negatives, accumulation, an item adapter, validation and early stopping: all that
# a checkpoint has to carry.
RUN = (
    *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/HLLM/HLLM.yaml"),
    *("--dataset", "tiny", "--MAX_ITEM_LIST_LENGTH", "8", "--precision", "32-true"),
    *("--show_progress", "False", "--num_threads", "1", "--use_qlora", "True", "--epochs", "3"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--qlora_dropout", "0.2"),
    *("--num_negatives", "16", "--item_adapter", "linear", "--optim_args.learning_rate", "1e-2"),
    *("--checkpoint_every", "3", "--auto_resume", "True"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer("main")
    yield server
    server.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(tmp_path)
    make_cache(tmp_path / "dataset" / "tiny_item_embeddings.safetensors")
    return tmp_path


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions, tensor files as bytes."""
    result = json.loads((folder / "result.json").read_text())
    files = ["best/adapter/adapter_model.safetensors", "best/trained.safetensors"]
    return {
        "metrics": [(row["name"], row["metrics"]) for row in result["rows"]],
        "history": result["training"]["history"],
        "best": (result["training"]["best_epoch"], result["training"]["best_value"]),
        **{name: (folder / name).read_bytes() for name in [*files, "ranks.safetensors"]},
    }


def test_killed_anywhere_and_resumed_equals_uninterrupted(
    server: ForkServer, root: Path, llama: Path
) -> None:
    argv = (*RUN, "--user_pretrain_dir", str(llama))
    log = root / "log"

    def run(name: str, **plan: Any) -> dict[str, Any]:
        return server.run((*argv, "--run_name", name), root, log, **plan)

    whole = run("whole")
    assert whole["code"] == 0, log.read_text()
    reference = outcome(root / "saved" / "whole")
    assert not (root / "saved" / "whole" / "checkpoints").exists()
    labels = whole["moments"]
    assert labels.count("step") == 12

    draw = random.Random(7)

    def plan(kind: str) -> dict[str, Any]:
        if kind == "time":
            delay = draw.uniform(0.1, 0.6) * whole["seconds"]
            return {"delay": delay, "signal": signal.SIGKILL}
        # Sessions that continue a run have fewer moments than a whole one.
        count = sum(label.startswith(kind) for label in labels)
        return {"kill_at": draw.randint(1, max(1, count // 2)), "among": kind}

    turns = [
        "write checkpoint",
        "time",
        "",
        "step",
        "write checkpoint",
        "replace",
        "",
        "write best",
    ]
    kinds = cycle(turns)
    kills: Counter[str] = Counter()
    runs = 0
    # Whether a kill by the clock comes in time depends on the machine: those are not counted.
    while kills.total() - kills["time"] < KILLS:
        runs += 1
        folder = root / "saved" / f"run{runs}"
        # Killed up to four times, then left to end.
        for _ in range(4):
            kind = next(kinds)
            ended = run(folder.name, **plan(kind))
            assert ended["code"] in (0, KILLED), log.read_text()
            kills[kind] += ended["code"] == KILLED
            for path in Checkpoints(folder / "checkpoints", 2).list():
                verify(path)
            # A kill by the clock may come between the result and the end of the program.
            if ended["code"] == 0 or (folder / "result.json").exists():
                break
        else:
            ended = run(folder.name)
            assert ended["code"] == 0, log.read_text()
        actual = outcome(folder)
        for key, value in reference.items():
            assert actual[key] == value, (folder.name, key)
        if ended["code"] == 0:
            assert not list(folder.glob(".*"))
            assert not (folder / "checkpoints").exists()
    assert kills["write checkpoint"] >= 4, kills

"""Runs killed with SIGKILL at many moments and resumed equal an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from hsft.trainer.checkpoint import Checkpoints, verify
from tests.helpers import ROOT, make_cache, make_dataset

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


class Server:
    """The process that forks the runs."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT / "code"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )

    def run(self, argv: tuple[str, ...], cwd: Path, **plan: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": list(argv), "cwd": str(cwd), **plan}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
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
    server: Server, root: Path, llama: Path
) -> None:
    argv = (*RUN, "--user_pretrain_dir", str(llama))
    began = os.times().elapsed
    whole = server.run((*argv, "--run_name", "whole"), root, labels=True)
    seconds = os.times().elapsed - began
    assert whole["code"] == 0, whole["err"]
    reference = outcome(root / "saved" / "whole")
    assert not (root / "saved" / "whole" / "checkpoints").exists()
    labels = whole["moments"]
    assert labels.count("step") == 12

    draw = random.Random(7)

    def plan(kind: str) -> dict[str, Any]:
        if kind == "time":
            return {"kill_after": draw.uniform(0.1, 0.6) * seconds}
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
            ended = server.run((*argv, "--run_name", folder.name), root, **plan(kind))
            assert ended["code"] in (0, KILLED), ended["err"]
            kills[kind] += ended["code"] == KILLED
            for path in Checkpoints(folder / "checkpoints", 2).list():
                verify(path)
            if ended["code"] == 0:
                break
        else:
            ended = server.run((*argv, "--run_name", folder.name), root)
            assert ended["code"] == 0, ended["err"]
        found = outcome(folder)
        for key, value in reference.items():
            assert found[key] == value, (folder.name, key)
        assert not list(folder.glob(".*"))
        assert not (folder / "checkpoints").exists()
    assert kills["write checkpoint"] >= 4, kills

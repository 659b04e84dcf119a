"""Runs main.py in forked children and kills them at chosen moments; see test_resume.py.

Importing torch and transformers takes longer than a tiny run. This process does it once, starts no
threads, and forks a child for every request: a JSON line on standard input with

    argv, cwd: the command and where it runs;
    kill_at: number of the moment at which the child kills itself with SIGKILL, or null;
    among: count only moments whose label begins so;
    kill_after: seconds after which it is killed from outside, or null;
    labels: report what the moments were.

A moment is an optimizer step, a change in a folder (rename, link, removal, ...), a flush to disk,
or the middle of writing a tensor file. The answer is a JSON line with `code` (exit code, or minus
the signal), `moments` (labels in order, empty for a killed child) and `err` (standard error).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported late by the program, and slow)
import torch
from transformers import LlamaModel  # noqa: F401

from hsft.model import weights
from hsft.trainer import checkpoint, loop
from hsft.utils.program import run_program
from main import main

CHANGES = ("replace", "unlink", "rmdir", "mkdir", "link", "fsync")


class Moments:
    """Counts moments and kills this process at one of them."""

    def __init__(self, kill_at: int | None, among: str) -> None:
        self.kill_at, self.among = kill_at, among
        self.passed = 0
        self.labels: list[str] = []

    def pass_by(self, label: str, spoil: Callable[[], object] = lambda: None) -> None:
        self.labels.append(label)
        self.passed += label.startswith(self.among)
        if self.kill_at == self.passed and label.startswith(self.among):
            spoil()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Put this in the way of what the program does."""
        for name in CHANGES:
            setattr(os, name, self._before(name, getattr(os, name)))
        loop.update = self._before("step", loop.update)
        checkpoint.save_file = self._halfway("checkpoint", checkpoint.save_file)
        weights.save_file = self._halfway("best", weights.save_file)

    def _before(self, label: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(label)
            return action(*args, **kwargs)

        return watched

    def _halfway(self, label: str, save: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tensors: Any, path: Path, **kwargs: Any) -> None:
            save(tensors, path, **kwargs)
            self.pass_by(f"write {label}", lambda: os.truncate(path, path.stat().st_size // 2))

        return watched


def child(request: dict[str, Any], log: Path) -> int:
    os.chdir(request["cwd"])
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    moments = Moments(request.get("kill_at"), request.get("among", ""))
    moments.watch()
    code = run_program(main, request["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    if request.get("labels"):
        log.with_suffix(".json").write_text(json.dumps(moments.labels))
    return code


def serve(request: dict[str, Any], log: Path) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = child(request, log)
        finally:
            os._exit(code)
    if request.get("kill_after") is not None:
        time.sleep(request["kill_after"])
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    labels = log.with_suffix(".json")
    moments = json.loads(labels.read_text()) if labels.exists() else []
    labels.unlink(missing_ok=True)
    return {"code": code, "moments": moments, "err": log.read_text()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answer = serve(json.loads(line), Path(folder) / "log")
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

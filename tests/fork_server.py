"""Runs programs in forked children and ends them at chosen moments; `helpers.ForkServer` starts it.

Importing torch and transformers takes longer than a tiny run. This process does it once, starts no
threads, and forks a child for every request, a JSON line on standard input:

    program: `main` or `item_caching`;
    argv, cwd: the command and where it runs;
    log: file that takes the child's output;
    delay, signal: seconds after which the child gets a signal from outside;
    and what `watch_training` or `watch_caching` reads.

The answer is a JSON line: `code` (exit code, or minus the signal), `seconds`, and `moments`, the
labels of what `watch_training` saw, in order; none for a child that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported late by the program, and slow)
import torch
import transformers

import item_caching
import main
from hsft.encoding import build_cache, parts
from hsft.encoding.item_llm import ItemEncoder
from hsft.inputs import cache_items
from hsft.model import weights
from hsft.trainer import checkpoint, loop
from hsft.utils.program import run_program

# Loaded lazily, which every child would do again.
WARM = (transformers.LlamaModel, transformers.PreTrainedTokenizerFast, transformers.AutoModel)
CHANGES = ("replace", "unlink", "rmdir", "mkdir", "link", "fsync")


def die() -> None:
    """Die as by SIGKILL from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def halve(path: Path) -> None:
    """Cut a file to half its length, as a write that was interrupted."""
    os.truncate(path, path.stat().st_size // 2)


# --- training


class Moments:
    """Counts moments and kills this process at one of them.

    A moment is an optimizer step, a change in a folder (rename, link, removal, ...), a flush to
    disk, or the middle of writing a file of a checkpoint or of the best model.
    """

    def __init__(self, kill_at: int | None, among: str) -> None:
        self.kill_at, self.among = kill_at, among
        self.passed = 0
        self.labels: list[str] = []

    def pass_by(self, label: str, spoil: Callable[[], object] = lambda: None) -> None:
        self.labels.append(label)
        self.passed += label.startswith(self.among)
        if self.kill_at == self.passed and label.startswith(self.among):
            spoil()
            die()

    def before(self, label: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(label)
            return action(*args, **kwargs)

        return watched

    def halfway(self, label: str, save: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tensors: Any, path: Path, **kwargs: Any) -> None:
            save(tensors, path, **kwargs)
            self.pass_by(f"write {label}", lambda: halve(path))

        return watched


def watch_training(request: dict[str, Any]) -> list[str]:
    """Kill the child at moment number `kill_at` of those whose label begins with `among`."""
    moments = Moments(request.get("kill_at"), request.get("among", ""))
    for name in CHANGES:
        setattr(os, name, moments.before(name, getattr(os, name)))
    loop.update = moments.before("step", loop.update)
    checkpoint.save_file = moments.halfway("checkpoint", checkpoint.save_file)
    write_state = checkpoint.write_state

    def write_half(folder: Path, state: dict[str, Any]) -> None:
        write_state(folder, state)
        moments.pass_by("write checkpoint", lambda: halve(folder / checkpoint.STATE_FILE))

    checkpoint.write_state = write_half
    weights.save_file = moments.halfway("best", weights.save_file)
    return moments.labels


# --- item caching


def on_call(count: int, act: Callable[..., object], plain: Callable[..., Any]) -> Any:
    """Return `plain`, with `act` in place of its call number `count` (from 1)."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return act(*args, **kwargs) if calls == count else plain(*args, **kwargs)

    return called


def set_trap(name: str, count: int) -> None:
    """Make the child die in the middle of writing a part or the file, or before the parts go."""
    save: Callable[..., Any] = parts.save_file
    write: Callable[..., Any] = build_cache.write_cache

    def half_a_part(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata=metadata)
        halve(path)
        die()

    def cut(blocks: Iterable[Any]) -> Iterator[Any]:
        for number, block in enumerate(blocks):
            if number == 3:
                die()
            yield block

    def three_blocks(*args: Any) -> None:
        *others, blocks = args
        write(*others, cut(blocks))

    if name == "part":
        parts.save_file = on_call(count, half_a_part, save)
    elif name == "file":
        build_cache.write_cache = on_call(1, three_blocks, write)
    else:
        assert name == "remove"
        cache_items.remove = on_call(1, lambda path: die(), cache_items.remove)


def watch_caching(request: dict[str, Any]) -> list[str]:
    """Send the child `signal` when it encodes batch number `batch` (from 1), or set a `trap`.

    `again` is a second signal, while a part is written after that batch; `count` is the trap's call;
    `items_per_part` is 16 and `seconds_per_part` 1e9 unless given. The number of items in each
    batch is written to the log's name with `.encoded`.
    """
    build_cache.ITEMS_PER_PART = request.get("items_per_part", 16)
    build_cache.SECONDS_PER_PART = request.get("seconds_per_part", 1e9)
    encode, save = ItemEncoder.encode, parts.save_file
    counter = Path(request["log"] + ".encoded")
    counter.write_text("")
    batches = 0

    def save_amid_signal(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), request["again"])
        save(*args, **kwargs)

    def counting(self: ItemEncoder, tokens: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == request.get("batch"):
            if "again" in request:
                parts.save_file = save_amid_signal
            os.kill(os.getpid(), request["signal"])
        with counter.open("a") as file:
            file.write(f"{len(tokens)}\n")
        return encode(self, tokens)

    ItemEncoder.encode = counting  # type: ignore[method-assign]
    if request.get("trap"):
        set_trap(request["trap"], request.get("count", 1))
    return []


PROGRAMS = {
    "main": (main.main, watch_training),
    "item_caching": (item_caching.main, watch_caching),
}


def run_child(request: dict[str, Any]) -> int:
    """Run one request's program."""
    os.chdir(request["cwd"])
    with Path(request["log"]).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    program, watch = PROGRAMS[request["program"]]
    moments = watch(request)
    code = run_program(program, request["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    Path(request["log"] + ".json").write_text(json.dumps(moments))
    return code


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for a request and wait for its end."""
    labels = Path(request["log"] + ".json")
    labels.unlink(missing_ok=True)
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = run_child(request)
        finally:
            os._exit(code)
    if request.get("delay") is not None:
        time.sleep(request["delay"])
        os.kill(pid, request["signal"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.perf_counter() - began
    moments = json.loads(labels.read_text()) if labels.exists() else []
    return {"code": code, "seconds": seconds, "moments": moments}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()

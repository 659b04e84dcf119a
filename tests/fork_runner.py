"""Runs item_caching.py in forked children and kills them when told to.

torch and transformers are imported once. Every line of standard input is an order (JSON): argv,
cwd, log, and either `signal` with `delay` (seconds) or `batch` (number of the batch to be encoded,
from 1; `again` is a second signal, while a part is written after it), or `trap` with `count`, or
neither; `items_per_part` is 16 and `seconds_per_part` 1e9 unless given. The answer is a line with the
child's exit code (negative: the signal that ended it) and its seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "code"), str(ROOT)]

import transformers  # noqa: E402

from hsft.encoding import build_cache, parts  # noqa: E402
from hsft.encoding.item_llm import ItemEncoder  # noqa: E402
from hsft.inputs import cache_items  # noqa: E402
from hsft.utils.program import run_program  # noqa: E402
from item_caching import main  # noqa: E402

# Loaded lazily, which every child would do again.
WARM = (transformers.LlamaModel, transformers.PreTrainedTokenizerFast, transformers.AutoModel)


def die() -> None:
    """Die as by SIGKILL from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(count: int, act: Callable[..., object], plain: Callable[..., Any]) -> Any:
    """Return `plain`, with `act` in place of its call number `count` (from 1)."""
    calls = 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return act(*arguments, **named) if calls == count else plain(*arguments, **named)

    return called


def half_a_part(tensors: Any, path: Path, metadata: Any) -> None:
    """Write half of a part's file and die."""
    PLAIN_SAVE(tensors, path, metadata=metadata)
    os.truncate(path, path.stat().st_size // 2)
    die()


PLAIN_SAVE: Callable[..., None] = parts.save_file


def while_saving(number: int) -> Callable[..., None]:
    """Return the function that saves a part, and in which a signal comes."""

    def save(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), number)
        PLAIN_SAVE(*arguments, **named)

    return save


def some_blocks(*arguments: Any) -> None:
    """Write three blocks of the file and die."""
    *others, blocks = arguments

    def cut() -> Any:
        for number, block in enumerate(blocks):
            if number == 3:
                die()
            yield block

    PLAIN_WRITE(*others, cut())


PLAIN_WRITE: Callable[..., None] = build_cache.write_cache


def set_trap(name: str, count: int) -> None:
    """Make the child die at a certain place."""
    if name == "part":
        parts.save_file = on_call(count, half_a_part, parts.save_file)
    elif name == "file":
        build_cache.write_cache = on_call(1, some_blocks, build_cache.write_cache)
    elif name == "remove":
        cache_items.remove = on_call(1, lambda path: die(), cache_items.remove)
    else:
        raise ValueError(name)


def child(order: dict[str, Any]) -> int:
    """Run one order's command."""
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    build_cache.ITEMS_PER_PART = order.get("items_per_part", 16)
    build_cache.SECONDS_PER_PART = order.get("seconds_per_part", 1e9)
    plain = ItemEncoder.encode
    counter = Path(order["log"] + ".encoded")
    counter.write_text("")

    batches = 0

    def encode(self: ItemEncoder, tokens: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == order.get("batch"):
            if "again" in order:
                parts.save_file = while_saving(order["again"])
            os.kill(os.getpid(), order["signal"])
        with counter.open("a") as file:
            file.write(f"{len(tokens)}\n")
        return plain(self, tokens)

    ItemEncoder.encode = encode  # type: ignore[method-assign]
    if order.get("trap"):
        set_trap(order["trap"], order.get("count", 1))
    return run_program(main, order["argv"])


def serve() -> None:
    """Answer orders until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(order)
            finally:
                os._exit(code)
        if order.get("delay") is not None:
            time.sleep(order["delay"])
            os.kill(pid, order["signal"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {"code": code, "seconds": time.perf_counter() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()

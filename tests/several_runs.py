"""Runs several commands in the processes that torchrun started, one after the other.

A start of torch and transformers takes long, so the tests share one. Usage: torchrun ...
several_runs.py COMMANDS.json, a list of [program, arguments] with program `main` or `item_caching`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "code"), str(ROOT)]


def divide_everything() -> None:
    """Let ZeRO stage 3 divide the tests' small matrices too, which it would keep whole."""
    from hsft.trainer import zero

    plain = zero.zero_settings

    def settings(config: Any, device: str) -> dict[str, Any]:
        actual = plain(config, device)
        actual["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return actual

    zero.zero_settings = settings


def run_all(path: str) -> int:
    """Run the commands of a file until one fails; return its exit code."""
    from hsft.utils.program import run_program

    Path(f"process-{os.environ.get('RANK', '0')}.pid").write_text(str(os.getpid()))
    divide_everything()
    for program, arguments in json.loads(Path(path).read_text()):
        code = run_program(importlib.import_module(program).main, arguments)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1]))

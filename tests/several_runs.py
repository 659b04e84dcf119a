"""Runs several commands in the processes that torchrun started, one after the other.

A start of torch and transformers takes long, so the tests share one. Usage: torchrun ...
several_runs.py COMMANDS.json, a list of [program, arguments] with program `main` or `item_caching`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "code"), str(ROOT)]

from item_caching import main as cache_main  # noqa: E402
from main import main  # noqa: E402
from REC.utils.errors import run_program  # noqa: E402

PROGRAMS = {"main": main, "item_caching": cache_main}


def run_all(path: str) -> int:
    """Run the commands of a file until one fails; return its exit code."""
    for program, arguments in json.loads(Path(path).read_text()):
        code = run_program(PROGRAMS[program], arguments)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1]))

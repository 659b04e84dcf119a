"""Fetch an HLLM checkpoint and import its ItemLLM as a model folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from REC.model.checkpoint_import import run_import
from REC.utils.errors import run_program


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return run_import("item", argv, "model_checkpoints/ItemLLM_complete", __doc__ or "")


if __name__ == "__main__":
    sys.exit(run_program(main))

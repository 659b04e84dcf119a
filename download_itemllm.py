# PYTHON_ARGCOMPLETE_OK
"""Fetch HLLM's pretrained checkpoint and write its ItemLLM as a transformers model folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from hsft.hub.options import parse_options
from hsft.utils.errors import EXIT_OK
from hsft.utils.program import run_program


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    options = parse_options("item", argv, __doc__ or "")
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.inputs.import_hllm import import_checkpoint

    import_checkpoint(options)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

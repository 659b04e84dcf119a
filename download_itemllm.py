# PYTHON_ARGCOMPLETE_OK
"""Fetch HLLM's pretrained checkpoint and write its ItemLLM as a transformers model folder.

The same as `hsft download-itemllm`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("download-itemllm")

if __name__ == "__main__":
    sys.exit(run_program(main))

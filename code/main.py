# PYTHON_ARGCOMPLETE_OK
"""Evaluate or fine-tune the UserLLM, or a reference model, on cached item embeddings.

The same as `hsft train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("train")

if __name__ == "__main__":
    sys.exit(run_program(main))

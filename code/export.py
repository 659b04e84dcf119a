# PYTHON_ARGCOMPLETE_OK
"""Export a fine-tuned UserLLM: a plain model folder, or the adapter, with a model card.

The same as `hsft export`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("export")

if __name__ == "__main__":
    sys.exit(run_program(main))

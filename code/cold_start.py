# PYTHON_ARGCOMPLETE_OK
"""Measure how a finished run ranks items that were held out from its data.

The same as `hsft cold-start`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("cold-start")

if __name__ == "__main__":
    sys.exit(run_program(main))

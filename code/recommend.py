# PYTHON_ARGCOMPLETE_OK
"""Recommend items with a finished run: to a user, for a history, and new items too.

The same as `hsft recommend`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("recommend")

if __name__ == "__main__":
    sys.exit(run_program(main))

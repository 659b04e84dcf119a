# PYTHON_ARGCOMPLETE_OK
"""Print and save the table of several runs, with intervals and paired tests.

The same as `hsft compare`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("compare")

if __name__ == "__main__":
    sys.exit(run_program(main))

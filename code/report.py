# PYTHON_ARGCOMPLETE_OK
"""Write the report of one or more finished runs: one HTML page that needs nothing beside it.

The same as `hsft report`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("report")

if __name__ == "__main__":
    sys.exit(run_program(main))

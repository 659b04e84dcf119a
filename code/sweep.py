# PYTHON_ARGCOMPLETE_OK
"""Search configuration keys with Optuna, on the validation users only.

The same as `hsft sweep`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("sweep")

if __name__ == "__main__":
    sys.exit(run_program(main))

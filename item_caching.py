# PYTHON_ARGCOMPLETE_OK
"""Encode a dataset's items once with the ItemLLM and write the item cache.

The same as `hsft cache`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("cache")

if __name__ == "__main__":
    sys.exit(run_program(main))

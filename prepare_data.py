# PYTHON_ARGCOMPLETE_OK
"""Make HSFT's two files of a data set from PixelRec, Amazon Reviews or MovieLens as downloaded.

The same as `hsft prepare`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from hsft.cli import program
from hsft.utils.program import run_program

main = program("prepare")

if __name__ == "__main__":
    sys.exit(run_program(main))

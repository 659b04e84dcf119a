# PYTHON_ARGCOMPLETE_OK
"""Make HSFT's two files of a data set from PixelRec, Amazon Reviews or MovieLens as downloaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from REC.data.prepare.options import parse_options
from REC.utils.errors import EXIT_OK, run_program
from REC.utils.logs import set_up_logging


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    options = parse_options(argv, __doc__ or "")
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from REC.recipes.prepare_data import prepare

    set_up_logging()
    prepare(options)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

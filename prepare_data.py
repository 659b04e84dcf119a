# PYTHON_ARGCOMPLETE_OK
"""Make HSFT's two files of a data set from PixelRec, Amazon Reviews or MovieLens as downloaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))

from hsft.data.prepare.options import parse_options
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging
from hsft.utils.program import run_program


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    options = parse_options(argv, __doc__ or "")
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.inputs.prepare_data import prepare

    set_up_logging()
    prepare(options)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

"""`hsft prepare`: prepare_data.py."""

from __future__ import annotations

from collections.abc import Sequence

from hsft.data.prepare.options import parse_options
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    options = parse_options(argv)
    # Imported here, so that --help and a mistyped option need not wait for pandas.
    from hsft.inputs.prepare_data import prepare

    set_up_logging()
    prepare(options)
    return EXIT_OK

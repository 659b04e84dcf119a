"""`hsft sweep`: code/sweep.py."""

from __future__ import annotations

from collections.abc import Sequence

from hsft.config.options import Parser
from hsft.finished.sweep_plan import keys_help, read_plan
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging

EXAMPLES = ("sweep code/overall/sweep_example.yaml",)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("sweep", EXAMPLES, more=keys_help())
    parser.add_argument(
        "plan",
        metavar="SWEEP.yaml",
        help="what is searched; the same command again goes on where it was interrupted",
    )
    args = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.sweep import sweep

    set_up_logging()
    sweep(read_plan(args.plan))
    return EXIT_OK

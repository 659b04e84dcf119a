# PYTHON_ARGCOMPLETE_OK
"""Search configuration keys with Optuna, on the validation users only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.config.options import Parser
from hsft.finished.sweep_plan import keys_help, read_plan
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging
from hsft.utils.program import run_program

EXAMPLES = ("python code/sweep.py code/overall/sweep_example.yaml",)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("python code/sweep.py", f"{__doc__}\n\n{keys_help()}", EXAMPLES)
    parser.add_argument(
        "plan",
        metavar="SWEEP.yaml",
        help="what is searched; the same command again goes on where it was interrupted",
    )
    args = parser.parse_args(list(argv))
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.sweep import sweep

    set_up_logging()
    sweep(read_plan(args.plan))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

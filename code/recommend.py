"""Recommend items with a finished run: to a user, for a history, and new items too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from REC.config.options import Parser
from REC.recipes.recommend import add_options, run_recommend
from REC.utils.errors import EXIT_OK, run_program
from REC.utils.logs import set_up_logging

EXAMPLES = (
    "python code/recommend.py --run saved/Pixel200K-qlora --user 1001",
    "python code/recommend.py --run saved/Pixel200K-qlora --history 31,7,204 --topk 5 --json",
    "python code/recommend.py --run saved/Pixel200K-qlora --user 1001 --add_items new.csv",
    "python code/recommend.py --run saved/Pixel200K-qlora --serve 8000",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("python code/recommend.py", __doc__ or "", EXAMPLES)
    add_options(parser)
    options = parser.parse_args(argv)
    set_up_logging()
    run_recommend(options)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

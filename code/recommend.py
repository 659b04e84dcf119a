# PYTHON_ARGCOMPLETE_OK
"""Recommend items with a finished run: to a user, for a history, and new items too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.config.options import Parser, add_places, true_or_false
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging
from hsft.utils.program import run_program

EXAMPLES = (
    "python code/recommend.py --run saved/Pixel200K-qlora --user 1001",
    "python code/recommend.py --run saved/Pixel200K-qlora --history 31,7,204 --topk 5 --json",
    "python code/recommend.py --run saved/Pixel200K-qlora --user 1001 --add_items new.csv",
    "python code/recommend.py --run saved/Pixel200K-qlora --serve 8000",
    "python code/recommend.py --run runs/demo/ml-100k-qlora --user 42",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("python code/recommend.py", __doc__ or "", EXAMPLES)
    _add_options(parser)
    options = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.recommend import run_recommend

    set_up_logging()
    run_recommend(options)
    return EXIT_OK


def _add_options(parser: Parser) -> None:
    parser.add_argument("--run", metavar="RUN_DIR", required=True, help="folder that main.py made")
    parser.add_argument(
        "--user",
        metavar="ID",
        help="recommend to this user of the data, from all of the user's items, those included "
        "that were held out to evaluate the model",
    )
    parser.add_argument(
        "--history",
        metavar="ID,ID,...",
        help="recommend for these items, oldest first; ids are separated by commas",
    )
    parser.add_argument(
        "--topk", type=_positive, default=10, metavar="K", help="items to recommend (default: 10)"
    )
    parser.add_argument(
        "--exclude_seen",
        type=true_or_false,
        default=True,
        metavar="True|False",
        help="leave the history's items out (default: True)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="which of the run's models: untrained or fine-tuned (default: fine-tuned, where the "
        "run has one)",
    )
    parser.add_argument(
        "--add_items",
        metavar="FILE.csv",
        help="items that the data does not have, with the columns item_id and text_keys: they are "
        "encoded with the ItemLLM and recommended along with the others",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    page = parser.add_argument_group("a page to look at, instead of one answer")
    page.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="serve a local page on this port (0: a free one): put a history together or take a "
        "user's, and see the run's models side by side; Ctrl-C ends it",
    )
    page.add_argument(
        "--host",
        default="127.0.0.1",
        help="name or address to serve on (default: %(default)s, this machine only; there is no "
        "password)",
    )
    add_places(parser)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


if __name__ == "__main__":
    sys.exit(run_program(main))

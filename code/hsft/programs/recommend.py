"""`hsft recommend` and `hsft serve`: code/recommend.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hsft.config.options import Parser, add_flag, add_location_options
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging

EXAMPLES = (
    "recommend --run saved/Pixel200K-qlora --user 1001",
    "recommend --run saved/Pixel200K-qlora --history 31,7,204 --topk 5 --json",
    "recommend --run saved/Pixel200K-qlora --user 1001 --add_items new.csv",
    "recommend --run saved/Pixel200K-qlora --user 1001 --index saved/Pixel200K-qlora/export-embeddings",
    "recommend --run hf://me/Pixel200K-qlora --user 1001 --user_pretrain_dir UserLLM",
    "recommend --run saved/Pixel200K-qlora --serve 8000",
    "recommend --run runs/demo/ml-100k-qlora --user 42",
)
SERVE_EXAMPLES = (
    "serve --run saved/Pixel200K-qlora",
    "serve --run runs/demo/ml-100k-qlora --port 8000",
)

_RUN_HELP = "folder of a finished run, or hf://OWNER/NAME for one on the hub"


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("recommend", EXAMPLES)
    _add_run(parser)
    _add_options(parser)
    return _run(parser.parse_args(argv))


def serve(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("serve", SERVE_EXAMPLES)
    _add_run(parser)
    parser.add_argument(
        "--port",
        dest="serve",
        type=int,
        default=8000,
        metavar="PORT",
        help="port to serve on; 0 takes a free one (default: %(default)s)",
    )
    _add_host(parser)
    _add_shared(parser)
    add_location_options(parser)
    # The options of `recommend` that have no meaning here, as its parser leaves them.
    parser.set_defaults(user=None, history=None, model=None, predict_at=None)
    parser.set_defaults(json=False, exclude_seen=True)
    return _run(parser.parse_args(argv))


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.recommend import run_recommend

    set_up_logging()
    run_recommend(options)
    return EXIT_OK


def _add_run(parser: Parser) -> None:
    parser.add_argument("--run", metavar="RUN_DIR", required=True, help=_RUN_HELP)


def _add_options(parser: Parser) -> None:
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
    _add_shared(parser)
    add_flag(parser, "--exclude_seen", "leave the history's items out", default=True)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="which of the run's models: untrained or fine-tuned (default: fine-tuned, where the "
        "run has one)",
    )
    parser.add_argument(
        "--predict_at",
        metavar="TIME",
        help="when the recommendations are for, with a run of predict_at: target: a date in ISO 8601 "
        "(UTC without a zone) or a number as in the data's timestamps (default: now)",
    )
    add_flag(parser, "--json", "print JSON and nothing else")
    page = parser.add_argument_group("a page to look at, instead of one answer")
    page.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="serve a local page on this port (0: a free one): put a history together or take a "
        "user's, and see the run's models side by side; Ctrl-C ends it",
    )
    _add_host(page)
    add_location_options(parser)


def _add_shared(parser: Parser) -> None:
    parser.add_argument(
        "--topk", type=_positive, default=10, metavar="K", help="items to recommend (default: 10)"
    )
    parser.add_argument(
        "--add_items",
        metavar="FILE.csv",
        help="items that the data does not have, with the columns item_id and text_keys: they are "
        "encoded with the ItemLLM and recommended along with the others",
    )
    parser.add_argument(
        "--index",
        metavar="DIR",
        help="folder of export.py --format embeddings, whose FAISS index is searched instead of all "
        "items (default: exact search over all items)",
    )


def _add_host(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="name or address to serve on (default: %(default)s, this machine only; others need the "
        "key in HSFT_API_KEY)",
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value

"""The command line of prepare_data.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hsft.config.options import Parser, add_flag
from hsft.data.prepare.columns import ITEM, TEXTS, TIME, USER

_EXAMPLES = {
    "pixelrec": "--interactions Pixel200K.csv --items item_info/Pixel200K.csv",
    "amazon2014": "--reviews ratings_Books.csv --meta meta_Books.json.gz --name amazon_books --k_core 5",
    "amazon2023": "--reviews Books.jsonl.gz --meta meta_Books.jsonl.gz --k_core 5",
    "movielens": "--folder ml-1m.zip",
    "hold-out": "--dataset Pixel200K --share 0.1",
}


class _SubParser(Parser):
    """A sub-command's parser, as argparse constructs it."""

    def __init__(self, prog: str, summary: str, example: str, **_: Any) -> None:
        super().__init__("prepare", [f"prepare {example}"], prog=prog, summary=summary)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `format` is the sub-command.

    Raises:
        InputError: an option is missing, unknown or has a value that it cannot have.
    """
    parser = Parser("prepare", [f"prepare {name} {words}" for name, words in _EXAMPLES.items()])
    kinds = parser.add_subparsers(
        dest="format", required=True, metavar="FORMAT", parser_class=_SubParser
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        example = f"{name} {_EXAMPLES[name]}"
        return kinds.add_parser(name, help=text, summary=text, example=example)

    pixelrec = add("pixelrec", "PixelRec's CSV files: Pixel200K, Pixel1M, Pixel8M")
    columns = {"item_id": ITEM, "user_id": USER, "timestamp": TIME}
    _file(
        pixelrec,
        "--interactions",
        f"interactions: below a header line with {_columns(columns)}, among others, in any order "
        f"and case, separated by commas, tabs or semicolons; or ordered lists without a header "
        f"line: the user, a tab, and the items from the oldest on, separated by blanks",
    )
    _file(
        pixelrec,
        "--items",
        f"item information: below a header line with {_columns({'item_id': ITEM})}, and with at "
        f"least one of {_columns(TEXTS)}",
    )
    old = add("amazon2014", "Amazon Reviews of 2014")
    _file(old, "--reviews", "ratings_X.csv, reviews_X.json.gz or reviews_X_5.json.gz")
    _file(old, "--meta", "meta_X.json.gz")
    add_flag(
        old, "--item_first", "ratings are item,user,rating,timestamp, as in the edition of 2018"
    )
    new = add("amazon2023", "Amazon Reviews of 2023")
    _file(new, "--reviews", "X.jsonl, X.jsonl.gz, or the benchmark's X.csv or X.csv.gz")
    _file(new, "--meta", "meta_X.jsonl or meta_X.jsonl.gz")
    films = add("movielens", "MovieLens: 100K, 1M, 10M, 20M, 25M, 32M and the latest ones")
    films.add_argument(
        "--folder", required=True, help="the unpacked folder, or the zip archive as downloaded"
    )
    for kind in (pixelrec, old, new, films):
        _filters(kind)
    for kind in (old, new, films):
        kind.add_argument(
            "--min_rating",
            metavar="RATING",
            type=_number,
            help="leave out interactions with a lower rating (default: none)",
        )
    held = add("hold-out", "a copy of a prepared data set without a share of its items")
    held.add_argument("--dataset", required=True, metavar="NAME", help="the data set to copy")
    held.add_argument(
        "--share", type=float, default=0.1, help="share of the items (default: %(default)s)"
    )
    held.add_argument(
        "--seed", type=_count, default=2020, help="seed of the draw (default: %(default)s)"
    )
    for kind in (pixelrec, old, new, films):
        _output(kind, "after its files")
    _output(held, "NAME-warm")
    return parser.parse_args(argv)


def _file(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, required=True, metavar="FILE", help=f"{text}; plain or gzip")


def _columns(names: Mapping[str, Sequence[str]]) -> str:
    """Write columns with their other names: `title (or item_title), tag (or tags)`."""
    return ", ".join(
        f"{column} (or {', '.join(name for name in known if name != column)})"
        for column, known in names.items()
    )


def _filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is left out (default: exact repeats only)")
    group.add_argument(
        "--k_core",
        metavar="N",
        type=_count,
        default=0,
        help="take out users and items with fewer than N interactions, in turns until none is left "
        "(default: %(default)s, none)",
    )
    group.add_argument(
        "--min_history",
        metavar="N",
        type=_count,
        default=0,
        help="take out users with fewer than N interactions (default: %(default)s, none)",
    )
    add_flag(
        group, "--keep_repeats", "keep rows that repeat an earlier row's user, item and timestamp"
    )


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("what is written")
    group.add_argument("--name", help=f"name of the data set (default: {name})")
    group.add_argument(
        "--data_path",
        metavar="DIR",
        default="dataset",
        help="folder of the interactions (default: %(default)s)",
    )
    group.add_argument(
        "--text_path",
        metavar="DIR",
        default="information",
        help="folder of the item information (default: %(default)s)",
    )
    add_flag(group, "--overwrite", "replace files that are there")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value

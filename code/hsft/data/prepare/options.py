"""The command line of prepare_data.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hsft.config.options import Parser, add_flag
from hsft.data.prepare.columns import ITEM, TEXTS, TIME, USER
from hsft.data.prepare.dates import parse_date


@dataclass(frozen=True)
class _Format:
    """A sub-command.

    Attributes:
        summary: what it reads.
        example: options that it may be called with.
        add_files: adds the options that name its files.
        has_ratings: whether `--min_rating` applies.
        has_filters: whether the options of what is left out apply.
    """

    summary: str
    example: str
    add_files: Callable[[argparse.ArgumentParser], None]
    has_ratings: bool = True
    has_filters: bool = True


class _SubParser(Parser):
    """A sub-command's parser, as argparse constructs it."""

    def __init__(self, prog: str, summary: str, example: str, **_: Any) -> None:
        super().__init__("prepare", [f"prepare {example}"], prog=prog, summary=summary)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `format` is the sub-command.

    Raises:
        InputError: an option is missing, unknown or has a value that it cannot have.
    """
    commands = {**_FORMATS, "hold-out": _HOLD_OUT}
    examples = [f"prepare {name} {command.example}" for name, command in commands.items()]
    parser = Parser("prepare", examples)
    kinds = parser.add_subparsers(
        dest="format", required=True, metavar="FORMAT", parser_class=_SubParser
    )
    for name, command in commands.items():
        kind = kinds.add_parser(
            name,
            help=command.summary,
            summary=command.summary,
            example=f"{name} {command.example}",
        )
        command.add_files(kind)
        if name in _FORMATS:
            if command.has_filters:
                _add_filters(kind, command.has_ratings)
            else:
                kind.set_defaults(k_core=0, min_history=0, since=None, keep_repeats=True)
            _add_output(kind, "after its files")
        else:
            _add_output(kind, "NAME-warm")
    return parser.parse_args(argv)


def _pixelrec(parser: argparse.ArgumentParser) -> None:
    columns = {"item_id": ITEM, "user_id": USER, "timestamp": TIME}
    _file(
        parser,
        "--interactions",
        f"interactions: below a header line with {_columns(columns)}, among others, in any order "
        f"and case, separated by commas, tabs or semicolons; or ordered lists without a header "
        f"line: the user, a tab, and the items from the oldest on, separated by blanks",
    )
    _file(
        parser,
        "--items",
        f"item information: below a header line with {_columns({'item_id': ITEM})}, and with at "
        f"least one of {_columns(TEXTS)}",
    )


def _amazon2014(parser: argparse.ArgumentParser) -> None:
    _file(parser, "--reviews", "ratings_X.csv, reviews_X.json.gz or reviews_X_5.json.gz")
    _file(parser, "--meta", "meta_X.json.gz")
    add_flag(
        parser, "--item_first", "ratings are item,user,rating,timestamp, as in the edition of 2018"
    )


def _hllm_books(parser: argparse.ArgumentParser) -> None:
    _file(parser, "--reviews", "ratings_Books.csv")
    _file(parser, "--meta", "meta_Books.json or meta_Books.json.gz")


def _amazon2023(parser: argparse.ArgumentParser) -> None:
    _file(parser, "--reviews", "X.jsonl, X.jsonl.gz, or the benchmark's X.csv or X.csv.gz")
    _file(parser, "--meta", "meta_X.jsonl or meta_X.jsonl.gz")


def _movielens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", required=True, help="the unpacked folder, or the zip archive as downloaded"
    )


def _recbole(parser: argparse.ArgumentParser) -> None:
    _file(parser, "--inter", "interactions with user_id, item_id and timestamp, as name:type")
    _file(parser, "--item", "item information with item_id")
    for text in TEXTS:
        parser.add_argument(
            f"--{text}", metavar="COLUMN", help=f"column of the {text} (default: by its name)"
        )


def _hold_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, metavar="NAME", help="the data set to copy")
    parser.add_argument(
        "--share", type=float, default=0.1, help="share of the items (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=_count, default=2020, help="seed of the draw (default: %(default)s)"
    )


_FORMATS = {
    "pixelrec": _Format(
        "PixelRec's CSV files: Pixel200K, Pixel1M, Pixel8M",
        "--interactions Pixel200K.csv --items item_info/Pixel200K.csv",
        _pixelrec,
        has_ratings=False,
    ),
    "amazon2014": _Format(
        "Amazon Reviews of 2014",
        "--reviews ratings_Books.csv --meta meta_Books.json.gz --name amazon_books --k_core 5",
        _amazon2014,
    ),
    "amazon2023": _Format(
        "Amazon Reviews of 2023",
        "--reviews Books.jsonl.gz --meta meta_Books.jsonl.gz --k_core 5",
        _amazon2023,
    ),
    "hllm-books": _Format(
        "Amazon Books of 2014, filtered as in HLLM's paper: users and items with fewer than 5 "
        "interactions are left out, counted once",
        "--reviews ratings_Books.csv --meta meta_Books.json.gz",
        _hllm_books,
        has_ratings=False,
        has_filters=False,
    ),
    "movielens": _Format(
        "MovieLens: 100K, 1M, 10M, 20M, 25M, 32M and the latest ones",
        "--folder ml-1m.zip",
        _movielens,
    ),
    "recbole": _Format(
        "RecBole's atomic files, X.inter and X.item",
        "--inter ml-100k.inter --item ml-100k.item",
        _recbole,
    ),
}
_HOLD_OUT = _Format(
    "a copy of a prepared data set without a share of its items",
    "--dataset Pixel200K --share 0.1",
    _hold_out,
)


def _file(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, required=True, metavar="FILE", help=f"{text}; plain or gzip")


def _columns(names: Mapping[str, Sequence[str]]) -> str:
    """Write columns with their other names: `title (or item_title), tag (or tags)`."""
    return ", ".join(
        f"{column} (or {', '.join(name for name in known if name != column)})"
        for column, known in names.items()
    )


def _add_filters(parser: argparse.ArgumentParser, has_ratings: bool) -> None:
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
    group.add_argument(
        "--since",
        metavar="DATE",
        type=_date,
        help="leave out interactions before this date, for example 1996-05-01, in UTC (default: none)",
    )
    add_flag(
        group, "--keep_repeats", "keep rows that repeat an earlier row's user, item and timestamp"
    )
    if has_ratings:
        group.add_argument(
            "--min_rating",
            metavar="RATING",
            type=_number,
            help="leave out interactions with a lower rating (default: none)",
        )


def _add_output(parser: argparse.ArgumentParser, name: str) -> None:
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
    group.add_argument(
        "--files",
        choices=("csv", "parquet"),
        default="csv",
        help="format of both files; parquet needs pyarrow, and every program reads either "
        "(default: %(default)s)",
    )
    add_flag(group, "--overwrite", "replace files that are there")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _date(text: str) -> datetime:
    try:
        return parse_date(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no date such as 1996-05-01") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value

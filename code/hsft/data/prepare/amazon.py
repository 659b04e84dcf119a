"""Amazon Reviews of 2014 and of 2023.

2014: `ratings_X.csv` without a header line, `user,item,rating,timestamp`, or `reviews_X.json.gz`; and
`meta_X.json.gz`, whose lines are Python literals rather than JSON. 2023: `X.jsonl` or the benchmark's
`X.csv`, and `meta_X.jsonl`; items are parents of variants, and time is in milliseconds.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hsft.data.csv_rows import RowProblems, refuse_other_separator
from hsft.data.prepare.rows import Download, Event, Item, joined, plain_text
from hsft.data.prepare.sources import Source, wrong_width
from hsft.utils.errors import InputError, one_line

_PREFIX = re.compile(r"(ratings|reviews|meta)_")
_ROWS_LOOKED_AT = 200
_ASIN_LENGTH = 10
_HLLM_INTERACTIONS = 5
_DOUBT = "check that both files are of one category and edition"

# Names of the fields: item, user, timestamp, rating.
_FIELDS_2014 = (("asin",), ("reviewerID",), ("unixReviewTime",), ("overall",))
_FIELDS_2023 = (("parent_asin",), ("user_id",), ("timestamp", "sort_timestamp"), ("rating",))
_COLUMNS_2023 = ("user_id", "parent_asin", "rating", "timestamp")

Parse = Callable[[str], Any]


def amazon2014(reviews: Path, meta: Path, item_first: bool = False) -> Download:
    """Describe a download of 2014: `ratings_X.csv` or `reviews_X[_5].json[.gz]`, and `meta_X.json[.gz]`.

    Args:
        reviews: ratings or reviews.
        meta: the metadata.
        item_first: ratings are `item,user,rating,timestamp`, as in the edition of 2018.

    Raises:
        InputError: a file is missing, or ratings begin with a header line, or the order of their
            columns looks like the other one.
    """
    source = Source(reviews)
    first = source.first_line()
    doubt = _DOUBT
    if first.startswith("{"):
        events = partial(_json_events, parse=_json_or_literal, fields=_FIELDS_2014)
    else:
        _refuse_header(source, first)
        columns = "user,item: leave out" if item_first else "item,user: add"
        doubt = f"are the columns {columns} --item_first? Or {_DOUBT}"
        _check_order(source, item_first)
        events = partial(_rating_events, item_first=item_first)
    return Download(
        name=f"amazon2014_{_category(reviews)}",
        interactions=source,
        items=Source(meta),
        events=events,
        described=partial(_items, parse=_json_or_literal, key="asin"),
        doubt=doubt,
    )


def hllm_books(ratings: Path, meta: Path) -> Download:
    """Describe Amazon Books of 2014 as HLLM (arXiv 2409.12740) prepares it: `amazon_books`.

    Users and items need 5 interactions, which are counted once; rows that repeat others stay. Item
    information is title and description.

    Args:
        ratings: `ratings_Books.csv`.
        meta: `meta_Books.json[.gz]`.

    Raises:
        InputError: as `amazon2014`.
    """
    download = amazon2014(ratings, meta)
    described = download.described

    def untagged(source: Source, problems: RowProblems) -> Iterator[Item]:
        return (item._replace(tag="") for item in described(source, problems))

    return replace(
        download,
        name="amazon_books",
        described=untagged,
        has_ratings=False,
        once_filtered=_HLLM_INTERACTIONS,
    )


def amazon2023(reviews: Path, meta: Path) -> Download:
    """Describe a download of 2023: `X.jsonl[.gz]` or `X.csv[.gz]`, and `meta_X.jsonl[.gz]`.

    Raises:
        InputError: a file is missing, or a CSV file's first line does not name the columns.
    """
    source = Source(reviews)
    first = source.first_line()
    events: Callable[[Source, RowProblems], Iterator[Event]]
    if first.startswith("{"):
        events = partial(_json_events, parse=json.loads, fields=_FIELDS_2023)
    else:
        missing = [name for name in _COLUMNS_2023 if name not in first.split(",")]
        if missing:
            refuse_other_separator(source.shown, first, missing[0])
            raise InputError(
                f"{reviews} lacks the column {missing[0]}: its first line is "
                f"'{one_line(first, 120)}', it must name {','.join(_COLUMNS_2023)}; check that it is "
                f"a file of the edition of 2023."
            )
        events = _csv_events_2023
    return Download(
        name=f"amazon2023_{_category(reviews)}",
        interactions=source,
        items=Source(meta),
        events=events,
        described=partial(_items, parse=json.loads, key="parent_asin"),
        doubt=_DOUBT,
    )


def _category(path: Path) -> str:
    """Return `Books` for `ratings_Books.csv`, `reviews_Books_5.json.gz` or `Books.jsonl`."""
    return _PREFIX.sub("", path.name.partition(".")[0]).removesuffix("_5")


def _refuse_header(source: Source, first: str) -> None:
    """Refuse ratings that begin with names: a row of ratings has digits, at least in its timestamp."""
    names = [cell.strip() for cell in first.split(",")]
    if len(names) == 1 or any(map(str.isdigit, first)):
        return
    if set(names).issuperset(_COLUMNS_2023):
        remedy = "files with this header are of the edition of 2023: prepare_data.py amazon2023"
    else:
        remedy = "remove the line"
    raise InputError(
        f"{source.shown}, row 1: looks like a header line ('{one_line(first, 120)}'), which ratings "
        f"of the edition of 2014 do not have; {remedy}."
    )


def _check_order(source: Source, item_first: bool) -> None:
    """Refuse ratings whose items stand where users should: an ASIN has 10 characters, a user more."""
    users = items = 0
    for row, cells in source.csv_rows():
        if len(cells) == 4:
            first, second = (cells[1], cells[0]) if item_first else (cells[0], cells[1])
            users += len(first) == _ASIN_LENGTH
            items += len(second) == _ASIN_LENGTH
        if row >= _ROWS_LOOKED_AT:
            break
    if users and not items:
        given, other = ("item", "user") if item_first else ("user", "item")
        remedy = "leave out --item_first" if item_first else "add --item_first"
        raise InputError(
            f"{source.shown} looks as if its rows were {other},{given},rating,timestamp rather than "
            f"{given},{other},rating,timestamp; {remedy}."
        )


def _rating_events(source: Source, problems: RowProblems, item_first: bool) -> Iterator[Event]:
    item, user = (0, 1) if item_first else (1, 0)
    for row, cells in source.csv_rows("reading interactions"):
        if len(cells) == 4:
            yield Event(row, cells[item], cells[user], cells[3], cells[2])
        else:
            wrong_width(problems, row, len(cells), 4)


def _csv_events_2023(source: Source, problems: RowProblems) -> Iterator[Event]:
    rows = source.csv_rows("reading interactions")
    _, header = next(rows)
    user, item, rating, time = (header.index(name) for name in _COLUMNS_2023)
    for row, cells in rows:
        if len(cells) == len(header):
            yield Event(row, cells[item], cells[user], cells[time], cells[rating])
        else:
            wrong_width(problems, row, len(cells), len(header))


def _json_events(
    source: Source, problems: RowProblems, parse: Parse, fields: tuple[tuple[str, ...], ...]
) -> Iterator[Event]:
    for row, record in _records(source, "reading interactions", problems, parse):
        values = [next((record[k] for k in names if k in record), None) for names in fields]
        lacking = next(
            (
                names[0]
                for names, value in zip(fields[:3], values, strict=False)
                if not _scalar(value)
            ),
            None,
        )
        if lacking is None:
            item, user, time, rating = ("" if value is None else str(value) for value in values)
            yield Event(row, item, user, time, rating)
        else:
            problems.add(f"lacks {lacking}", row, f"lacks the field {lacking}")


def _items(source: Source, problems: RowProblems, parse: Parse, key: str) -> Iterator[Item]:
    for row, record in _records(source, "reading items", problems, parse):
        if not _scalar(record.get(key)):
            problems.add(f"lacks {key}", row, f"lacks the field {key}")
            continue
        # `category` and `feature` are the names in the edition of 2018.
        tags = _strings(record.get("categories") or record.get("category"))
        texts = [
            *_strings(record.get("description")),
            *_strings(record.get("features") or record.get("feature")),
        ]
        yield Item(
            row,
            str(record[key]),
            joined(_strings(record.get("title")), " "),
            joined([*_strings(record.get("main_category")), *tags], ", "),
            joined(texts, " "),
        )


def _scalar(value: object) -> bool:
    return isinstance(value, str | int | float)


def _records(
    source: Source, task: str, problems: RowProblems, parse: Parse
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield a file's objects, one a line."""
    for row, line in source.text_lines(task):
        if line.isspace():
            continue
        try:
            record = parse(line)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            record = None
        if isinstance(record, dict):
            yield row, record
        else:
            shown = one_line(line.strip(), 40)
            problems.add("record", row, f"'{shown}' is not a complete JSON object")


def _json_or_literal(line: str) -> Any:
    """Parse JSON or a literal of Python, which is what the metadata of 2014 are; nothing is run."""
    try:
        return json.loads(line)
    except ValueError:
        pass
    with warnings.catch_warnings():
        # Backslashes in descriptions; Python 3.11 says it with a DeprecationWarning.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.literal_eval(line.strip())


def _strings(value: object) -> list[str]:
    """Return the texts in a field: a text, a list of them, or a list of lists."""
    if isinstance(value, str):
        return [plain_text(value)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return []

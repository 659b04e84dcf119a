"""PixelRec's downloads: CSV files of interactions and of item information.

Interactions are `item_id,user_id,timestamp`. Columns may stand in any order, among others such as a
table's index, have one of the names in `columns.py`, and be separated by tabs or semicolons. A file of
ordered lists, `user<TAB>item item ...` as in the group's later data sets, is read too: an item's place
in its list is its timestamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hsft.data.csv_rows import RowProblems, refuse_other_separator
from hsft.data.prepare.columns import ITEM, TEXTS, TIME, USER
from hsft.data.prepare.rows import Download, Event, Item, plain_text
from hsft.data.prepare.sources import Source, wrong_width
from hsft.utils.errors import InputError, one_line

_DELIMITERS = ",\t;"
_INTERACTIONS = {"item_id": ITEM, "user_id": USER, "timestamp": TIME}


def pixelrec(interactions: Path, items: Path) -> Download:
    """Describe a PixelRec download.

    Raises:
        InputError: a file is missing, or its first line does not name the columns needed.
    """
    events, described = Source(interactions), Source(items)
    first = events.first_line()
    lists = _is_lists(first)
    if not lists:
        _positions(events, first, _INTERACTIONS)
    _item_positions(described, described.first_line())
    return Download(
        name=interactions.name.partition(".")[0],
        interactions=events,
        items=described,
        events=_list_events if lists else _events,
        described=_items,
        has_ratings=False,
        note=f"{interactions} holds ordered lists: timestamps are positions in them."
        if lists
        else "",
    )


def _is_lists(first: str) -> bool:
    user, tab, items = first.partition("\t")
    return bool(tab and user.strip() and len(items.split()) > 1 and "\t" not in items)


def _delimiter(first: str) -> str:
    return next((character for character in _DELIMITERS if character in first), ",")


def _cells(first: str) -> list[str]:
    return [cell.strip().strip('"').lower() for cell in first.split(_delimiter(first))]


def _positions(source: Source, first: str, columns: Mapping[str, Sequence[str]]) -> list[int]:
    """Return each columns column's position in the first line, -1 where it is missing."""
    header = _cells(first)
    positions = []
    for column, names in columns.items():
        matching = [position for position, cell in enumerate(header) if cell in names]
        if len(matching) > 1:
            raise InputError(f"{source.shown} names the column {column} twice; remove one of them.")
        if not matching and column not in TEXTS:
            if ":token" in first:
                raise InputError(
                    f"{source.shown} is an atomic file of RecBole; use prepare_data.py recbole."
                )
            for name in names:
                refuse_other_separator(source.shown, first, name, _DELIMITERS)
            raise InputError(
                f"{source.shown} lacks the column {column}: its first line is "
                f"'{one_line(first, 120)}', it must name {','.join(columns)}; check that it is the "
                f"right file."
            )
        positions.extend(matching or [-1])
    return positions


def _item_positions(source: Source, first: str) -> list[int]:
    positions = _positions(source, first, {"item_id": ITEM, **TEXTS})
    if positions[1:] == [-1] * len(TEXTS):
        raise InputError(
            f"{source.shown} has none of the columns {', '.join(TEXTS)}: its first line is "
            f"'{one_line(first, 120)}'; check that it is the item information."
        )
    return positions


def _events(source: Source, problems: RowProblems) -> Iterator[Event]:
    first = source.first_line()
    item, user, time = _positions(source, first, _INTERACTIONS)
    width = len(_cells(first))
    rows = source.csv_rows("reading interactions", _delimiter(first))
    next(rows)
    for row, cells in rows:
        if len(cells) == width:
            yield Event(row, cells[item], cells[user], cells[time], "")
        else:
            wrong_width(problems, row, len(cells), width)


def _list_events(source: Source, problems: RowProblems) -> Iterator[Event]:
    for row, cells in source.split_rows("reading interactions", "\t"):
        if len(cells) != 2:
            wrong_width(problems, row, len(cells), 2)
            continue
        for step, item in enumerate(cells[1].split(), start=1):
            yield Event(row, item, cells[0], str(step), "")


def _items(source: Source, problems: RowProblems) -> Iterator[Item]:
    first = source.first_line()
    item, *texts = _item_positions(source, first)
    width = len(_cells(first))
    rows = source.csv_rows("reading items", _delimiter(first))
    next(rows)
    for row, cells in rows:
        if len(cells) != width:
            wrong_width(problems, row, len(cells), width)
            continue
        title, tag, description = (plain_text(cells[at]) if at >= 0 else "" for at in texts)
        yield Item(row, cells[item], title, tag, description)

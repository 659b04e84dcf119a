"""RecBole's atomic files: tables separated by tabs, whose header line names `column:type`.

`X.inter` has the interactions, `X.item` the item information. Names of columns differ from data set
to data set; types are `token`, `token_seq`, `float` and `float_seq`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from hsft.data.csv_rows import RowProblems
from hsft.data.prepare.columns import ITEM, TEXTS, TIME, USER
from hsft.data.prepare.rows import Download, Event, Item, plain_text
from hsft.data.prepare.sources import Source, wrong_width
from hsft.utils.errors import InputError, one_line

_TYPES = ("token", "token_seq", "float", "float_seq")
_TAB = "\t"
# What a column's name is or ends with, the likeliest first.
_ENDINGS = {
    "title": ("title", "name"),
    "tag": ("genre", "genres", "category", "categories", "class", "tag", "tags"),
    "description": ("description", "desc", "overview", "summary", "abstract"),
}


def recbole(interactions: Path, items: Path, texts: Mapping[str, str | None]) -> Download:
    """Describe atomic files.

    Args:
        interactions: the `.inter` file.
        items: the `.item` file.
        texts: `title`, `tag` and `description` -> the column to take it from; None looks for one
            by its name.

    Raises:
        InputError: a file is missing, has another header line, or lacks a column.
    """
    events, described = Source(interactions), Source(items)
    header = _names(events)
    columns = {"user_id": USER, "item_id": ITEM, "timestamp": TIME}
    positions = {name: _position(events, header, name, known) for name, known in columns.items()}
    if "rating" in header:
        positions["rating"] = header.index("rating")
    item_header = _names(described)
    item_position = _position(described, item_header, "item_id", ITEM)
    taken = _text_columns(described, item_header, texts)
    unused = [
        name
        for name in item_header
        if name not in taken.values() and name != item_header[item_position]
    ]
    note = ", ".join(f"{text} from {name}" for text, name in taken.items())
    return Download(
        name=interactions.name.partition(".")[0],
        interactions=events,
        items=described,
        events=partial(_events, positions=positions),
        described=partial(
            _items,
            item=item_position,
            texts={text: item_header.index(name) for text, name in taken.items()},
        ),
        has_ratings="rating" in positions,
        note=f"{items}: {note}; not used: {', '.join(unused) or 'none'}.",
    )


def _names(source: Source) -> list[str]:
    """Return the columns of a header line `name:type<TAB>name:type`, in lower case."""
    first = source.first_line()
    cells = first.split(_TAB)
    names = []
    for cell in cells:
        name, colon, kind = cell.strip().partition(":")
        if not (colon and name and kind in _TYPES):
            raise InputError(
                f"{source.shown}: its first line is '{one_line(first, 120)}', which must name columns "
                f"as name:type, separated by tabs, with the types {', '.join(_TYPES)}; check that it "
                f"is an atomic file of RecBole."
            )
        names.append(name.lower())
    return names


def _position(source: Source, header: Sequence[str], column: str, known: Sequence[str]) -> int:
    positions = [position for position, name in enumerate(header) if name in known]
    if len(positions) == 1:
        return positions[0]
    wrong = f"names the column {column} twice" if positions else f"lacks the column {column}"
    raise InputError(
        f"{source.shown} {wrong}: its first line names {', '.join(header)}; rename the column that "
        f"is meant to {column} and others away from {', '.join(known)}."
    )


def _text_columns(
    source: Source, header: Sequence[str], texts: Mapping[str, str | None]
) -> dict[str, str]:
    """Return the column of each text that there is."""
    taken: dict[str, str] = {}
    for text in TEXTS:
        given = texts.get(text)
        if given is not None and given.lower() not in header:
            raise InputError(
                f"{source.shown} lacks the column {given} of --{text}; it has {', '.join(header)}."
            )
        likely = (
            name
            for ending in _ENDINGS[text]
            for name in header
            if name == ending or name.endswith(f"_{ending}")
        )
        name = given.lower() if given is not None else next(likely, None)
        if name is not None:
            taken[text] = name
    if not taken:
        raise InputError(
            f"{source.shown} has no column whose name says that it is a title, tag or description; it "
            f"has {', '.join(header)}: name one with --title, --tag or --description."
        )
    return taken


def _events(source: Source, problems: RowProblems, positions: Mapping[str, int]) -> Iterator[Event]:
    width = len(_names(source))
    rating = positions.get("rating")
    rows = source.split_rows("reading interactions", _TAB)
    next(rows)
    for row, cells in rows:
        if len(cells) == width:
            item, user, time = (positions[name] for name in ("item_id", "user_id", "timestamp"))
            given = "" if rating is None else cells[rating]
            yield Event(row, cells[item], cells[user], cells[time], given)
        else:
            wrong_width(problems, row, len(cells), width)


def _items(
    source: Source, problems: RowProblems, item: int, texts: Mapping[str, int]
) -> Iterator[Item]:
    width = len(_names(source))
    rows = source.split_rows("reading items", _TAB)
    next(rows)
    for row, cells in rows:
        if len(cells) != width:
            wrong_width(problems, row, len(cells), width)
            continue
        written = {text: plain_text(_unquoted(cells[position])) for text, position in texts.items()}
        yield Item(row, cells[item], *(written.get(text, "") for text in TEXTS))


def _unquoted(cell: str) -> str:
    """Return a cell without the quotes that pandas puts around one with a quote in it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        inside = cell[1:-1].replace('""', "")
        if '"' not in inside:
            return cell[1:-1].replace('""', '"')
    return cell

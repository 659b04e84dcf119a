"""What every format's module gives: a stream of events and a stream of described items."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hsft.data.csv_rows import RowProblems
from hsft.data.prepare.sources import Source

# What no text of an item needs and a CSV reader may refuse: control characters but for blanks.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")


class Event(NamedTuple):
    """One interaction, as text: line of the file, ids, timestamp, and rating or ''."""

    row: int
    item: str
    user: str
    timestamp: str
    rating: str


class Item(NamedTuple):
    """One described item: line of the file, id and texts; a text that is not there is ''."""

    row: int
    item: str
    title: str
    tag: str
    description: str


@dataclass(frozen=True)
class Download:
    """A data set as downloaded.

    Attributes:
        name: what to call the data set.
        interactions: file of the interactions.
        items: file of the item information.
        events: reads the former; a bad row is booked in the second argument and left out.
        described: reads the latter, likewise.
        has_ratings: whether events carry a rating.
        once_filtered: users and items with fewer interactions are left out, as counted once before
            any is; 0: none.
        note: a sentence about the data that the user should know, or ''.
        doubt: what to check when none of the interactions' items is described.
    """

    name: str
    interactions: Source
    items: Source
    events: Callable[[Source, RowProblems], Iterator[Event]]
    described: Callable[[Source, RowProblems], Iterator[Item]]
    has_ratings: bool = True
    once_filtered: int = 0
    note: str = ""
    doubt: str = "check that the two files are of one data set"


def plain_text(text: str) -> str:
    """Write an item's text on one line of valid Unicode; nothing else is changed.

    Blanks and line breaks become single spaces, control characters go, and halves of surrogate
    pairs, which JSON can hold and UTF-8 cannot, become question marks.
    """
    line = " ".join(_CONTROL.sub("", text).split())
    return line if line.isascii() else line.encode("utf-8", "replace").decode("utf-8")


def joined(values: Sequence[str], separator: str) -> str:
    """Join the values that are not empty, each once, in their order."""
    return separator.join(dict.fromkeys(filter(None, values)))

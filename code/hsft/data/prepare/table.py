"""Interactions by the million as three columns of numbers, and what is left out of them."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from hsft.data.column_checks import check_ids, sentences
from hsft.data.csv_rows import RowProblems, all_ids_sound, id_problem
from hsft.data.prepare.rows import Event
from hsft.data.prepare.times import TimeColumn
from hsft.data.time_checks import check_times
from hsft.utils.errors import InputError, one_line, refuse

log = logging.getLogger(__name__)

# Events that are text in memory at a time.
BATCH = 1 << 14


@dataclass(frozen=True)
class Table:
    """Interactions in the order of their file.

    Attributes:
        item_ids: the ids of items by number, those without interactions included.
        user_ids: likewise of users.
        items: int32 [N], an item's number.
        users: int32 [N], a user's number.
        timestamps: int64 [N].
    """

    item_ids: list[str]
    user_ids: list[str]
    items: np.ndarray
    users: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def keep(self, rows: np.ndarray) -> Table:
        """Return the rows where bool [N] is True; ids keep their numbers."""
        return replace(
            self,
            items=self.items[rows],
            users=self.users[rows],
            timestamps=self.timestamps[rows],
        )

    def kept_items(self) -> set[str]:
        """Return the ids of the items that have interactions."""
        return {self.item_ids[number] for number in np.unique(self.items).tolist()}


class _Ids:
    """Numbers ids by first appearance. Blanks around an id are not part of it.

    Args:
        name: what to call an id in messages.
        problems: where unusable ids are booked.
    """

    def __init__(self, name: str, problems: RowProblems) -> None:
        self.numbers: dict[str, int] = {}
        self._name, self._problems = name, problems

    def codes(self, column: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """Return the numbers of a column's ids: int32 [n].

        Args:
            column: str [n].
            rows: their lines in the file.
        """
        here, distinct = pd.factorize(column)
        known = self.numbers
        before = len(known)
        codes = [known.setdefault(text.strip(), len(known)) for text in distinct]
        if not all_ids_sound(list(islice(reversed(known), len(known) - before))):
            self._book(column, rows)
        return np.array(codes, dtype=np.int32)[here]

    def _book(self, column: np.ndarray, rows: Sequence[int]) -> None:
        for row, text in zip(rows, column, strict=True):
            problem = id_problem(text.strip())
            if problem is not None:
                kind = f"{self._name}{problem.rpartition(chr(39))[2]}"
                self._problems.add(kind, row, f"{self._name} {problem}")
                # It is new again in the next batch, so that all its rows are counted.
                self.numbers.pop(text.strip(), None)


def read_events(
    events: Iterable[Event], problems: RowProblems, min_rating: float | None = None
) -> tuple[Table, int]:
    """Read a stream of events; memory holds ids, 16 bytes an event, and one batch of texts.

    Args:
        events: what a format's module yields.
        problems: where its bad rows, and those seen here, are added.
        min_rating: events with a lower rating are left out.

    Returns:
        The interactions, and how many were left out for their rating.

    Raises:
        InputError: there are bad rows, no rows, or timestamps of several units; `InputErrors` for
            several kinds of bad rows.
    """
    items, users, times = _Ids("item id", problems), _Ids("user id", problems), TimeColumn(problems)
    columns = array("i"), array("i"), array("q")
    low = 0
    stream = iter(events)
    while batch := list(islice(stream, BATCH)):
        rows, item, user, time, rating = (list(map(itemgetter(at), batch)) for at in range(5))
        keep = np.ones(len(batch), dtype=bool)
        if min_rating is not None:
            keep = _ratings(rows, rating, problems) >= min_rating
            low += int((~keep).sum())
        kept = np.array(rows)[keep].tolist()
        parts = (
            items.codes(np.array(item, dtype=object)[keep], kept),
            users.codes(np.array(user, dtype=object)[keep], kept),
            times.read(rows, time)[keep],
        )
        for column, part in zip(columns, parts, strict=True):
            column.frombytes(part.tobytes())
    refuse(problems.sentences())
    if not columns[0]:
        rating_words = f" with a rating of at least {min_rating:g}" if low else ""
        raise InputError(f"{problems.path} has no interactions{rating_words}; check the file.")
    table = Table(
        list(items.numbers),
        list(users.numbers),
        np.frombuffer(columns[0], dtype=np.int32),
        np.frombuffer(columns[1], dtype=np.int32),
        _one_unit(times, np.frombuffer(columns[2], dtype=np.int64), problems.path),
    )
    return table, low


def _one_unit(times: TimeColumn, timestamps: np.ndarray, path: Path) -> np.ndarray:
    """Return timestamps that were read a batch at a time in one unit, and log how dates were read."""
    timestamps, note, findings = times.finish(timestamps)
    sentences(path, findings)
    if note:
        log.info("%s: %s", path, note)
    return timestamps


def check_columns(table: Table, path: Path) -> list[str]:
    """Look at each column as a whole and return warnings.

    Raises:
        InputError: a column cannot be right.
    """
    findings = [
        *check_ids("item_id", np.array(table.item_ids, dtype=object), table.items),
        *check_ids("user_id", np.array(table.user_ids, dtype=object), table.users),
        *check_times(table.timestamps),
    ]
    return sentences(path, findings)


def first_of_repeats(table: Table) -> np.ndarray:
    """Mark all rows but those that repeat an earlier one's user, item and timestamp: bool [N]."""
    order = np.lexsort((table.items, table.timestamps, table.users))
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in (table.items, table.timestamps, table.users):
        sorted_column = column[order]
        same &= sorted_column[1:] == sorted_column[:-1]
    keep = np.ones(len(table), dtype=bool)
    # The sort is stable: the first of equal rows is the earliest.
    keep[order[1:][same]] = False
    return keep


def core_rows(table: Table, user_min: int, item_min: int) -> np.ndarray:
    """Mark the largest set of rows in which every user and item has enough rows: bool [N].

    Users and items with fewer interactions are taken out in turns until none is left to take out.

    Args:
        table: the interactions.
        user_min: interactions that a user needs.
        item_min: interactions that an item needs.
    """
    keep = np.ones(len(table), dtype=bool)
    while True:
        before = int(keep.sum())
        for codes, least in ((table.users, user_min), (table.items, item_min)):
            if least > 1:
                keep &= np.bincount(codes[keep], minlength=int(codes.max()) + 1)[codes] >= least
        if int(keep.sum()) == before or not keep.any():
            return keep


def once_filtered_rows(table: Table, least: int) -> np.ndarray:
    """Mark the rows that HLLM's filter of Amazon Books leaves: bool [N].

    Users and items are counted once, on all rows; of what is left, users are counted again, items
    are not, so that an item may end with fewer interactions than `least`.

    Args:
        table: the interactions.
        least: interactions that a user, and an item, needs.
    """
    keep = np.ones(len(table), dtype=bool)
    for codes in (table.items, table.users):
        keep &= np.bincount(codes)[codes] >= least
    left = np.bincount(table.users[keep], minlength=int(table.users.max()) + 1)
    return keep & (left[table.users] >= least)


def _ratings(rows: Sequence[int], texts: Sequence[str], problems: RowProblems) -> np.ndarray:
    """Return float64 [n]; NaN where the row is booked as bad."""
    values = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(dtype=float)
    for at in np.flatnonzero(np.isnan(values)).tolist():
        shown = one_line(texts[at], 40)
        problems.add("rating", rows[at], f"rating '{shown}' is not a number")
    return values

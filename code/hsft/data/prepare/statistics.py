"""What a prepared data set holds, and what was left out of the download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsft.data.prepare.table import Table
from hsft.data.split import NEEDED, count_too_short
from hsft.data.time_checks import UNITS, date_of

# Unix time in seconds: 1973 and the year 2100. Smaller numbers are counters rather than times.
_LEAST, _MOST = 100_000_000, 4_102_444_800
_PURPOSE = {
    "train": "to train on",
    "valid": "for a validation target",
    "test": "for a test target",
}


@dataclass(frozen=True)
class Statistics:
    """The numbers of a data set.

    Attributes:
        users: users with interactions.
        items: items with interactions.
        interactions: rows.
        mean_length: interactions a user.
        median_length: the middle one of the users' numbers of interactions.
        again: interactions with an item that the user has another interaction with.
        first: earliest timestamp.
        last: latest timestamp.
        too_short: phase (train, valid, test) -> users with too few interactions for it.
    """

    users: int
    items: int
    interactions: int
    mean_length: float
    median_length: float
    again: int
    first: int
    last: int
    too_short: Mapping[str, int]

    @property
    def density(self) -> float:
        """Interactions by users times items."""
        return self.interactions / (self.users * self.items)


def statistics(table: Table) -> Statistics:
    """Count what a table of at least one interaction holds."""
    lengths = np.bincount(table.users)
    lengths = lengths[lengths > 0]
    pairs = table.users.astype(np.int64) * len(table.item_ids) + table.items
    return Statistics(
        users=len(lengths),
        items=len(np.unique(table.items)),
        interactions=len(table),
        mean_length=float(lengths.mean()),
        median_length=float(np.median(lengths)),
        again=len(pairs) - len(np.unique(pairs)),
        first=int(table.timestamps.min()),
        last=int(table.timestamps.max()),
        too_short=count_too_short(lengths),
    )


def statistics_rows(numbers: Statistics, with_text: int) -> list[tuple[str, str]]:
    """Write the numbers as rows of a table.

    Args:
        numbers: of the data set.
        with_text: items that have a title, tag or description.
    """
    return [
        ("users", f"{numbers.users:,}"),
        ("items", f"{numbers.items:,}"),
        ("interactions", f"{numbers.interactions:,}"),
        ("density", f"{numbers.density:.4%}"),
        ("history length, mean", f"{numbers.mean_length:.2f}"),
        ("history length, median", f"{numbers.median_length:g}"),
        ("same item again", f"{numbers.again:,}"),
        ("items with text", f"{with_text:,} of {numbers.items:,}"),
        ("first interaction", _time(numbers.first, numbers.last)),
        ("last interaction", _time(numbers.last, numbers.last)),
        *(
            (f"users too short {_PURPOSE[phase]} (fewer than {NEEDED[phase]})", f"{count:,}")
            for phase, count in numbers.too_short.items()
        ),
    ]


def format_rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Write rows as two columns under a title."""
    left, right = (max(len(row[side]) for row in rows) for side in (0, 1))
    lines = [f"  {name.ljust(left)}  {value.rjust(right)}" for name, value in rows]
    return "\n".join([title, *lines]) + "\n"


def dropped_rows(dropped: Mapping[str, int]) -> list[tuple[str, str]]:
    """Write what was left out, by reason, as rows; reasons that met nothing are left out too."""
    return [(reason, f"{count:,}") for reason, count in dropped.items() if count]


def _time(stamp: int, last: int) -> str:
    """Write a timestamp as a date; its unit is told from the last one, which lies in 1973 to 2099."""
    for scale in UNITS.values():
        if _LEAST <= last // scale < _MOST:
            return date_of(stamp, scale)
    return str(stamp)

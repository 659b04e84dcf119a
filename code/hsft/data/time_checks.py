"""Timestamps that are well formed and wrong, and timestamps that do not tell the order of events.

Exports write one column in seconds and in milliseconds, round times to floating-point numbers or to
days, or write dates before anybody could interact. What cannot be right is refused, what may be right
is a warning; see `column_checks` for ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from hsft.data.column_checks import Finding
from hsft.utils.errors import one_line

# Unix time of the year's beginning, in seconds, and how many of each unit are in a second.
_YEAR_1990, _YEAR_2000, _YEAR_2100 = 631_152_000, 946_684_800, 4_102_444_800
UNITS = {
    "seconds": 1,
    "milliseconds": 1000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
}
# Smaller numbers are counters, not times: their orders of magnitude say nothing.
_LEAST_TIME = 10_000_000
# No two neighbouring times of one unit are this far apart: 1971 to 2100 in seconds is 1 to 90.
_GAP = 100
_DAY = 86_400
_EXPONENT = re.compile(r"[+-]?[0-9](?:\.([0-9]*))?[eE]\+?(-?[0-9]{1,3})")
_FEWEST_TIMES = 20
_TIES_LOOKED_AT = 10_000


def check_times(timestamps: np.ndarray) -> list[Finding]:
    """Look at the timestamps of a file as a whole.

    Args:
        timestamps: int64 [N], in the order of the file.
    """
    lowest, highest = int(timestamps.min()), int(timestamps.max())
    if highest < _LEAST_TIME:
        return []
    unit = _unit_of(lowest)
    if unit is None or unit != _unit_of(highest):
        mixed = _mixed_units(timestamps)
        if mixed is not None:
            return [mixed]
    checks = (_unlikely_years, _rounded_times)
    return [finding for check in checks if (finding := check(timestamps)) is not None]


def check_time_texts(texts: Iterable[str]) -> Finding | None:
    """Refuse times in exponent notation none of which shows its last digit: `1.59E+09`.

    `1.588687728923E+12` does: whole numbers that Java or JavaScript wrote keep all their digits.

    Args:
        texts: the cells of a column of timestamps.
    """
    first, count, whole = "", 0, False
    index = 0
    for row, text in enumerate(texts):
        match = _EXPONENT.fullmatch(text.strip()) if "e" in text or "E" in text else None
        if match is not None:
            if not count:
                first, index = text, row
            count += 1
            whole |= len(match[1] or "") >= int(match[2])
    if not count or whole:
        return None
    return Finding(
        f"{count:,} timestamps in exponent notation, the first '{one_line(first, 40)}', lack the last "
        f"digits and with them the order of events",
        "export the timestamps as whole numbers",
        certain=True,
        index=index,
    )


@dataclass(frozen=True)
class Ties:
    """How often a user's interactions have one timestamp, so that their order is not known.

    Attributes:
        interactions: how many share user and timestamp with another one.
        total: all interactions.
        users: users with at least two interactions, who have a test target.
        test: users of those whose last two interactions, with two items, are tied.
        valid: users whose two interactions before the last are tied likewise.
        pairs: neighbouring tied interactions with two items, at most 10,000 spread over the file.
        ascending: pairs of those whose item ids ascend, as numbers or as text, whichever is more.
        whole_days: whether timestamps are days rather than seconds.
    """

    interactions: int
    total: int
    users: int
    test: int
    valid: int
    pairs: int
    ascending: int
    whole_days: bool

    def summary(self) -> str:
        """Return one sentence with the numbers."""
        days = ", timestamps are whole days" if self.whole_days and self.interactions else ""
        return (
            f"{self.interactions:,} of {self.total:,} interactions share user and timestamp with "
            f"another one{days}; a tie decides the test item of {self.test:,} and the validation "
            f"item of {self.valid:,} of {self.users:,} users"
        )

    def findings(self) -> list[Finding]:
        """Return warnings of ties that matter to what is measured."""
        findings = []
        if max(self.test, self.valid) >= max(1, 0.01 * self.users):
            findings.append(
                Finding(
                    self.summary(),
                    "tied events keep the order of the file: use finer timestamps, or --tie_order "
                    "shuffle",
                )
            )
        share = self.ascending / max(self.pairs, 1)
        if self.pairs >= 30 and not 0.1 < share < 0.9:
            way = "ascend" if share > 0.5 else "descend"
            count = self.ascending if share > 0.5 else self.pairs - self.ascending
            findings.append(
                Finding(
                    f"item ids {way} in {count:,} of {self.pairs:,} pairs of tied interactions, so "
                    f"the file is sorted by item within a timestamp and the next item can be told "
                    f"from its id",
                    "use --tie_order shuffle",
                )
            )
        return findings


def count_ties(
    items: np.ndarray, timestamps: np.ndarray, offsets: np.ndarray, item_ids: np.ndarray
) -> Ties:
    """Count interactions of equal user and timestamp.

    Args:
        items: int [N], item numbers, user after user, each sorted by time.
        timestamps: int64 [N], beside them.
        offsets: int64 [U + 1]; user u has rows `offsets[u]` to `offsets[u + 1]`.
        item_ids: str, an item's id by number.
    """
    # tied[i]: rows i and i + 1 are one user's and have one timestamp.
    tied = timestamps[1:] == timestamps[:-1]
    tied[offsets[1:-1] - 1] = False
    shared = np.zeros(len(items), dtype=bool)
    shared[1:] |= tied
    shared[:-1] |= tied
    decided = tied & (items[1:] != items[:-1])
    lengths = np.diff(offsets)
    last = offsets[1:] - 1
    pairs = np.flatnonzero(decided)
    if len(pairs) > _TIES_LOOKED_AT:
        pairs = pairs[np.linspace(0, len(pairs) - 1, _TIES_LOOKED_AT).astype(np.int64)]
    return Ties(
        interactions=int(shared.sum()),
        total=len(items),
        users=int((lengths >= 2).sum()),
        test=int(decided[last[lengths >= 2] - 1].sum()),
        valid=int(decided[last[lengths >= 3] - 2].sum()),
        pairs=len(pairs),
        ascending=_ascending(items[pairs], items[pairs + 1], item_ids),
        whole_days=bool(len(pairs)) and _whole_days(timestamps),
    )


def unit_of_times(timestamps: np.ndarray) -> str | None:
    """Return the unit in which most timestamps are dates of 1990 to 2099, None without one.

    Args:
        timestamps: int64 [N].
    """
    return _unit_of(int(np.median(timestamps)))


def is_date(seconds: int) -> bool:
    """Say whether seconds since 1970 are a date of 1990 to 2099."""
    return _YEAR_1990 <= seconds < _YEAR_2100


def _unit_of(stamp: int) -> str | None:
    for name, scale in UNITS.items():
        if _YEAR_1990 * scale <= stamp < _YEAR_2100 * scale:
            return name
    return None


def _mixed_units(timestamps: np.ndarray) -> Finding | None:
    """Find rows in seconds among rows in milliseconds, or the like.

    Such rows would be sorted by unit, not by time, and leave-one-out would hold out the wrong
    items. A unit is recognised by its numbers for the years 2000 to 2099, and earlier years by the
    gap of orders of magnitude between two units.
    """
    units = {
        name: (timestamps >= _YEAR_2000 * scale) & (timestamps < _YEAR_2100 * scale)
        for name, scale in UNITS.items()
    }
    counts = {name: int(rows.sum()) for name, rows in units.items()}
    present = sorted((name for name in counts if counts[name]), key=lambda name: counts[name])
    remedy = "convert the file to one unit"
    if len(present) > 1:
        rare, usual = present[0], present[-1]
        index = int(np.flatnonzero(units[rare])[0])
        return Finding(
            f"timestamps mix units: {counts[usual]:,} rows are in {usual} and {counts[rare]:,} in "
            f"{rare}, the first {timestamps[index]}",
            remedy,
            certain=True,
            index=index,
        )
    values = np.unique(timestamps[timestamps >= _LEAST_TIME])
    jumps = np.flatnonzero(values[1:] // _GAP >= values[:-1])
    if not len(jumps):
        return None
    below, above = int(values[jumps[0]]), int(values[jumps[0] + 1])
    low = (timestamps >= _LEAST_TIME) & (timestamps <= below)
    high = timestamps >= above
    counted = (int(low.sum()), int(high.sum()))
    rare_rows = low if counted[0] < counted[1] else high
    index = int(np.flatnonzero(rare_rows)[0])
    return Finding(
        f"timestamps mix units: {counted[0]:,} rows are at most {below} and {counted[1]:,} at least "
        f"{above}, with none between; the first of the fewer ones is {timestamps[index]}",
        remedy,
        certain=True,
        index=index,
    )


def _unlikely_years(timestamps: np.ndarray) -> Finding | None:
    """Find times before 1990 or after 2099 among others in one unit."""
    lowest, highest = int(timestamps.min()), int(timestamps.max())
    if _unit_of(lowest) is not None and _unit_of(lowest) == _unit_of(highest):
        return None
    unit = unit_of_times(timestamps)
    if unit is None:
        return None
    scale = UNITS[unit]
    early = timestamps < _YEAR_1990 * scale
    rows = np.flatnonzero(early | (timestamps >= _YEAR_2100 * scale))
    extreme = lowest if early.any() else highest
    negative = int((timestamps < 0).sum())
    before = f", {negative:,} of them negative and so before 1970" if negative else ""
    return Finding(
        f"{len(rows):,} of {len(timestamps):,} timestamps lie before 1990 or after 2099, read as "
        f"{unit} like the others{before}, for example {extreme} ({date_of(extreme, scale)})",
        "remove the rows if these are no times (prepare_data.py: --since DATE)",
        index=int(rows[0]),
    )


def _rounded_times(timestamps: np.ndarray) -> Finding | None:
    """Find times that a 32-bit floating-point column has rounded, seconds of today to 128."""
    sample = timestamps[:1000]
    if not (_is_single(sample).all() and _is_single(timestamps).all()):
        return None
    # Whole hours are multiples of 16, and round numbers on their own.
    large = timestamps[np.abs(timestamps) >= 1 << 25]
    if len(np.unique(large[:100_000])) < _FEWEST_TIMES or not (large % 3600).any():
        return None
    return Finding(
        f"all timestamps, for example {large[0]}, are numbers that a 32-bit floating-point column "
        f"can hold, so times a minute apart may have become one",
        "export them as whole numbers if so",
    )


def _is_single(values: np.ndarray) -> np.ndarray:
    """Say which numbers a 32-bit floating-point number holds: bool [N]."""
    return values.astype(np.float32).astype(np.float64) == values


def date_of(stamp: int, scale: int) -> str:
    """Write a timestamp as a date in UTC.

    Args:
        stamp: the timestamp.
        scale: its units in a second.
    """
    try:
        date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=stamp // scale)
    except OverflowError:
        return "no date of the years 1 to 9999"
    return f"{date.year:04}-{date:%m-%d} UTC"


def _whole_days(timestamps: np.ndarray) -> bool:
    unit = unit_of_times(timestamps[:1000])
    if unit is None:
        return False
    step = _DAY * UNITS[unit]
    return not ((timestamps[:1000] % step).any() or (timestamps % step).any())


def _ascending(first: np.ndarray, second: np.ndarray, item_ids: np.ndarray) -> int:
    """Count the pairs of item numbers whose ids ascend, as numbers or as text."""
    if not len(first):
        return 0
    numbers = np.unique(np.concatenate([first, second]))
    texts = [str(text) for text in item_ids[numbers]]
    left, right = np.searchsorted(numbers, first), np.searchsorted(numbers, second)
    counts = []
    for keys in (texts, list(map(_natural, texts))):
        ranks = np.empty(len(texts), dtype=np.int64)
        ranks[sorted(range(len(texts)), key=keys.__getitem__)] = np.arange(len(texts))
        counts.append(int((ranks[left] < ranks[right]).sum()))
    # The order further from chance is the one that the file may have been sorted by.
    return max(counts, key=lambda count: abs(2 * count - len(first)))


def _natural(text: str) -> list[tuple[bool, str | int]]:
    """Return a sort key in which `v9` comes before `v10`."""
    parts = re.split(r"([0-9]+)", text)
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts]

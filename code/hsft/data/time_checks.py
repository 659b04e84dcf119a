"""Timestamps that are well formed and wrong, and timestamps that do not tell the order of events.

Exports write one column in seconds and in milliseconds, round times to floating-point numbers or to
days, or write dates before anybody could interact. What cannot be right is refused, what may be right
is a warning; see `column_checks` for ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from hsft.data.blocks import count_less, kth_smallest, slices, user_ranges
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
_TIMES_LOOKED_AT = 100_000


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
    shared = users = test = valid = pair_count = 0
    for _, ends, tied, decided in _ties_in_ranges(items, timestamps, offsets):
        shared += int(np.count_nonzero(np.append(tied, False) | np.append(False, tied)))
        pair_count += int(np.count_nonzero(decided))
        lengths = np.diff(ends, prepend=0)
        users += int(np.count_nonzero(lengths >= 2))
        test += int(np.count_nonzero(decided[ends[lengths >= 2] - 2]))
        valid += int(np.count_nonzero(decided[ends[lengths >= 3] - 3]))
    pairs = _pairs_looked_at(items, timestamps, offsets, pair_count)
    return Ties(
        interactions=shared,
        total=len(items),
        users=users,
        test=test,
        valid=valid,
        pairs=len(pairs),
        ascending=_ascending(items[pairs], items[pairs + 1], item_ids),
        whole_days=bool(len(pairs)) and _whole_days(timestamps),
    )


def _ties_in_ranges(
    items: np.ndarray, timestamps: np.ndarray, offsets: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield of some users at a time their n rows' first one, ends from there on, and ties.

    Ties are bool [n - 1]: whether a row is tied with the next one, and whether with another item.
    """
    for part in user_ranges(offsets):
        rows = slice(offsets[part.start], offsets[part.stop])
        ends = offsets[part.start + 1 : part.stop + 1] - rows.start
        tied = timestamps[rows][1:] == timestamps[rows][:-1]
        tied[ends[:-1] - 1] = False
        yield rows.start, ends, tied, tied & (items[rows][1:] != items[rows][:-1])


def _pairs_looked_at(
    items: np.ndarray, timestamps: np.ndarray, offsets: np.ndarray, count: int
) -> np.ndarray:
    """Return the rows that are tied with the next one and another item, some of many: int64."""
    ranks = np.arange(count)
    if count > _TIES_LOOKED_AT:
        ranks = np.linspace(0, count - 1, _TIES_LOOKED_AT).astype(np.int64)
    pairs, passed = [np.empty(0, np.int64)], 0
    for begin, _, _, marked in _ties_in_ranges(items, timestamps, offsets) if count else ():
        decided = np.flatnonzero(marked)
        here = ranks[np.searchsorted(ranks, passed) : np.searchsorted(ranks, passed + len(decided))]
        pairs.append(decided[here - passed] + begin)
        passed += len(decided)
    return np.concatenate(pairs)


def unit_of_times(timestamps: np.ndarray) -> str | None:
    """Return the unit in which most timestamps are dates of 1990 to 2099, None without one.

    Args:
        timestamps: int64 [N].
    """
    count = len(timestamps)
    # Of the two in the middle, or the one twice.
    middle = [kth_smallest(timestamps, rank) for rank in {(count - 1) // 2, count // 2}]
    return _unit_of(int(np.median(middle)))


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
    bounds = {name: (_YEAR_2000 * scale, _YEAR_2100 * scale) for name, scale in UNITS.items()}
    counts = {name: _count_within(timestamps, *bound) for name, bound in bounds.items()}
    present = sorted((name for name in counts if counts[name]), key=lambda name: counts[name])
    remedy = "convert the file to one unit"
    if len(present) > 1:
        rare, usual = present[0], present[-1]
        index = _first_within(timestamps, *bounds[rare])
        return Finding(
            f"timestamps mix units: {counts[usual]:,} rows are in {usual} and {counts[rare]:,} in "
            f"{rare}, the first {timestamps[index]}",
            remedy,
            certain=True,
            index=index,
        )
    gap = _first_gap(timestamps)
    if gap is None:
        return None
    below, above = gap
    largest = 1 << 63
    low = _count_within(timestamps, _LEAST_TIME, below + 1)
    high = _count_within(timestamps, above, largest)
    rare_bound = (_LEAST_TIME, below + 1) if low < high else (above, largest)
    index = _first_within(timestamps, *rare_bound)
    return Finding(
        f"timestamps mix units: {low:,} rows are at most {below} and {high:,} at least "
        f"{above}, with none between; the first of the fewer ones is {timestamps[index]}",
        remedy,
        certain=True,
        index=index,
    )


def _count_within(timestamps: np.ndarray, first: int, bound: int) -> int:
    """Count the times from `first` until before `bound`."""
    return count_less(timestamps, bound) - count_less(timestamps, first)


def _first_within(timestamps: np.ndarray, first: int, bound: int) -> int:
    """Return the position of the first time from `first` until before `bound`, of which there is one."""
    for part in slices(len(timestamps)):
        within = (timestamps[part] >= first) & (timestamps[part] < bound)
        if within.any():
            return part.start + int(np.argmax(within))
    raise ValueError("no time is within these bounds")


def _first_gap(timestamps: np.ndarray) -> tuple[int, int] | None:
    """Return the smallest time whose next one is at least `_GAP` times as large, and the next one.

    Times below `_LEAST_TIME` do not count.
    """
    below, bound = 0, _LEAST_TIME
    while True:
        # The largest time before the bound, and the smallest from there on.
        largest, above = below, None
        for part in slices(len(timestamps)):
            block = timestamps[part]
            block = block[block >= _LEAST_TIME]
            before = block[block < bound]
            largest = max(largest, int(before.max(initial=0)))
            if len(before) < len(block):
                least = int(block[block >= bound].min())
                above = least if above is None else min(above, least)
        if above is None:
            return None
        if below and largest == below:
            return below, above
        # Each two passes raise the bound a hundredfold.
        below = largest or above
        bound = _GAP * below


def _unlikely_years(timestamps: np.ndarray) -> Finding | None:
    """Find times before 1990 or after 2099 among others in one unit."""
    lowest, highest = int(timestamps.min()), int(timestamps.max())
    if _unit_of(lowest) is not None and _unit_of(lowest) == _unit_of(highest):
        return None
    unit = unit_of_times(timestamps)
    if unit is None:
        return None
    scale = UNITS[unit]
    early = count_less(timestamps, _YEAR_1990 * scale)
    late = len(timestamps) - count_less(timestamps, _YEAR_2100 * scale)
    extreme = lowest if early else highest
    negative = count_less(timestamps, 0)
    lowest_bound, largest = -(1 << 63), 1 << 63
    sides = ((lowest_bound, _YEAR_1990 * scale, early), (_YEAR_2100 * scale, largest, late))
    first = min(_first_within(timestamps, begin, end) for begin, end, rows in sides if rows)
    before = f", {negative:,} of them negative and so before 1970" if negative else ""
    return Finding(
        f"{early + late:,} of {len(timestamps):,} timestamps lie before 1990 or after 2099, read as "
        f"{unit} like the others{before}, for example {extreme} ({date_of(extreme, scale)})",
        "remove the rows if these are no times (prepare_data.py: --since DATE)",
        index=first,
    )


def _rounded_times(timestamps: np.ndarray) -> Finding | None:
    """Find times that a 32-bit floating-point column has rounded, seconds of today to 128."""
    parts = [timestamps[part] for part in slices(len(timestamps))]
    if not (_is_single(timestamps[:1000]).all() and all(_is_single(part).all() for part in parts)):
        return None
    # Whole hours are multiples of 16, and round numbers on their own.
    large_of = (part[np.abs(part) >= 1 << 25] for part in parts)
    large, no_hours = np.empty(0, np.int64), False
    for some in large_of:
        large = np.append(large, some[: _TIMES_LOOKED_AT - len(large)])
        no_hours = no_hours or bool((some % 3600).any())
    if len(np.unique(large)) < _FEWEST_TIMES or not no_hours:
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
    if (timestamps[:1000] % step).any():
        return False
    return not any((timestamps[part] % step).any() for part in slices(len(timestamps)))


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

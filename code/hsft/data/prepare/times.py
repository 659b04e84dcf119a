"""Timestamps of a download: whole numbers, or dates in ISO 8601."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from hsft.data.column_checks import Finding
from hsft.data.csv_rows import RowProblems
from hsft.data.interactions import timestamp_problem
from hsft.data.prepare.dates import in_utc, parse_date
from hsft.data.time_checks import UNITS, check_time_texts, date_of, unit_of_times
from hsft.utils.errors import InputError, one_line

_NUMBER_DIGITS = 18
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}(?:-[0-9]{2})?\b.*")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class TimeColumn:
    """Reads a column of timestamps, a batch at a time.

    A column holds whole numbers or dates, not both. A date is ISO 8601, with `T` or a blank before
    the time: `2022-09-01`, `2022-09-01 12:03:11.5`, `2022-09-01T12:03:11Z`, `... +08:00`. A date
    without a time zone is read as UTC.

    Args:
        problems: where bad rows are booked.
    """

    def __init__(self, problems: RowProblems) -> None:
        self._problems = problems
        self._dates: bool | None = None
        self._without_zone = 0
        self._exponents: list[str] = []

    def read(self, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """Return a batch's timestamps: int64 [n], 0 where the row is booked as bad.

        Dates are microseconds since 1970 until `finish`.

        Args:
            rows: lines of the file.
            texts: the cells.
        """
        plain = all(map(str.isdecimal, texts)) and max(map(len, texts)) <= _NUMBER_DIGITS
        if plain and not self._dates:
            self._dates = False
            return np.array(list(map(int, texts)), dtype=np.int64)
        values = [self._value(row, text.strip()) for row, text in zip(rows, texts, strict=True)]
        return np.array(values, dtype=np.int64)

    def finish(self, timestamps: np.ndarray) -> tuple[np.ndarray, str, list[Finding]]:
        """Return the whole column in one unit.

        Args:
            timestamps: int64 [N], the batches.

        Returns:
            int64 [N]; for dates a sentence on how they were read, else ''; and what is wrong with
            the column.
        """
        if not self._dates:
            rounded = check_time_texts(self._exponents)
            # The position among those in exponent notation is no position in the file.
            findings = [] if rounded is None else [Finding(rounded.text, rounded.remedy, True)]
            return timestamps, "", findings
        unit = next(
            name
            for name in ("seconds", "milliseconds", "microseconds")
            if not (timestamps % (10**6 // UNITS[name])).any()
        )
        note = f"timestamps are dates and are written as Unix time in {unit}"
        if self._without_zone:
            note += f"; {self._without_zone:,} of {len(timestamps):,} name no time zone and are read as UTC"
        return timestamps // (10**6 // UNITS[unit]), f"{note}.", []

    def _value(self, row: int, text: str) -> int:
        is_date = _DATE.fullmatch(text) is not None
        if self._dates is None:
            self._dates = is_date
        elif self._dates != is_date and (is_date or timestamp_problem(text) is None):
            kinds = ("a date", "numbers") if is_date else ("a number", "dates")
            self._problems.add(
                "kind of time",
                row,
                f"timestamp '{one_line(text, 40)}' is {kinds[0]} among {kinds[1]}; write all alike",
            )
            return 0
        problem = self._date_problem(text) if is_date else timestamp_problem(text)
        if problem is not None:
            self._problems.add("timestamp", row, f"timestamp {problem}")
            return 0
        if is_date:
            return self._microseconds(text)
        if "e" in text or "E" in text:
            self._exponents.append(text)
        return int(text) if text.lstrip("+-").isdecimal() else int(float(text))

    @staticmethod
    def _date_problem(text: str) -> str | None:
        try:
            parse_date(text)
        except ValueError:
            shown = one_line(text, 40)
            return f"'{shown}' is no date; write ISO 8601, for example 2022-09-01 12:03:11"
        return None

    def _microseconds(self, text: str) -> int:
        date = parse_date(text)
        if date.tzinfo is None:
            self._without_zone += 1
        return (in_utc(date) - _EPOCH) // _MICROSECOND


def first_since(timestamps: np.ndarray, since: datetime) -> tuple[int, str]:
    """Return the timestamp of a date in the unit of a column, and the date as a text.

    Args:
        timestamps: int64 [N].
        since: the date; UTC without a time zone.

    Raises:
        InputError: the timestamps are in no known unit.
    """
    unit = unit_of_times(timestamps)
    if unit is None:
        raise InputError(
            "--since: the timestamps are no dates of 1990 to 2099 in any unit, so none of them can be "
            "told to be before one; leave out --since."
        )
    stamp = (in_utc(since) - _EPOCH) // _MICROSECOND * UNITS[unit] // 10**6
    return stamp, date_of(stamp, UNITS[unit])

"""Dates in ISO 8601, read without the libraries that work on tables."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_date(text: str) -> datetime:
    """Read a date in ISO 8601; a trailing ` UTC`, as databases write it, is a time zone too.

    Returns:
        The date; without a time zone where the text names none.

    Raises:
        ValueError: it is no date.
    """
    if text.endswith(" UTC"):
        return datetime.fromisoformat(text.removesuffix(" UTC")).replace(tzinfo=UTC)
    return datetime.fromisoformat(text)


def in_utc(date: datetime) -> datetime:
    """Return a date with a time zone: UTC where it has none."""
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def utc_seconds(text: str) -> int:
    """Read a date as `parse_date`, in UTC unless it names a time zone: whole seconds since 1970.

    Raises:
        ValueError: it is no date.
        OverflowError: it is out of range.
    """
    return int(in_utc(parse_date(text)).timestamp())

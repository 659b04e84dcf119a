"""What a model is told of the times of a history: calendar and gaps, as small numbers."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from hsft.config import Config
from hsft.config.schema import RAW_TIME_MODELS
from hsft.data.blocks import empty_column
from hsft.data.interactions import Interactions
from hsft.data.time_checks import UNITS, unit_of_times
from hsft.utils.errors import InputError

# Years from 1970, months, days of the month, weekdays (0 is Monday), hours, and gaps: 0 without an
# earlier item, else 1 + floor(log2(seconds + 1)). All in UTC.
FIELD_SIZES = (131, 12, 31, 7, 24, 34)


@dataclass(frozen=True)
class ItemTimes:
    """When items were interacted with.

    Attributes:
        seconds: int64 [N] since 1970, beside `Interactions.items`.
        of_next: whether a position is told the time of its next item too, the one it predicts.
        raw: give the seconds themselves, not the fields of `encode_times`.
    """

    seconds: np.ndarray
    of_next: bool
    raw: bool = False

    @property
    def width(self) -> int:
        """Number of fields F of a position."""
        return (1 if self.raw else len(FIELD_SIZES)) * (2 if self.of_next else 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the times, in hexadecimal digits."""
        return sha256(np.ascontiguousarray(self.seconds).data).hexdigest()

    def fields(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the fields of the items starts[i]..ends[i] - 1, each row's next item at ends[i].

        A row's first item has no gap, whatever came before it.

        Args:
            starts, ends: int64 [B]; `seconds` holds an entry at ends[i] where `of_next`.

        Returns:
            uint8 [B, T, F], or int64 if `raw`, with T the longest range, 0 where padded: the item's
            own fields, then with `of_next` the next item's.
        """
        lengths = ends - starts
        steps = np.arange(lengths.max(initial=0))
        index = starts[:, None] + steps
        here = self.seconds.take(index, mode="clip")
        after = self.seconds.take(index + 1, mode="clip")
        if self.raw:
            seconds = np.stack([here, after] if self.of_next else [here], axis=-1)
            return np.where((steps < lengths[:, None])[..., None], seconds, 0)
        before = self.seconds.take(index - 1, mode="clip")
        parts = [encode_times(here, np.where(steps > 0, np.maximum(here - before, 0), -1))]
        if self.of_next:
            parts.append(encode_times(after, np.maximum(after - here, 0)))
        fields = np.concatenate(parts, axis=-1)
        fields[steps >= lengths[:, None]] = 0
        return fields


def item_times(config: Config, interactions: Interactions) -> ItemTimes | None:
    """Return the times that a configuration's model reads, None where it reads none.

    Raises:
        InputError: the timestamps are no dates.
    """
    if not config.use_timestamps:
        return None
    scale = unit_scale(interactions, config.dataset)
    seconds = empty_column(len(interactions), np.int64, interactions.folder)
    np.floor_divide(interactions.timestamps, scale, out=seconds)
    return ItemTimes(seconds, config.predict_at == "target", raw=config.model in RAW_TIME_MODELS)


def unit_scale(interactions: Interactions, dataset: str | None) -> int:
    """Return how many units of an interaction file's timestamps make a second.

    Raises:
        InputError: the timestamps are no dates.
    """
    unit = unit_of_times(interactions.timestamps)
    if unit is None:
        raise InputError(
            f"use_timestamps: the timestamps of {dataset} are no dates of 1990 to 2099 in seconds, "
            f"milliseconds, microseconds or nanoseconds since 1970; correct them or leave "
            f"use_timestamps out."
        )
    return UNITS[unit]


def encode_times(seconds: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Turn times and gaps into the fields of `FIELD_SIZES`.

    Args:
        seconds: int64 [...], since 1970; years before 1970 and from 2101 on are as the nearest.
        gaps: int64 [...], seconds since the item before, -1 without one.

    Returns:
        uint8 [..., 6].
    """
    times = seconds.astype("datetime64[s]")
    days, months = times.astype("datetime64[D]"), times.astype("datetime64[M]")
    day_numbers = days.astype(np.int64)
    fields = (
        np.clip(times.astype("datetime64[Y]").astype(np.int64), 0, FIELD_SIZES[0] - 1),
        months.astype(np.int64) % 12,
        (days - months.astype("datetime64[D]")).astype(np.int64),
        (day_numbers + 3) % 7,  # 1970 began on a Thursday
        (seconds - day_numbers * 86_400) // 3600,
        np.where(gaps < 0, 0, 1 + np.log2(np.maximum(gaps, 0) + 1).astype(np.int64)),
    )
    return np.stack([*fields[:-1], fields[-1].clip(max=FIELD_SIZES[-1] - 1)], axis=-1).astype(
        np.uint8
    )

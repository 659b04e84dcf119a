"""Splits by time, leave-one-out and at a date for all users, and the training sequences cut from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Literal

import numpy as np

from hsft.config import Config
from hsft.config.schema import SHARE_PATTERN, TIMESTAMP_PATTERN
from hsft.data.blocks import SAMPLES_AT_ONCE, Column, count_less, kth_smallest, slices, user_ranges
from hsft.data.interactions import Interactions, count_numbers, drop_items, renumber
from hsft.data.prepare.dates import utc_seconds
from hsft.data.time_checks import UNITS, unit_of_times
from hsft.utils.errors import InputError, one_line

Phase = Literal["valid", "test"]

# Interactions that a user needs: a target and one item before it for test, another target for
# validation, and two items that are no target for a transition to train on.
NEEDED = {"train": 4, "valid": 3, "test": 2}
_PERIODS = ("train", "valid", "test")


@dataclass(frozen=True)
class Segments:
    """Ranges of `Interactions.items`, one row each.

    Attributes:
        users: int64 [R], user number of each range.
        starts: int64 [R], first position of the range in `Interactions.items`.
        ends: int64 [R], one past its last position.
    """

    users: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class TimeCuts:
    """Where a global split by time cuts, in the unit of the data's timestamps.

    Attributes:
        valid: first time of the validation period; training sees what is before.
        test: first time of the test period.
        unit: name of the unit, None where the timestamps are no dates.
    """

    valid: int
    test: int
    unit: str | None = None

    def shown(self, phase: Phase) -> str:
        """Write the first time of a period as a date (UTC) where it is one."""
        return shown_time(self.valid if phase == "valid" else self.test, self.unit)


@dataclass(frozen=True)
class TimeSplit:
    """What a global split by time leaves, for the log, `--check` and `result.json`.

    Attributes:
        cuts: where it cuts.
        cold: what becomes of users and items that are first seen after a cut: `leave_out` or `rank`.
        interactions: period (train, valid, test) -> interactions in it, of all users and items.
        active_users: phase -> users with an interaction in its period.
        new_users: phase -> those of them without an interaction before it.
        scored_users: phase -> users with a target.
        cold_items: items that are first seen after training.
        cold_interactions: interactions with these.
        cold_targets: phase -> scored users whose target is such an item.
    """

    cuts: TimeCuts
    cold: Literal["leave_out", "rank"]
    interactions: dict[str, int]
    active_users: dict[Phase, int]
    new_users: dict[Phase, int]
    scored_users: dict[Phase, int]
    cold_items: int
    cold_interactions: int
    cold_targets: dict[Phase, int]

    def sentences(self) -> list[str]:
        """Say what is in each period, and what becomes of what is first seen after a cut."""
        total = sum(self.interactions.values())
        train, valid, test = (
            f"{self.interactions[period]} interactions ({self.interactions[period] / total:.1%})"
            for period in _PERIODS
        )
        lines = [
            f"split: global_time: training before {self.cuts.shown('valid')}, {train}; validation "
            f"from then until {self.cuts.shown('test')}, {valid}; test from then on, {test}."
        ]
        phases: tuple[Phase, ...] = ("valid", "test")
        for phase in phases:
            cold = (
                f", {self.cold_targets[phase]} of them on an item that training has not seen"
                if self.cold == "rank"
                else ""
            )
            lines.append(
                f"{phase}: {self.scored_users[phase]} of {self.active_users[phase]} users with an "
                f"interaction in the period are scored{cold}; users first seen in it: "
                f"{self.new_users[phase]}."
            )
        fate = (
            f"left out with their {self.cold_interactions} interactions"
            if self.cold == "leave_out"
            else "ranked with the others"
        )
        return [*lines, f"items first seen after training: {self.cold_items}, {fate}."]

    def summary(self) -> dict[str, object]:
        """Return the counts for `result.json`."""
        return {
            "kind": "global_time",
            "valid_from": self.cuts.valid,
            "test_from": self.cuts.test,
            "valid_from_shown": self.cuts.shown("valid"),
            "test_from_shown": self.cuts.shown("test"),
            "cold": self.cold,
            "interactions": self.interactions,
            "active_users": self.active_users,
            "new_users": self.new_users,
            "scored_users": self.scored_users,
            "cold_items": self.cold_items,
            "cold_interactions": self.cold_interactions,
            "cold_targets": self.cold_targets,
        }


@dataclass(frozen=True)
class Split:
    """What is trained on and what is held out, as positions in `Interactions.items`.

    Attributes:
        interactions: what was split.
        train_ends: int64 [U], one past each user's last training item.
        targets: phase -> int64 [U], position of each user's target, -1 for a user without one, or
            without an item before it.
        too_short: phase (train, valid, test) -> users without enough items for it.
        time: what the cuts of a global split by time leave; None for leave-one-out.
        train_items: items 1..train_items may be drawn as negatives in training.
        whole_histories: cut training histories into pieces, so that all of them is trained on; False:
            of a long one only its end.
    """

    interactions: Interactions
    train_ends: np.ndarray
    targets: Mapping[Phase, np.ndarray]
    too_short: dict[str, int]
    train_items: int
    time: TimeSplit | None = None
    whole_histories: bool = True

    @property
    def held_out(self) -> np.ndarray:
        """int64 [U]: how many of each user's last items are not trained on."""
        ends = self.interactions.offsets[1:]
        return np.subtract(ends, self.train_ends, out=self.interactions.per_user())

    @property
    def identity(self) -> str:
        """What another split of the same interactions differs in, for fingerprints."""
        if self.time is None:
            return "leave_one_out"
        return f"global_time {self.time.cuts.valid} {self.time.cuts.test} {self.time.cold}"

    def needs(self, period: str) -> str:
        """Say what a user needs to be in a period: train, valid or test."""
        if self.time is None:
            return f"at least {NEEDED[period]} items"
        if period == "train":
            return f"two items before {self.time.cuts.shown('valid')}"
        phase: Phase = "valid" if period == "valid" else "test"
        end = f" until {self.time.cuts.shown('test')}" if phase == "valid" else ""
        return f"an item before {self.time.cuts.shown(phase)} and one from then on{end}"

    def train_segments(self, max_length: int) -> Segments:
        """Cut every user's training items into pieces of at most `max_length + 1`.

        Cuts count from the end, as in HLLM: the pieces of a long history are full and what is
        left over at its beginning is dropped. A piece of n items gives n - 1 transitions; pieces
        of one item give none and are left out. Without `whole_histories` a user's last piece is the only one.
        """
        size = max_length + 1
        interactions = self.interactions
        columns = [Column(np.int64, interactions.folder) for _ in range(3)]
        for some in user_ranges(interactions.offsets):
            begin, end = interactions.offsets[some], self.train_ends[some]
            pieces = np.maximum((end - begin) // size, 1)
            if not self.whole_histories:
                pieces = np.ones_like(pieces)
            users = np.repeat(np.arange(len(begin)), pieces)
            # The k-th piece of a user, counted from 0 at the oldest.
            kth = np.arange(len(users)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            ends = end[users] - (pieces[users] - 1 - kth) * size
            starts = np.maximum(ends - size, begin[users])
            enough = ends - starts >= 2
            for column, block in zip(columns, (users + some.start, starts, ends), strict=True):
                column.append(block[enough])
        return Segments(*(column.whole() for column in columns))

    def eval_segments(self, phase: Phase) -> Segments:
        """Return one range a user: the whole history, and the phase's target as its last item.

        Users without a target, or without a history before it, are left out (see `too_short`).
        """
        interactions, targets = self.interactions, self.targets[phase]
        columns = [Column(np.int64, interactions.folder) for _ in range(3)]
        for some in slices(len(targets)):
            users = np.flatnonzero(targets[some] >= 0)
            starts, ends = interactions.offsets[some][users], targets[some][users] + 1
            for column, block in zip(columns, (users + some.start, starts, ends), strict=True):
                column.append(block)
        return Segments(*(column.whole() for column in columns))


def make_split(config: Config, interactions: Interactions) -> Split:
    """Split interactions as a configuration says.

    Raises:
        InputError: a time of a global split is none, or leaves nothing on one side of it.
    """
    if config.split == "leave_one_out":
        split = leave_one_out(interactions)
    else:
        cuts = time_cuts(
            interactions,
            config.split_time or DEFAULT_SPLIT_TIME,
            config.split_valid_time,
            config.dataset,
        )
        split = global_time(interactions, cuts, config.split_cold)
    return replace(split, whole_histories=config.data_split)


def leave_one_out(interactions: Interactions) -> Split:
    """Split by time: the last item for test, the second-last for validation, the rest to train.

    A user needs two items for a test target with a history, three for validation and four for a
    training transition; who has fewer is counted per phase, not dropped silently.
    """
    train_ends, valid, test = (interactions.per_user() for _ in range(3))
    for users in slices(interactions.num_users):
        begin, end = interactions.offsets[:-1][users], interactions.offsets[1:][users]
        train_ends[users] = np.maximum(end - 2, begin)
        valid[users] = np.where(end - 2 > begin, end - 2, -1)
        test[users] = np.where(end - 1 > begin, end - 1, -1)
    return Split(
        interactions,
        train_ends,
        {"valid": valid, "test": test},
        count_too_short(interactions.lengths),
        interactions.num_items,
    )


def global_time(
    interactions: Interactions, cuts: TimeCuts, cold: Literal["leave_out", "rank"] = "leave_out"
) -> Split:
    """Split at two times that are the same for all users.

    Training sees the interactions before `cuts.valid`. A user's target of a phase is the first
    interaction in its period, from `cuts.valid` until `cuts.test` or from `cuts.test` on; the history is
    everything before it. This is the global temporal split with the target "First" and global
    temporal validation of Gusak et al. (RecSys 2025, arXiv 2507.16289).

    Args:
        interactions: what to split.
        cuts: the times.
        cold: `leave_out` drops the items that are first seen after training with their
            interactions, and scores no user who is first seen in a period. `rank` keeps these items, with
            the highest numbers, and scores such a user on the second interaction in the period.

    Raises:
        InputError: no interaction is before the first cut.
    """
    counts = count_numbers(interactions.items, interactions.num_items + 1)
    trained = np.zeros(interactions.num_items + 1, dtype=bool)
    for rows in slices(len(interactions)):
        trained[interactions.items[rows][interactions.timestamps[rows] < cuts.valid]] = True
    cold_items = ~trained & (counts > 0)
    before_valid, before_test = (
        count_less(interactions.timestamps, cut) for cut in (cuts.valid, cuts.test)
    )
    periods = (before_valid, before_test - before_valid, len(interactions) - before_test)
    if not periods[0]:
        raise InputError(
            f"split: global_time: no interaction is before {cuts.shown('valid')}, where training ends; "
            f"change split_time or split_valid_time."
        )
    active, new = _count_users(interactions, cuts)
    kept = interactions
    if cold == "rank":
        order = np.argsort(~trained[1:], kind="stable") + 1
        kept = renumber(interactions, interactions.item_ids[np.concatenate([[0], order])])
    elif cold_items.any():
        # What a run reports as dropped has no embedding; these are reported on their own.
        kept = replace(drop_items(interactions, ~cold_items), dropped=interactions.dropped)
    split = cut_at(kept, cuts, score_new_users=cold == "rank")
    train_items = int(trained.sum()) if cold == "rank" else kept.num_items
    scored, on_cold = dict.fromkeys(split.targets, 0), dict.fromkeys(split.targets, 0)
    for phase, targets in split.targets.items():
        for users in slices(len(targets)):
            some = targets[users][targets[users] >= 0]
            scored[phase] += len(some)
            on_cold[phase] += int(np.count_nonzero(kept.items[some] > train_items))
    time = TimeSplit(
        cuts,
        cold,
        dict(zip(_PERIODS, periods, strict=True)),
        active,
        new,
        scored,
        int(cold_items.sum()),
        int(counts[cold_items].sum()),
        on_cold,
    )
    return replace(split, time=time, train_items=train_items)


def cut_at(interactions: Interactions, cuts: TimeCuts, *, score_new_users: bool) -> Split:
    """Split at two times with all users and items, see `global_time`.

    Args:
        interactions: what to split.
        cuts: the times.
        score_new_users: a user without an interaction before a period has the second one in it as a
            target; else none.
    """
    train_ends, valid, test = (interactions.per_user() for _ in range(3))
    too_short = dict.fromkeys(_PERIODS, 0)

    def targets(starts: np.ndarray, ends: np.ndarray, begin: np.ndarray) -> np.ndarray:
        position = np.maximum(starts, begin + 1) if score_new_users else starts
        return np.where((position > begin) & (position < ends), position, -1)

    for users in user_ranges(interactions.offsets):
        begin, end = interactions.offsets[:-1][users], interactions.offsets[1:][users]
        valid_starts = begin + _count_before(interactions, cuts.valid, users)
        test_starts = begin + _count_before(interactions, cuts.test, users)
        train_ends[users] = valid_starts
        valid[users] = targets(valid_starts, test_starts, begin)
        test[users] = targets(test_starts, end, begin)
        too_short["train"] += int(np.count_nonzero(valid_starts - begin < 2))
        too_short["valid"] += int(np.count_nonzero(valid[users] < 0))
        too_short["test"] += int(np.count_nonzero(test[users] < 0))
    of_phase: dict[Phase, np.ndarray] = {"valid": valid, "test": test}
    return Split(interactions, train_ends, of_phase, too_short, interactions.num_items)


DEFAULT_SPLIT_TIME = "0.9"


def time_cuts(
    interactions: Interactions,
    split_time: str,
    split_valid_time: str | None = None,
    dataset: str | None = None,
) -> TimeCuts:
    """Return the times of a global split.

    Args:
        interactions: what will be split.
        split_time: where the test period begins: a share between 0 and 1 of the interactions, which
            are before it (fewer where several have its timestamp), a date in ISO 8601 (UTC without
            a time zone), or a timestamp as in the data.
        split_valid_time: where the validation period begins, likewise; None: it is as many
            interactions long as the test period.
        dataset: name of the data, for errors.

    Raises:
        InputError: a time is none of these, or nothing is left on one side of it.
    """
    times = interactions.timestamps
    unit = unit_of_times(times)
    test = _cut_time(times, split_time, "split_time", unit, dataset)
    first, last = (shown_time(int(time), unit) for time in (times.min(), times.max()))
    within = f"the timestamps of {one_line(dataset, 80)} are from {first} to {last}"
    before_test = count_less(times, test)
    if before_test == len(times):
        raise InputError(
            f"split_time: no interaction is at {shown_time(test, unit)} or later; {within}: name a "
            f"time between."
        )
    if split_valid_time is None:
        # As many before it as are in the test period.
        rank = 2 * before_test - len(times)
        valid = kth_smallest(times, rank) if rank > 0 else test
    else:
        valid = _cut_time(times, split_valid_time, "split_valid_time", unit, dataset)
    if not count_less(times, valid) or (split_valid_time is None and valid >= test):
        raise InputError(
            f"split: global_time: with the test period from {shown_time(test, unit)} on, nothing is left "
            f"to train on before the validation period; {within}: name a later split_time, or "
            f"split_valid_time."
        )
    if valid >= test:
        raise InputError(
            f"split_valid_time ({shown_time(valid, unit)}) is not before split_time "
            f"({shown_time(test, unit)}); name an earlier one."
        )
    return TimeCuts(valid, test, unit)


def shown_time(time: int, unit: str | None) -> str:
    """Write a timestamp as a date and time of day (UTC), or as it is where `unit` is None."""
    if unit is None:
        return str(time)
    seconds, rest = divmod(time, UNITS[unit])
    try:
        date = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(time)
    date = date.removesuffix(" 00:00:00") if not rest else date
    return f"{date} UTC" if ":" in date else date


def _cut_time(times: np.ndarray, text: str, key: str, unit: str | None, dataset: str | None) -> int:
    text = text.strip()
    if SHARE_PATTERN.fullmatch(text) and Fraction(text) > 0:
        # A double's share of the rows may come out one short.
        rank = int(Fraction(text) * len(times))
        return kth_smallest(times, rank)
    if TIMESTAMP_PATTERN.fullmatch(text):
        return int(text)
    try:
        seconds = utc_seconds(text)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{key} '{one_line(text, 40)}' is no share between 0 and 1, no date such as 2024-05-31 "
            f"and no whole number as the data's timestamps; correct it."
        ) from error
    if unit is None:
        raise InputError(
            f"{key} is the date {one_line(text, 40)}, but the timestamps of {one_line(dataset, 80)} are "
            f"no dates of 1990 to 2099; name a share such as 0.9, or a timestamp."
        )
    return seconds * UNITS[unit]


def _count_before(interactions: Interactions, time: int, users: slice) -> np.ndarray:
    """Count the interactions before a time of some users, each of whom has one: int64 [users]."""
    offsets = interactions.offsets
    first = offsets[users.start]
    before = interactions.timestamps[first : offsets[users.stop]] < time
    return np.add.reduceat(before, offsets[users] - first, dtype=np.int64)


def _count_users(
    interactions: Interactions, cuts: TimeCuts
) -> tuple[dict[Phase, int], dict[Phase, int]]:
    """Count each period's users, and those of them without an interaction before it."""
    active: dict[Phase, int] = {"valid": 0, "test": 0}
    new: dict[Phase, int] = {"valid": 0, "test": 0}
    for users in user_ranges(interactions.offsets):
        before_valid = _count_before(interactions, cuts.valid, users)
        before_test = _count_before(interactions, cuts.test, users)
        lengths = np.diff(interactions.offsets[users.start : users.stop + 1])
        in_valid, in_test = before_test > before_valid, lengths > before_test
        active["valid"] += int(in_valid.sum())
        active["test"] += int(in_test.sum())
        new["valid"] += int((in_valid & (before_valid == 0)).sum())
        new["test"] += int((in_test & (before_test == 0)).sum())
    return active, new


def count_too_short(lengths: np.ndarray) -> dict[str, int]:
    """Count the users with too few interactions: phase (train, valid, test) -> users.

    Args:
        lengths: integers [U], interactions of each user.
    """
    return {phase: count_less(lengths, least) for phase, least in NEEDED.items()}


def train_item_counts(split: Split) -> np.ndarray:
    """Count how often each item occurs among the training items: int64 [I + 1], entry 0 is 0."""
    interactions = split.interactions
    size = interactions.num_items + 1
    counts = count_numbers(interactions.items, size)
    for users in slices(interactions.num_users, SAMPLES_AT_ONCE):
        held_out = ragged_positions(split.train_ends[users], interactions.offsets[1:][users])
        counts -= np.bincount(interactions.items[held_out], minlength=size)
    return counts


def ragged_positions(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Concatenate `arange(starts[i], ends[i])` for all i without a loop: int64 [sum of lengths]."""
    lengths = ends - starts
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)

"""Calendar and gaps of histories as small numbers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from hsft.config import Config
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.dataset.collate_fn import EvalCollate, TrainCollate
from hsft.data.dataset.packing import Buckets
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.data.time_fields import FIELD_SIZES, ItemTimes, encode_times, item_times, unit_scale
from hsft.utils.errors import InputError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BOTH = 2 * len(FIELD_SIZES)


def history(seconds: list[list[int]], scale: int = 1) -> Interactions:
    """Users of items 1, 2, ... at these times."""
    flat = [second * scale for user in seconds for second in user]
    numbers = [number for user in seconds for number in range(1, len(user) + 1)]
    return Interactions(
        user_ids=np.array([f"u{n}" for n in range(len(seconds))], dtype=object),
        item_ids=np.array([f"i{n}" for n in range(max(numbers) + 1)], dtype=object),
        items=np.array(numbers, dtype=np.int32),
        timestamps=np.array(flat, dtype=np.int64),
        offsets=np.cumsum([0, *map(len, seconds)]),
    )


def test_the_calendar_is_that_of_datetime() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.integers(0, int(datetime(2100, 12, 31, tzinfo=UTC).timestamp()), 3000)
    days = [datetime(2000, 2, 29, 23, 59, 59), datetime(1900 + 200, 3, 1), datetime(2024, 2, 29)]
    special = [int(day.replace(tzinfo=UTC).timestamp()) for day in days]
    seconds = np.concatenate([seconds, special, [0]])
    fields = encode_times(seconds, np.full(len(seconds), -1))
    for second, row in zip(seconds.tolist(), fields.tolist(), strict=True):
        date = EPOCH + timedelta(seconds=second)
        expected = [date.year - 1970, date.month - 1, date.day - 1, date.weekday(), date.hour, 0]
        assert row == expected
    assert (fields < np.array(FIELD_SIZES)).all()


def test_gaps_are_powers_of_two_and_ends_of_time_stay_in_range() -> None:
    gaps = np.array([-1, 0, 1, 2, 3, 6, 7, 86_400, 2**40])
    fields = encode_times(np.zeros(len(gaps), dtype=np.int64), gaps)
    assert fields[:, -1].tolist() == [0, 1, 2, 2, 3, 3, 4, 17, 33]
    extreme = encode_times(np.array([-(10**10), 10**11]), np.array([0, 0]))
    assert extreme[:, 0].tolist() == [0, FIELD_SIZES[0] - 1]
    assert (extreme < np.array(FIELD_SIZES)).all()


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000_000])
def test_times_come_in_any_unit_but_must_be_dates(scale: int) -> None:
    config = Config(use_timestamps=True, dataset="d")
    data = history([[10**9, 10**9 + 60, 10**9 + 90]], scale)
    times = item_times(config, data)
    assert times is not None
    assert times.seconds.tolist() == [10**9, 10**9 + 60, 10**9 + 90]
    assert unit_scale(data, "d") == scale
    with pytest.raises(InputError, match="timestamps of d are no dates of 1990 to 2099"):
        item_times(config, history([[1, 2, 3]]))
    assert item_times(Config(), history([[1, 2, 3]])) is None


def test_a_target_shows_its_time_only_where_asked() -> None:
    hour = 3600
    seconds = [0, 2 * hour, 3 * hour, 50 * hour, 60 * hour, 61 * hour]
    data = history([seconds])
    split = leave_one_out(data)
    other = np.array([*seconds[:-1], 900 * hour])
    for of_next in (False, True):
        batches = []
        for times in (np.array(seconds), other):
            dataset = CachedEmbeddingEvalDataset(split, "test", 3, ItemTimes(times, of_next))
            batches.append(EvalCollate(dataset)([0]))
        first, second = (batch.times.numpy() for batch in batches)
        assert first.shape == (1, 3, BOTH if of_next else BOTH // 2)
        assert (first == second).all() != of_next
        # The first item read has no gap, although there are earlier ones.
        assert first[0, :, 5].tolist() == [0, 1 + 17, 1 + 15]
        assert first[0, :, 4].tolist() == [3, 2, 12]
        if of_next:
            assert first[0, :, 6:].tolist() == [
                *[encode_times(np.array(seconds[n]), np.array(seconds[n] - seconds[n - 1])).tolist()
                  for n in (3, 4, 5)],
            ]  # fmt: skip
    assert EvalCollate(CachedEmbeddingEvalDataset(split, "test", 3))([0]).times.numel() == 0


@pytest.mark.parametrize("layout", ["rows", "packed", "single", "buckets"])
@pytest.mark.parametrize("of_next", [False, True])
def test_every_layout_gives_an_item_its_own_time(layout: str, of_next: bool) -> None:
    rng = np.random.default_rng(1)
    users = [np.cumsum(rng.integers(1, 10**6, size)).tolist() for size in (9, 4, 6, 5, 12)]
    data = history(users)
    seconds = data.timestamps
    sequences = CachedEmbeddingTrainDataset(leave_one_out(data), 20, ItemTimes(seconds, of_next))
    collate = TrainCollate(
        sequences,
        row_length=10 if layout == "packed" else None,
        single_row=layout in ("single", "buckets"),
        buckets=Buckets(8, 6, 20) if layout == "buckets" else None,
    )
    batch = collate(np.arange(len(sequences)))
    assert batch.times.shape == (*batch.history.shape, BOTH if of_next else BOTH // 2)
    checked = 0
    for item, next_item, row in zip(
        batch.history.flatten().tolist(),
        batch.targets.flatten().tolist(),
        batch.times.flatten(0, 1).tolist(),
        strict=True,
    ):
        if not item:
            assert not any(row)
            continue
        # Items are numbered by their place in a history, so the gap tells the user.
        candidates = []
        for user in users:
            if len(user) < next_item + 2:
                continue
            gap = user[item - 1] - user[item - 2] if item > 1 else -1
            here = encode_times(np.array(user[item - 1]), np.array(gap)).tolist()
            after = np.array(user[next_item - 1])
            then = encode_times(after, after - user[item - 1]).tolist()
            candidates.append(here + then if of_next else here)
        assert row in candidates
        checked += 1
    assert checked == sequences.num_transitions


def test_single_rows_of_evaluation_hold_the_times_of_padded_ones() -> None:
    rng = np.random.default_rng(2)
    data = history([np.cumsum(rng.integers(1, 10**6, size)).tolist() for size in (3, 8, 5)])
    dataset = CachedEmbeddingEvalDataset(
        leave_one_out(data), "valid", 4, ItemTimes(data.timestamps, True)
    )
    collate = EvalCollate(dataset)
    padded = collate([2, 0, 1])
    collate.single_row = True
    row = collate([2, 0, 1])
    real = padded.history > 0
    assert row.row[0].tolist() == padded.history[real].tolist()
    assert row.times[0].tolist() == padded.times[real].tolist()

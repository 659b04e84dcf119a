"""Reading, splitting and batching on a data set small enough to do by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsft.data.dataset import (
    CachedEmbeddingEvalDataset,
    CachedEmbeddingTrainDataset,
    EvalCollate,
    TrainCollate,
)
from hsft.data.interactions import Interactions, read_interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import leave_one_out, train_item_counts

# Out of order, with a tie (b before c) and users of 6, 1, 2 and 3 items.
CSV = """item_id,user_id,timestamp
f,u1,60
a,u1,10
b,u1,20
c,u1,20
d,u1,40
e,u1,50
a,u2,5
b,u3,9
a,u3,8
c,u4,3
b,u4,2
a,u4,1
"""


@pytest.fixture
def data(tmp_path: Path) -> Interactions:
    (tmp_path / "small.csv").write_text(CSV)
    return read_interactions(tmp_path / "small.csv")


def ids(data: Interactions, numbers: object) -> list[str]:
    return data.item_ids[np.asarray(numbers)].tolist()


def history(data: Interactions, user: str) -> list[str]:
    at = data.user_ids.tolist().index(user)
    return ids(data, data.items[data.offsets[at] : data.offsets[at + 1]])


def test_histories_are_sorted_by_time_and_ties_keep_file_order(data: Interactions) -> None:
    assert history(data, "u1") == ["a", "b", "c", "d", "e", "f"]
    assert history(data, "u3") == ["a", "b"]
    assert history(data, "u4") == ["a", "b", "c"]
    assert data.num_items == 6


def test_who_is_too_short_is_counted(data: Interactions) -> None:
    assert leave_one_out(data).too_short == {"train": 3, "valid": 2, "test": 1}


def test_targets_are_the_last_and_the_second_last_item(data: Interactions) -> None:
    split = leave_one_out(data)
    test = CachedEmbeddingEvalDataset(split, "test", 50)
    valid = CachedEmbeddingEvalDataset(split, "valid", 50)
    assert data.user_ids[test.segments.users].tolist() == ["u1", "u3", "u4"]
    assert ids(data, test.targets) == ["f", "b", "c"]
    assert data.user_ids[valid.segments.users].tolist() == ["u1", "u4"]
    assert ids(data, valid.targets) == ["e", "b"]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (50, [["a", "b", "c", "d"]]),
        (3, [["a", "b", "c", "d"]]),
        (2, [["b", "c", "d"]]),
        (1, [["a", "b"], ["c", "d"]]),
    ],
)
def test_training_histories_are_cut_from_the_end(
    data: Interactions, length: int, expected: list[list[str]]
) -> None:
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), length)
    assert [ids(data, dataset[n]) for n in range(len(dataset))] == expected
    assert dataset.num_transitions == sum(len(piece) - 1 for piece in expected)


def test_training_batches_pair_each_item_with_the_next(data: Interactions) -> None:
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), 50)
    batch = TrainCollate(dataset)([0])
    assert ids(data, batch.history[0]) == ["a", "b", "c"]
    assert ids(data, batch.targets[0]) == ["b", "c", "d"]
    assert batch.loss_mask.all()


def test_evaluation_batches_hold_recent_history_and_all_seen_items(data: Interactions) -> None:
    dataset = CachedEmbeddingEvalDataset(leave_one_out(data), "test", 2)
    batch = EvalCollate(dataset)([0, 1])
    assert ids(data, batch.history[0]) == ["d", "e"]
    assert batch.history[1].tolist()[1] == 0
    assert batch.lengths.tolist() == [2, 1]
    assert ids(data, batch.targets) == ["f", "b"]
    seen = [ids(data, batch.seen_items[batch.seen_rows == row]) for row in (0, 1)]
    assert seen == [["a", "b", "c", "d", "e"], ["a"]]


def test_popularity_counts_training_items_only(data: Interactions) -> None:
    counts = dict(zip(data.item_ids, train_item_counts(leave_one_out(data)), strict=True))
    # u1 trains on a, b, c, d and u4 on a; u2 and u3 have nothing but held-out items.
    assert counts == {"[PAD]": 0, "f": 0, "a": 2, "b": 1, "c": 1, "d": 1, "e": 0}


def test_negatives_leave_out_what_the_user_met_but_not_the_held_out_items(
    data: Interactions,
) -> None:
    sampler = NegativeSampler(data, held_out=2)
    drawn = sampler.draw(np.array([0, 0]), 200, np.random.default_rng(0))
    assert set(ids(data, np.unique(drawn))) == {"e", "f"}
    assert sampler.available[0] == 2
    with pytest.raises(ValueError, match="only 2 items left"):
        sampler.draw(np.array([0]), 3, np.random.default_rng(0), distinct=True)


def test_negatives_may_be_any_items(data: Interactions) -> None:
    sampler = NegativeSampler(data, held_out=2, exclude="none")
    drawn = sampler.draw(np.array([0, 0]), 200, np.random.default_rng(0))
    assert set(ids(data, np.unique(drawn))) == set("abcdef")
    assert sampler.available.tolist() == [6, 6, 6, 6]

"""Metrics of recommended lists: by hand, by loops over lists, and as RecBole and RecTools have them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hsft.data.interactions import Interactions
from hsft.evaluator import list_metrics
from hsft.evaluator.list_metrics import (
    NAMES,
    ItemStatistics,
    ListMetrics,
    count_item_users,
    mean_history_popularity,
    popularity_classes,
)

USERS, ITEMS, TOPK = 60, 50, (1, 5, 10)
# What RecBole 1.2.1 and RecTools 0.19.0 compute of `random_lists`. RecBole divides the entropy by the
# number of items that are in some list, of which there are 2, 44 and 50.
RECBOLE = {
    "Coverage": (0.04, 0.88, 1.0),
    "GiniIndex": (0.9753333333, 0.5957333333, 0.3480666667),
    "ShannonEntropy": (0.1801152606 * 2, 0.0728178498 * 44, 0.0736614839 * 50),
    "AveragePopularity": (8.0666666667, 7.46, 7.99),
}
RECTOOLS = {
    "Coverage": (0.04, 0.88, 1.0),
    "AveragePopularity": (8.066666666666666, 7.46, 7.989999999999998),
    "Novelty": (3.10679017766781, 3.5691395541748663, 3.471777500179641),
    # 1 - IntraListDiversity with cosine distances.
    "IntraListSimilarity": (None, -0.018601623777545928, -0.03495131753671554),
}


def random_lists() -> tuple[np.ndarray, ItemStatistics]:
    """Lists of random scores that favour some items, and users of 8 training items each."""
    rng = np.random.default_rng(7)
    popularity = 1 / np.arange(1, ITEMS + 1)
    shares = popularity / popularity.sum()
    train = [rng.choice(ITEMS, size=8, replace=False, p=shares) + 1 for _ in range(USERS)]
    scores = rng.random((USERS, ITEMS)) + popularity[rng.permutation(ITEMS)]
    rng.integers(1, ITEMS + 1, size=USERS)
    vectors = rng.normal(size=(ITEMS + 1, 6))
    counts = np.bincount(np.concatenate(train), minlength=ITEMS + 1)
    lists = np.argsort(-scores, axis=1)[:, : max(TOPK)] + 1
    return lists, ItemStatistics(
        counts, counts, USERS, lambda items: torch.from_numpy(vectors[items])
    )


def measure(
    lists: np.ndarray, statistics: ItemStatistics, topk: tuple[int, ...], popularity: float = 1.0
) -> dict[str, float]:
    metrics = ListMetrics(topk, len(statistics.interactions) - 1, statistics, popularity)
    for part in np.array_split(lists, 4):
        metrics.add(part)
    return metrics.values()


@pytest.mark.parametrize("library", [RECBOLE, RECTOOLS], ids=["RecBole", "RecTools"])
def test_other_libraries_find_the_same(library: dict[str, tuple[float | None, ...]]) -> None:
    actual = measure(*random_lists(), TOPK)
    for name, expected in library.items():
        for k, value in zip(TOPK, expected, strict=True):
            assert actual.get(f"{name}@{k}") == (
                None if value is None else pytest.approx(value, rel=1e-7, abs=1e-7)
            ), name


def test_lists_by_hand() -> None:
    # The third user has one item only. Item 1 is in three lists, 2 and 3 in one each.
    lists = np.array([[1, 2], [1, 3], [1, 0]])
    vectors = torch.tensor([[9.0, 9], [1, 0], [1, 1], [0, 2], [5, 5]])
    statistics = ItemStatistics(
        # Of 10 interactions 6 are with item 1, the head; 3 and 1 with the tail; item 4 has none.
        np.array([0, 6, 3, 1, 0]),
        np.array([0, 3, 2, 1, 0]),
        4,
        lambda items: vectors[torch.from_numpy(items)],
    )
    actual = measure(lists, statistics, (2, 1), 4.0)
    expected = {
        "Coverage@2": 3 / 4,
        # Of 0, 1, 1, 3, weighted by -3, -1, 1, 3.
        "GiniIndex@2": (-1 + 1 + 9) / (4 * 5),
        "ShannonEntropy@2": -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)),
        "AveragePopularity@2": (3 * 6 + 3 + 1) / 5,
        "TailPercentage@2": 2 / 5,
        "Novelty@2": (3 * math.log2(4 / 3) + 1 + 2) / 5,
        "PopularityLift@2": 4.4 / 4 - 1,
        # Cosines of 45 and 90 degrees; the third list has no pair.
        "IntraListSimilarity@2": (math.sqrt(0.5) + 0) / 2,
        "Coverage@1": 1 / 4,
        "GiniIndex@1": 3 * 3 / (4 * 3),
        "ShannonEntropy@1": 0.0,
        "AveragePopularity@1": 6.0,
        "TailPercentage@1": 0.0,
        "Novelty@1": math.log2(4 / 3),
        "PopularityLift@1": 0.5,
    }
    assert actual == pytest.approx(expected)
    assert list(actual) == [f"{n}@{k}" for n in NAMES for k in (2, 1) if f"{n}@{k}" in expected]


def test_what_is_never_in_training_is_tail_and_of_one_user() -> None:
    statistics = ItemStatistics(np.array([0, 9, 9, 0]), np.array([0, 8, 8, 0]), 8)
    actual = measure(np.array([[3, 1]]), statistics, (2,))
    assert actual["TailPercentage@2"] == 1 / 2
    assert actual["Novelty@2"] == (3 + 0) / 2
    assert "IntraListSimilarity@2" not in actual


def test_loops_over_lists_find_the_same_where_lists_differ_in_length() -> None:
    lists, statistics = random_lists()
    lists = np.where(np.arange(10) < np.arange(USERS)[:, None] % 11, lists, 0)
    assert statistics.vectors is not None
    vectors = statistics.vectors(np.arange(ITEMS + 1)).numpy()
    # A vector of zeros has no direction, so that its cosines are 0.
    vectors[int(lists[10, 0])] = 0.0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    statistics = ItemStatistics(
        statistics.interactions,
        statistics.users,
        USERS,
        lambda items: torch.from_numpy(vectors[items]),
    )
    actual = measure(lists, statistics, (3, 10, 20))
    for k in (3, 10, 20):
        shown = [[item for item in row[:k] if item] for row in lists.tolist()]
        entries = list(itertools.chain(*shown))
        assert actual[f"Coverage@{k}"] == len(set(entries)) / ITEMS
        mean = np.mean([statistics.interactions[item] for item in entries])
        assert actual[f"AveragePopularity@{k}"] == pytest.approx(mean)
        # The Gini index is half the mean absolute difference of two items, relative to the mean.
        counts = np.bincount(entries, minlength=ITEMS + 1)[1:]
        differences = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
        assert actual[f"GiniIndex@{k}"] == pytest.approx(differences)
        similar = [
            np.mean([unit[one] @ unit[two] for one, two in itertools.combinations(row, 2)])
            for row in shown
            if len(row) > 1
        ]
        assert actual[f"IntraListSimilarity@{k}"] == pytest.approx(np.mean(similar), abs=1e-6)


def test_empty_lists_cover_nothing() -> None:
    statistics = ItemStatistics(np.array([0, 1, 1]), np.array([0, 1, 1]), 1)
    assert measure(np.zeros((3, 2), dtype=np.int64), statistics, (2,)) == {"Coverage@2": 0.0}


def test_users_of_an_item_are_counted_once_and_before_their_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = np.array([1, 1, 2, 3, 1, 2, 2], dtype=np.int32)
    offsets = np.array([0, 4, 4, 7])
    data = Interactions(
        np.array(["a", "b", "c"], dtype=object),
        np.array(["", "x", "y", "z"], dtype=object),
        items,
        np.arange(7),
        offsets,
    )
    for at_a_time in (1, 2, 100):
        monkeypatch.setattr(list_metrics, "_USERS_AT_A_TIME", at_a_time)
        assert count_item_users(data, np.array([3, 4, 7])).tolist() == [0, 2, 2, 0]
        counts = np.array([0, 10, 20, 30])
        # Of a's items 1, 1, 2 and c's 1 and 2.
        popularity = mean_history_popularity(items, np.array([0, 4]), np.array([3, 6]), counts)
        assert popularity == pytest.approx((40 / 3 + 15) / 2)


def test_classes_of_popularity() -> None:
    # The head holds 50 of 100 interactions, the item with 30 is between, the others hold 20.
    assert popularity_classes(np.array([50, 30, 15, 5, 0])).tolist() == [0, 1, 2, 2, 3]

"""The FAISS index: every kind finds what numpy finds, seen items are left out, nothing runs short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsft.finished.item_index import (
    INDEX_KINDS,
    IndexKind,
    ItemIndex,
    build_index,
    cells_for,
    kind_for,
    recall,
    search_width,
    tune,
)

pytest.importorskip("faiss", reason="faiss-cpu is not installed (hsft[index])")

ITEMS, DIM = 900, 8


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def users() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((40, DIM)).astype(np.float32)


def built(kind: IndexKind, vectors: np.ndarray) -> ItemIndex:
    index = build_index(kind, lambda start, end: vectors[start:end], len(vectors), DIM)
    return ItemIndex(Path("there"), "fine-tuned", index)


def nearest(users: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """Rows of the greatest inner products, best first."""
    return np.argsort(-(users @ vectors.T), axis=1)[:, :count]


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_a_widened_search_finds_what_numpy_finds(
    kind: IndexKind, vectors: np.ndarray, users: np.ndarray
) -> None:
    index = built(kind, vectors)
    exact = nearest(users, vectors, 10)
    np.testing.assert_array_equal(index.vectors(np.array([1, 7, ITEMS])), vectors[[0, 6, -1]])
    narrow = search_width(index.faiss_index)
    tune(index.faiss_index, users, exact, target=1.0)
    wide = search_width(index.faiss_index)
    best, whole = index.best(users, 10)
    assert whole.all()
    assert recall(best.items - 1, exact) == 1.0
    np.testing.assert_array_equal(best.items, exact + 1)
    expected = np.take_along_axis(users @ vectors.T, exact, axis=1)
    np.testing.assert_allclose(best.scores, expected, rtol=1e-5)
    if kind == "ivf":
        assert narrow == ("nprobe", 1)
        assert wide is not None
        assert 1 < wide[1] <= cells_for(ITEMS)
    assert (wide is None) == (kind == "flat")


def test_the_search_is_no_wider_than_the_target_needs(
    vectors: np.ndarray, users: np.ndarray
) -> None:
    exact = nearest(users, vectors, 10)
    index = built("ivf", vectors).faiss_index
    tune(index, users, exact, target=0.5)
    width = index.nprobe
    assert recall(index.search(users, 10)[1], exact) >= 0.5
    index.nprobe = width // 2
    assert width > 1
    assert recall(index.search(users, 10)[1], exact) < 0.5


def test_recall_by_hand() -> None:
    exact = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    returned = np.array([[3, 9, 0, -1], [7, 6, 5, 4]])
    assert recall(returned, exact) == pytest.approx((2 + 4) / 8)


def test_seen_items_are_left_out_of_each_user(vectors: np.ndarray, users: np.ndarray) -> None:
    index = built("flat", vectors)
    ranked = nearest(users[:3], vectors, 40) + 1
    # The best ones, twice as a history may have them; none; and some in between.
    seen = [np.repeat(ranked[0, :12], 2), ranked[1, :0], ranked[2, 1:9:2]]
    best, whole = index.best(users[:3], 5, seen)
    assert whole.all()
    for row, left_out in enumerate(seen):
        expected = [item for item in ranked[row] if item not in left_out][:5]
        assert best.items[row].tolist() == expected
    again, _ = index.best(users[:3], 5)
    np.testing.assert_array_equal(again.items, ranked[:, :5])


def test_running_short_is_noticed(vectors: np.ndarray, users: np.ndarray) -> None:
    index = built("ivf", vectors)
    index.faiss_index.nprobe = 1
    _, whole = index.best(users, 200)
    assert not whole.any()
    # All but two items are seen: two are all there are.
    flat = built("flat", vectors)
    best, whole = flat.best(users[:1], 5, [np.arange(3, ITEMS + 1)])
    assert whole.all()
    assert sorted(best.items[0]) == [0, 0, 0, 1, 2]
    assert np.isneginf(best.scores[0, 2:]).all()


def test_the_kind_follows_from_the_number_of_items() -> None:
    assert [kind_for(items) for items in (10, 50_000, 50_001, 1_000_000, 10_000_000)] == [
        *("flat", "flat", "hnsw", "hnsw", "ivf")
    ]
    assert cells_for(1_000_000) == 4_000
    assert cells_for(20) == 1

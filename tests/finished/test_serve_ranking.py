"""Lists for many requests at once, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from hsft.finished.item_index import IndexedScorer, ItemIndex, build_index
from hsft.finished.serve_ranking import ListQuery, diversify, rank_for_histories, rank_similar

# Items 1 to 4; the user's vector is the sum of its history's.
VECTORS = torch.tensor([[0.0, 0.0], [3.0, 4.0], [4.0, 3.0], [0.0, 2.0], [-1.0, 0.0]])


class Sums:
    num_items = 4

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        return VECTORS[history].sum(dim=1)

    def item_slice(self, start: int, end: int) -> Tensor:
        return VECTORS[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        return VECTORS[items]


def rank(*queries: ListQuery, budget_bytes: int = 1 << 20) -> list[tuple[list[int], list[float]]]:
    ranked = rank_for_histories(
        Sums(),
        queries,
        max_length=2,
        device=torch.device("cpu"),
        batch_size=2,
        budget_bytes=budget_bytes,
    )
    return [(one.items.tolist(), one.scores.tolist()) for one in ranked]


def history(*items: int) -> np.ndarray:
    return np.array(items)


@pytest.mark.parametrize("budget_bytes", [1, 1 << 20])
def test_each_request_has_candidates_of_its_own(budget_bytes: int) -> None:
    queries = [
        # Two last items: (0, 2) + (-1, 0) = (-1, 2): scores 5, 2, 4, 1.
        ListQuery(topk=9, history=history(1, 3, 4)),
        ListQuery(topk=2, history=history(3), excluded=history(1, 1)),
        ListQuery(topk=2, history=history(3), allowed=history(2, 4)),
        ListQuery(topk=2, history=history(3), allowed=history(2), excluded=history(2)),
    ]
    assert rank(*queries, budget_bytes=budget_bytes) == [
        ([1, 3, 2, 4], [5, 4, 2, 1]),
        ([2, 3], [6, 4]),
        ([2, 4], [6, 0]),
        ([], []),
    ]


def test_an_index_gives_the_lists_of_exact_search() -> None:
    pytest.importorskip("faiss")

    class Counting(ItemIndex):
        searched: ClassVar[list[int]] = []

        def best(self, users: np.ndarray, *more: Any) -> Any:
            self.searched.append(len(users))
            return super().best(users, *more)

    vectors = VECTORS[1:].numpy()
    index = Counting(Path("x"), "m", build_index("flat", lambda a, b: vectors[a:b], 4, 2))
    queries = [
        ListQuery(topk=9, history=history(3), excluded=history(1, 1)),
        ListQuery(topk=2, history=history(3)),
        ListQuery(topk=2, history=history(3), diversity=0.6),
        ListQuery(topk=2, history=history(3), allowed=history(2, 4)),
        ListQuery(topk=1, history=history(3), find=4),
    ]

    def lists(scorer: Any) -> list[Any]:
        ranked = rank_for_histories(
            scorer,
            queries,
            max_length=2,
            device=torch.device("cpu"),
            batch_size=8,
            budget_bytes=1 << 20,
        )
        return [(r.items.tolist(), r.scores.tolist(), r.candidates, r.rank) for r in ranked]

    assert lists(IndexedScorer(Sums(), index)) == lists(Sums())
    assert index.searched == [3]


def test_ranks_and_candidates() -> None:
    def find(item: int, *excluded: int) -> tuple[int | None, int]:
        query = ListQuery(topk=1, history=history(3), excluded=history(*excluded).astype(int))
        query = ListQuery(1, query.history, excluded=query.excluded, find=item)
        (one,) = rank_for_histories(
            Sums(), [query], max_length=2, device=torch.device("cpu"), batch_size=1, budget_bytes=1
        )
        return one.rank, one.candidates

    # Scores 8, 6, 4, 0.
    assert find(1) == (1, 4)
    assert find(4) == (4, 4)
    assert find(4, 1, 2) == (2, 2)
    assert find(1, 1) == (None, 3)


def test_similar_items_by_cosine() -> None:
    queries = [
        ListQuery(topk=3, history=history(1), excluded=history(1)),
        ListQuery(topk=1, history=history(3), excluded=history(3)),
    ]
    first, second = rank_similar(Sums(), queries, device=torch.device("cpu"), budget_bytes=1 << 20)
    # (3, 4) and (4, 3): 24 / 25; (0, 2): 4 / 5; (-1, 0): -3 / 5.
    assert first.items.tolist() == [2, 3, 4]
    assert first.scores.tolist() == pytest.approx([0.96, 0.8, -0.6])
    assert second.items.tolist() == [1]


def test_maximal_marginal_relevance_by_hand() -> None:
    relevance = np.array([10.0, 9.0, 6.0, 0.0])
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert diversify(relevance, vectors, 4, 0.0).tolist() == [0, 1, 2, 3]
    # Relevances 1, 0.9, 0.6, 0. After the first, d = 0.5: 0.45 - 0.5, 0.3 - 0.3, 0 + 0.5. Then
    # 0.45 - 0.5 and 0.3 - 0.3.
    assert diversify(relevance, vectors, 4, 0.5).tolist() == [0, 3, 2, 1]
    assert diversify(relevance, vectors, 2, 0.5).tolist() == [0, 3]
    # d = 0.2: 0.72 - 0.2, 0.48 - 0.12, 0 + 0.2; then 0.36 and 0.2.
    assert diversify(relevance, vectors, 3, 0.2).tolist() == [0, 1, 2]
    # By unlikeness alone, and equal relevances.
    assert diversify(relevance, vectors, 2, 1.0).tolist() == [0, 3]
    assert diversify(np.ones(2), vectors[:2], 2, 0.5).tolist() == [0, 1]


def test_a_diverse_list_is_chosen_from_more_items_than_it_has() -> None:
    # Scores 8, 6, 4, 0 scaled to 1, 0.75, 0.5, 0; cosines to item 1: 0.96, 0.8, -0.6. With
    # d = 0.6: 0.3 - 0.576, 0.2 - 0.48, 0 + 0.36.
    query = ListQuery(topk=2, history=history(3), diversity=0.6)
    assert rank(query) == [([1, 4], [8, 0])]

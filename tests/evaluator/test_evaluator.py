"""Whole evaluations against one-user-at-a-time NumPy, and the fixed candidate lists."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.interactions import Interactions
from hsft.data.split import Split, leave_one_out
from hsft.evaluator import metrics
from hsft.evaluator.evaluator import EvalProtocol, Evaluation, Evaluator, draw_candidates
from hsft.evaluator.list_metrics import ItemStatistics, ListMetrics

ITEMS, DIM, LENGTH = 40, 6, 5
FULL = EvalProtocol("full", (1, 5, 10), ("Recall", "NDCG", "MRR", "AUC", "Coverage"))
SAMPLED = replace(FULL, kind="sampled", candidates=9, metrics=("Recall", "NDCG", "GAUC"))
CPU = torch.device("cpu")


class TableScorer:
    """Users are the sum of their history's vectors."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.num_items = len(table) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        return self.table[history].sum(dim=1)

    def item_slice(self, start: int, end: int) -> Tensor:
        return self.table[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        return self.table[items]


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 15, size=23)
    return leave_one_out(
        Interactions(
            user_ids=np.array([f"u{n}" for n in range(len(lengths))], dtype=object),
            item_ids=np.array([f"i{n}" for n in range(ITEMS + 1)], dtype=object),
            items=rng.integers(1, ITEMS + 1, size=lengths.sum()).astype(np.int32),
            timestamps=np.arange(lengths.sum()),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
        )
    )


@pytest.fixture(scope="module")
def table() -> Tensor:
    actual = torch.randn(ITEMS + 1, DIM, generator=torch.Generator().manual_seed(4))
    actual[0] = 0.0
    return actual


def evaluate(
    split: Split, table: Tensor, protocol: EvalProtocol, batch_size: int = 8, phase: str = "test"
) -> Evaluation:
    dataset = CachedEmbeddingEvalDataset(split, phase, LENGTH)  # type: ignore[arg-type]
    return Evaluator(dataset, protocol, batch_size=batch_size).run(TableScorer(table), CPU)


def by_hand(split: Split, table: Tensor, phase: str) -> tuple[list[int], list[set[int]]]:
    """Ranks and top-10 lists, one user after the other."""
    data, vectors = split.interactions, table.double().numpy()
    ranks, lists = [], []
    for user in range(data.num_users):
        user_items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        user_items = user_items[:-1] if phase == "valid" else user_items
        if len(user_items) < 2:
            continue
        *history, target = user_items
        scores = vectors @ vectors[history[-LENGTH:]].sum(axis=0)
        allowed = [n for n in range(1, ITEMS + 1) if n not in history]
        better = [n for n in allowed if n != target and scores[n] >= scores[target]]
        ranks.append(metrics.UNRANKED if target in history else 1 + len(better))
        lists.append(set(sorted(allowed, key=lambda n: -scores[n])[:10]))
    return ranks, lists


@pytest.mark.parametrize("phase", ["valid", "test"])
@pytest.mark.parametrize("budget", [1 << 28, 1])
def test_full_ranking_is_what_one_user_at_a_time_gives(
    split: Split, table: Tensor, phase: str, budget: int
) -> None:
    actual = evaluate(split, table, replace(FULL, budget_bytes=budget), phase=phase)
    ranks, lists = by_hand(split, table, phase)
    assert len(actual.ranks) == len(ranks)
    assert metrics.UNRANKED in ranks
    assert actual.ranks.tolist() == ranks
    assert actual.metrics["Recall@5"] == pytest.approx(np.mean(np.array(ranks) <= 5))
    assert actual.metrics["Coverage@10"] == pytest.approx(len(set.union(*lists)) / ITEMS)
    data = split.interactions
    below = []
    for user, rank in zip(actual.users, ranks, strict=True):
        end = data.offsets[user + 1] - (2 if phase == "valid" else 1)
        candidates = ITEMS - len(set(data.items[data.offsets[user] : end].tolist()))
        is_ranked = rank != metrics.UNRANKED
        below.append((candidates - rank) / (candidates - 1) if is_ranked else 0.0)
    assert actual.metrics["AUC"] == pytest.approx(np.mean(below))


@pytest.mark.parametrize("protocol", [FULL, SAMPLED], ids=["full", "sampled"])
def test_the_batch_size_changes_nothing(
    split: Split, table: Tensor, protocol: EvalProtocol
) -> None:
    ranks = [evaluate(split, table, protocol, size).ranks.tolist() for size in (1, 7, 100)]
    assert ranks[0] == ranks[1] == ranks[2]


@pytest.mark.parametrize("protocol", [FULL, SAMPLED], ids=["full", "sampled"])
def test_a_constant_scorer_gets_no_credit(split: Split, protocol: EvalProtocol) -> None:
    actual = evaluate(split, torch.ones(ITEMS + 1, DIM), protocol)
    # The target shares its score with every item that is not masked: it stands behind them all.
    assert actual.ranks.min() >= (10 if protocol is SAMPLED else ITEMS - 14)
    assert actual.metrics["Recall@5"] == 0.0


def test_auc_among_candidates_is_the_share_of_them_below(split: Split, table: Tensor) -> None:
    actual = evaluate(split, table, SAMPLED)
    assert actual.metrics["GAUC"] == pytest.approx(np.mean((10 - actual.ranks) / 9))


def test_candidate_lists_are_fixed_by_seed_and_phase_alone(split: Split) -> None:
    test = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    lists = draw_candidates(test, SAMPLED)
    assert np.array_equal(lists, draw_candidates(test, SAMPLED))
    shorter = CachedEmbeddingEvalDataset(split, "test", 2)
    assert np.array_equal(lists, draw_candidates(shorter, SAMPLED))
    assert not np.array_equal(lists, draw_candidates(test, replace(SAMPLED, seed=1)))
    valid = draw_candidates(CachedEmbeddingEvalDataset(split, "valid", LENGTH), SAMPLED)
    assert not np.array_equal(lists[: len(valid)], valid[: len(lists)])


def test_candidates_are_distinct_items_that_the_user_never_met(split: Split) -> None:
    dataset = CachedEmbeddingEvalDataset(split, "valid", LENGTH)
    data = split.interactions
    for user, drawn in zip(dataset.segments.users, draw_candidates(dataset, SAMPLED), strict=True):
        history = set(data.items[data.offsets[user] : data.offsets[user + 1]].tolist())
        assert len(set(drawn.tolist())) == SAMPLED.candidates
        assert not history & set(drawn.tolist())
        assert drawn.min() >= 1
        assert drawn.max() <= ITEMS


def test_every_process_scores_its_own_share_once(split: Split, table: Tensor) -> None:
    dataset = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    protocol = replace(FULL, metrics=("Recall",))
    whole = evaluate(split, table, protocol).ranks
    shares = [
        Evaluator(dataset, protocol, batch_size=4, rank=rank, world_size=3) for rank in range(3)
    ]
    # What each would add to the sum over all processes.
    parts = [share.run(TableScorer(table), CPU) for share in shares]
    counts = sum((part.ranks > 0).astype(int) for part in parts)
    assert np.asarray(counts).tolist() == [1] * len(dataset)
    assert sum(part.ranks for part in parts).tolist() == whole.tolist()  # type: ignore[union-attr]


def test_padded_histories_of_a_batch_are_alike_in_length(split: Split, table: Tensor) -> None:
    dataset = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    seen: list[list[int]] = []

    class Watched(TableScorer):
        def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
            assert history.shape[1] == lengths.max()
            seen.append(lengths.tolist())
            return super().user_vectors(history, lengths)

    Evaluator(dataset, FULL, batch_size=4).run(Watched(table), CPU)
    given = (split.interactions.offsets[1:] - split.interactions.offsets[:-1] - 1).clip(max=LENGTH)
    assert min(given) < max(given)
    assert list(itertools.chain(*seen)) == sorted(given.tolist(), reverse=True)


def test_lists_are_those_of_one_user_at_a_time(split: Split, table: Tensor) -> None:
    statistics = ItemStatistics(np.arange(ITEMS + 1), np.arange(ITEMS + 1), 50)
    dataset = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    protocol = replace(FULL, metrics=("Recall",), tensor_cores=True)
    _, lists = by_hand(split, table, "test")
    expected = ListMetrics(protocol.topk, ITEMS, statistics, 20.0)
    # Only the best of all lists are sets; the metrics at 10 do not depend on their order.
    expected.add(np.array([sorted(items) for items in lists]))
    for batch_size in (5, 100):
        evaluator = Evaluator(dataset, protocol, batch_size=batch_size, statistics=statistics)
        actual = evaluator.run(TableScorer(table), CPU).metrics
        # An item's number is its popularity here.
        histories = [dataset[n][:-1].mean() for n in range(len(dataset))]
        popularity = np.mean([np.mean(list(items)) for items in lists])
        assert actual["AveragePopularity@10"] == pytest.approx(popularity)
        assert actual["PopularityLift@10"] == pytest.approx(popularity / np.mean(histories) - 1)
        for name in ("Coverage", "GiniIndex", "ShannonEntropy", "TailPercentage", "Novelty"):
            assert actual[f"{name}@10"] == pytest.approx(expected.values()[f"{name}@10"])


def test_every_list_is_counted_in_one_process(split: Split, table: Tensor) -> None:
    counts, dim = np.arange(ITEMS + 1), 3
    vectors = torch.randn(ITEMS + 1, dim, generator=torch.Generator().manual_seed(0))
    statistics = ItemStatistics(counts, counts, 50, lambda items: vectors[torch.from_numpy(items)])
    dataset = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    sent: list[list[np.ndarray]] = []

    def evaluator(rank: int, world_size: int) -> Evaluator:
        return Evaluator(
            dataset,
            replace(FULL, metrics=("Recall", "Coverage")),
            batch_size=4,
            rank=rank,
            world_size=world_size,
            statistics=statistics,
        )

    def run(rank: int, summed: list[np.ndarray]) -> Evaluation:
        sent.append([])

        def all_reduce(values: np.ndarray) -> np.ndarray:
            sent[-1].append(values.copy())
            return summed[len(sent[-1]) - 1] if summed else values

        # 23 users: two of the processes encode another's user too.
        return evaluator(rank, 3).run(TableScorer(table), CPU, all_reduce=all_reduce)

    for rank in range(3):
        run(rank, [])
    summed = [sum(parts[1:], parts[0]) for parts in zip(*sent, strict=True)]
    together = run(0, summed)
    alone = evaluator(0, 1).run(TableScorer(table), CPU)
    assert together.metrics == pytest.approx(alone.metrics)
    assert "IntraListSimilarity@5" in alone.metrics


class RowScorer(TableScorer):
    """The same users, read from single rows."""

    reads_rows = True

    def row_user_vectors(self, row: Tensor, positions: Tensor, cu_lengths: Tensor) -> Tensor:
        assert positions[0, cu_lengths[:-1][cu_lengths.diff() > 0]].eq(0).all()
        bounds = cu_lengths.tolist()
        vectors = self.table[row[0]]
        return torch.stack(
            [vectors[start:end].sum(dim=0) for start, end in itertools.pairwise(bounds)]
        )


@pytest.mark.parametrize("protocol", [FULL, SAMPLED], ids=["full", "sampled"])
def test_single_rows_give_the_same_ranks(
    split: Split, table: Tensor, protocol: EvalProtocol
) -> None:
    dataset = CachedEmbeddingEvalDataset(split, "test", LENGTH)
    evaluator = Evaluator(dataset, protocol, batch_size=8)
    rows = evaluator.run(RowScorer(table), CPU)
    padded = evaluator.run(TableScorer(table), CPU)
    assert rows.ranks.tolist() == padded.ranks.tolist()

"""Ranks with pessimistic ties, metrics by hand and against torchmetrics, intervals and tests."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import (
    RetrievalAUROC,
    RetrievalHitRate,
    RetrievalMAP,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalRecall,
)

from hsft.config.schema import PER_USER_METRICS, MetricName
from hsft.evaluator import metrics, ranking
from hsft.evaluator.intervals import (
    bootstrap_interval,
    holm,
    interval,
    paired_p_value,
    wilson_interval,
)


def full_ranks(
    scores: list[list[float]], targets: list[int], seen: list[tuple[int, int]]
) -> list[int]:
    rows = torch.tensor([row for row, _ in seen], dtype=torch.int64)
    items = torch.tensor([item for _, item in seen], dtype=torch.int64)
    table = torch.tensor(scores)
    table[:, 0] = -torch.inf
    return ranking.full_ranks(table, torch.tensor(targets), rows, items).tolist()


def test_seen_items_and_padding_do_not_outrank_the_target() -> None:
    # Item 0 is padding. Without masking the target 3 would rank third behind items 1 and 2.
    assert full_ranks([[9.0, 5.0, 4.0, 3.0, 1.0]], [3], [(0, 1)]) == [2]


def test_ties_count_against_the_model() -> None:
    assert full_ranks([[0.0, 1.0, 1.0, 1.0, 1.0]], [2], []) == [4]


def test_a_nan_counts_against_the_model() -> None:
    nan = math.nan
    assert full_ranks([[0.0, nan, nan, nan]], [1], []) == [metrics.UNRANKED]
    assert full_ranks([[0.0, 1.0, nan, 0.5]], [1], []) == [2]


def test_a_seen_target_has_no_rank() -> None:
    assert full_ranks([[0.0, 9.0, 2.0, 3.0]], [1], [(0, 1)]) == [metrics.UNRANKED]


@pytest.mark.parametrize("name", metrics.PER_USER)
@pytest.mark.parametrize("k", [1, 4, 10, 2**31 - 1])
def test_a_target_without_a_rank_is_a_miss_at_any_k(name: str, k: int) -> None:
    # The catalogue has three items, so every K from 4 on holds all of it.
    ranks = np.array(full_ranks([[0.0, 9.0, 2.0, 3.0]] * 2, [1, 1], [(0, 1)]))
    hit = 1 / k if name == "Precision" else 1.0
    assert metrics.per_user(name, ranks, k).tolist() == [0.0, hit]


def test_a_candidate_whose_score_is_nan_has_no_rank() -> None:
    users = torch.tensor([[1.0, 0.0]])
    vectors = torch.tensor([[[math.nan, 0.0], [3.0, 0.0]]])
    assert ranking.candidate_ranks(users, vectors).tolist() == [metrics.UNRANKED]


def test_candidate_ranks_by_hand() -> None:
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    vectors = torch.tensor(
        [[[2.0, 0.0], [3.0, 0.0], [1.0, 9.0]], [[0.0, 1.0], [5.0, 1.0], [0.0, 0.5]]]
    )
    assert ranking.candidate_ranks(users, vectors).tolist() == [2, 2]


def test_chunked_scores_equal_the_plain_product() -> None:
    users, items = torch.randn(3, 4), torch.randn(8, 4)
    scores = ranking.full_scores(users, lambda a, b: items[a:b], 7, items_at_a_time=3)
    torch.testing.assert_close(scores[:, 1:], (users @ items.T)[:, 1:])
    assert scores[:, 0].tolist() == [-math.inf] * 3


@pytest.mark.parametrize(
    ("dim", "budget", "device", "expected"),
    [
        (2048, 1 << 28, "cpu", 1024),
        (2048, 1 << 28, "cuda", 8192),
        (2048, 1 << 20, "cpu", 32),
        (2048, 1, "cpu", 1),
    ],
)
def test_items_prepared_at_once(dim: int, budget: int, device: str, expected: int) -> None:
    assert ranking.items_at_a_time(dim, budget, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Recall", 2 / 4),
        ("HitRate", 2 / 4),
        ("MRR", (1 + 1 / 3) / 4),
        ("MAP", (1 + 1 / 3) / 4),
        ("Precision", (1 / 3 + 1 / 3) / 4),
        ("NDCG", (1 + 0.5) / 4),
    ],
)
def test_metrics_by_hand(name: str, expected: float) -> None:
    ranks = np.array([1, 3, 4, 100])
    assert metrics.compute([name], [3], ranks)[f"{name}@3"] == pytest.approx(expected)


def test_auc_by_hand() -> None:
    # Of 4, 9, 9 and 0 others, 4, 8, 0 and none rank below; the second last target has no rank.
    ranks = np.array([1, 2, metrics.UNRANKED, 1])
    candidates = np.array([5, 10, 10, 1])
    expected = (1 + 8 / 9 + 0) / 3
    values = metrics.compute(["AUC", "Recall", "GAUC"], [1], ranks, candidates)
    assert values == {
        "AUC": pytest.approx(expected),
        "Recall@1": 0.5,
        "GAUC": pytest.approx(expected),
    }
    assert metrics.auc(ranks[3:], candidates[3:]) == 0.0


@pytest.mark.parametrize("k", [1, 5, 10])
def test_metrics_agree_with_torchmetrics(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(50, 31, generator=generator)
    targets = torch.randint(1, 31, (50,), generator=generator)
    empty = torch.zeros(0, dtype=torch.int64)
    table = scores.clone()
    table[:, 0] = -torch.inf
    ranks = ranking.full_ranks(table, targets, empty, empty).numpy()
    relevant = torch.zeros(50, 30, dtype=torch.bool)
    relevant[torch.arange(50), targets - 1] = True
    users = torch.arange(50).repeat_interleave(30)
    names = [*metrics.PER_USER, *metrics.WHOLE_RANKING]
    ours = metrics.compute(names, [k], ranks, np.full(50, 30))
    arguments = (scores[:, 1:].reshape(-1), relevant.reshape(-1), users)
    for name, theirs in (
        (f"Recall@{k}", RetrievalRecall(top_k=k)),
        (f"HitRate@{k}", RetrievalHitRate(top_k=k)),
        (f"NDCG@{k}", RetrievalNormalizedDCG(top_k=k)),
        (f"MRR@{k}", RetrievalMRR(top_k=k)),
        (f"MAP@{k}", RetrievalMAP(top_k=k)),
        (f"Precision@{k}", RetrievalPrecision(top_k=k)),
        ("AUC", RetrievalAUROC()),
        ("GAUC", RetrievalAUROC()),
    ):
        assert ours[name] == pytest.approx(theirs(*arguments).item(), abs=1e-6)


def test_no_users_is_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="no users"):
        metrics.compute(["Recall"], [5], np.array([], dtype=np.int64))


def test_precision_has_the_interval_of_recall_over_k() -> None:
    few = np.array([1, 3, 40, 60, 9])
    low, high = interval("Precision", few, 5)
    assert (5 * low, 5 * high) == pytest.approx(interval("Recall", few, 5))
    assert (5 * low, 5 * high) == pytest.approx(wilson_interval(2 / 5, 5))
    every = interval("Precision", np.ones(7, dtype=np.int64), 3)
    assert every == pytest.approx((wilson_interval(1.0, 7)[0] / 3, 1 / 3))


def test_bootstrap_interval_agrees_with_resampling_users() -> None:
    rng = np.random.default_rng(1)
    ranks = rng.integers(1, 40, size=300)
    low, high = bootstrap_interval("NDCG", ranks, 10, draws=4000)
    values = metrics.per_user("NDCG", ranks, 10)
    means = [rng.choice(values, size=300).mean() for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.004)
    assert low < values.mean() < high


def test_paired_test_by_hand() -> None:
    # Three users gain, none loses: of 8 sign patterns 2 are as extreme, p = 1/4.
    better, worse = np.array([1, 1, 1, 9]), np.array([9, 9, 9, 9])
    assert paired_p_value("Recall", better, worse, 5, draws=40_000) == pytest.approx(0.25, abs=0.01)
    assert paired_p_value("Recall", better, better, 5) == 1.0


def test_holm_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_configuration_and_metrics_agree_on_the_names() -> None:
    known = {*metrics.PER_USER, *metrics.WHOLE_RANKING, "Coverage"}
    assert known == set(get_args(MetricName))
    assert set(metrics.PER_USER) == set(PER_USER_METRICS)

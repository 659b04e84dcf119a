"""How sure a metric is: bootstrap intervals over users and paired tests between two models.

Per-user metrics depend on the target's rank alone, so users with the same rank are alike. Drawing
users with replacement is then a multinomial draw over the ranks' histogram, and flipping signs of
paired differences a binomial draw over their distinct sizes: exact, and as fast for millions of
users as for a thousand.
"""

from __future__ import annotations

import numpy as np

from hsft.evaluator.metrics import per_user

DRAWS = 10_000


def bootstrap_interval(
    name: str, ranks: np.ndarray, k: int, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a metric's mean over users (Efron 1979).

    Args:
        name: Recall, HitRate, NDCG or MRR.
        ranks: int64 [E].
        k: cut-off.
        level: coverage of the interval.
        draws: bootstrap samples.
        seed: of the draws.
    """
    clipped = np.minimum(ranks, k + 1)
    counts = np.bincount(clipped, minlength=k + 2)[1:]
    values = per_user(name, np.arange(1, k + 2), k)
    rng = np.random.default_rng(seed)
    means = rng.multinomial(len(ranks), counts / len(ranks), size=draws) @ values / len(ranks)
    tail = (1.0 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(
    name: str,
    ranks: np.ndarray,
    other: np.ndarray,
    k: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of a paired randomisation test (Fisher's sign flips).

    Under the null hypothesis the two models are exchangeable for each user, so that every
    difference is as likely with the other sign.

    Args:
        name: Recall, HitRate, NDCG or MRR.
        ranks: int64 [E], of one model.
        other: int64 [E], of the other model, the same users in the same order.
        k: cut-off.
        draws: random sign patterns; the smallest p-value is 1 / (draws + 1).
        seed: of the draws.
    """
    differences = per_user(name, ranks, k) - per_user(name, other, k)
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    rng = np.random.default_rng(seed)
    flipped = (2 * rng.binomial(counts, 0.5, size=(draws, len(counts))) - counts) @ sizes
    observed = abs(differences.sum())
    # Rounding must not turn a draw that equals the observation into a smaller one.
    extreme = int((np.abs(flipped) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + draws)

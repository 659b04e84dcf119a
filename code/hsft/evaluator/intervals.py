"""How sure a metric is: intervals over users and paired tests between two models.

Per-user metrics depend on the target's rank alone, so users with the same rank are alike. Drawing
users with replacement is then a multinomial draw over the ranks' histogram, and flipping signs of
paired differences a binomial draw over their distinct sizes: exact, and as fast for millions of
users as for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsft.evaluator.metrics import per_user

DRAWS = 10_000
# Below these the bootstrap draws too few different means: no hit at all would give [0, 0].
FEWEST_USERS = 40
FEWEST_HITS = 5
# The normal distribution's 97.5 % quantile.
_Z = 1.959963984540054


def interval(name: str, ranks: np.ndarray, k: int) -> tuple[float, float]:
    """Return a 95 % interval of a metric's mean over users, whatever their number.

    The percentile bootstrap, and Wilson's score interval where there are fewer than 40 users, or
    where fewer than 5 of them have a hit or a miss.

    Args:
        name: one of `metrics.PER_USER`.
        ranks: int64 [E].
        k: cut-off.
    """
    if needs_wilson(int((ranks <= k).sum()), len(ranks)):
        # Of values between 0 and 1: Precision is at most 1 / K.
        largest = float(per_user(name, np.ones(1, dtype=np.int64), k)[0])
        mean = float(per_user(name, ranks, k).mean())
        low, high = wilson_interval(min(mean / largest, 1.0), len(ranks))
        # At 0 and 1 rounding would leave the mean outside.
        return min(low * largest, mean), max(high * largest, mean)
    return bootstrap_interval(name, ranks, k)


def needs_wilson(hits: int, users: int) -> bool:
    """Say whether there are too few users, hits or misses for the bootstrap."""
    return users < FEWEST_USERS or not FEWEST_HITS <= hits <= users - FEWEST_HITS


def wilson_interval(mean: float, users: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927).

    For the mean of values between 0 and 1 that are not all 0 or 1, such as NDCG, it is wider than
    need be: their variance is at most that of a proportion with the same mean.

    Args:
        mean: the proportion or mean.
        users: E, at least 1.
    """
    z2 = _Z * _Z / users
    middle = (mean + z2 / 2) / (1 + z2)
    spread = _Z / (1 + z2) * np.sqrt(mean * (1 - mean) / users + z2 / (4 * users))
    # At 0 and 1 rounding would leave the mean outside.
    low, high = min(float(middle - spread), mean), max(float(middle + spread), mean)
    return max(low, 0.0), min(high, 1.0)


def bootstrap_interval(
    name: str, ranks: np.ndarray, k: int, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a metric's mean over users (Efron 1979).

    Args:
        name: one of `metrics.PER_USER`.
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
        name: one of `metrics.PER_USER`.
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests so that one below a level is rarely below it by chance.

    Holm's step-down procedure (Holm 1979): with m tests, the j-th smallest is multiplied by m - j + 1,
    at most 1 and at least the one before it. The chance that any true null hypothesis has an adjusted
    p-value below a level is at most that level, however the tests depend on each other.

    Args:
        p_values: of the tests, in any order.

    Returns:
        The adjusted ones, in the same order.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(order) - np.arange(len(order))
    stepped = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]

"""Metrics of leave-one-out ranking, where every user has one relevant item.

With one relevant item at rank r (1 is best): Recall@K and HitRate@K are 1 when r <= K; NDCG@K is
1 / log2(r + 1) when r <= K (Järvelin and Kekäläinen 2002; the ideal DCG is 1); MRR@K is 1 / r when
r <= K; all are 0 otherwise, and averaged over all users. Coverage@K is the share of the catalogue
that is in some user's top K. A target without a rank, see `UNRANKED`, counts 0 at every K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

# The rank of a target that is no candidate: it was masked as seen, or its score is not a number.
# Greater than any K, so that it is a hit nowhere, in files that others read too.
UNRANKED = int(np.iinfo(np.int64).max)
PER_USER = ("Recall", "HitRate", "NDCG", "MRR")


def per_user(name: str, ranks: np.ndarray, k: int) -> np.ndarray:
    """Return a metric's value for each user.

    Args:
        name: Recall, HitRate, NDCG or MRR.
        ranks: int64 [E], 1 is best; `UNRANKED` for a target without a rank.
        k: cut-off.

    Returns:
        float64 [E].
    """
    hit = ranks <= k
    if name in ("Recall", "HitRate"):
        return hit.astype(np.float64)
    if name == "NDCG":
        return np.where(hit, 1.0 / np.log2(ranks + 1.0), 0.0)
    if name == "MRR":
        return np.where(hit, 1.0 / ranks, 0.0)
    raise ValueError(f"{name} is not a per-user metric")


def compute(names: Iterable[str], topk: Sequence[int], ranks: np.ndarray) -> dict[str, float]:
    """Average per-user metrics: `{"Recall@5": ..., ...}`; metrics that are not per-user are skipped.

    Raises:
        ValueError: there are no users.
    """
    if not len(ranks):
        raise ValueError("there are no users to average over")
    return {
        f"{name}@{k}": float(per_user(name, ranks, k).mean())
        for name in names
        if name in PER_USER
        for k in topk
    }

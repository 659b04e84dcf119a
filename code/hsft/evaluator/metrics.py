"""Metrics of leave-one-out ranking, where every user has one relevant item.

With one relevant item at rank r (1 is best): Recall@K and HitRate@K are 1 when r <= K; NDCG@K is
1 / log2(r + 1) when r <= K (Järvelin and Kekäläinen 2002; the ideal DCG is 1); MRR@K is 1 / r when
r <= K, and so is MAP@K, the precision at the one relevant item; Precision@K is 1 / K when r <= K; all
are 0 otherwise, and averaged over all users. AUC (Rendle et al. 2009) is the share of a user's other
candidates that rank below the target, averaged over users. GAUC (Zhou et al. 2018), which weighs
users by their number of targets, is the same. Coverage@K is the share of the catalogue that is in
some user's top K. A target without a rank, see `UNRANKED`, counts 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

# The rank of a target that is no candidate: it was masked as seen, or its score is not a number.
# Greater than any K, so that it is a hit nowhere, in files that others read too.
UNRANKED = int(np.iinfo(np.int64).max)
PER_USER = ("Recall", "HitRate", "NDCG", "MRR", "MAP", "Precision")
# Of the whole ranking, without a K.
WHOLE_RANKING = ("AUC", "GAUC")


def per_user(name: str, ranks: np.ndarray, k: int) -> np.ndarray:
    """Return a metric's value for each user.

    Args:
        name: one of `PER_USER`.
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
    if name in ("MRR", "MAP"):
        return np.where(hit, 1.0 / ranks, 0.0)
    if name == "Precision":
        return np.where(hit, 1.0 / k, 0.0)
    raise ValueError(f"{name} is not a per-user metric")


def auc(ranks: np.ndarray, candidates: np.ndarray) -> float:
    """Average over users the share of the other candidates that rank below the target.

    The area under each user's ROC curve, except that ties, which count against the model, are not
    halved. Users whose target is the only candidate are left out.

    Args:
        ranks: int64 [E], 1 is best; `UNRANKED` counts 0.
        candidates: int64 [E], how many items each user's target was ranked among, itself included.

    Returns:
        The mean; 0 where no user has another candidate.
    """
    others = candidates - 1
    below = np.where(ranks <= candidates, candidates - ranks, 0)
    counted = others > 0
    return float((below[counted] / others[counted]).mean()) if counted.any() else 0.0


def compute(
    names: Iterable[str],
    topk: Sequence[int],
    ranks: np.ndarray,
    candidates: np.ndarray | None = None,
) -> dict[str, float]:
    """Average metrics over users: `{"Recall@5": ..., "AUC": ...}`.

    Args:
        names: metrics; those that ranks do not tell are skipped.
        topk: cut-offs.
        ranks: int64 [E], 1 is best.
        candidates: int64 [E], as for `auc`; without them AUC and GAUC are skipped.

    Raises:
        ValueError: there are no users.
    """
    if not len(ranks):
        raise ValueError("there are no users to average over")
    values = {}
    for name in names:
        if name in PER_USER:
            values.update({f"{name}@{k}": float(per_user(name, ranks, k).mean()) for k in topk})
        elif name in WHOLE_RANKING and candidates is not None:
            values[name] = auc(ranks, candidates)
    return values

"""Training losses on user vectors and item vectors.

Shapes: T scored positions, P negatives in a shared pool, I items in the catalogue, D dimensions.
All losses compute logits in float32 whatever dtype comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = math.log(100)


def normalize(vectors: Tensor) -> Tensor:
    """Scale rows to unit length in float32; a zero row stays zero. Shape is kept."""
    return F.normalize(vectors.float(), dim=-1)


def info_nce(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    logit_scale: Tensor,
    nce_thres: float = 0.99,
    excluded: Tensor | None = None,
    budget_bytes: int = 1 << 28,
) -> Tensor:
    """HLLM's InfoNCE (arXiv 2409.12740, eq. 2 and its public code).

    Mean over positions of -log softmax of the positive among itself and the pool, with logits
    exp(logit_scale) * cosine. A pool item whose cosine with the positive exceeds `nce_thres`
    is taken for the positive itself and masked for that position.

    Args:
        queries: [T, D] user vectors.
        positives: [T, D] item vectors of the next items.
        pool: [P, D] item vectors of the negatives.
        logit_scale: scalar, log of the factor; the caller keeps it in [0, ln 100].
        nce_thres: cosine above which a negative is masked.
        excluded: bool [T, P] further (position, negative) pairs to mask, or None.
        budget_bytes: largest [block, P] float32 matrix held at once; larger ones are computed in
            blocks of positions and recomputed in the backward pass.

    Returns:
        Scalar float32; 0 when T is 0.
    """
    queries, positives, pool = normalize(queries), normalize(positives), normalize(pool)

    def block(q: Tensor, p: Tensor, pool: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        with torch.no_grad():
            masked = p @ pool.T > nce_thres
            if out is not None:
                masked |= out
        negative = ((q @ pool.T) * scale.exp()).masked_fill(masked, -torch.inf)
        positive = (q * p).sum(dim=-1, keepdim=True) * scale.exp()
        logits = torch.cat([positive, negative], dim=-1)
        return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.long), reduction="sum")

    return _sum_in_blocks(
        block, (queries, positives), (pool, logit_scale), excluded, len(pool) * 3, budget_bytes
    ) / max(len(queries), 1)


def catalogue_softmax(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    *,
    cosine: bool = True,
    budget_bytes: int = 1 << 28,
) -> Tensor:
    """Softmax cross-entropy of the next item against every item of the catalogue.

    Args:
        queries: [T, D] user vectors.
        items: [I, D] item vectors.
        targets: int64 [T], index into `items` of the next item.
        logit_scale: scalar, log of the factor on the scores.
        cosine: score by cosine; else by dot product.
        budget_bytes: largest [block, I] float32 matrix held at once; larger ones are computed in
            blocks of positions and recomputed in the backward pass.

    Returns:
        Scalar float32, the mean over positions; 0 when T is 0.
    """
    queries, items = (
        (normalize(queries), normalize(items)) if cosine else (queries.float(), items.float())
    )

    def block(q: Tensor, t: Tensor, items: Tensor, scale: Tensor, _: Tensor | None) -> Tensor:
        return F.cross_entropy((q * scale.exp()) @ items.T, t, reduction="sum")

    return _sum_in_blocks(
        block, (queries, targets), (items, logit_scale), None, len(items) * 2, budget_bytes
    ) / max(len(queries), 1)


def binary_cross_entropy(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    excluded: Tensor | None = None,
    budget_bytes: int = 1 << 28,
) -> Tensor:
    """The published HSFT's loss: BCEWithLogits on dot products, label 1 for the positive.

    Args:
        queries: [T, D] user vectors.
        positives: [T, D] item vectors of the next items.
        pool: [P, D] item vectors of the negatives, label 0.
        excluded: bool [T, P], (position, negative) pairs that do not count, such as a negative
            that is the positive itself; or None.
        budget_bytes: as for `info_nce`.

    Returns:
        Scalar float32: the mean over all (position, item) pairs that count; 0 when T is 0.
    """
    queries, positives, pool = queries.float(), positives.float(), pool.float()

    def block(q: Tensor, p: Tensor, pool: Tensor, _: Tensor, out: Tensor | None) -> Tensor:
        positive = F.softplus(-(q * p).sum(dim=-1)).sum()
        negative = F.softplus(q @ pool.T)
        return positive + (negative if out is None else negative.masked_fill(out, 0.0)).sum()

    pairs = len(queries) * (1 + len(pool)) - (0 if excluded is None else int(excluded.sum()))
    return _sum_in_blocks(
        block,
        (queries, positives),
        (pool, pool.new_zeros(())),
        excluded,
        len(pool) * 2,
        budget_bytes,
    ) / max(pairs, 1)


def _sum_in_blocks(
    block: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    excluded: Tensor | None,
    floats_per_row: int,
    budget_bytes: int,
) -> Tensor:
    """Sum `block` over blocks of rows that keep its intermediate values within the budget."""
    count = len(rows[0])
    size = max(1, budget_bytes // max(1, floats_per_row * 4))
    if count <= size:
        return block(*rows, *shared, excluded)
    total = rows[0].new_zeros(())
    for start in range(0, count, size):
        part = tuple(row[start : start + size] for row in rows)
        out = None if excluded is None else excluded[start : start + size]
        total = total + checkpoint(block, *part, *shared, out, use_reentrant=False)
    return total

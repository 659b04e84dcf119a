"""Ranks from products on tensor cores, with exact scores for the items that these cannot place.

All scores are computed from vectors rounded to TF32. An item whose score differs from the target's by
more than twice the error bound stands on the same side of it as in exact arithmetic; the others, of
which there are few where targets rank well, are scored again in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.evaluator.metrics import UNRANKED
from hsft.evaluator.ranking import ItemSlice, count_true

# Share of all scores above which scoring them again costs more than it saves: a pair moves some 50
# bytes a dimension through memory, while a float32 product computes 2 operations a dimension.
_MOST_UNSURE = 1 / 256
# As many a user are always scored again.
_FEW = 64
# Pairs that are scored again at once.
_PAIRS = 2048
# Above this, scores could overflow to infinity.
_LARGEST_PRODUCT = 1e37

Product = Callable[[Tensor, Tensor], Tensor]


def to_tf32(values: Tensor) -> Tensor:
    """Round float32 numbers to TF32's 10 explicit bits of mantissa, to nearest, ties to even.

    What is so rounded stays as it is in a TF32 product, whether the hardware rounds or truncates.
    """
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def tf32_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply float32 [n, D] and [D, m], on CUDA with TF32's tensor cores.

    Elsewhere it is a float32 product, whose error is smaller.
    """
    if not left.is_cuda:
        return left @ right
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


def accumulation_error(dim: int) -> float:
    """Return gamma of `error_bound` for vectors of D dimensions."""
    return (dim + 4) * 2.0**-22


def error_bound(users: Tensor, item_error: Tensor, item_norm: Tensor) -> Tensor:
    """Bound how far a TF32 score is from the exact product of the float32 vectors.

    Let u and v be the vectors, u' and v' the same rounded by `to_tf32`, and s the computed product.
    Then

        |s - u.v| <= |u'.(v' - v)| + |(u' - u).v| + |s - u'.v'|
                  <= ||u'|| ||v' - v|| + ||u' - u|| ||v|| + gamma ||u'|| ||v'||.

    The first two terms are Cauchy and Schwarz's inequality. For the third, a product of two TF32
    numbers has 22 significant bits and is exact in float32, so that only additions err. An
    instruction of a tensor core adds n such products to the accumulator: it aligns these n + 1
    numbers to the largest, drops what is below 2^-23 of it, and drops as much again when it
    normalises the sum (Fasi, Higham, Mikaitis and Pranesh 2021, Numerical behavior of NVIDIA tensor
    cores). That is at most (n + 2) 2^-23 sum_k |u'_k v'_k| each time, D / n times, which for n >= 2
    is at most D 2^-22 ||u'|| ||v'||; additions rounded one by one in float32 err by half of it. The
    4 in gamma = (D + 4) 2^-22 covers the rounding of the bound itself, of the differences of scores
    that it is compared with, and of the exact scores to float32; the factor 1 + gamma covers the
    norms, which are computed in float32.

    Args:
        users: float32 [b, D], u.
        item_error: float32 [], the largest ||v' - v|| + gamma ||v'|| of an item.
        item_norm: float32 [], the largest ||v||.

    Returns:
        float32 [b].
    """
    gamma = accumulation_error(users.shape[1])
    rounded = to_tf32(users)
    error = rounded.norm(dim=1) * item_error + (rounded - users).norm(dim=1) * item_norm
    # What underflows in products is lost whatever its share.
    return (1 + gamma) * error + users.shape[1] * 2.0**-120


def tensor_core_ranks(
    users: Tensor,
    item_slice: ItemSlice,
    num_items: int,
    targets: Tensor,
    seen: tuple[Tensor, Tensor],
    *,
    items_at_a_time: int,
    budget_bytes: int,
    out: Tensor | None = None,
    product: Product = tf32_product,
) -> Tensor | None:
    """Rank each user's target among all items that the user has not seen, as `ranking.full_ranks`.

    The ranks are those of the exact scores rounded to float32: an item is above the target unless
    its score, computed in float64 and rounded, is below the target's. They differ from those of
    float32 products for items only that float32 rounding alone puts above or below the target.

    Args:
        users: float32 [b, D].
        item_slice: (start, end) -> float32 [end - start, D] vectors of those item numbers; the same
            for the same numbers.
        num_items: I.
        targets: int64 [b].
        seen: rows and columns of the items to mask, int64 [n] each.
        items_at_a_time: item vectors held at once.
        budget_bytes: of the pairs of vectors that are held at once.
        out: float32 [at least b, I + 1], as for `ranking.full_scores`.
        product: computes [n, D] times [D, m], within the error bound.

    Returns:
        int64 [b]; None where the vectors hold numbers too large or NaN, or where too many items lie
        within the bound: float32 products are then simpler or faster.
    """
    scores = users.new_empty((len(users), num_items + 1)) if out is None else out[: len(users)]
    gamma = accumulation_error(users.shape[1])
    rounded_users = to_tf32(users)
    item_error, item_norm = users.new_zeros(()), users.new_zeros(())
    starts = range(0, num_items + 1, items_at_a_time)
    for start in starts:
        end = min(start + items_at_a_time, num_items + 1)
        vectors = item_slice(start, end)
        rounded = to_tf32(vectors)
        scores[:, start:end] = product(rounded, rounded_users.T).T
        errors = (rounded - vectors).norm(dim=1) + gamma * rounded.norm(dim=1)
        item_error = torch.maximum(item_error, errors.max())
        item_norm = torch.maximum(item_norm, vectors.norm(dim=1).max())
    scores[:, PAD] = -torch.inf
    scores[seen] = -torch.inf
    target_scores = scores.gather(1, targets.unsqueeze(1))
    width = 2 * error_bound(users, item_error, item_norm).unsqueeze(1)
    differences = scores.sub_(target_scores)
    # A masked target has no differences within a width, and no rank.
    unsure = (differences <= width) & (differences >= -width)
    small = (users.norm(dim=1) * item_norm < _LARGEST_PRODUCT).all() & width.isfinite().all()
    # The one time that the host waits for the device, but for what follows from it.
    count, is_small = torch.stack([unsure.sum(), small.long()]).tolist()
    if not is_small or count > max(_MOST_UNSURE * scores.numel(), _FEW * len(users)):
        return None
    above = count_true(differences > width)
    rows, items = unsure.nonzero(as_tuple=True)
    exact = _exact_scores(users, item_slice, rows, items, starts, num_items, budget_bytes)
    is_target = items == targets[rows]
    target_exact = users.new_full((len(users),), torch.nan)
    target_exact[rows[is_target]] = exact[is_target]
    not_below = (exact >= target_exact[rows]).long()
    ranks = above.index_add(0, rows, not_below)
    return ranks.masked_fill(target_scores.squeeze(1) == -torch.inf, UNRANKED)


def _exact_scores(
    users: Tensor,
    item_slice: ItemSlice,
    rows: Tensor,
    items: Tensor,
    starts: range,
    num_items: int,
    budget_bytes: int,
) -> Tensor:
    """Score pairs of a user, int64 [n], and an item, int64 [n]: float32 [n], from float64 products."""
    by_item = items.argsort(stable=True)
    firsts = torch.tensor([*starts, num_items + 1], device=items.device)
    bounds = torch.searchsorted(items[by_item], firsts).tolist()
    at_a_time = max(1, min(_PAIRS, budget_bytes // (32 * users.shape[1])))
    exact = users.new_empty(len(rows))
    for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
        if first == last:
            continue
        vectors = item_slice(start, min(start + starts.step, num_items + 1))
        for begin in range(first, last, at_a_time):
            chosen = by_item[begin : min(begin + at_a_time, last)]
            # As many pairs each time: the order of a sum's additions depends on their number on some
            # devices, and equal vectors must have equal scores.
            filled = torch.cat([chosen, chosen[:1].expand(at_a_time - len(chosen))])
            pairs = users[rows[filled]].double() * vectors[items[filled] - start].double()
            exact[chosen] = pairs.sum(dim=1)[: len(chosen)].float()
    return exact

"""Where the held-out item ranks, among the whole catalogue or among drawn candidates.

Ties count against the model: an item that scores the same as the target is ranked above it, so a
scorer that gives every item the same score gets no credit. Target and rivals are read from one
score matrix, so that equal items get equal scores whatever the rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.evaluator.metrics import UNRANKED

ItemSlice = Callable[[int, int], Tensor]

# 8 MB of float32 vectors at 2,048 dimensions. Larger pieces leave the processor's caches, and the C
# library's allocator then asks the system for fresh pages again and again.
_ITEMS_IN_CACHE = 1024


def full_scores(
    users: Tensor,
    item_slice: ItemSlice,
    num_items: int,
    items_at_a_time: int = 8192,
    out: Tensor | None = None,
) -> Tensor:
    """Score every item for every user.

    Args:
        users: [b, D] float32.
        item_slice: (start, end) -> float32 [end - start, D] vectors of those item numbers.
        num_items: I.
        items_at_a_time: item vectors held at once.
        out: float32 [at least b, I + 1] to write into, so that one matrix serves all users; a new
            one when None.

    Returns:
        float32 [b, I + 1]; the padding item's column is -inf.
    """
    scores = users.new_empty((len(users), num_items + 1)) if out is None else out[: len(users)]
    for start in range(0, num_items + 1, items_at_a_time):
        end = min(start + items_at_a_time, num_items + 1)
        # Items times users: the CPU's matrix product is a quarter slower the other way round.
        # `contiguous` turns it in blocks, which writing into a slice of `scores` would not.
        scores[:, start:end] = (item_slice(start, end) @ users.T).T.contiguous()
    scores[:, PAD] = -torch.inf
    return scores


def full_ranks(scores: Tensor, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
    """Rank each user's target among all items that the user has not seen.

    A target that the user has seen is masked like any seen item and has no rank.

    Args:
        scores: float32 [b, I + 1] from `full_scores`; seen entries are overwritten with -inf.
        targets: int64 [b].
        seen_rows: int64 [n], rows of the entries to mask.
        seen_items: int64 [n], columns of the entries to mask.

    Returns:
        int64 [b], 1 is best, `UNRANKED` where the target is masked or its score is NaN. A NaN among
        the other items counts against the model.
    """
    rows = torch.arange(len(targets), device=scores.device)
    scores[seen_rows, seen_items] = -torch.inf
    target_scores = scores[rows, targets].unsqueeze(1)
    # "not below" instead of "at least": a NaN on either side then counts against the model. The
    # target itself is among them, which makes the best rank 1.
    return _ranks(scores.shape[1] - count_true(scores < target_scores), target_scores)


def candidate_ranks(users: Tensor, candidates: Tensor) -> Tensor:
    """Rank each user's target among drawn candidates.

    Args:
        users: [b, D] float32.
        candidates: [b, 1 + C, D] float32 item vectors, the target first.

    Returns:
        int64 [b], 1 is best, 1 + C worst; `UNRANKED` where the target's score is NaN.
    """
    return ranks_of_first(candidate_scores(users, candidates))


def candidate_scores(users: Tensor, candidates: Tensor) -> Tensor:
    """Score each user's candidates: float32 [b, D] and [b, 1 + C, D] -> [b, 1 + C]."""
    return torch.einsum("bd,bcd->bc", users, candidates)


def ranks_of_first(scores: Tensor) -> Tensor:
    """Rank the first of each user's candidates, the target: float32 [b, 1 + C] -> int64 [b]."""
    return _ranks(scores.shape[1] - (scores < scores[:, :1]).sum(dim=1), scores[:, :1])


def _ranks(not_below: Tensor, target_scores: Tensor) -> Tensor:
    """Replace the ranks of targets whose score, float32 [b, 1], is -inf or NaN by `UNRANKED`."""
    return not_below.masked_fill(~(target_scores.squeeze(1) > -torch.inf), UNRANKED)


def count_true(mask: Tensor) -> Tensor:
    """Count each row's True entries: bool [b, n] -> int64 [b].

    On the CPU numpy counts bytes with vector instructions; torch's sum converts each entry to an
    int64 first, which takes longer than a top-k of the same scores.
    """
    if mask.device.type != "cpu":
        return mask.sum(dim=1)
    return torch.tensor([np.count_nonzero(row) for row in mask.numpy()], dtype=torch.int64)


def users_at_a_time(num_items: int, budget_bytes: int, dim: int = 0) -> int:
    """Return how many users' vectors and scores over I + 1 items fit in a budget: at least 1."""
    return max(1, budget_bytes // (4 * (num_items + 1 + dim)))


def items_at_a_time(dim: int, budget_bytes: int, device: torch.device) -> int:
    """Return how many item vectors to prepare at once: at least 1.

    As many as fit in a quarter of the budget, since normalising them holds a copy or two beside
    them; on the CPU no more than its caches hold between normalising and scoring.
    """
    fitting = max(1, budget_bytes // (16 * dim))
    return min(fitting, _ITEMS_IN_CACHE) if device.type == "cpu" else fitting

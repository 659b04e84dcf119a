"""The best items for given histories: what evaluation ranks, seen from the user's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.data.time_fields import ItemTimes
from hsft.evaluator import ranking
from hsft.evaluator.evaluator import Scorer
from hsft.evaluator.user_vectors import encode_users


@dataclass(frozen=True)
class Recommendations:
    """The best items of B users, best first.

    Attributes:
        items: int64 [B, K], item numbers; 0 (the padding item) once a user's items run out.
        scores: float32 [B, K], as the model ranks by: cosines or dot products; -inf beside 0.
    """

    items: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def recommend(
    scorer: Scorer,
    histories: Sequence[np.ndarray],
    *,
    topk: int,
    max_length: int,
    device: torch.device,
    exclude_seen: bool = True,
    batch_size: int = 256,
    budget_bytes: int = 1 << 28,
    times: Sequence[np.ndarray] | None = None,
    of_next: bool = False,
    raw_times: bool = False,
) -> Recommendations:
    """Score the whole catalogue for each history and keep the best items.

    Args:
        scorer: the model, in evaluation mode.
        histories: item numbers of each user, oldest first, at least one; the model reads the last
            `max_length`.
        topk: K; cut to the catalogue's size.
        max_length: `Config.eval_list_length`.
        device: where the model is.
        exclude_seen: leave out every item of the history, as full ranking does.
        batch_size: users encoded at a time.
        budget_bytes: largest score matrix held at once.
        times: for a model that reads times, int64 [n + 1] of each history of n items: seconds since
            1970 of its items and, last, of the request.
        of_next: whether the model reads the request's time.
        raw_times: whether it reads seconds, not their fields, see `ItemTimes`.
    """
    topk = min(topk, scorer.num_items)
    starts = np.cumsum([0, *(len(history) for history in histories)])
    flat = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
    item_times = None if times is None else ItemTimes(np.concatenate(times), of_next, raw_times)
    parts = [
        _best(scorer, flat, starts[first : first + batch_size + 1], topk, max_length, device,
              exclude_seen, budget_bytes, item_times, first)
        for first in range(0, len(histories), batch_size)
    ]  # fmt: skip
    items = torch.cat([part[0] for part in parts]).numpy(force=True)
    scores = torch.cat([part[1] for part in parts]).numpy(force=True)
    return Recommendations(np.where(scores > -np.inf, items, PAD), scores)


def _best(
    scorer: Scorer,
    flat: np.ndarray,
    bounds: np.ndarray,
    topk: int,
    max_length: int,
    device: torch.device,
    exclude_seen: bool,
    budget_bytes: int,
    times: ItemTimes | None,
    first_history: int,
) -> tuple[Tensor, Tensor]:
    starts, ends = bounds[:-1], bounds[1:]
    vectors = encode_users(
        scorer,
        flat,
        starts,
        ends,
        max_length=max_length,
        device=device,
        times=times,
        # Every history before has one time more than items.
        time_shifts=first_history + np.arange(len(starts)),
    )
    dim = vectors.shape[1]
    size = ranking.users_at_a_time(scorer.num_items, budget_bytes, dim)
    seen = torch.from_numpy(flat[starts[0] : ends[-1]]).to(device)
    owner = torch.from_numpy(np.repeat(np.arange(len(starts)), ends - starts)).to(device)
    items, scores = [], []
    for first in range(0, len(vectors), size):
        matrix = ranking.full_scores(
            vectors[first : first + size],
            scorer.item_slice,
            scorer.num_items,
            ranking.items_at_a_time(dim, budget_bytes, device),
        )
        if exclude_seen:
            in_block = (owner >= first) & (owner < first + size)
            matrix[owner[in_block] - first, seen[in_block]] = -torch.inf
        best = matrix.topk(topk, dim=1)
        items.append(best.indices)
        scores.append(best.values)
    return torch.cat(items), torch.cat(scores)

"""Rank the catalogue for many requests in one forward pass, each with candidates of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hsft.data.time_fields import ItemTimes
from hsft.evaluator import ranking
from hsft.evaluator.evaluator import Scorer
from hsft.evaluator.user_vectors import encode_users
from hsft.finished.item_index import IndexedScorer
from hsft.model.losses import normalize

# Diversified lists are chosen from this many times as many of the best items.
_POOL = 10


@dataclass(frozen=True)
class ListQuery:
    """A request for a list of items.

    Attributes:
        topk: items at most.
        history: int64 [n] item numbers, oldest first, at least one; for `rank_similar` the one item
            that others are compared with.
        times: int64 [n + 1], seconds since 1970 of the history and, last, of the request, for a
            model that reads times.
        excluded: int64 [m], items that are no candidates.
        allowed: int64 [k], the only items that are candidates; None: all.
        diversity: weight of unlikeness, 0 to 1, see `diversify`.
        find: an item whose rank is asked for.
    """

    topk: int
    history: np.ndarray
    times: np.ndarray | None = None
    excluded: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    allowed: np.ndarray | None = None
    diversity: float = 0.0
    find: int | None = None


@dataclass(frozen=True)
class Ranked:
    """The items of a list, best first.

    Attributes:
        items: int64 [K], item numbers.
        scores: float32 [K].
        candidates: number of items that could have been in it.
        rank: of `ListQuery.find` by its score, which items of the same score come before; None where it
            is no candidate or none was asked for.
    """

    items: np.ndarray
    scores: np.ndarray
    candidates: int
    rank: int | None = None


@torch.no_grad()
def rank_for_histories(
    scorer: Scorer,
    queries: Sequence[ListQuery],
    *,
    max_length: int,
    device: torch.device,
    batch_size: int,
    budget_bytes: int,
    of_next: bool = False,
    raw_times: bool = False,
) -> list[Ranked]:
    """Rank items by a model's scores for histories.

    Args:
        scorer: the model, in evaluation mode; one with an index searches it for requests that
            neither filter nor ask for a rank.
        queries: the lists; all of them have times where the model reads times.
        max_length: `Config.eval_list_length`; the model reads as many of a history's last items.
        device: where the model is.
        batch_size: histories in one forward pass.
        budget_bytes: largest score matrix held at once.
        of_next: whether the model reads the request's time.
        raw_times: whether it reads seconds, not their fields, see `ItemTimes`.
    """
    ranked: list[Ranked] = []
    for first in range(0, len(queries), batch_size):
        part = queries[first : first + batch_size]
        vectors = _encode(scorer, part, max_length, device, of_next, raw_times)
        answers: list[Ranked | None] = [None] * len(part)
        if isinstance(scorer, IndexedScorer):
            answers = _search_index(scorer, vectors, part)
        rows = [row for row, answer in enumerate(answers) if answer is None]
        asked = [part[row] for row in rows]
        for row, one in zip(
            rows, _rank(scorer, vectors[rows], asked, budget_bytes, unit=False), strict=True
        ):
            answers[row] = one
        ranked += [answer for answer in answers if answer is not None]
    return ranked


@torch.no_grad()
def rank_similar(
    scorer: Scorer, queries: Sequence[ListQuery], *, device: torch.device, budget_bytes: int
) -> list[Ranked]:
    """Rank items by the cosine of their vectors to an item's, which is no candidate itself.

    Args:
        scorer: the model, in evaluation mode.
        queries: the lists; each history is one item.
        device: where the model is.
        budget_bytes: largest score matrix held at once.
    """
    items = torch.from_numpy(np.array([int(query.history[0]) for query in queries], dtype=np.int64))
    vectors = normalize(scorer.item_vectors(items.to(device)))
    return _rank(scorer, vectors, queries, budget_bytes, unit=True)


def diversify(
    relevance: np.ndarray, vectors: np.ndarray, topk: int, diversity: float
) -> np.ndarray:
    """Choose items by maximal marginal relevance (Carbonell and Goldstein 1998).

    Each step takes the item of the highest `(1 - d) r - d s`: r is its relevance, scaled to [0, 1]
    over the items given, and s its highest cosine to an item taken before.

    Args:
        relevance: float [n], highest first.
        vectors: float [n, D], of unit length.
        topk: items to choose.
        diversity: d, 0 to 1.

    Returns:
        int64 [min(topk, n)], positions in the order chosen; the first is 0.
    """
    spread = float(relevance.max() - relevance.min())
    scaled = (relevance - relevance.min()) / spread if spread > 0 else np.zeros(len(relevance))
    cosines = vectors @ vectors.T
    nearest = np.full(len(relevance), -1.0)
    left = np.ones(len(relevance), dtype=bool)
    chosen = []
    for _ in range(min(topk, len(relevance))):
        gain = np.where(left, (1 - diversity) * scaled - diversity * nearest, -np.inf)
        best = int(gain.argmax())
        chosen.append(best)
        left[best] = False
        nearest = np.maximum(nearest, cosines[best])
    return np.array(chosen, dtype=np.int64)


def _encode(
    scorer: Scorer,
    queries: Sequence[ListQuery],
    max_length: int,
    device: torch.device,
    of_next: bool,
    raw_times: bool,
) -> Tensor:
    """Encode the histories of queries: float32 [B, D]."""
    lengths = np.array([len(query.history) for query in queries])
    ends = np.cumsum(lengths)
    times = None
    if getattr(scorer, "reads_times", False):
        seconds = [query.times for query in queries if query.times is not None]
        times = ItemTimes(np.concatenate(seconds), of_next, raw_times)
    return encode_users(
        scorer,
        np.concatenate([query.history for query in queries]).astype(np.int64),
        ends - lengths,
        ends,
        max_length=max_length,
        device=device,
        times=times,
        # Every history before has one time more than items.
        time_shifts=np.arange(len(queries)),
    )


def _search_index(
    scorer: IndexedScorer, vectors: Tensor, queries: Sequence[ListQuery]
) -> list[Ranked | None]:
    """Search an index for queries that it can answer; None for the others."""
    answers: list[Ranked | None] = [None] * len(queries)
    rows = [
        row
        for row, query in enumerate(queries)
        if query.allowed is None
        and query.find is None
        and scorer.can_answer([query.excluded], _pool(query), exclude_seen=True)
    ]
    if not rows:
        return answers
    pool = min(max(_pool(queries[row]) for row in rows), scorer.num_items)
    excluded = [queries[row].excluded for row in rows]
    best, whole = scorer.index.best(vectors[rows].numpy(force=True), pool, excluded)
    for place, row in enumerate(rows):
        if whole[place]:
            left = scorer.num_items - len(np.unique(excluded[place]))
            count = min(_pool(queries[row]), left)
            numbers, relevance = best.items[place, :count], best.scores[place, :count]
            answers[row] = _choose(
                scorer, vectors.device, queries[row], numbers, relevance, left, None
            )
    return answers


def _rank(
    scorer: Scorer, vectors: Tensor, queries: Sequence[ListQuery], budget_bytes: int, *, unit: bool
) -> list[Ranked]:
    """Rank items by dot products with [B, D] vectors; `unit`: with the items' vectors normalised."""

    def unit_slice(start: int, end: int) -> Tensor:
        return normalize(scorer.item_slice(start, end))

    dim = vectors.shape[1]
    size = ranking.users_at_a_time(scorer.num_items, budget_bytes, dim)
    at_a_time = ranking.items_at_a_time(dim, budget_bytes, vectors.device)
    item_slice = unit_slice if unit else scorer.item_slice
    ranked: list[Ranked] = []
    for first in range(0, len(queries), size):
        part = queries[first : first + size]
        block = vectors[first : first + size]
        scores = ranking.full_scores(block, item_slice, scorer.num_items, at_a_time)
        ranked += _best(scorer, scores, part)
    return ranked


def _best(scorer: Scorer, scores: Tensor, queries: Sequence[ListQuery]) -> list[Ranked]:
    """Return the best of each row of [b, I + 1] scores, which are overwritten."""
    device, items = scores.device, scores.shape[1] - 1
    rows = np.repeat(np.arange(len(queries)), [len(query.excluded) for query in queries])
    columns = np.concatenate([query.excluded for query in queries])
    index = torch.from_numpy(np.stack([rows, columns]).astype(np.int64)).to(device)
    scores[index[0], index[1]] = -torch.inf
    for row, query in enumerate(queries):
        if query.allowed is not None:
            kept = torch.from_numpy(query.allowed).to(device)
            kept_scores = scores[row, kept]
            scores[row] = -torch.inf
            scores[row, kept] = kept_scores
    sought = torch.tensor([query.find or 0 for query in queries], device=device).unsqueeze(1)
    score = scores.gather(1, sought)
    # One copy to the host: how many candidates, the rank, and whether there is one.
    masks = (scores > -torch.inf, scores >= score, score > -torch.inf)
    counts = torch.stack([mask.sum(dim=1) for mask in masks]).numpy(force=True)
    pools = [min(_pool(query), items) for query in queries]
    best = scores.topk(max(pools), dim=1)
    indices, values = best.indices.numpy(force=True), best.values.numpy(force=True)
    ranked = []
    for row, (query, pool) in enumerate(zip(queries, pools, strict=True)):
        candidates, rank, in_list = counts[:, row].tolist()
        count = min(pool, candidates)
        has_rank = in_list and query.find is not None
        numbers, relevance = indices[row, :count], values[row, :count]
        place = rank if has_rank else None
        ranked.append(_choose(scorer, device, query, numbers, relevance, candidates, place))
    return ranked


def _choose(
    scorer: Scorer,
    device: torch.device,
    query: ListQuery,
    numbers: np.ndarray,
    relevance: np.ndarray,
    candidates: int,
    rank: int | None,
) -> Ranked:
    """Choose a list from the best items, int64 [n], and their scores."""
    chosen = np.arange(min(query.topk, len(numbers)))
    if query.diversity > 0 and len(numbers):
        items = torch.from_numpy(np.ascontiguousarray(numbers))
        unit = normalize(scorer.item_vectors(items.to(device))).numpy(force=True)
        chosen = diversify(relevance, unit, query.topk, query.diversity)
    return Ranked(numbers[chosen], relevance[chosen], candidates, rank)


def _pool(query: ListQuery) -> int:
    return query.topk * (_POOL if query.diversity > 0 else 1)

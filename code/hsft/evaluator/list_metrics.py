"""Metrics of the lists that a model recommends, whether or not they hold the target.

Each is over the K best items of every evaluated user, seen items left out. Let n_i be in how many
lists item i is, N the sum of all n_i, I the number of items, and f_i how many training interactions
are with item i.

- Coverage: the share of items with n_i > 0 (Ge, Delgado-Battenfeld and Jannach 2010).
- GiniIndex: sum_j (2 j - I - 1) n_(j) / (I N) with n_(1) <= ... <= n_(I): 0 where all items are listed
  equally often, (I - 1) / I where one item is all lists (Gini 1912).
- ShannonEntropy: -sum_i (n_i / N) ln (n_i / N), in nats; ln I at most.
- AveragePopularity: sum_i n_i f_i / N (Yin et al. 2012).
- TailPercentage: the share of N that is tail items, or items that are never in training
  (Abdollahpouri, Burke and Mobasher 2019); `popularity_classes` says what the tail is.
- Novelty: sum_i n_i -log2 (u_i / U) / N, the mean self-information in bits, with u_i of U users having
  item i in their training items (Zhou et al. 2010). An item that nobody has counts as of one user.
- PopularityLift: AveragePopularity relative to the mean, over users, of the mean f of a user's
  history, less 1 (Abdollahpouri et al. 2020): above 0 lists are more popular than what users chose.
- IntraListSimilarity: the mean cosine of two items of one list, averaged over users (Ziegler et al.
  2005), from item embeddings that do not depend on the model; for K of at least 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hsft.data.interactions import PAD, Interactions
from hsft.data.plain_csv import distinct

NAMES = (
    *("Coverage", "GiniIndex", "ShannonEntropy", "AveragePopularity", "TailPercentage"),
    *("Novelty", "PopularityLift", "IntraListSimilarity"),
)
# Head and tail each hold this share of the training interactions.
POPULARITY_SHARE = 0.2
HEAD, MIDDLE, TAIL, NEVER_TRAINED = range(4)
# Users whose histories are read at once.
_USERS_AT_A_TIME = 1 << 18
# Item vectors that are held at once, in bytes. More leave the processor's caches.
_VECTORS_AT_A_TIME = 1 << 23


@dataclass(frozen=True)
class ItemStatistics:
    """What lists are measured by.

    Attributes:
        interactions: int64 [I + 1], training interactions of each item, entry 0 the padding item.
        users: int64 [I + 1], users who have the item among their training items.
        num_users: users with training items.
        vectors: item numbers, int64 [n] -> [n, D] of any floating type, on the CPU; None where there
            are no embeddings.
        vectors_origin: how the embeddings were made, as a cache's metadata say; None where there are
            none.
    """

    interactions: np.ndarray
    users: np.ndarray
    num_users: int
    vectors: Callable[[np.ndarray], Tensor] | None = None
    vectors_origin: Mapping[str, str] | None = None

    @cached_property
    def is_tail(self) -> np.ndarray:
        """Bool [I]: which items are tail items or never in training."""
        return popularity_classes(self.interactions[1:]) >= TAIL

    @cached_property
    def information(self) -> np.ndarray:
        """float64 [I]: each item's self-information in bits."""
        return -np.log2(np.maximum(self.users[1:], 1) / max(self.num_users, 1))


def popularity_classes(counts: np.ndarray) -> np.ndarray:
    """Say which items are `HEAD`, `MIDDLE`, `TAIL` or `NEVER_TRAINED`.

    Items are ordered by training interactions. Head: the most popular items that hold the first
    20 % of the interactions; tail: the least popular ones that hold the last 20 %; middle: those
    between. Items with the same count are never separated: they belong to the head when fewer than
    20 % of the interactions are with more popular items, to the tail when fewer than 20 % are with
    less popular ones, and to the middle when both hold.

    Args:
        counts: int64 [I], training interactions of each item.

    Returns:
        int64 [I].
    """
    levels, level_of = np.unique(counts, return_inverse=True)
    held = np.bincount(level_of, weights=counts.astype(np.float64), minlength=len(levels))
    total = max(held.sum(), 1.0)
    up_to = np.cumsum(held)
    below, above = (up_to - held) / total, (total - up_to) / total
    head, tail = above < POPULARITY_SHARE, below < POPULARITY_SHARE
    kinds = [NEVER_TRAINED, HEAD, TAIL]
    of_level = np.select([levels == 0, head & ~tail, tail & ~head], kinds, default=MIDDLE)
    return of_level[level_of]


def count_item_users(interactions: Interactions, ends: np.ndarray) -> np.ndarray:
    """Count the users who have each item before a position of theirs: int64 [I + 1].

    Args:
        interactions: of all users.
        ends: int64 [U], where in `interactions.items` each user's counted items end.
    """
    counts = np.zeros(interactions.num_items + 1, dtype=np.int64)
    stride = np.int64(len(counts))
    for first in range(0, interactions.num_users, _USERS_AT_A_TIME):
        bounds = interactions.offsets[first : first + _USERS_AT_A_TIME + 1]
        rows = np.arange(bounds[0], bounds[-1])
        users = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        counted = rows < ends[first + users]
        items = interactions.items[bounds[0] : bounds[-1]]
        pairs = distinct(users[counted] * stride + items[counted])
        counts += np.bincount(pairs % stride, minlength=len(counts))
    return counts


def mean_history_popularity(
    items: np.ndarray, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray
) -> float:
    """Average over users the mean training interactions of the items of their histories.

    Args:
        items: int32 [N], item numbers of all users, one user after the other.
        starts, ends: int64 [E], each user's history in it, ascending; none is empty.
        counts: int64 [I + 1], training interactions of each item.
    """
    total = 0.0
    for first in range(0, len(starts), _USERS_AT_A_TIME):
        part = slice(first, first + _USERS_AT_A_TIME)
        begin, end = starts[part], ends[part]
        summed = np.cumsum(counts[items[begin[0] : end[-1]]])
        summed = np.concatenate([[0], summed])
        sums = summed[end - begin[0]] - summed[begin - begin[0]]
        total += float((sums / (end - begin)).sum())
    return total / len(starts)


class ListMetrics:
    """Adds up lists, batch after batch, and computes their metrics.

    Args:
        topk: the cut-offs K.
        num_items: I.
        statistics: what lists are measured by; None: Coverage alone is computed.
        history_popularity: as `mean_history_popularity` returns it.
    """

    def __init__(
        self,
        topk: Sequence[int],
        num_items: int,
        statistics: ItemStatistics | None = None,
        history_popularity: float = 0.0,
    ) -> None:
        self._cuts = sorted(topk)
        self._topk = topk
        self._statistics = statistics
        self._history_popularity = history_popularity
        # Row c: how often each item is at a rank after cut c - 1, up to cut c.
        self._counts = np.zeros((len(topk), num_items + 1), dtype=np.int64)
        # For each cut: the sum over lists of at least two items of the mean cosine, and their number.
        self._cosines = np.zeros((2, len(topk)))
        self.depth = min(self._cuts[-1], num_items)

    def add(self, items: np.ndarray) -> None:
        """Count the lists of some users.

        Args:
            items: int64 [b, `depth`], best first; 0 (the padding item) stands for none.
        """
        for number, part in enumerate(self._parts()):
            self._counts[number] += np.bincount(
                items[:, part].ravel(), minlength=self._counts.shape[1]
            )
        if self._statistics is not None and self._statistics.vectors is not None:
            self._add_cosines(items, self._statistics.vectors)

    def add_up(self, all_reduce: Callable[[np.ndarray], np.ndarray]) -> None:
        """Add what other processes counted.

        Args:
            all_reduce: returns the sum of an array over all processes.
        """
        self._counts = all_reduce(self._counts)
        self._cosines = all_reduce(self._cosines)

    def values(self) -> dict[str, float]:
        """Return the metrics: `NAME@K` -> value.

        Metrics that are not defined are left out: all but Coverage where lists are empty, and those
        that lack item vectors or pairs of items.
        """
        counts = np.cumsum(self._counts, axis=0)[:, 1:]
        by_cut = {
            cut: self._of_cut(counts[number], self._cosines[:, number])
            for number, cut in enumerate(self._cuts)
        }
        return {
            f"{name}@{k}": by_cut[k][name]
            for name in NAMES
            for k in self._topk
            if name in by_cut[k]
        }

    def _parts(self) -> list[slice]:
        """Return the ranks between one cut and the next."""
        starts = [0, *self._cuts[:-1]]
        return [slice(start, end) for start, end in zip(starts, self._cuts, strict=True)]

    def _add_cosines(self, items: np.ndarray, vectors: Callable[[np.ndarray], Tensor]) -> None:
        at_a_time, first = 1, 0
        while first < len(items):
            part = items[first : first + at_a_time]
            first += len(part)
            listed = torch.from_numpy(part != PAD)
            given = vectors(part.ravel()).float().view(*part.shape, -1)
            at_a_time = max(1, _VECTORS_AT_A_TIME // (4 * given.shape[1] * given.shape[2]))
            norms = torch.linalg.vector_norm(given, dim=2)
            # A vector of zeros has no direction: its cosines are 0.
            has_direction = listed & (norms > 0)
            factors = torch.where(has_direction, 1 / norms, 0.0).unsqueeze(1)
            total = given.new_zeros(len(part), given.shape[2])
            length = squares = torch.zeros(len(part), dtype=torch.int64)
            for number, ranks in enumerate(self._parts()):
                total = total + (factors[:, :, ranks] @ given[:, ranks]).squeeze(1)
                length = length + listed[:, ranks].sum(dim=1)
                squares = squares + has_direction[:, ranks].sum(dim=1)
                # The square of a sum holds every pair twice, and every vector's own square.
                both_ways = total.square().sum(dim=1).double() - squares
                has_pair = length > 1
                means = both_ways[has_pair] / (length * (length - 1))[has_pair]
                self._cosines[:, number] += [float(means.sum()), int(has_pair.sum())]

    def _of_cut(self, counts: np.ndarray, cosines: np.ndarray) -> dict[str, float]:
        """Compute the metrics of one cut from int64 [I] counts and float64 [2] cosines."""
        values = {"Coverage": float((counts > 0).mean())}
        statistics, total = self._statistics, int(counts.sum())
        if statistics is None or not total:
            return values
        shares = counts / total
        values["GiniIndex"] = gini_index(counts)
        listed = shares[shares > 0]
        values["ShannonEntropy"] = float(-(listed * np.log(listed)).sum())
        values["AveragePopularity"] = float(shares @ statistics.interactions[1:])
        values["TailPercentage"] = float(shares[statistics.is_tail].sum())
        values["Novelty"] = float(shares @ statistics.information)
        if self._history_popularity > 0:
            lift = values["AveragePopularity"] / self._history_popularity - 1
            values["PopularityLift"] = lift
        similarity, lists = cosines
        if lists:
            values["IntraListSimilarity"] = float(similarity / lists)
        return values


def gini_index(counts: np.ndarray) -> float:
    """Return the Gini index of int64 [I] counts, of which one at least is not 0."""
    ascending = np.sort(counts)
    number = len(ascending)
    weights = 2 * np.arange(1, number + 1) - number - 1
    return float(weights @ ascending / (number * ascending.sum()))

"""Metrics by groups of users: by history length, by the target's popularity, and Recall@K by K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsft.evaluator.intervals import DRAWS, interval, needs_wilson, wilson_interval
from hsft.evaluator.list_metrics import HEAD, MIDDLE, NEVER_TRAINED, TAIL, popularity_classes
from hsft.evaluator.metrics import per_user
from hsft.utils.errors import counted


@dataclass(frozen=True)
class Group:
    """Users that are averaged over together; the groups of one breakdown hold every user once.

    Attributes:
        name: what they have in common.
        members: bool [E].
        notes: what else to say of it, such as how many items it is about.
    """

    name: str
    members: np.ndarray
    notes: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Number of users."""
        return int(self.members.sum())


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over users and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RecallCurve:
    """Recall@K for K = 1, 2, ...: each float64 [K], `low` and `high` a 95 % interval at each K."""

    cuts: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def group_estimate(group: Group, name: str, ranks: np.ndarray, k: int) -> Estimate | None:
    """Average a metric over a group's users; None for a group without users.

    Args:
        group: the users.
        name: one of `hsft.evaluator.metrics.PER_USER`.
        ranks: int64 [E].
        k: cut-off.
    """
    members = ranks[group.members]
    if not len(members):
        return None
    return Estimate(float(per_user(name, members, k).mean()), *interval(name, members, k))


def history_groups(lengths: np.ndarray, parts: int = 4) -> list[Group]:
    """Group users by the length of their history, cut at quantiles so that groups are of like size.

    Users with histories of one length are never separated; where many share a length there are
    fewer groups.

    Args:
        lengths: int64 [E], items before the target, at least 1.
        parts: number of groups.
    """
    cuts = np.unique(_quantile_cuts(lengths, parts))
    group_of = np.searchsorted(cuts, lengths)
    first = [int(lengths.min()), *(int(cut) + 1 for cut in cuts[:-1])]
    return [
        Group(f"{_span(low, int(high))} {'item' if high == 1 else 'items'}", group_of == number)
        for number, (low, high) in enumerate(zip(first, cuts, strict=True))
    ]


def _quantile_cuts(values: np.ndarray, parts: int) -> np.ndarray:
    """Return the largest value of each part of like size: int64 [parts], ascending, some equal."""
    shares = np.arange(1, parts + 1) / parts
    return np.quantile(values, shares, method="inverted_cdf").astype(np.int64)


def popularity_groups(counts: np.ndarray, targets: np.ndarray) -> list[Group]:
    """Group users by how popular their target is among the training items, see `popularity_classes`.

    Args:
        counts: int64 [I + 1], training interactions of each item, entry 0 the padding item.
        targets: int64 [E], item number of each user's target.

    Returns:
        Four groups: head, middle, tail, never in training; some may be empty.
    """
    of_item = popularity_classes(counts[1:])
    of_user = of_item[targets - 1]
    names = {HEAD: "head", MIDDLE: "middle", TAIL: "tail", NEVER_TRAINED: "never in training"}
    return [
        Group(name, of_user == number, _about(counts[1:][of_item == number]))
        for number, name in names.items()
    ]


@dataclass(frozen=True)
class Deciles:
    """Users in ten parts of like size, of which those with equal values are one.

    Attributes:
        groups: the distinct parts.
        of_decile: int64 [10], the group of each decile.
    """

    groups: Sequence[Group]
    of_decile: np.ndarray


def popularity_deciles(counts: np.ndarray, targets: np.ndarray) -> Deciles:
    """Group users by the decile of their target's popularity, from the least popular to the most.

    Users whose targets are equally popular are never separated: deciles that end at one popularity
    are one group.

    Args:
        counts: int64 [I + 1], training interactions of each item, entry 0 the padding item.
        targets: int64 [E], item number of each user's target.
    """
    popularity = counts[targets]
    cuts, of_decile = np.unique(_quantile_cuts(popularity, 10), return_inverse=True)
    group_of = np.searchsorted(cuts, popularity)
    groups = []
    for number in range(len(cuts)):
        deciles = np.flatnonzero(of_decile == number) + 1
        name = f"decile {_span(int(deciles[0]), int(deciles[-1]))}"
        members = group_of == number
        shown = popularity[members]
        span = _span(int(shown.min()), int(shown.max()))
        unit = "interaction" if span == "1" else "interactions"
        groups.append(Group(name, members, [f"{span} {unit} each"]))
    return Deciles(groups, of_decile)


def recall_curve(
    ranks: np.ndarray, deepest: int = 100, *, draws: int = DRAWS, seed: int = 0
) -> RecallCurve:
    """Return Recall@K for K = 1..`deepest` with intervals over users, each K by itself.

    As `hsft.evaluator.intervals.interval`: bootstrap, or Wilson's where hits or misses are few.

    Args:
        ranks: int64 [E].
        deepest: largest K.
        draws: bootstrap samples.
        seed: of the draws.
    """
    # One column a rank, the last for all deeper ones; see hsft.evaluator.intervals.
    counts = np.bincount(np.minimum(ranks, deepest + 1), minlength=deepest + 2)[1:]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(ranks), counts / len(ranks), size=draws)[:, :-1]
    low, high = np.quantile(np.cumsum(drawn, axis=1) / len(ranks), [0.025, 0.975], axis=0)
    hits = np.cumsum(counts[:-1])
    values = hits / len(ranks)
    for number, (count, value) in enumerate(zip(hits, values, strict=True)):
        if needs_wilson(int(count), len(ranks)):
            low[number], high[number] = wilson_interval(float(value), len(ranks))
    return RecallCurve(np.arange(1, deepest + 1), values, low, high)


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _about(counts: np.ndarray) -> list[str]:
    """Say how many items a group has and how often they occur in training."""
    notes = [counted(len(counts), "item")]
    if len(counts) and counts.max() > 0:
        span = _span(int(counts.min()), int(counts.max()))
        notes.append(f"{span} {'interaction' if span == '1' else 'interactions'} each")
    return notes

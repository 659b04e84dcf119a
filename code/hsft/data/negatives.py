"""Drawing items that a user has not interacted with, or any items, for many users at once."""

from __future__ import annotations

from typing import Literal

import numpy as np

from hsft.data.blocks import Column, offsets_of, slices, user_ranges
from hsft.data.interactions import PAD, Interactions
from hsft.data.plain_csv import distinct
from hsft.data.split import ragged_positions


class NegativeSampler:
    """Draws item numbers uniformly from the catalogue, without the user's own items.

    Membership is one binary search in a sorted array of (user, item) pairs, so a draw for a whole
    batch takes no Python loop over users. A draw searches only its own users' pairs, which stay in
    the processor's cache. Drawing is a pure function of the generator given.

    Args:
        interactions: whose users' items are excluded.
        held_out: this many last items of each user are not excluded, int64 [U] or one number for all.
            Training passes those that it is not trained on: a sampler that never drew the
            validation and test targets would tell the model about them.
        exclude: `history`; `none` draws from all items whatever the user.
        items: draw from items 1..items; None: from all. Without those that are excluded it has to
            hold all of the users' items.
    """

    def __init__(
        self,
        interactions: Interactions,
        held_out: int | np.ndarray = 0,
        exclude: Literal["history", "none"] = "history",
        items: int | None = None,
    ) -> None:
        self.num_items = interactions.num_items if items is None else items
        self._catalogue = interactions.num_items
        self._stride = np.int64(self._catalogue + 1)
        offsets = interactions.offsets
        pairs, counts = Column(np.int64, interactions.folder), interactions.per_user()
        for some in user_ranges(offsets):
            rows = slice(offsets[some.start], offsets[some.stop])
            lengths = np.diff(offsets[some.start : some.stop + 1])
            users = np.repeat(np.arange(some.start, some.stop, dtype=np.int64), lengths)
            from_end = np.repeat(offsets[1:][some], lengths) - np.arange(rows.start, rows.stop)
            not_excluded = held_out
            if isinstance(held_out, np.ndarray):
                not_excluded = np.repeat(held_out[some], lengths)
            known = (from_end > not_excluded) & (exclude == "history")
            block = distinct(users[known] * self._stride + interactions.items[rows][known])
            pairs.append(block)
            counts[some] = np.bincount(block // self._stride - some.start, minlength=len(lengths))
        self._pairs = pairs.whole()
        # Where the pairs of each user begin.
        self._first = offsets_of(counts, interactions.folder)
        self.available = np.subtract(self.num_items, counts, out=counts)

    def owns(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Say which items belong to the user beside them: bool, shape of `items`."""
        if not len(self._pairs):
            return np.zeros(items.shape, dtype=bool)
        keys = users.astype(np.int64) * self._stride + items
        at = np.searchsorted(self._pairs, keys)
        return self._pairs[np.minimum(at, len(self._pairs) - 1)] == keys

    def draw(
        self, users: np.ndarray, count: int, rng: np.random.Generator, distinct: bool = False
    ) -> np.ndarray:
        """Draw `count` items for each user: int64 [len(users), count], item numbers 1..I.

        Args:
            users: int [B] user numbers.
            count: items per user.
            rng: source of randomness; the result depends on nothing else.
            distinct: no item twice in a row.

        Raises:
            ValueError: a user has fewer than `count` other items (or none at all).
        """
        users = np.asarray(users, dtype=np.int64)
        needed = count if distinct else 1
        if len(users) and self.available[users].min() < needed:
            raise ValueError(
                f"a user has only {self.available[users].min()} items left to draw from, "
                f"{needed} are needed"
            )
        drawn = rng.integers(1, self.num_items + 1, size=(len(users), count))
        # Rows with an entry to be drawn again; the others are done.
        open_rows = np.arange(len(users))
        while True:
            rows = drawn[open_rows]
            bad = self._owned(users[open_rows], rows)
            if distinct:
                bad |= _repeats(rows)
            missing = int(bad.sum())
            if not missing:
                return drawn
            rows[bad] = rng.integers(1, self.num_items + 1, size=missing)
            drawn[open_rows] = rows
            open_rows = open_rows[bad.any(axis=1)]

    def shares(self, users: np.ndarray) -> np.ndarray:
        """Return the probability of each item in a draw for one of some users, chosen evenly.

        Args:
            users: int [S] user numbers, each with an item to draw.

        Returns:
            float64 [I + 1], with a sum of 1; 0 for the padding item.
        """
        # A user's items share what is left of the catalogue evenly; the others have no share.
        per_item = np.bincount(users, minlength=len(self.available)) / len(users)
        per_item = np.divide(per_item, self.available, where=per_item > 0, out=per_item)
        shares = np.full(self._catalogue + 1, per_item.sum())
        for part in slices(len(self._pairs)):
            owners, items = np.divmod(self._pairs[part], self._stride)
            shares -= np.bincount(items, per_item[owners], minlength=self._catalogue + 1)
        shares[PAD] = 0.0
        shares[self.num_items + 1 :] = 0.0
        return shares.clip(min=0.0)

    def _owned(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Say which items belong to their row's user: int [R], int [R, n] -> bool [R, n]."""
        starts, ends = self._first[users], self._first[users + 1]
        row = np.arange(len(users), dtype=np.int64)
        user_pairs = self._pairs[ragged_positions(starts, ends)]
        # The same pairs with the row in place of the user: still sorted, and rows are distinct.
        user_pairs += np.repeat((row - users) * self._stride, ends - starts)
        if not len(user_pairs):
            return np.zeros(items.shape, dtype=bool)
        keys = (row * self._stride)[:, None] + items
        return (
            user_pairs[np.minimum(np.searchsorted(user_pairs, keys), len(user_pairs) - 1)] == keys
        )


def _repeats(rows: np.ndarray) -> np.ndarray:
    """Mark, in each row, every entry that equals an earlier entry of that row."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    again = np.zeros_like(rows, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marked = np.zeros_like(again)
    np.put_along_axis(marked, order, again, axis=1)
    return marked

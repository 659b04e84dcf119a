"""Leave-one-out split by time, and the training sequences cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hsft.data.interactions import Interactions

Phase = Literal["valid", "test"]

# Interactions that a user needs: a target and one item before it for test, another target for
# validation, and two items that are no target for a transition to train on.
NEEDED = {"train": 4, "valid": 3, "test": 2}


@dataclass(frozen=True)
class Segments:
    """Ranges of `Interactions.items`, one row each.

    Attributes:
        users: int64 [R], user number of each range.
        starts: int64 [R], first position of the range in `Interactions.items`.
        ends: int64 [R], one past its last position.
    """

    users: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Split:
    """Leave-one-out: the last item of a user is the test target, the one before validation's.

    Attributes:
        interactions: what was split.
        too_short: phase (train, valid, test) -> users without enough items for it.
    """

    interactions: Interactions
    too_short: dict[str, int]

    def train_segments(self, max_length: int) -> Segments:
        """Cut every user's training items into pieces of at most `max_length + 1`.

        Cuts count from the end, as in HLLM: the pieces of a long history are full and what is
        left over at its beginning is dropped. A piece of n items gives n - 1 transitions; pieces
        of one item give none and are left out.
        """
        size = max_length + 1
        begin = self.interactions.offsets[:-1]
        end = np.maximum(self.interactions.offsets[1:] - 2, begin)
        pieces = np.maximum((end - begin) // size, 1)
        users = np.repeat(np.arange(len(begin)), pieces)
        # The k-th piece of a user, counted from 0 at the oldest.
        kth = np.arange(len(users)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        ends = end[users] - (pieces[users] - 1 - kth) * size
        starts = np.maximum(ends - size, begin[users])
        enough = ends - starts >= 2
        return Segments(users[enough], starts[enough], ends[enough])

    def eval_segments(self, phase: Phase) -> Segments:
        """Return one range a user: the whole history, and the phase's target as its last item.

        Users without a history before their target are left out (see `too_short`).
        """
        begin = self.interactions.offsets[:-1]
        end = self.interactions.offsets[1:] - (1 if phase == "valid" else 0)
        users = np.flatnonzero(end - begin >= 2)
        return Segments(users, begin[users], end[users])


def leave_one_out(interactions: Interactions) -> Split:
    """Split by time: the last item for test, the second-last for validation, the rest to train.

    A user needs two items for a test target with a history, three for validation and four for a
    training transition; who has fewer is counted per phase, not dropped silently.
    """
    return Split(interactions, count_too_short(interactions.lengths))


def count_too_short(lengths: np.ndarray) -> dict[str, int]:
    """Count the users with too few interactions: phase (train, valid, test) -> users.

    Args:
        lengths: integers [U], interactions of each user.
    """
    return {phase: int((lengths < least).sum()) for phase, least in NEEDED.items()}


def train_item_counts(split: Split) -> np.ndarray:
    """Count how often each item occurs among the training items: int64 [I + 1], entry 0 is 0."""
    interactions = split.interactions
    held_out = np.zeros(len(interactions), dtype=bool)
    for back in (1, 2):
        rows = interactions.offsets[1:] - back
        held_out[rows[rows >= interactions.offsets[:-1]]] = True
    return np.bincount(interactions.items[~held_out], minlength=interactions.num_items + 1)


def ragged_positions(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Concatenate `arange(starts[i], ends[i])` for all i without a loop: int64 [sum of lengths]."""
    lengths = ends - starts
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)

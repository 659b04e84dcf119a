"""Evaluation users as integer ids; embeddings are gathered later, by index."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from torch.utils.data import Dataset

from hsft.data.interactions import Interactions
from hsft.data.plain_csv import distinct
from hsft.data.split import Phase, Segments, Split, ragged_positions
from hsft.data.time_fields import ItemTimes


class CachedEmbeddingEvalDataset(Dataset[np.ndarray]):
    """One sample a user that has a target in this phase and a history before it.

    Args:
        split: the interactions, split.
        phase: `valid` or `test`.
        max_length: `Config.eval_list_length`; the model reads the last L items, all are "seen".
        times: of the interactions, for a model that reads them; None: batches have none.

    Attributes:
        split: as given.
        interactions: the arrays that samples point into.
        segments: [E] ranges of `interactions.items`: whole history, then the target.
        max_length: L.
        phase: the phase.
    """

    def __init__(
        self, split: Split, phase: Phase, max_length: int, times: ItemTimes | None = None
    ) -> None:
        self.split = split
        self.interactions: Interactions = split.interactions
        self.segments: Segments = split.eval_segments(phase)
        self.max_length = max_length
        self.phase = phase
        self.times = times

    def keep(self, samples: np.ndarray) -> CachedEmbeddingEvalDataset:
        """Return the dataset with some of its users only.

        Args:
            samples: bool [E], True for those that stay, or int64 [B], their sample numbers.
        """
        kept = copy(self)
        whole = self.segments
        kept.segments = Segments(whole.users[samples], whole.starts[samples], whole.ends[samples])
        return kept

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a user's item numbers: int32 [2..], oldest first, the target last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"user {index} of {len(self)}")
        return self.interactions.items[self.segments.starts[index] : self.segments.ends[index]]

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        """Return the sample numbers of a batch: int64 [B]. DataLoader calls this, not one by one."""
        return np.asarray(indices, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E]: items of each user's history that the model reads, L at most."""
        return np.minimum(self.segments.ends - self.segments.starts - 1, self.max_length)

    @property
    def targets(self) -> np.ndarray:
        """int32 [E]: item number of each user's target."""
        return self.interactions.items[self.segments.ends - 1]

    def count_seen_items(self) -> np.ndarray:
        """Count the distinct items of each user's history: int64 [E]."""
        lengths = self.segments.ends - self.segments.starts - 1
        owners = np.repeat(np.arange(len(self), dtype=np.int64), lengths)
        stride = np.int64(self.interactions.num_items + 1)
        rows = ragged_positions(self.segments.starts, self.segments.ends - 1)
        pairs = distinct(owners * stride + self.interactions.items[rows])
        return np.bincount(pairs // stride, minlength=len(self))

    def count_seen_targets(self) -> int:
        """Count users whose target is in their history: masked as seen, it can only be a miss."""
        owners = np.repeat(np.arange(len(self)), self.segments.ends - self.segments.starts - 1)
        targets = self.targets
        rows = ragged_positions(self.segments.starts, self.segments.ends - 1)
        hits = self.interactions.items[rows] == targets[owners]
        return len(np.unique(owners[hits]))

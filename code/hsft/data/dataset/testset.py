"""Evaluation users as integer ids; embeddings are gathered later, by index."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from torch.utils.data import Dataset

from hsft.data.blocks import SAMPLES_AT_ONCE, empty_column, slices
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
        lengths = empty_column(len(self), np.int64, self.interactions.folder)
        np.subtract(self.segments.ends, self.segments.starts, out=lengths)
        lengths -= 1
        return np.minimum(lengths, self.max_length, out=lengths)

    @property
    def targets(self) -> np.ndarray:
        """int32 [E]: item number of each user's target."""
        targets = empty_column(len(self), np.int32, self.interactions.folder)
        for part in slices(len(self)):
            targets[part] = self.interactions.items[self.segments.ends[part] - 1]
        return targets

    def count_seen_items(self) -> np.ndarray:
        """Count the distinct items of each user's history: int64 [E]."""
        counts = empty_column(len(self), np.int64, self.interactions.folder)
        stride = np.int64(self.interactions.num_items + 1)
        for part in slices(len(self), SAMPLES_AT_ONCE):
            owners, items = self._histories(part)
            pairs = distinct(owners * stride + items)
            counts[part] = np.bincount(pairs // stride, minlength=part.stop - part.start)
        return counts

    def count_seen_targets(self) -> int:
        """Count users whose target is in their history: masked as seen, it can only be a miss."""
        count = 0
        for part in slices(len(self), SAMPLES_AT_ONCE):
            owners, items = self._histories(part)
            targets = self.interactions.items[self.segments.ends[part] - 1]
            count += len(np.unique(owners[items == targets[owners]]))
        return count

    def _histories(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return who of some users has which item in the history: int64 and int32 [rows]."""
        starts, ends = self.segments.starts[part], self.segments.ends[part] - 1
        owners = np.repeat(np.arange(len(starts), dtype=np.int64), ends - starts)
        return owners, self.interactions.items[ragged_positions(starts, ends)]

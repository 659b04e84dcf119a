"""Training sequences as integer ids; embeddings are gathered later, by index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from hsft.data.blocks import SAMPLES_AT_ONCE, empty_column, slices
from hsft.data.interactions import Interactions
from hsft.data.split import Segments, Split, ragged_positions
from hsft.data.time_fields import ItemTimes


class CachedEmbeddingTrainDataset(Dataset[np.ndarray]):
    """Pieces of users' training histories.

    A sample is only its own number: the collate function gathers all items of a batch from one
    array in a single indexing step, so nothing is stacked per sample.

    Args:
        split: the interactions, split.
        max_length: `MAX_ITEM_LIST_LENGTH`, the longest history L in items.
        times: of the interactions, for a model that reads them; None: batches have none.

    Attributes:
        split: as given.
        interactions: the arrays that samples point into.
        segments: [S] ranges of `interactions.items`, each of 2 to L + 1 items.
        max_length: L.
    """

    def __init__(self, split: Split, max_length: int, times: ItemTimes | None = None) -> None:
        self.split = split
        self.interactions: Interactions = split.interactions
        self.segments: Segments = split.train_segments(max_length)
        self.max_length = max_length
        self.times = times

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the item numbers of one sequence: int32 [2..L + 1], oldest first."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self.interactions.items[self.segments.starts[index] : self.segments.ends[index]]

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        """Return the sample numbers of a batch: int64 [B]. DataLoader calls this, not one by one."""
        return np.asarray(indices, dtype=np.int64)

    @property
    def num_transitions(self) -> int:
        """Number of (history, next item) pairs in one pass."""
        return int(self.lengths.sum())

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]: transitions of each sequence, 1..L."""
        lengths = empty_column(len(self), np.int64, self.interactions.folder)
        np.subtract(self.segments.ends, self.segments.starts, out=lengths)
        lengths -= 1
        return lengths

    def target_shares(self, random_split: bool) -> np.ndarray:
        """Return the probability of each item as the target of a training position.

        Args:
            random_split: a sequence trains one of its positions a pass, not all.

        Returns:
            float64 [I + 1], with a sum of 1; 0 for the padding item.
        """
        size = self.interactions.num_items + 1
        counts = np.zeros(size, dtype=np.float64 if random_split else np.int64)
        for part in slices(len(self), SAMPLES_AT_ONCE):
            starts, ends = self.segments.starts[part] + 1, self.segments.ends[part]
            lengths = ends - starts
            weights = np.repeat(1 / lengths, lengths) if random_split else None
            items = self.interactions.items[ragged_positions(starts, ends)]
            counts += np.bincount(items, weights, minlength=size)
        return counts / max(counts.sum(), 1)

    def users_of(self, samples: Sequence[int]) -> list[str]:
        """Return the user id of each sample."""
        users = self.segments.users[np.asarray(samples, dtype=np.int64)]
        return [str(user) for user in self.interactions.user_ids[users]]

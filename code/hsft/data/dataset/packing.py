"""Several sequences in one row, so that few positions of a batch are padding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Buckets of fewer than 2^5 positions would be more graphs than they save padding.
_SMALLEST_STEP = 5


@dataclass(frozen=True)
class PackedLayout:
    """Where each position of a batch of sequences goes.

    Attributes:
        shape: (rows R, positions per row W).
        flat_index: int64 [N], index into the flattened [R, W] of each real position, the sequences one
            after the other.
        positions: int64 [R, W], each position's number within its own sequence. Padding at a row's
            end counts from 0 again, so that it is a sequence of its own, which no other sees.
    """

    shape: tuple[int, int]
    flat_index: np.ndarray
    positions: np.ndarray

    def scatter(self, padded: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Move the values of [B, T, ...] where `mask`, [B, T], is True into the rows: [R, W, ...].

        They are 0 elsewhere.
        """
        rest = padded.shape[2:]
        packed = np.zeros((*self.shape, *rest), dtype=padded.dtype)
        packed.reshape(-1, *rest)[self.flat_index] = padded[mask]
        return packed


def pack(lengths: np.ndarray, row_length: int) -> PackedLayout:
    """Share sequences out over rows of about `row_length` positions.

    Sequences are dealt out from the longest to the shortest, forwards and backwards in turn, so
    that rows come out alike in length; a row may be somewhat longer than `row_length`.

    Args:
        lengths: int64 [B], positions of each sequence, at least 1.
        row_length: positions per row to aim at; all in one row when they fit.
    """
    total = int(lengths.sum())
    rows = min(len(lengths), -(-total // max(row_length, int(lengths.max()))))
    order = np.argsort(-lengths, kind="stable")
    turn, rank_in_turn = np.divmod(np.arange(len(lengths)), rows)
    row_of = np.empty_like(order)
    row_of[order] = np.where(turn % 2 == 0, rank_in_turn, rows - 1 - rank_in_turn)
    # Sequences by row, each row in the batch's order.
    by_row = np.argsort(row_of, kind="stable")
    filled = np.bincount(row_of, weights=lengths, minlength=rows).astype(np.int64)
    before = np.cumsum(lengths[by_row]) - lengths[by_row]
    starts = np.empty_like(before)
    starts[by_row] = before - np.repeat(np.cumsum(filled) - filled, np.bincount(row_of))
    width = int(filled.max())
    numbers = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    flat_index = np.repeat(row_of * width + starts, lengths) + numbers
    positions = np.maximum(np.arange(width) - filled[:, None], 0)
    positions.reshape(-1)[flat_index] = numbers
    return PackedLayout((rows, width), flat_index, positions)


@dataclass(frozen=True)
class Buckets:
    """Sizes that batches in one row are padded up to, so that a few CUDA graphs serve all of them.

    Attributes:
        step: row lengths are multiples of it.
        sequences: most sequences of a batch.
        max_length: most positions of a sequence.
    """

    step: int
    sequences: int
    max_length: int

    @classmethod
    def of(cls, lengths: np.ndarray, batch_size: int, max_length: int) -> Buckets:
        """Choose the step: about an eighth of a batch's mean number of positions, a power of 2.

        Args:
            lengths: int64 [S], positions of every sequence.
            batch_size: sequences of a batch.
            max_length: most positions of a sequence.
        """
        positions = float(lengths.mean()) * min(batch_size, len(lengths))
        step = 1 << max(_SMALLEST_STEP, int(math.log2(max(positions / 8, 1))))
        return cls(step, batch_size, max_length)

    def row_length(self, positions: int) -> int:
        """Return the row length for so many real positions; at least one more is left free."""
        return (positions // self.step + 1) * self.step

    @property
    def fillers(self) -> int:
        """Sequences that the padding of a row is cut into: none longer than `max_length`."""
        return -(-self.step // self.max_length)


@dataclass(frozen=True)
class RowLayout:
    """A batch in one row, for attention kernels that take sequences of any length.

    Attributes:
        positions: int64 [1, W], each position's number within its own sequence.
        cu_lengths: int32 [S + 1], where each sequence starts, and W; padding at the row's end is
            cut into sequences as well, and there may be empty ones.
        padding: positions at the row's end that hold nothing.
    """

    positions: np.ndarray
    cu_lengths: np.ndarray
    padding: int


def one_row(lengths: np.ndarray, buckets: Buckets | None = None) -> RowLayout:
    """Put sequences into one row, one after the other.

    With buckets the shapes depend on nothing but the bucket: there are always as many sequences,
    the missing ones empty.

    Args:
        lengths: int64 [B], positions of each sequence, at least 1.
        buckets: sizes to pad the row up to; None: no padding.
    """
    padding = 0
    if buckets is not None:
        total = int(lengths.sum())
        padding = buckets.row_length(total) - total
        starts = np.arange(buckets.fillers) * buckets.max_length
        fillers = np.clip(padding - starts, 0, buckets.max_length)
        missing = np.zeros(max(0, buckets.sequences - len(lengths)), dtype=np.int64)
        lengths = np.concatenate([lengths, missing, fillers])
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    cu_lengths = np.concatenate([[0], ends]).astype(np.int32)
    return RowLayout(positions[None], cu_lengths, padding)


def real_share(lengths: np.ndarray, batches: list[np.ndarray], row_length: int | None) -> float:
    """Return real positions / computed positions over batches, packed or (None) padded each.

    Args:
        lengths: int64 [S], positions of every sequence.
        batches: sample numbers of each batch.
        row_length: as for `pack`; None pads every batch to its longest sequence.
    """
    computed = 0
    for batch in batches:
        batch_lengths = lengths[batch]
        shape = (len(batch), int(batch_lengths.max()))
        if row_length is not None:
            shape = pack(batch_lengths, row_length).shape
        computed += shape[0] * shape[1]
    return float(sum(int(lengths[batch].sum()) for batch in batches) / computed)

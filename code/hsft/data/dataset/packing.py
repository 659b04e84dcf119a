"""Several training sequences in one row, so that few positions of a batch are padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedLayout:
    """Where each position of a batch of sequences goes.

    Attributes:
        shape: (rows R, positions per row W).
        places: int64 [N], index into the flattened [R, W] of each real position, the sequences one
            after the other.
        positions: int64 [R, W], each position's number within its own sequence. Padding at a row's
            end counts from 0 again, so that it is a sequence of its own, which no other sees.
    """

    shape: tuple[int, int]
    places: np.ndarray
    positions: np.ndarray

    def place(self, padded: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Move the values of [B, T] where `mask` is True to their places: [R, W], 0 elsewhere."""
        packed = np.zeros(self.shape, dtype=padded.dtype)
        packed.reshape(-1)[self.places] = padded[mask]
        return packed


def pack(lengths: np.ndarray, row_length: int) -> PackedLayout:
    """Share sequences out over rows of about `row_length` positions.

    Sequences are dealt out from the longest to the shortest, forwards and backwards in turn, so
    that rows come out alike in length; a row may be somewhat longer than `row_length`.

    Args:
        lengths: int64 [B], positions of each sequence, at least 1.
        row_length: wanted positions per row; all in one row when they fit.
    """
    total = int(lengths.sum())
    rows = min(len(lengths), -(-total // max(row_length, int(lengths.max()))))
    order = np.argsort(-lengths, kind="stable")
    turn, place = np.divmod(np.arange(len(lengths)), rows)
    row_of = np.empty_like(order)
    row_of[order] = np.where(turn % 2 == 0, place, rows - 1 - place)
    # Sequences by row, each row in the batch's order.
    by_row = np.argsort(row_of, kind="stable")
    filled = np.bincount(row_of, weights=lengths, minlength=rows).astype(np.int64)
    before = np.cumsum(lengths[by_row]) - lengths[by_row]
    starts = np.empty_like(before)
    starts[by_row] = before - np.repeat(np.cumsum(filled) - filled, np.bincount(row_of))
    width = int(filled.max())
    numbers = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(row_of * width + starts, lengths) + numbers
    positions = np.maximum(np.arange(width) - filled[:, None], 0)
    positions.reshape(-1)[places] = numbers
    return PackedLayout((rows, width), places, positions)


def real_share(lengths: np.ndarray, batches: list[np.ndarray], row_length: int | None) -> float:
    """Return real positions / computed positions over batches, packed or (None) padded each.

    Args:
        lengths: int64 [S], positions of every sequence.
        batches: sample numbers of each batch.
        row_length: as for `pack`; None pads every batch to its longest sequence.
    """
    computed = 0
    for batch in batches:
        own = lengths[batch]
        shape = (len(own), int(own.max())) if row_length is None else pack(own, row_length).shape
        computed += shape[0] * shape[1]
    return float(sum(int(lengths[batch].sum()) for batch in batches) / computed)

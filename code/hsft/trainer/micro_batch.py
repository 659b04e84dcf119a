"""Splitting a batch that does not fit the GPU's memory, with the gradient of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsft.data.dataset import TrainBatch
from hsft.model.recommender import LossSettings


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch.

    Attributes:
        batch: some of its sequences.
        weight: the part's share in the batch's loss; the shares of a batch sum to 1.
    """

    batch: TrainBatch
    weight: float


def split_batch(batch: TrainBatch, rows: int | None, settings: LossSettings) -> list[MicroBatch]:
    """Split a batch into parts of at most `rows` sequences, one to a row.

    The sum of weight * loss over the parts is the batch's loss, and so are the gradients, where
    every part meets the same negatives: drawn ones stay whole in every part, and the catalogue is
    what it is. In-batch negatives come from the part alone, so there are fewer of them.

    Args:
        batch: sequences on any device, packed or not.
        rows: sequences per part; None keeps the batch whole.
        settings: the loss, for what it is a mean of.
    """
    count = count_sequences(batch)
    if rows is None or count <= rows:
        return [MicroBatch(batch, 1.0)]
    batch = unpack(batch)
    parts = []
    for start in range(0, count, rows):
        rows_of = slice(start, start + rows)
        parts.append(
            TrainBatch(
                history=batch.history[rows_of],
                attention_mask=batch.attention_mask[rows_of],
                targets=batch.targets[rows_of],
                loss_mask=batch.loss_mask[rows_of],
                negatives=batch.negatives,
                times=batch.times[rows_of],
            )
        )
    terms = [loss_terms(part, settings) for part in parts]
    whole = max(1, sum(terms))
    return [
        MicroBatch(part, count / whole) for part, count in zip(parts, terms, strict=True) if count
    ]


def count_sequences(batch: TrainBatch) -> int:
    """Return how many sequences a batch holds: its rows, or the starts in packed rows."""
    if not batch.positions.numel():
        return len(batch.history)
    return int(((batch.positions == 0) & batch.attention_mask).sum())


def unpack(batch: TrainBatch) -> TrainBatch:
    """Give every sequence of a packed batch a row of its own; other batches stay as they are."""
    if not batch.positions.numel():
        return batch
    real = batch.attention_mask
    numbers = batch.positions[real]
    owners = (numbers == 0).cumsum(dim=0) - 1
    shape = (int(owners[-1]) + 1, int(numbers.max()) + 1)

    def spread(packed: Tensor) -> Tensor:
        padded = packed.new_zeros((*shape, *packed.shape[2:]))
        padded[owners, numbers] = packed[real]
        return padded

    return TrainBatch(
        history=spread(batch.history),
        attention_mask=spread(real),
        targets=spread(batch.targets),
        loss_mask=spread(batch.loss_mask),
        negatives=batch.negatives,
        times=spread(batch.times) if batch.times.numel() else batch.times,
    )


def loss_terms(batch: TrainBatch, settings: LossSettings) -> int:
    """Return how many terms the batch's loss is the mean of.

    nce: the positions that count. bce with drawn negatives: the (position, item) pairs that count,
    which leaves out a negative that is the position's own target.
    """
    positions = int(batch.loss_mask.sum())
    if settings.loss != "bce" or settings.negatives != "sampled":
        return positions
    pool = batch.negatives.reshape(-1)
    targets, times = batch.targets[batch.loss_mask].unique(return_counts=True)
    drawn, counts = pool.unique(return_counts=True)
    same = torch.isin(drawn, targets)
    excluded = int((counts[same] * times[torch.isin(targets, drawn)]).sum())
    return positions * (1 + len(pool)) - excluded

"""Batches of item numbers for training and evaluation, gathered by index in one step each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hsft.data.dataset.packing import Buckets, one_row, pack
from hsft.data.dataset.testset import CachedEmbeddingEvalDataset
from hsft.data.dataset.trainset import CachedEmbeddingTrainDataset
from hsft.data.interactions import PAD
from hsft.data.negatives import NegativeSampler
from hsft.data.split import ragged_positions

# What `positions` is in a batch that is not packed.
NOT_PACKED = torch.empty((0, 0), dtype=torch.int64)
# What `cu_lengths`, `scored`, `counted` and `items` are in a batch without them.
_NO_LENGTHS = torch.empty(0, dtype=torch.int32)
_NO_INDEX = torch.empty(0, dtype=torch.int64)
_NO_TIMES = torch.empty((0, 0, 0), dtype=torch.uint8)
_ALL_COUNTED = torch.empty(0, dtype=torch.bool)


class TrainBatch(NamedTuple):
    """Training sequences: one in each row (R = B, padded on the right), or several (packed).

    Attributes:
        history: int64 [R, T], item numbers, 0 where padded; without packing T <= L is the longest
            in the batch.
        attention_mask: bool [R, T], True on real history items.
        targets: int64 [R, T], the next item at each position, 0 where padded.
        loss_mask: bool [R, T], positions that count in the loss.
        negatives: int64 [B, n], drawn items, [B, 0] when negatives come from the batch.
        positions: int64 [R, T], each item's number in its own sequence, which starts where 0
            stands; [0, 0] when every row is one sequence.
        cu_lengths: int32 [S + 1], where the sequences of a single row (R = 1) start and the last
            one ends, for variable-length attention; [0] in batches of other layouts.
        times: uint8 or int64 [R, T, F], fields of each position's time, see `ItemTimes`; [0, 0, 0] for
            a model that reads none.
        scored: int64 [N], where `loss_mask` is True, as indices into the flattened [R, T]: made
            here, since a GPU would have to be waited for. [0]: to be taken from `loss_mask`.
        counted: bool [N], False for the entries of `scored` that fill a bucket up; [0] when all
            count. Not float: Fabric converts floating-point inputs to the precision's type, and
            bfloat16 cannot count positions.
        items: int64 [U], the items of `history` and `targets` in order, each once, after as many 0 as
            fill a bucket up, at least one; [0] where nothing is to be computed once an item.
    """

    history: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    loss_mask: torch.Tensor
    negatives: torch.Tensor
    positions: torch.Tensor = NOT_PACKED
    cu_lengths: torch.Tensor = _NO_LENGTHS
    times: torch.Tensor = _NO_TIMES
    scored: torch.Tensor = _NO_INDEX
    counted: torch.Tensor = _ALL_COUNTED
    items: torch.Tensor = _NO_INDEX

    def to(self, device: torch.device) -> TrainBatch:
        """Copy the batch to a device; from pinned memory without waiting for it."""
        return TrainBatch(*(part.to(device, non_blocking=True) for part in self))


class EvalBatch(NamedTuple):
    """Evaluation users.

    Attributes:
        rows: int64 [B], numbers of the samples in the evaluation set.
        users: int64 [B], user numbers.
        history: int64 [B, T], the last T <= L items, right-padded with 0.
        lengths: int64 [B], real items in each row of `history`, at least 1.
        targets: int64 [B], the held-out item.
        seen_rows: int64 [n], row in the batch of each seen item.
        seen_items: int64 [n], all items of the whole history, beside `seen_rows`.
        candidates: int64 [B, C], drawn items for sampled evaluation, [B, 0] for full ranking.
        row: int64 [1, N], the histories one after the other, for a model that reads rows; [0, 0]
            else. `history` has no columns then.
        positions: int64 [1, N], beside `row`, as in `TrainBatch`.
        cu_lengths: int32 [S + 1], where each history starts in `row`, and N; [0] without one. S = B,
            but for rows that are padded to a bucket: what fills them stands after the histories.
        times: uint8 or int64 [B, T, F] beside `history`, or [1, N, F] beside `row`: fields of each
            item's time; [0, 0, 0] for a model that reads none.
    """

    rows: torch.Tensor
    users: torch.Tensor
    history: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    seen_rows: torch.Tensor
    seen_items: torch.Tensor
    candidates: torch.Tensor
    row: torch.Tensor = NOT_PACKED
    positions: torch.Tensor = NOT_PACKED
    cu_lengths: torch.Tensor = _NO_LENGTHS
    times: torch.Tensor = _NO_TIMES

    def pin_memory(self) -> EvalBatch:
        """Copy the batch to pinned memory; what is there already stays."""
        return EvalBatch(*(part.pin_memory() for part in self))

    def to(self, device: torch.device) -> EvalBatch:
        """Copy the batch to a device, to a GPU without waiting for it."""
        if device.type == "cuda":
            pinned = self.pin_memory()
            return EvalBatch(*(part.to(device, non_blocking=True) for part in pinned))
        return EvalBatch(*(part.to(device) for part in self))


class TrainCollate:
    """Turn sample numbers into a `TrainBatch`.

    Everything random is drawn from a generator seeded by (seed, epoch, first sample of the batch,
    batch size), so a batch is the same with any number of workers and after a resume.

    Args:
        dataset: the training sequences.
        sampler: draws negatives; None leaves `negatives` empty.
        num_negatives: drawn items per row.
        random_split: count one random position per row in the loss, not all.
        seed: base seed.
        row_length: put several sequences into rows of about this many positions; None gives every
            sequence a row.
        pack_below: leave a batch padded when at least this share of it is real: what packing
            would save is then less than what the mask costs.
        single_row: put all sequences of a batch into one row, for variable-length attention;
            `row_length` and `pack_below` have no effect then.
        buckets: sizes that such a row is padded up to; None: none.
        list_items: list a batch's items, for an adapter that maps each once.
    """

    def __init__(
        self,
        dataset: CachedEmbeddingTrainDataset,
        *,
        sampler: NegativeSampler | None = None,
        num_negatives: int = 0,
        random_split: bool = False,
        seed: int = 0,
        row_length: int | None = None,
        pack_below: float = 0.9,
        single_row: bool = False,
        buckets: Buckets | None = None,
        list_items: bool = False,
    ) -> None:
        self.dataset = dataset
        self.list_items = list_items
        self.single_row, self.buckets = single_row, buckets
        self.row_length, self.pack_below = row_length, pack_below
        self.sampler = sampler
        self.num_negatives = num_negatives
        self.random_split = random_split
        self.seed = seed
        self.epoch = 0

    def __call__(self, indices: Sequence[int] | np.ndarray) -> TrainBatch:
        """Gather a batch.

        Args:
            indices: int64 [B], sample numbers.
        """
        indices = np.asarray(indices, dtype=np.int64)
        segments = self.dataset.segments
        starts, ends = segments.starts[indices], segments.ends[indices]
        history, targets, mask = gather_pairs(self.dataset.interactions.items, starts, ends)
        loss_mask, times = mask, None
        if self.dataset.times is not None:
            times = self.dataset.times.fields(starts, ends - 1)
        negatives = np.empty((len(indices), 0), dtype=np.int64)
        if self.random_split or self.sampler:
            rng = np.random.default_rng([self.seed, self.epoch, int(indices[0]), len(indices)])
            if self.random_split:
                chosen = rng.integers(0, ends - starts - 1)
                loss_mask = np.arange(mask.shape[1]) == chosen[:, None]
            if self.sampler:
                negatives = self.sampler.draw(segments.users[indices], self.num_negatives, rng)
        if self.single_row:
            return self._one_row(
                ends - starts - 1, history, targets, mask, loss_mask, negatives, times
            )
        positions = NOT_PACKED
        if self.row_length is not None and mask.mean() < self.pack_below:
            layout = pack(ends - starts - 1, self.row_length)
            history, targets, loss_mask = (
                layout.scatter(padded, mask) for padded in (history, targets, loss_mask)
            )
            times = None if times is None else layout.scatter(times, mask)
            mask = layout.scatter(mask, mask)
            positions = torch.from_numpy(layout.positions)
        return TrainBatch(
            history=torch.from_numpy(history),
            attention_mask=torch.from_numpy(mask),
            targets=torch.from_numpy(targets),
            loss_mask=torch.from_numpy(loss_mask),
            negatives=torch.from_numpy(negatives),
            positions=positions,
            times=_NO_TIMES if times is None else torch.from_numpy(times),
            scored=torch.from_numpy(np.flatnonzero(loss_mask)),
            items=self._items(history, targets),
        )

    def _items(
        self, history: np.ndarray, targets: np.ndarray, size: int | None = None
    ) -> torch.Tensor:
        """List the items of a batch; `size`: how many numbers, None: one more than there are."""
        if not self.list_items:
            return _NO_INDEX
        numbers = np.union1d(history, targets)
        numbers = numbers[numbers != PAD]
        padding = 1 if size is None else size - len(numbers)
        return torch.from_numpy(np.pad(numbers, (padding, 0)))

    def _one_row(
        self,
        lengths: np.ndarray,
        history: np.ndarray,
        targets: np.ndarray,
        mask: np.ndarray,
        loss_mask: np.ndarray,
        negatives: np.ndarray,
        times: np.ndarray | None,
    ) -> TrainBatch:
        layout = one_row(lengths, self.buckets)

        def row(padded: np.ndarray) -> np.ndarray:
            real = padded[mask]
            return np.pad(real, [(0, layout.padding)] + [(0, 0)] * (real.ndim - 1))

        in_loss, most = row(loss_mask), None
        scored, counted = np.flatnonzero(in_loss), np.empty(0, dtype=bool)
        if self.buckets is not None:
            # Shapes that depend on the bucket alone; a bucket always leaves a position free.
            count = self.buckets.sequences if self.random_split else len(in_loss)
            counted = np.arange(count) < len(scored)
            scored = np.pad(scored, (0, count - len(scored)), constant_values=len(in_loss) - 1)
            # A sequence has one item more than positions.
            most = len(in_loss) + self.buckets.sequences + 1
        return TrainBatch(
            history=torch.from_numpy(row(history)[None]),
            attention_mask=torch.from_numpy(row(mask)[None]),
            targets=torch.from_numpy(row(targets)[None]),
            loss_mask=torch.from_numpy(in_loss[None]),
            negatives=torch.from_numpy(negatives),
            positions=torch.from_numpy(layout.positions),
            cu_lengths=torch.from_numpy(layout.cu_lengths),
            times=_NO_TIMES if times is None else torch.from_numpy(row(times)[None]),
            scored=torch.from_numpy(scored),
            counted=torch.from_numpy(counted),
            items=self._items(history, targets, most),
        )


class EvalCollate:
    """Turn sample numbers into an `EvalBatch`.

    Args:
        dataset: the evaluation users.
        candidates: int64 [E, C], drawn items of every user for sampled evaluation, else None.

    Attributes:
        single_row: put the histories of a batch into one row.
    """

    def __init__(
        self, dataset: CachedEmbeddingEvalDataset, candidates: np.ndarray | None = None
    ) -> None:
        self.single_row = False
        self.dataset = dataset
        self.candidates = candidates

    def __call__(self, indices: Sequence[int] | np.ndarray) -> EvalBatch:
        """Gather a batch.

        Args:
            indices: int64 [B], sample numbers.
        """
        indices = np.asarray(indices, dtype=np.int64)
        segments = self.dataset.segments
        items = self.dataset.interactions.items
        starts, ends = segments.starts[indices], segments.ends[indices] - 1
        recent = np.maximum(starts, ends - self.dataset.max_length)
        rows = {}
        times = None
        if self.dataset.times is not None:
            times = self.dataset.times.fields(recent, ends)
        if self.single_row:
            history = np.empty((len(indices), 0), dtype=np.int64)
            layout = one_row(ends - recent)
            row = items[ragged_positions(recent, ends)].astype(np.int64)
            if times is not None:
                real = times[np.arange(times.shape[1]) < (ends - recent)[:, None]]
                times = real[None]
            rows = {
                "row": torch.from_numpy(row[None]),
                "positions": torch.from_numpy(layout.positions),
                "cu_lengths": torch.from_numpy(layout.cu_lengths),
            }
        else:
            history, _ = gather_padded(items, recent, ends)
        drawn = (
            np.empty((len(indices), 0), dtype=np.int64)
            if self.candidates is None
            else self.candidates[indices]
        )
        return EvalBatch(
            rows=torch.from_numpy(indices),
            users=torch.from_numpy(segments.users[indices]),
            history=torch.from_numpy(history),
            lengths=torch.from_numpy(ends - recent),
            targets=torch.from_numpy(items[ends].astype(np.int64)),
            seen_rows=torch.from_numpy(np.repeat(np.arange(len(indices)), ends - starts)),
            seen_items=torch.from_numpy(items[ragged_positions(starts, ends)].astype(np.int64)),
            candidates=torch.from_numpy(drawn),
            times=_NO_TIMES if times is None else torch.from_numpy(times),
            **rows,
        )


def gather_padded(
    items: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Copy `items[starts[i]:ends[i]]` into row i, padded with 0 on the right.

    Returns:
        int64 [B, T] with T the longest range, and bool [B, T], True on real items.
    """
    lengths = ends - starts
    steps = np.arange(lengths.max(initial=0))
    mask = steps < lengths[:, None]
    # Clipping keeps the padded places inside the array; the mask then makes them 0, the padding.
    rows = items.take(starts[:, None] + steps, mode="clip")
    return np.multiply(rows, mask, dtype=np.int64), mask


def gather_pairs(
    items: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copy each range without its last item, and without its first one, padded with 0.

    Returns:
        int64 [B, T] histories and int64 [B, T] next items with T + 1 the longest range, and bool
        [B, T], True on real items.
    """
    both, mask = gather_padded(items, starts, ends)
    mask = np.ascontiguousarray(mask[:, 1:])
    return both[:, :-1] * mask, np.ascontiguousarray(both[:, 1:]), mask

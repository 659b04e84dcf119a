"""The order of training sequences: seeded, resumable, shared out evenly over processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from hsft.utils.errors import InputError

# Batches whose sequences are sorted by length together under `group_by_length`.
BATCHES_PER_GROUP = 50


class SequenceBatches(Sampler[list[int]]):
    """Batches of sample numbers for one process.

    Every epoch is a permutation drawn from (seed, epoch) alone, cut into batches that are dealt out
    to the processes. All processes make the same number of batches, as DDP requires, and every
    sequence is in exactly one of them, once an epoch: the last batch may be smaller, and by one
    sequence smaller in some processes than in others. Only where fewer sequences are left over
    than there are processes do these join the batch before.

    Args:
        lengths: int [S], transitions of each sequence.
        batch_size: sequences per batch and process.
        seed: base seed.
        group_by_length: put sequences of similar length together; batches stay in random order.
        rank, world_size: this process among all.

    Raises:
        InputError: there are fewer sequences than processes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        group_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if 0 < len(lengths) < world_size:
            raise InputError(
                f"there are {len(lengths)} training sequences for {world_size} processes; start "
                f"fewer with torchrun --nproc_per_node."
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        """Number of batches of a whole epoch in this process."""
        full, left = divmod(len(self.lengths), self.batch_size * self.world_size)
        return full + (left >= self.world_size) if full else int(left > 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches of the epoch, from `start_batch` on."""
        order, step = self._epoch_order()
        for batch in range(self.start_batch, len(self)):
            yield self._share(order, step, batch)

    def sequences(self, batches: int) -> int:
        """Return how many sequences the first batches of an epoch hold, in all processes."""
        every = len(self.lengths)
        return batches * self.batch_size * self.world_size if batches < len(self) else every

    def samples(self, batch: int) -> list[int]:
        """Return the sample numbers of one batch of the epoch, from 0, in this process."""
        return self._share(*self._epoch_order(), batch)

    def _epoch_order(self) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        step = self.batch_size * self.world_size
        if self.group_by_length:
            order = self._grouped(order, step, rng)
        return order, step

    def _share(self, order: np.ndarray, step: int, batch: int) -> list[int]:
        end = (batch + 1) * step if batch + 1 < len(self) else len(order)
        share: list[int] = order[batch * step : end][self.rank :: self.world_size].tolist()
        return share

    def _grouped(self, order: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
        size = step * BATCHES_PER_GROUP
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        ordered = np.concatenate(
            [group[np.argsort(-self.lengths[group], kind="stable")] for group in groups]
        )
        full = len(ordered) // step * step
        batches = ordered[:full].reshape(-1, step)
        return np.concatenate([rng.permutation(batches).reshape(-1), ordered[full:]])

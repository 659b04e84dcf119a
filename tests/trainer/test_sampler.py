"""The order of training sequences: once an epoch, evenly over processes, resumable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hsft.trainer.sampler import SequenceBatches
from hsft.utils.errors import InputError


@pytest.mark.parametrize("sequences", [3, 8, 24, 25, 26, 27, 31, 47])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_sequence_is_in_one_batch_an_epoch(sequences: int, world: int, grouped: bool) -> None:
    lengths = np.arange(sequences) % 7 + 1
    made = [
        SequenceBatches(lengths, 4, 0, group_by_length=grouped, rank=rank, world_size=world)
        for rank in range(world)
    ]
    dealt = [list(batches) for batches in made]
    assert {len(batches) for batches in dealt} == {len(made[0])}
    assert all(batch for batches in dealt for batch in batches)
    everything = [sample for batches in dealt for batch in batches for sample in batch]
    assert sorted(everything) == list(range(sequences))
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert max(sizes) <= 5
    # The global batches are those of one process with the whole batch.
    alone = list(SequenceBatches(lengths, 4 * world, 0, group_by_length=grouped))
    for number, batch in enumerate(alone[: len(made[0]) - 1]):
        assert sorted(batch) == sorted(itertools.chain(*(batches[number] for batches in dealt)))


def test_fewer_sequences_than_processes_are_refused() -> None:
    with pytest.raises(InputError, match="2 training sequences for 3 processes"):
        SequenceBatches(np.ones(2), 4, 0, rank=0, world_size=3)


def test_order_of_batches_is_taken_up_in_the_middle() -> None:
    import numpy as np

    lengths = np.arange(1, 24)
    for grouped in (False, True):
        batches = SequenceBatches(lengths, 4, 3, group_by_length=grouped)
        batches.epoch = 2
        whole = list(batches)
        assert [batches.samples(number) for number in range(len(batches))] == whole
        batches.start_batch = 4
        assert list(batches) == whole[4:]


@pytest.mark.parametrize(("count", "world"), [(30, 1), (32, 1), (30, 2), (31, 3), (49, 3), (5, 3)])
def test_sequences_of_the_first_batches(count: int, world: int) -> None:
    shares = [
        list(SequenceBatches(np.ones(count), 4, 0, rank=rank, world_size=world))
        for rank in range(world)
    ]
    batches = SequenceBatches(np.ones(count), 4, 0, world_size=world)
    sizes = [sum(map(len, batch)) for batch in zip(*shares, strict=True)]
    assert [batches.sequences(n) for n in range(len(batches) + 1)] == [
        0,
        *itertools.accumulate(sizes),
    ]
    assert batches.sequences(len(batches)) == count

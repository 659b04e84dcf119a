"""`train_batch_size: auto`: how many sequences a forward pass takes, from shapes alone."""

from __future__ import annotations

import math

from hsft.report.memory import GIB, TrainingShape, adapter_matrices, estimate, saved_bytes_per_token

# Powers of two from here on; only memory makes batches smaller.
SMALLEST = 8
# The shortest training of docs/experiments.md that gains: 6 passes over Amazon Beauty's 22,332 users in
# batches of 256 are 528 steps.
FEWEST_STEPS = 500
# From here on the arithmetic of a step fills a GPU, and larger batches only take memory.
MOST_POSITIONS = 8192
# How much of a step's arithmetic may be what does not grow with the batch. Doubling a batch at this
# share makes an epoch an eighth shorter.
_FIXED_SHARE = 0.25


def most_for_steps(sequences: int, epochs: int, accumulation: int, processes: int) -> int:
    """Return the largest batch of a process that leaves a run its `FEWEST_STEPS`.

    Args:
        sequences: training sequences of all processes.
        epochs: passes over them.
        accumulation: forward passes per optimizer step.
        processes: that share a step.

    Returns:
        A power of two, `SMALLEST` at least.
    """

    def steps(size: int) -> int:
        return epochs * math.ceil(math.ceil(sequences / (size * processes)) / accumulation)

    size = SMALLEST
    # Batches larger than all sequences are none.
    while 2 * size * processes <= sequences and steps(2 * size) >= FEWEST_STEPS:
        size *= 2
    return size


def batch_for_card(shape: TrainingShape, most: int, available: float | None) -> int:
    """Return the largest batch for a GPU: within `MOST_POSITIONS` on average, and within its memory.

    Args:
        shape: the run.
        most: as `most_for_steps` gives.
        available: bytes that a step may take by the estimate; None: any number.

    Returns:
        A power of two. It is 1 too where not even one sequence fits.
    """
    counted = saved_bytes_per_token(shape)
    size = most
    while size > SMALLEST and size * _mean_length(shape) > MOST_POSITIONS:
        size //= 2
    while available is not None and size > 1 and estimate(shape, size, counted).total > available:
        size //= 2
    return size


def batch_for_processor(shape: TrainingShape, most: int) -> int:
    """Return the smallest batch over which the items' vectors are spread thinly enough.

    On a processor a step takes as long as its arithmetic. Where all items, or those drawn once for a
    batch, go through the item adapter, that part is the same for every batch.

    Args:
        shape: the run.
        most: as `most_for_steps` gives.

    Returns:
        A power of two, `SMALLEST` at least.
    """
    size = SMALLEST
    while size < most and fixed_share(shape, size) > _FIXED_SHARE:
        size *= 2
    return size


def fixed_share(shape: TrainingShape, batch_size: int) -> float:
    """Return the share of a step's products that adapts items, however large the batch is.

    Counted as 2 operations a weight forward, as many for the inputs' gradients, and as many again for
    the gradients of weights that are trained.
    """
    items = shape.num_negatives
    if shape.negatives == "catalogue":
        items = shape.items or 0
    passes = 6 if shape.lora_rank is None else 4
    weights = sum(math.prod(widths) for widths in shape.decoder.linear.values())
    each = passes * weights + 6 * items * shape.decoder.hidden_size
    fixed = 6 * items * sum(adapter_matrices(shape))
    return fixed / (fixed + batch_size * _mean_length(shape) * each)


def describe_for_card(shape: TrainingShape, batch_size: int, available: float) -> str:
    """Return the figures by which a batch was chosen for a GPU, in words that follow "takes N"."""
    needed = estimate(shape, batch_size).total
    return (
        f"about {batch_size * _mean_length(shape):,.0f} positions in a step (of {MOST_POSITIONS:,} at "
        f"most), estimated at {needed / GIB:.2f} GiB (of {available / GIB:.2f})"
    )


def describe_for_processor(shape: TrainingShape, batch_size: int) -> str:
    """Return the figures by which a batch was chosen for a processor, as `describe_for_card`."""
    return (
        f"items' vectors, whose cost does not grow with the batch, are "
        f"{fixed_share(shape, batch_size):.0%} of a step's arithmetic (of {_FIXED_SHARE:.0%} at most)"
    )


def _mean_length(shape: TrainingShape) -> float:
    return float(shape.length) if shape.mean_length is None else shape.mean_length

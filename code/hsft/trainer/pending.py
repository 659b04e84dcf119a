"""An optimizer step's numbers on their way from the device, so that nothing waits for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsft.utils.distributed import all_reduce, world_size


class HostCopy:
    """A small tensor copied to the CPU in the background.

    `Tensor.item()` waits for everything that is queued on the GPU; this waits only for what was
    queued before the copy, so a value read one step late costs no idle time.

    Args:
        values: float [n].
    """

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        # With non_blocking, torch copies from a GPU into pinned memory.
        self._values = values.to("cpu", non_blocking=True)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step came to.

    Attributes:
        step: its number, from 1.
        rate: its learning rate.
        first_batch: number of its first batch in the epoch, from 0.
        losses: mean loss of each of its batches.
        positions: positions in each of these means.
        norm: gradient norm before clipping; 0 where it was not taken.
        stop: largest signal number that a process had received, 0 for none.
        due: a process found that time for a checkpoint had come.
    """

    step: int
    rate: float
    first_batch: int
    losses: list[float]
    positions: list[int]
    norm: float
    stop: int
    due: bool

    @property
    def loss(self) -> float:
        """Mean loss over the step's positions."""
        total = sum(loss * n for loss, n in zip(self.losses, self.positions, strict=True))
        return total / max(sum(self.positions), 1)

    @property
    def has_bad_loss(self) -> bool:
        """Whether the loss itself is NaN or infinite."""
        return not all(map(math.isfinite, self.losses))

    @property
    def bad_batches(self) -> list[int]:
        """The batches whose loss is NaN or infinite, or all of them if only the gradient is."""
        bad = [n for n, loss in enumerate(self.losses) if not math.isfinite(loss)]
        if not bad and not math.isfinite(self.norm):
            bad = list(range(len(self.losses)))
        return [self.first_batch + n for n in bad]


class PendingStep:
    """An optimizer step that is queued on the device.

    Args:
        losses: scalars on the device, one a batch.
        norm: scalar on the device, or None.
        step, rate, first_batch, positions, stop, due: see `StepReport`; of `stop` and `due` the
            largest of all processes is read.
    """

    def __init__(
        self,
        *,
        step: int,
        rate: float,
        first_batch: int,
        losses: list[Tensor],
        positions: list[int],
        norm: Tensor | None,
        stop: int,
        due: bool,
    ) -> None:
        self._known = {"step": step, "rate": rate, "first_batch": first_batch}
        self._positions = positions
        self._flags: list[float] = [float(stop), float(due)]
        parts = [*losses, losses[0].new_zeros(()) if norm is None else norm.to(losses[0].dtype)]
        values = torch.stack(parts)
        if world_size() > 1:
            flags = torch.tensor(self._flags, device=values.device)
            agreed = all_reduce(flags, "max")
            values = torch.cat([values, agreed.to(values.dtype)])
        self._copy = HostCopy(values)

    def read(self) -> StepReport:
        """Wait for the step and return its numbers."""
        values = self._copy.read()
        count = len(self._positions)
        stop, due = values[count + 1 :] or self._flags
        return StepReport(
            step=int(self._known["step"]),
            rate=self._known["rate"],
            first_batch=int(self._known["first_batch"]),
            losses=values[:count],
            positions=self._positions,
            norm=values[count],
            stop=int(stop),
            due=bool(due),
        )

"""What an optimizer step came to: copied from the device without waiting, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hsft.config import Config
from hsft.data.dataset import CachedEmbeddingTrainDataset
from hsft.model.recommender import Recommender
from hsft.trainer.fabric import choose_precision
from hsft.trainer.sampler import SequenceBatches
from hsft.utils.distributed import all_reduce, world_size
from hsft.utils.errors import InputError
from hsft.utils.host_copy import HostCopy


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step came to.

    Attributes:
        step: its number, from 1.
        rate: its learning rate.
        first_batch: number of its first batch in the epoch, from 0.
        positions: positions in each of its batches.
        stop: largest signal number that a process had received, 0 for none.
        due: a process found that time for a checkpoint had come.
        losses: mean loss of each batch over its positions.
        norm: gradient norm before clipping; 0 where it was not taken.
        negatives: sums of `losses.count_negatives` over the step, in all processes.
    """

    step: int
    rate: float
    first_batch: int
    positions: list[int]
    stop: int = 0
    due: bool = False
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0
    negatives: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def loss(self) -> float:
        """Mean loss over the step's positions."""
        total = sum(loss * n for loss, n in zip(self.losses, self.positions, strict=True))
        return total / max(sum(self.positions), 1)

    @property
    def bad_batches(self) -> list[int]:
        """The batches whose loss is NaN or infinite, or all of them if only the gradient is."""
        bad = [n for n, loss in enumerate(self.losses) if not math.isfinite(loss)]
        if not bad and not math.isfinite(self.norm):
            bad = list(range(len(self.losses)))
        return [self.first_batch + n for n in bad]

    def check_finite(
        self,
        config: Config,
        batches: SequenceBatches,
        dataset: CachedEmbeddingTrainDataset,
        last_good: Callable[[], str],
    ) -> None:
        """Refuse a loss or gradient that is NaN or infinite.

        Args:
            config: for the precision.
            batches: set to the step's epoch, to name the users in the bad batches.
            dataset: what `batches` indexes.
            last_good: names the last checkpoint in half a sentence.

        Raises:
            InputError: it names the step, the batch, its users and the last checkpoint.
        """
        bad = self.bad_batches
        if not bad:
            return
        samples = [sample for number in bad for sample in batches.samples(number)]
        users = list(dict.fromkeys(dataset.users_of(samples)))
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        what = "gradient" if all(map(math.isfinite, self.losses)) else "loss"
        wider = "" if choose_precision(config) == "32-true" else " or use --precision 32-true"
        raise InputError(
            f"the {what} became NaN or infinite in optimizer step {self.step} (epoch "
            f"{batches.epoch + 1}, batch {bad[0] + 1}, users {', '.join(users[:5])}{more}), so "
            f"training was stopped; lower --optim_args.learning_rate{wider}; {last_good()}."
        )


class PendingStep:
    """An optimizer step that is queued on the device.

    Args:
        report: what is known of it; with several processes, the largest `stop` and `due` of all of
            them are read.
        losses: scalars on the device, one a batch.
        norm: scalar on the device, or None.
        model: whose counts of negatives are taken.
    """

    def __init__(
        self,
        report: StepReport,
        losses: list[Tensor],
        norm: Tensor | None,
        model: Recommender,
    ) -> None:
        self._report = report
        parts = [*losses, losses[0].new_zeros(()) if norm is None else norm.to(losses[0].dtype)]
        # One copy for all: float32's bits as integers, since not every device has float64.
        bits = torch.stack(parts).float().view(torch.int32).long()
        values = torch.cat([bits, model.take_negative_counts()])
        if world_size() > 1:
            flags = torch.tensor([report.stop, report.due], dtype=torch.int64, device=values.device)
            values = torch.cat([values, all_reduce(flags, "max")])
        self._copy = HostCopy(values)

    def read(self) -> StepReport:
        """Wait for the step and return its numbers."""
        copied = self._copy.read()
        count = len(self._report.positions)
        *losses, norm = copied[: count + 1].int().view(torch.float32).tolist()
        counts = copied[count + 1 :].tolist()
        stop, due = counts[4:] or (self._report.stop, self._report.due)
        return replace(
            self._report,
            losses=losses,
            norm=norm,
            negatives=tuple(counts[:4]),
            stop=int(stop),
            due=bool(due),
        )

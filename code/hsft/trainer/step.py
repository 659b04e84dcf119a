"""One optimizer step: add up the gradients of its batches, then update the weights."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from hsft.config import Config
from hsft.data.dataset import TrainBatch
from hsft.model.accelerate import StepGraphs
from hsft.model.recommender import Recommender
from hsft.model.weights import ITEM_LLM, load_trained, save_trained
from hsft.trainer.checkpoint import restore_torch_rng, torch_rng_state
from hsft.trainer.item_training import ItemTraining
from hsft.trainer.micro_batch import count_sequences, split_batch
from hsft.trainer.optim import build_optimizer, build_schedule
from hsft.trainer.zero import engine_of, uses_deepspeed
from hsft.utils.distributed import all_reduce, global_rank, world_size
from hsft.utils.errors import InputError
from hsft.utils.gpu_memory import out_of_memory, release_unused_memory

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """A model and what changes its weights.

    Attributes:
        config: the configuration.
        fabric: Lightning Fabric, launched.
        model: the recommender as built.
        wrapped: the same model as `fabric.setup` returned it; its forward pass is the loss.
        optimizer: as `fabric.setup` returned it.
        schedule: of the learning rate; counts the optimizer steps taken.
        graphs: computes losses and gradients by CUDA graphs; None: kernel by kernel.
        items: trains the ItemLLM along with the model; None: the item table is frozen.
    """

    config: Config
    fabric: Fabric
    model: Recommender
    wrapped: Any
    optimizer: Any
    schedule: LRScheduler
    graphs: StepGraphs | None = None
    items: ItemTraining | None = None

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self.schedule.get_last_lr()[0])

    def save(self, folder: Path) -> None:
        """Write everything that was trained to a folder, whole or not at all."""
        save_trained(self.model, folder, None if self.items is None else self.items.save)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            InputError: a file is missing, damaged, or belongs to another configuration.
        """
        load_trained(self.model, folder)
        if self.items is not None:
            self.items.load(folder)


def make_learner(
    config: Config,
    fabric: Fabric,
    model: Recommender,
    total_steps: int,
    items: ItemTraining | None = None,
) -> Learner:
    """Make optimizer and schedule, and let Fabric wrap model and optimizer.

    Args:
        config: the configuration.
        fabric: Lightning Fabric, launched.
        model: the recommender, on the device.
        total_steps: optimizer steps of the whole run, for the schedule.
        items: trains the model's `item_llm` along with it.

    Raises:
        InputError: nothing is trainable, or the optimizer cannot run on this device.
    """
    if items is not None and items.along:
        items.agree()
        # Its gradients do not come from the model's forward pass, which is what DDP waits for.
        names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name in names if name.startswith(ITEM_LLM)]
        )
    optimizer = build_optimizer(model, config, fabric.device)
    schedule = build_schedule(optimizer, config, total_steps)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    return Learner(config, fabric, model, wrapped, wrapped_optimizer, schedule, items=items)


def group_batches(
    learner: Learner, batches: Iterator[TrainBatch]
) -> Iterator[tuple[list[TrainBatch], list[int]]]:
    """Yield the batches of each optimizer step with the positions that they count.

    A step's loss is the mean over all its positions, in whatever batches and processes they are:
    a batch weighs as much as it has positions, not one share in `gradient_accumulation_steps`,
    unless `loss_mean` is `batches`.

    Args:
        learner: for the number of batches in a step; the last step of an epoch may have fewer.
        batches: of this process; all processes have the same number.

    Yields:
        The batches, and the positions of each in all processes.
    """
    while group := list(itertools.islice(batches, learner.config.gradient_accumulation_steps)):
        counts = torch.stack([batch.loss_mask.sum() for batch in group])
        if world_size() > 1:
            counts = all_reduce(counts.to(learner.fabric.device))
        yield group, counts.tolist()


def accumulate(
    learner: Learner, group: list[TrainBatch], positions: list[int], micro_batch: int | None
) -> tuple[list[Tensor], int | None]:
    """Add up the gradients of a step; on too little GPU memory, again in smaller parts.

    Args:
        learner: the model.
        group, positions: as `group_batches` yields them.
        micro_batch: sequences that go through the model at a time; None for a whole batch.

    Returns:
        The mean loss of each batch, scalars on the device, and the `micro_batch` that fitted.

    Raises:
        InputError: a single sequence does not fit, or the batch does not in one of many processes.
    """
    rng = torch_rng_state(learner.fabric.device)
    while True:
        try:
            return _backward(learner, group, positions, micro_batch), micro_batch
        except torch.OutOfMemoryError:
            pass
        # Out of the except block: its traceback holds on to the activations.
        micro_batch = _halve(learner, group, micro_batch)
        learner.optimizer.zero_grad()
        release_unused_memory()
        # Dropout of the second try starts where that of the first did.
        restore_torch_rng(rng, learner.fabric.device)


def _backward(
    learner: Learner, group: list[TrainBatch], positions: list[int], micro_batch: int | None
) -> list[Tensor]:
    device = learner.fabric.device
    losses = []
    equal = learner.config.loss_mean == "batches"
    with nullcontext() if learner.items is None else learner.items.encoded(group):
        for batch, count in zip(group, positions, strict=True):
            weight = 1 / len(group) if equal else count / max(1, sum(positions))
            parts = split_batch(batch, micro_batch, learner.model.settings)
            total = torch.zeros((), device=device)
            for part in parts:
                if learner.graphs is not None:
                    total += learner.graphs.step(part.batch, part.weight * weight) * part.weight
                    continue
                last = batch is group[-1] and part is parts[-1]
                with _gradient_sync(learner, last):
                    loss = learner.wrapped(part.batch.to(device)) * part.weight
                    learner.fabric.backward(loss * weight)
                total += loss.detach()
            losses.append(total)
    return losses


@contextmanager
def _gradient_sync(learner: Learner, last: bool) -> Iterator[None]:
    """Exchange gradients in the backward pass of a step's last part only."""
    if uses_deepspeed(learner.fabric):
        # DeepSpeed would count batches itself, and wrongly where an epoch's last step has fewer.
        engine_of(learner.fabric).set_gradient_accumulation_boundary(last)
        yield
    else:
        with learner.fabric.no_backward_sync(learner.wrapped, enabled=not last):
            yield


def _halve(learner: Learner, group: list[TrainBatch], micro_batch: int | None) -> int:
    """Return half of the sequences that went through the model at a time."""
    sequences = max(count_sequences(batch) for batch in group)
    sequences = min(sequences, micro_batch or sequences)
    where = f"{out_of_memory(learner.fabric.device)} in optimizer step {learner.schedule.last_epoch + 1}"
    if world_size() > 1:
        # The others would wait for this process in the middle of their own, larger, batch.
        raise InputError(
            f"{where} of process {global_rank()}; lower --train_batch_size and raise "
            f"--gradient_accumulation_steps."
        )
    if sequences == 1:
        raise InputError(
            f"{where} with a single sequence; set --gradient_checkpointing True, or lower "
            f"--logits_budget_mb, --MAX_ITEM_LIST_LENGTH or --user_llm_layers."
        )
    half = -(-sequences // 2)
    log.warning(
        "%s: from now on a batch goes through the model %d sequences at a time; the optimizer "
        "step still covers the same sequences.%s",
        where,
        half,
        " In-batch negatives come from these parts, so there are fewer of them."
        if learner.model.settings.negatives == "in_batch" or learner.model.proposal is not None
        else "",
    )
    return half


def update(learner: Learner) -> Tensor | None:
    """Clip the gradients, take an optimizer step, and set them to zero.

    Returns:
        The gradient norm before clipping, a scalar on the device, where it was taken.

    Raises:
        InputError: the optimizer's states do not fit the GPU's memory.
    """
    norm = _clip(learner)
    try:
        learner.optimizer.step()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{out_of_memory(learner.fabric.device)} in the optimizer; use --optimizer "
            f"paged_adamw8bit (CUDA) or train fewer weights (--use_qlora True, a lower --qlora_r)."
        ) from error
    learner.optimizer.zero_grad()
    learner.schedule.step()
    # The scaler of 16-mixed skips a step whose gradients overflow, and lowers its scale.
    scaled = getattr(learner.fabric.strategy.precision, "scaler", None) is not None
    return None if scaled else norm


def _clip(learner: Learner) -> Tensor | None:
    """Scale gradients down to a norm of `clip_grad_norm`; 0 leaves them. DeepSpeed does so itself.

    Returns:
        The norm before clipping, where it was taken.
    """
    limit = learner.config.clip_grad_norm
    if not limit or uses_deepspeed(learner.fabric):
        return None
    norm: Tensor | None = learner.fabric.clip_gradients(
        learner.wrapped, learner.optimizer, max_norm=limit, error_if_nonfinite=False
    )
    return norm

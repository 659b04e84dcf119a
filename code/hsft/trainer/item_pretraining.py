"""A first stage that trains the ItemLLM alone: items that follow each other in histories are alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsft.config import Config
from hsft.data.blocks import SAMPLES_AT_ONCE, Column, slices
from hsft.data.dataset import TrainBatch
from hsft.data.split import Split, ragged_positions
from hsft.model import losses
from hsft.model.item_table import ItemTable
from hsft.trainer.checkpoint import restore_rng, rng_state
from hsft.trainer.context import RunContext
from hsft.trainer.item_training import ItemTraining
from hsft.trainer.optim import build_optimizer, build_schedule
from hsft.utils.distributed import (
    all_gather,
    all_gather_ids,
    all_reduce,
    global_rank,
    is_rank_zero,
    run_on_rank_zero,
    world_size,
)
from hsft.utils.errors import InputError
from hsft.utils.progress import Meter

log = logging.getLogger(__name__)

# Name among the run's checkpoints.
STATE = "item-pretraining"
# Above every cosine: negatives are left out by their item alone, since a threshold on cosines would
# reward items that are all alike.
_NO_THRESHOLD = 2.0


def pretrain_items(run: RunContext, items: ItemTraining, split: Split, fingerprint: str) -> None:
    """Train the ItemLLM by InfoNCE between neighbours for `item_pretrain_epochs`.

    The state after each epoch is kept among the run's checkpoints; a run that is continued goes on
    from there.

    Args:
        run: configuration, device, checkpoints.
        items: the ItemLLM, on the device; trained in place.
        split: whose training items are read.
        fingerprint: of data and ItemLLM; a state of others is not continued.

    Raises:
        InputError: there are no two neighbours, the loss became NaN or infinite, or a chunk does not
            fit the GPU's memory.
    """
    config, device = run.config, run.fabric.device
    left, right = neighbours(split)
    size = min(config.item_pretrain_batch_size, len(left) // world_size())
    if len(left) < 2 or not size:
        raise InputError(
            f"item_pretrain_epochs: {config.dataset} has {len(left)} pairs of neighbouring items to "
            f"train on, fewer than it takes; set --item_pretrain_epochs 0."
        )
    steps = len(left) // (size * world_size())
    optimizer = build_optimizer(nn.ModuleDict({"item_llm": items.tower}), config, device)
    schedule = build_schedule(optimizer, config, config.item_pretrain_epochs * steps)
    trained = [weight for weight in items.tower.parameters() if weight.requires_grad]
    first = _resume(run, items, optimizer, schedule, fingerprint)
    scale = torch.tensor(_initial_scale(config), device=device)
    items.tower.train()
    for epoch in range(first, config.item_pretrain_epochs):
        total = torch.zeros((), device=device)
        shown = config.show_progress and is_rank_zero()
        with Meter(f"pretraining items, epoch {epoch + 1}", steps, "steps", shown) as bar:
            for rows in _batches(config, epoch, len(left), size, steps):
                pair = torch.from_numpy(left[rows]), torch.from_numpy(right[rows])
                with items.encoded([_as_batch(*pair)]):
                    there = pair[0].to(device), pair[1].to(device)
                    loss = neighbour_loss(items.table, *there, scale, config.logits_budget_mb << 20)
                    loss.backward()
                if config.clip_grad_norm:
                    nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += loss.detach()
                bar.advance(1)
        mean = float(all_reduce(total)) / (steps * world_size())
        if not math.isfinite(mean):
            raise InputError(
                f"the loss of item pretraining is {mean} in epoch {epoch + 1}; lower --item_lr_mult or "
                f"--optim_args.learning_rate."
            )
        log.info("item pretraining: loss %.4f in epoch %d", mean, epoch + 1)
        with run.stop.held_back():
            _save(run, items, optimizer, schedule, fingerprint, epoch + 1)


def neighbours(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the items that follow each other in a user's training history, unless they are equal.

    Returns:
        int64 [n] and int64 [n], the earlier and the later one.
    """
    items, folder = split.interactions.items, split.interactions.folder
    whole = split.train_segments(len(items) + 1)
    left, right = Column(np.int64, folder), Column(np.int64, folder)
    for some in slices(len(whole), SAMPLES_AT_ONCE):
        later = ragged_positions(whole.starts[some] + 1, whole.ends[some])
        earlier_items, later_items = items[later - 1], items[later]
        unlike = earlier_items != later_items
        left.append(earlier_items[unlike])
        right.append(later_items[unlike])
    return left.whole(), right.whole()


def neighbour_loss(
    table: ItemTable, left: Tensor, right: Tensor, log_scale: Tensor, budget_bytes: int
) -> Tensor:
    """InfoNCE (arXiv 1807.03748) between neighbours, in both directions.

    The negatives of a pair are the items of all other pairs, over all processes, its own two left
    out.

    Args:
        table: gives the items' vectors.
        left, right: int64 [B], the pairs.
        log_scale: log factor on cosines.
        budget_bytes: largest block of logits held at once.

    Returns:
        Scalar, the mean over this process's 2 B terms.
    """
    queries, positives = torch.cat([left, right]), torch.cat([right, left])
    pool = all_gather_ids(positives)
    excluded = (pool == positives.unsqueeze(1)) | (pool == queries.unsqueeze(1))
    return losses.info_nce(
        table(queries),
        table(positives),
        table(pool),
        log_scale,
        _NO_THRESHOLD,
        excluded,
        budget_bytes,
    )


def _initial_scale(config: Config) -> float:
    given = config.initial_logit_scale
    return losses.LOGIT_SCALE_INIT if given is None else given


def _batches(config: Config, epoch: int, pairs: int, size: int, steps: int) -> Iterator[np.ndarray]:
    """Yield the pairs of each step of this process: int64 [size]; a rest is left out."""
    order = np.random.default_rng([config.seed, epoch]).permutation(pairs)
    whole = size * world_size()
    for step in range(steps):
        yield order[step * whole : (step + 1) * whole][global_rank() :: world_size()]


def _as_batch(left: Tensor, right: Tensor) -> TrainBatch:
    mask = torch.ones(1, len(left), dtype=torch.bool)
    return TrainBatch(left[None], mask, right[None], mask, left.new_empty((1, 0)))


def _save(
    run: RunContext,
    items: ItemTraining,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    fingerprint: str,
    epoch: int,
) -> None:
    generators = all_gather(rng_state(run.fabric.device))
    content = {
        "epoch": epoch,
        "fingerprint": fingerprint,
        "weights": items.tower.trained_state(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": generators,
        "record": run.session.record("item pretraining"),
    }
    run_on_rank_zero(lambda: run.checkpoints.save_extra(STATE, content))


def _resume(
    run: RunContext,
    items: ItemTraining,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    fingerprint: str,
) -> int:
    """Load the state of the last epoch and return how many epochs are done."""
    saved = run.checkpoints.load_extra(STATE) if run.resume else None
    if saved is None or saved["fingerprint"] != fingerprint or len(saved["rng"]) != world_size():
        return 0
    weights = dict(items.tower.named_parameters())
    with torch.no_grad():
        for name, value in saved["weights"].items():
            weights[name].copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    restore_rng(saved["rng"][global_rank()], run.fabric.device)
    run.session.continue_from(saved["record"])
    log.info("item pretraining: going on after epoch %d.", saved["epoch"])
    return int(saved["epoch"])

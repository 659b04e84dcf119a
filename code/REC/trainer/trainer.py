"""The training loop: one pass over the batches an epoch, validation, early stopping, best model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from REC.config import Config
from REC.data.dataset import TrainBatch, TrainCollate
from REC.evaluator.evaluator import Evaluation
from REC.model.recommender import Recommender
from REC.model.weights import load_trained, save_trained
from REC.trainer.fabric import clip_gradients, gradient_sync, micro_batches
from REC.trainer.sampler import SequenceBatches
from REC.trainer.zero import whole_parameters
from REC.utils.progress import meter

log = logging.getLogger(__name__)

BEST_DIR = "best"


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        epoch: epochs finished.
        step: optimizer steps taken.
        best_value: best validation metric so far; that of the untrained model at the start.
        best_epoch: epoch of the best value, 0 for the untrained model.
        bad_validations: validations since the best one.
        history: one record an epoch: epoch, loss, learning rate, validation metrics.
    """

    epoch: int = 0
    step: int = 0
    best_value: float = float("-inf")
    best_epoch: int = 0
    bad_validations: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return asdict(self)


class Trainer:
    """Trains a recommender.

    Args:
        fabric: Lightning Fabric, launched.
        config: the run's configuration.
        model: the recommender as built; its best state is loaded back at the end.
        wrapped: the same model as `fabric.setup` returned it.
        optimizer, schedule: as `build_optimizer` and `build_schedule` made them.
        loader: training batches, its batch sampler a `SequenceBatches`.
        validate: scores the validation users.
        run_dir: where the best model goes.
    """

    def __init__(
        self,
        *,
        fabric: Any,
        config: Config,
        model: Recommender,
        wrapped: Any,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loader: DataLoader[Any],
        validate: Callable[[], Evaluation],
        run_dir: Path,
    ) -> None:
        self.fabric = fabric
        self.config = config
        self.model, self.wrapped = model, wrapped
        self.optimizer, self.schedule = optimizer, schedule
        self.loader = loader
        self.validate = validate
        self.run_dir = run_dir
        self.state = TrainState()

    def fit(self) -> TrainState:
        """Train until the last epoch or until `stopping_step` validations brought no gain.

        Returns:
            The final state; the model holds the weights of the best epoch.
        """
        config = self.config
        with self._board() as board:
            while self.state.epoch < config.epochs:
                loss = self._train_epoch(board)
                self.state.epoch += 1
                record: dict[str, Any] = {
                    "epoch": self.state.epoch,
                    "step": self.state.step,
                    "loss": loss,
                    "learning_rate": self.schedule.get_last_lr()[0],
                }
                due = self.state.epoch % config.eval_step == 0
                if due or self.state.epoch == config.epochs:
                    record["valid"] = self._validate(board)
                self.state.history.append(record)
                log.info("epoch %d: %s", self.state.epoch, _describe(record, config.valid_metric))
                if self.state.bad_validations >= config.stopping_step:
                    log.info(
                        "stopping early: %s has not improved for %d validations.",
                        config.valid_metric,
                        self.state.bad_validations,
                    )
                    break
        if self.state.best_epoch:
            with whole_parameters(self.fabric, self.model, write=True):
                load_trained(self.model, self.run_dir / BEST_DIR)
        return self.state

    def _board(self) -> Any:
        # Process 0 alone writes files.
        if self.fabric.is_global_zero:
            return SummaryWriter(self.run_dir / "tensorboard")
        return nullcontext()

    def _train_epoch(self, board: SummaryWriter | None) -> float:
        config = self.config
        batches, collate = self._order()
        batches.epoch = collate.epoch = self.state.epoch
        self.wrapped.train()
        total, counted = 0.0, 0
        accumulate = config.gradient_accumulation_steps
        task = f"epoch {self.state.epoch + 1} of {config.epochs}"
        with meter(task, len(batches), "batches", config.show_progress) as bar:
            for batch, weight, positions, stepping in micro_batches(
                self.fabric, self.loader, accumulate
            ):
                with gradient_sync(self.fabric, self.wrapped, stepping):
                    loss = self.wrapped(self._move(batch))
                    self.fabric.backward(loss * weight)
                total += float(loss.detach()) * positions
                counted += positions
                if stepping:
                    self._step(board, float(loss.detach()))
                bar.advance(note=f"loss {total / max(counted, 1):.4f}")
        return total / max(counted, 1)

    def _step(self, board: SummaryWriter | None, loss: float) -> None:
        clip_gradients(self.fabric, self.wrapped, self.optimizer, self.config.clip_grad_norm)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.state.step += 1
        if board is not None:
            board.add_scalar("train/loss", loss, self.state.step)
            board.add_scalar("train/learning_rate", rate, self.state.step)

    def _validate(self, board: SummaryWriter | None) -> dict[str, float]:
        self.wrapped.eval()
        found = self.validate().metrics
        if board is not None:
            for name, value in found.items():
                board.add_scalar(f"valid/{name}", value, self.state.step)
        value = found[self.config.valid_metric]
        if value > self.state.best_value:
            self.state.best_value, self.state.best_epoch = value, self.state.epoch
            self.state.bad_validations = 0
            with whole_parameters(self.fabric, self.model):
                if self.fabric.is_global_zero:
                    save_trained(self.model, self.run_dir / BEST_DIR)
            self.fabric.barrier()
        else:
            self.state.bad_validations += 1
        return found

    def _order(self) -> tuple[SequenceBatches, TrainCollate]:
        batches, collate = self.loader.batch_sampler, self.loader.collate_fn
        assert isinstance(batches, SequenceBatches)
        assert isinstance(collate, TrainCollate)
        return batches, collate

    def _move(self, batch: TrainBatch) -> TrainBatch:
        return TrainBatch(*(part.to(self.fabric.device, non_blocking=True) for part in batch))


def count_trainable(model: torch.nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _describe(record: dict[str, Any], metric: str) -> str:
    text = f"loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}"
    return f"{text}, valid {metric} {record['valid'][metric]:.4f}" if "valid" in record else text

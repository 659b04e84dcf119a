"""Where training stands: saved as resumable checkpoints, and loaded to go on from one."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hsft.model.weights import trainable_state
from hsft.trainer.checkpoint import BEST_DIR, rng_state
from hsft.trainer.context import RunContext
from hsft.trainer.step import Learner
from hsft.trainer.step_report import StepReport
from hsft.trainer.zero import whole_parameters
from hsft.utils.distributed import (
    all_gather,
    global_rank,
    run_on_rank_zero,
    world_size,
)
from hsft.utils.errors import InputError
from hsft.utils.files import remove

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        epoch: epochs finished, with their validation.
        step: optimizer steps taken.
        best_value: best validation metric so far; -inf before the first validation.
        best_epoch: epoch of the best value, from 1; 0 before the first validation.
        bad_validations: validations since the best one.
        history: one record an epoch: epoch, loss, learning rate, validation metrics.
        resumed_from: optimizer step at the start of each session after the first.
        micro_batch: sequences of a batch that fit the GPU's memory; None for all of them.
        batch: batches done in the current epoch.
        loss_sum: sum of the loss over the positions of these batches.
        positions: number of these positions.
        negatives: sums of `losses.count_negatives` over these batches.
        best: name of the best model among the checkpoints.
    """

    epoch: int = 0
    step: int = 0
    best_value: float = float("-inf")
    best_epoch: int = 0
    bad_validations: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    micro_batch: int | None = None
    batch: int = 0
    loss_sum: float = 0.0
    positions: int = 0
    negatives: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    best: str | None = None

    @property
    def loss(self) -> float:
        """Mean loss over the positions of the current epoch so far."""
        return self.loss_sum / max(self.positions, 1)

    @property
    def masked_negatives(self) -> float | None:
        """Share of the current epoch's negatives that the loss masked; None where it has none."""
        masked, pairs, _, _ = self.negatives
        return masked / pairs if pairs else None

    def add(self, report: StepReport) -> None:
        """Count a step's loss and negatives in."""
        self.negatives = [a + b for a, b in zip(self.negatives, report.negatives, strict=True)]
        for loss, positions in zip(report.losses, report.positions, strict=True):
            self.loss_sum += loss * positions
            self.positions += positions

    def improve(self, value: float, *, ties: bool = False) -> bool:
        """Count a validation and say whether its metric is the best so far.

        Args:
            value: the metric; higher is better.
            ties: an equal metric is an improvement.
        """
        if value > self.best_value or (ties and value == self.best_value):
            self.best_value, self.best_epoch, self.bad_validations = value, self.epoch + 1, 0
            return True
        self.bad_validations += 1
        return False

    def end_epoch(self, record: dict[str, Any], metric: str) -> None:
        """Add an epoch's record to the history, log it with one metric, and go to the next epoch."""
        record["masked_negatives"] = self.masked_negatives
        self.history.append(record)
        self.epoch += 1
        self.batch, self.loss_sum, self.positions = 0, 0.0, 0
        self.negatives = [0, 0, 0, 0]
        text = f"loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}"
        if record["masked_negatives"] is not None:
            text += f", {record['masked_negatives']:.1%} of the negatives masked"
        if "valid" in record:
            text += f", valid {metric} {record['valid'][metric]:.4f}"
        log.info("epoch %d: %s", self.epoch, text)

    def summary(self) -> dict[str, Any]:
        """Return what `result.json` says of the training, as plain data."""
        inner = ("batch", "loss_sum", "positions", "negatives", "best")
        return {key: value for key, value in asdict(self).items() if key not in inner}


class TrainingCheckpoints:
    """Saves and loads all that the rest of a training depends on. Every method is collective.

    Under `strategy: deepspeed` nothing is saved: ZeRO divides weights and optimizer states among
    the processes.

    Args:
        run: for its checkpoints, its session's record and `checkpoint_minutes`.
        learner: whose weights, optimizer and schedule are saved and loaded.
        fingerprint: of the training data; a checkpoint of other data is refused.
    """

    def __init__(self, run: RunContext, learner: Learner, fingerprint: str) -> None:
        self._run, self._learner, self._fingerprint = run, learner, fingerprint
        self._saved_at = time.monotonic()
        self._enabled = run.config.strategy != "deepspeed"
        if not self._enabled:
            log.warning("strategy: deepspeed writes no resumable checkpoints.")

    def is_due(self) -> bool:
        """Say whether `checkpoint_minutes` have passed since the last checkpoint."""
        minutes = self._run.config.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def is_due_at(self, step: int) -> bool:
        """Say whether `checkpoint_every` asks for a checkpoint after this optimizer step."""
        every = self._run.config.checkpoint_every
        return every > 0 and step % every == 0

    def save(self, state: TrainState) -> None:
        """Write a checkpoint.

        Raises:
            InputError: a weight is NaN or infinite, or the checkpoint cannot be written.
        """
        if not self._enabled:
            return
        generators = all_gather(rng_state(self._learner.fabric.device))
        run_on_rank_zero(lambda: self._write(state, generators))
        self._saved_at = time.monotonic()

    def _write(self, state: TrainState, generators: list[dict[str, Any]]) -> None:
        learner = self._learner
        weights = trainable_state(learner.model)
        bad = [name for name, value in weights.items() if not value.isfinite().all()]
        if bad:
            raise InputError(
                f"weight {bad[0]} is NaN or infinite after optimizer step {state.step} "
                f"({len(bad)} weights in all), so training was stopped; lower "
                f"--optim_args.learning_rate; {self.last_good()}."
            )
        content = {
            **asdict(state),
            "optimizer": _unwrapped(learner.optimizer).state_dict(),
            "schedule": learner.schedule.state_dict(),
            "scaler": learner.fabric.strategy.precision.state_dict(),
            "rng": generators,
            "fingerprint": self._fingerprint,
            "user_llm_fingerprint": self._run.user_llm_fingerprint,
            "record": self._run.session.record("training"),
        }
        self._run.checkpoints.save(state.step, weights, content)

    def load(self) -> tuple[TrainState, dict[str, Any] | None]:
        """Load the newest whole checkpoint, if there is one.

        Returns:
            Where training stands, and the state of the random generators for `restore_rng`; a new
            `TrainState` and None without a checkpoint.

        Raises:
            InputError: no checkpoint is whole, or the newest is of other data or of another number
                of processes.
        """
        run, learner = self._run, self._learner
        path = run_on_rank_zero(run.checkpoints.newest)
        if path is None:
            log.info("the run has no checkpoint yet: training starts from the beginning.")
            return TrainState(), None
        checkpoint = run.checkpoints.load(path)
        content = checkpoint.state
        if content.pop("fingerprint") != self._fingerprint:
            raise InputError(
                f"{path} was trained on other data: the interactions or the item cache have changed "
                f"since; put them back, or start again with --overwrite True."
            )
        refuse_other_user_llm(run, content.pop("user_llm_fingerprint", None), path)
        generators = content.pop("rng")
        if len(generators) != world_size():
            raise InputError(
                f"{path} is of {len(generators)} processes, this run has {world_size()}; "
                f"start it with torchrun --nproc_per_node {len(generators)} as before."
            )
        parameters = dict(learner.model.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint.weights.items():
                parameters[name].copy_(value)
        _unwrapped(learner.optimizer).load_state_dict(content.pop("optimizer"))
        learner.schedule.load_state_dict(content.pop("schedule"))
        learner.fabric.strategy.precision.load_state_dict(content.pop("scaler"))
        run.session.continue_from(content.pop("record"))
        state = TrainState(**content)
        state.resumed_from.append(state.step)
        run_on_rank_zero(lambda: self._restore_best(state.best))
        log.info(
            "going on from %s: epoch %d, batch %d, optimizer step %d.",
            path,
            state.epoch + 1,
            state.batch + 1,
            state.step,
        )
        return state, generators[global_rank()]

    def _restore_best(self, name: str | None) -> None:
        """Make `best` what it was at the checkpoint: it may be of a later epoch."""
        if name is None:
            remove(self._run.folder / BEST_DIR)
        else:
            self._run.checkpoints.publish_best(name, self._run.folder / BEST_DIR)

    def save_best(self, state: TrainState) -> None:
        """Save the model as the best one so far, in the run's folder and among its checkpoints."""
        folder, store, learner = self._run.folder, self._run.checkpoints, self._learner

        def write() -> str:
            name = store.save_best(state.step, learner.save)
            store.publish_best(name, folder / BEST_DIR)
            return name

        with whole_parameters(learner.fabric, learner.model):
            state.best = run_on_rank_zero(write)

    def last_good(self) -> str:
        """Name the newest checkpoint, for a message."""
        saved = self._run.checkpoints.list()
        return (
            f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        )


def refuse_other_user_llm(run: RunContext, recorded: str | None, path: Path) -> None:
    """Refuse to go on from what was made with another UserLLM than the folder holds now.

    Args:
        run: the run, for its UserLLM.
        recorded: the UserLLM's fingerprint then; None, as in files of earlier versions, passes.
        path: what was made.

    Raises:
        InputError: the fingerprints differ.
    """
    if recorded not in (None, run.user_llm_fingerprint):
        raise InputError(
            f"{path} was made with another UserLLM: the weights or config.json in "
            f"{run.config.user_pretrain_dir} have changed since; put them back, or start again with "
            f"--overwrite True."
        )


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that Fabric wrapped."""
    return getattr(optimizer, "optimizer", optimizer)

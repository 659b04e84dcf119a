"""The training loop: one pass over the batches an epoch, validation, early stopping, best model."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hsft.config import Config
from hsft.data.dataset import TrainBatch, TrainCollate
from hsft.evaluator.evaluator import Evaluation
from hsft.model.accelerate import StepGraphs
from hsft.model.recommender import Recommender
from hsft.model.weights import load_trained, save_trained, trainable_state
from hsft.trainer.board import Board
from hsft.trainer.checkpoint import (
    Checkpoints,
    restore_rng,
    restore_torch_rng,
    rng_state,
    torch_rng_state,
)
from hsft.trainer.fabric import (
    choose_precision,
    clip_gradients,
    gradient_sync,
    step_groups,
)
from hsft.trainer.micro_batch import count_sequences, split_batch
from hsft.trainer.optim import steps_per_epoch
from hsft.trainer.pending import PendingStep, StepReport
from hsft.trainer.sampler import SequenceBatches
from hsft.trainer.wandb_log import WandbLog
from hsft.trainer.zero import whole_parameters
from hsft.utils.distributed import (
    all_gather,
    barrier,
    broadcast,
    global_rank,
    is_rank_zero,
    world_size,
)
from hsft.utils.errors import InputError
from hsft.utils.files import remove
from hsft.utils.progress import Meter, format_seconds
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

BEST_DIR = "best"

# Asked after each validation with the epoch's number, from 1, and the metrics; False ends training.
KeepGoing = Callable[[int, Mapping[str, float]], bool]


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        epoch: epochs finished, with their validation.
        step: optimizer steps taken.
        best_value: best validation metric so far; that of the untrained model at the start.
        best_epoch: epoch of the best value, 0 for the untrained model.
        bad_validations: validations since the best one.
        history: one record an epoch: epoch, loss, learning rate, validation metrics.
        resumed_from: optimizer step at the start of each session after the first.
        micro_batch: sequences of a batch that fit the GPU's memory; None for all of them.
        batch: batches done in the epoch under way.
        loss_sum: sum of the loss over the positions of these batches.
        positions: number of these positions.
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
    best: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return what `result.json` says of the training, as plain data."""
        inner = ("batch", "loss_sum", "positions", "best")
        return {key: value for key, value in asdict(self).items() if key not in inner}


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
        checkpoints: the run's resumable checkpoints.
        stop: notices SIGINT and SIGTERM.
        fingerprint: tells the training data; a checkpoint of other data is refused.
        wandb: takes the scalars that TensorBoard gets.
        record: returns and restores what else has to survive an interruption: the run's timings.
        keep_going: asked after each validation; None trains to the end.
        graphs: computes losses and gradients by CUDA graphs; None: kernel by kernel.
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
        checkpoints: Checkpoints,
        stop: StopSignals,
        fingerprint: str,
        wandb: WandbLog,
        record: tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]],
        keep_going: KeepGoing | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.graphs = graphs
        self.fabric = fabric
        self.config = config
        self.model, self.wrapped = model, wrapped
        self.optimizer, self.schedule = optimizer, schedule
        self.loader = loader
        self.validate = validate
        self.run_dir = run_dir
        self.checkpoints = checkpoints
        self.stop = stop
        self.fingerprint = fingerprint
        self.wandb = wandb
        self._record, self._restore_record = record
        self._keep_going = keep_going
        self.state = TrainState()
        # ZeRO spreads weights and optimizer over the processes; no checkpoint gathers them.
        self._resumable = config.strategy != "deepspeed"
        if not self._resumable:
            log.warning("strategy: deepspeed writes no resumable checkpoints.")
        self._pending: PendingStep | None = None
        self._rng: dict[str, Any] | None = None
        self._saved_at = self._began = time.monotonic()
        self._first_step = 0

    def fit(self, *, resume: bool = False) -> TrainState:
        """Train until the last epoch or until `stopping_step` validations brought no gain.

        Args:
            resume: go on from the newest whole checkpoint, if there is one.

        Returns:
            The final state; the model holds the weights of the best epoch.

        Raises:
            InputError: the loss or a gradient became NaN or infinite, a single sequence does not
                fit the GPU's memory, the disk is full, or the checkpoint is of other data.
            Interrupted: after SIGINT or SIGTERM, with the step finished and saved.
        """
        config = self.config
        if resume:
            self._resume()
        state = self.state
        self._began, self._first_step = time.monotonic(), state.step
        # Values that a killed session wrote after its last checkpoint are written again.
        first_step = state.step + 1 if resume else None
        enabled = is_rank_zero()
        with Board(self.run_dir / "tensorboard", first_step, enabled=enabled) as board:
            while not self._finished():
                with self.stop.deferred():
                    loss = self._train_epoch(board)
                    # Before the validation, which can be done again from here.
                    self._save(board)
                self._end_if_asked()
                record: dict[str, Any] = {
                    "epoch": state.epoch + 1,
                    "step": state.step,
                    "loss": loss,
                    "learning_rate": self.schedule.get_last_lr()[0],
                }
                if (state.epoch + 1) % config.eval_step == 0 or state.epoch + 1 == config.epochs:
                    record["valid"] = self._validate(board)
                state.history.append(record)
                state.epoch += 1
                state.batch, state.loss_sum, state.positions = 0, 0.0, 0
                log.info("epoch %d: %s", state.epoch, _describe(record, config.valid_metric))
                if self._is_ended(record):
                    log.info("training is ended after epoch %d.", state.epoch)
                    break
            if state.bad_validations >= config.stopping_step:
                log.info(
                    "stopping early: %s has not improved for %d validations.",
                    config.valid_metric,
                    state.bad_validations,
                )
            with self.stop.deferred():
                self._save(board)
            self._end_if_asked()
        if state.best_epoch:
            log.info("the weights of epoch %d, the best one, are kept.", state.best_epoch)
            with whole_parameters(self.fabric, self.model, write=True):
                load_trained(self.model, self.run_dir / BEST_DIR)
        return state

    def _finished(self) -> bool:
        state, config = self.state, self.config
        return state.epoch >= config.epochs or state.bad_validations >= config.stopping_step

    def _is_ended(self, record: dict[str, Any]) -> bool:
        asked = self._keep_going is not None and "valid" in record
        return asked and not self._keep_going(record["epoch"], record["valid"])  # type: ignore[misc]

    def _train_epoch(self, board: Board) -> float:
        state, config = self.state, self.config
        batches, collate = self._order()
        batches.epoch = collate.epoch = state.epoch
        batches.start_batch = state.batch
        self.wrapped.train()
        stream = iter(self.loader)
        # After iter(), which draws from torch's generator: a resumed epoch has drawn that before.
        if self._rng is not None:
            restore_rng(self._rng, self.fabric.device)
            self._rng = None
        task = f"epoch {state.epoch + 1} of {config.epochs}"
        shown = config.show_progress and is_rank_zero()
        accumulation = config.gradient_accumulation_steps
        steps = config.epochs * steps_per_epoch(len(batches), accumulation)
        total = batches.sequences(len(batches))
        with Meter(task, total, "sequences", shown, device=self.fabric.device) as bar:
            bar.skip(batches.sequences(state.batch))
            for group, positions in step_groups(self.fabric, stream, accumulation):
                rate = float(self.schedule.get_last_lr()[0])
                losses = self._accumulate(group, positions)
                norm = self._update()
                before = self._read_pending(board)
                self._pending = PendingStep(
                    step=state.step,
                    rate=rate,
                    first_batch=state.batch,
                    losses=losses,
                    positions=positions,
                    norm=norm,
                    stop=self.stop.received,
                    due=self._time_is_up(),
                )
                state.batch += len(group)
                done = batches.sequences(state.batch)
                tokens = self._count_tokens(group) if bar.shown else 0
                bar.advance(done - bar.done, tokens, partial(self._step_facts, steps, rate))
                self._save_if_asked(board, before, last=state.batch == len(batches))
        self._read_pending(board)
        return state.loss_sum / max(state.positions, 1)

    def _count_tokens(self, group: list[TrainBatch]) -> int:
        """Count the real positions of a step, in all processes: they have about the same number."""
        own = sum(int(batch.attention_mask.sum()) for batch in group)
        return own * world_size()

    def _step_facts(self, steps: int, rate: float) -> list[str]:
        state = self.state
        facts = [f"step {state.step:,} of {steps:,}"]
        # A step's loss is known one step later.
        if state.positions:
            facts.append(f"loss {state.loss_sum / state.positions:.4f}")
        facts.append(f"learning rate {rate:.2e}")
        if state.epoch + 1 < self.config.epochs:
            # Validations included; early stopping is not foreseen.
            pace = (time.monotonic() - self._began) / max(1, state.step - self._first_step)
            facts.append(f"all epochs in at most {format_seconds(pace * (steps - state.step))}")
        return facts

    def _accumulate(self, group: list[TrainBatch], positions: list[int]) -> list[Tensor]:
        """Add up the gradients of a step; on too little GPU memory, again in smaller parts."""
        rng = torch_rng_state(self.fabric.device)
        while True:
            try:
                return self._backward(group, positions)
            except torch.OutOfMemoryError:
                pass
            # Out of the except block: its traceback holds on to the activations.
            self._halve(group)
            self.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            # Dropout of the second try starts where that of the first did.
            restore_torch_rng(rng, self.fabric.device)

    def _backward(self, group: list[TrainBatch], positions: list[int]) -> list[Tensor]:
        losses = []
        for batch, count in zip(group, positions, strict=True):
            weight = count / max(1, sum(positions))
            parts = split_batch(batch, self.state.micro_batch, self.model.settings)
            total = torch.zeros((), device=self.fabric.device)
            for part in parts:
                if self.graphs is not None:
                    total += self.graphs.step(part.batch, part.weight * weight) * part.weight
                    continue
                last = batch is group[-1] and part is parts[-1]
                with gradient_sync(self.fabric, self.wrapped, last):
                    loss = self.wrapped(self._move(part.batch)) * part.weight
                    self.fabric.backward(loss * weight)
                total += loss.detach()
            losses.append(total)
        return losses

    def _halve(self, group: list[TrainBatch]) -> None:
        rows = max(count_sequences(batch) for batch in group)
        rows = min(rows, self.state.micro_batch or rows)
        where = f"CUDA ran out of memory in optimizer step {self.state.step + 1}"
        if world_size() > 1:
            # The others would wait for this process in the middle of their own, larger, batch.
            raise InputError(
                f"{where} of process {global_rank()}; lower --train_batch_size and raise "
                f"--gradient_accumulation_steps."
            )
        if rows == 1:
            raise InputError(
                f"{where} with a single sequence; set --gradient_checkpointing True, or lower "
                f"--logits_budget_mb, --MAX_ITEM_LIST_LENGTH or --user_llm_layers."
            )
        self.state.micro_batch = -(-rows // 2)
        log.warning(
            "%s: from now on a batch goes through the model %d sequences at a time; the optimizer "
            "step still covers the same sequences.%s",
            where,
            self.state.micro_batch,
            " In-batch negatives come from these parts, so there are fewer of them."
            if self.model.settings.negatives == "in_batch"
            else "",
        )

    def _update(self) -> Tensor | None:
        """Take an optimizer step and return the gradient norm before clipping, where known."""
        limit = self.config.clip_grad_norm
        norm = clip_gradients(self.fabric, self.wrapped, self.optimizer, limit)
        try:
            self.optimizer.step()
        except torch.OutOfMemoryError as error:
            raise InputError(
                "CUDA ran out of memory in the optimizer; use --optimizer paged_adamw8bit or train "
                "fewer weights (--use_qlora True, a lower --qlora_r)."
            ) from error
        self.optimizer.zero_grad()
        self.schedule.step()
        self.state.step += 1
        # The scaler of 16-mixed skips a step whose gradients overflow, and lowers its scale.
        return None if self._scaler() is not None else norm

    def _read_pending(self, board: Board) -> StepReport | None:
        """Count in the last step's loss, and refuse to go on when it is no number."""
        if self._pending is None:
            return None
        report = self._pending.read()
        self._pending = None
        if report.bad_batches:
            raise InputError(self._diverged(report))
        for loss, positions in zip(report.losses, report.positions, strict=True):
            self.state.loss_sum += loss * positions
            self.state.positions += positions
        values = {"train/loss": report.loss, "train/learning_rate": report.rate}
        self._log(board, values, report.step)
        return report

    def _diverged(self, report: StepReport) -> str:
        batches, collate = self._order()
        numbers = report.bad_batches
        samples = [sample for number in numbers for sample in batches.samples(number)]
        users = list(dict.fromkeys(collate.dataset.users_of(samples)))
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        what = "loss" if report.has_bad_loss else "gradient"
        half = choose_precision(self.config) != "32-true"
        return (
            f"the {what} became NaN or infinite in optimizer step {report.step} (epoch "
            f"{self.state.epoch + 1}, batch {numbers[0] + 1}, users {', '.join(users[:5])}{more}), "
            f"so training was stopped; lower --optim_args.learning_rate"
            f"{' or use --precision 32-true' if half else ''}; {self._last_good()}."
        )

    def _last_good(self) -> str:
        saved = self.checkpoints.list()
        return (
            f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        )

    def _time_is_up(self) -> bool:
        minutes = self.config.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _save_if_asked(self, board: Board, before: StepReport | None, *, last: bool) -> None:
        """Save when steps or time say so, and end after SIGINT or SIGTERM.

        Several processes act on what they agreed on in the step before, all after the same step.
        """
        every = self.config.checkpoint_every
        due = every > 0 and self.state.step % every == 0
        if world_size() == 1:
            stop, due = self.stop.received, due or self._time_is_up()
        else:
            stop, due = (before.stop, due or before.due) if before else (0, due)
        if stop or (due and not last):
            self._save(board)
        if stop:
            raise self.stop.interruption(stop, f" after optimizer step {self.state.step}")

    def _end_if_asked(self) -> None:
        """End after a signal that came while the epoch's end was saved."""
        received = max(all_gather(self.stop.received))
        if received:
            raise self.stop.interruption(received, f" after optimizer step {self.state.step}")

    def _save(self, board: Board) -> None:
        """Write a checkpoint of all that the rest of the training depends on."""
        self._read_pending(board)
        if not self._resumable:
            return
        generators = all_gather(rng_state(self.fabric.device))
        if is_rank_zero():
            weights = trainable_state(self.model)
            bad = [name for name, value in weights.items() if not value.isfinite().all()]
            if bad:
                raise InputError(
                    f"weight {bad[0]} is NaN or infinite after optimizer step {self.state.step} "
                    f"({len(bad)} weights in all), so training was stopped; lower "
                    f"--optim_args.learning_rate; {self._last_good()}."
                )
            board.flush()
            content = {
                **asdict(self.state),
                "optimizer": self._optimizer().state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.fabric.strategy.precision.state_dict(),
                "rng": generators,
                "fingerprint": self.fingerprint,
                "record": self._record(),
            }
            self.checkpoints.save(self.state.step, weights, content)
        barrier()
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        """Take up the newest whole checkpoint."""
        newest = self.checkpoints.newest() if is_rank_zero() else None
        path = broadcast(newest)
        if path is None:
            log.info("the run has no checkpoint yet: training starts from the beginning.")
            return
        saved = self.checkpoints.load(path)
        content = saved.state
        if content.pop("fingerprint") != self.fingerprint:
            raise InputError(
                f"{path} was trained on other data: the interactions or the item cache have changed "
                f"since; put them back, or start anew with --overwrite True."
            )
        generators = content.pop("rng")
        if len(generators) != world_size():
            raise InputError(
                f"{path} is of {len(generators)} processes, this run has {world_size()}; "
                f"start it with torchrun --nproc_per_node {len(generators)} as before."
            )
        self._rng = generators[global_rank()]
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in saved.weights.items():
                own[name].copy_(value)
        self._optimizer().load_state_dict(content.pop("optimizer"))
        self.schedule.load_state_dict(content.pop("schedule"))
        self.fabric.strategy.precision.load_state_dict(content.pop("scaler"))
        self._restore_record(content.pop("record"))
        self.state = TrainState(**content)
        self.state.resumed_from.append(self.state.step)
        if is_rank_zero():
            # What `best` holds may be newer than this checkpoint.
            if self.state.best is None:
                remove(self.run_dir / BEST_DIR)
            else:
                self.checkpoints.publish_best(self.state.best, self.run_dir / BEST_DIR)
        barrier()
        log.info(
            "going on from %s: epoch %d, batch %d, optimizer step %d.",
            path,
            self.state.epoch + 1,
            self.state.batch + 1,
            self.state.step,
        )

    def _validate(self, board: Board) -> dict[str, float]:
        state = self.state
        self.wrapped.eval()
        found = self.validate().metrics
        values = {f"valid/{name}": value for name, value in found.items()}
        self._log(board, values, state.step)
        value = found[self.config.valid_metric]
        if value > state.best_value:
            state.best_value, state.best_epoch = value, state.epoch + 1
            state.bad_validations = 0
            with whole_parameters(self.fabric, self.model):
                if is_rank_zero():
                    write = partial(save_trained, self.model)
                    state.best = self.checkpoints.save_best(state.step, write)
                    self.checkpoints.publish_best(state.best, self.run_dir / BEST_DIR)
            barrier()
        else:
            state.bad_validations += 1
        return found

    def _log(self, board: Board, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            board.add_scalar(tag, value, step)
        self.wandb.add_scalars(values, step)

    def _optimizer(self) -> Any:
        # Fabric's wrapper around the optimizer that was built.
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _scaler(self) -> Any:
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def _order(self) -> tuple[SequenceBatches, TrainCollate]:
        batches, collate = self.loader.batch_sampler, self.loader.collate_fn
        assert isinstance(batches, SequenceBatches)
        assert isinstance(collate, TrainCollate)
        return batches, collate

    def _move(self, batch: TrainBatch) -> TrainBatch:
        return batch.to(self.fabric.device)


def count_trainable(model: torch.nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _describe(record: dict[str, Any], metric: str) -> str:
    text = f"loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}"
    return f"{text}, valid {metric} {record['valid'][metric]:.4f}" if "valid" in record else text

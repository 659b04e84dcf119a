"""The training loop: epochs, optimizer steps, validation, early stopping, the best model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from hsft.data.dataset import TrainCollate
from hsft.evaluator.evaluator import Evaluation
from hsft.trainer.checkpoint import BEST_DIR, restore_rng
from hsft.trainer.context import RunContext
from hsft.trainer.masked_negatives import MaskedNegatives
from hsft.trainer.resume import TrainingCheckpoints, TrainState
from hsft.trainer.sampler import SequenceBatches
from hsft.trainer.scalars import open_scalars
from hsft.trainer.step import Learner, accumulate, group_batches, update
from hsft.trainer.step_report import PendingStep, StepReport
from hsft.trainer.training_meter import TrainingMeter
from hsft.trainer.zero import whole_parameters
from hsft.utils.distributed import world_size

log = logging.getLogger(__name__)


def train(
    run: RunContext,
    learner: Learner,
    loader: DataLoader[Any],
    validate: Callable[[], Evaluation],
    fingerprint: str,
) -> TrainState:
    """Train until the last epoch, or until `stopping_step` validations brought no gain.

    Args:
        run: configuration, folder, checkpoints; with `run.resume` the newest one is continued.
        learner: the model; at the end it holds the weights of the best epoch.
        loader: training batches, its batch sampler a `SequenceBatches`.
        validate: scores the validation users.
        fingerprint: of the training data; a checkpoint of other data is refused.

    Raises:
        InputError: the loss or a gradient became NaN or infinite, a single sequence does not fit
            the GPU's memory, the disk is full, or the checkpoint is of other data.
        Interrupted: after SIGINT or SIGTERM, with the step finished and saved.
    """
    config, stop = run.config, run.stop
    batches, collate = loader.batch_sampler, loader.collate_fn
    assert isinstance(batches, SequenceBatches)
    assert isinstance(collate, TrainCollate)
    checkpoints = TrainingCheckpoints(run, learner, fingerprint)
    masked = MaskedNegatives(config)
    state, rng = checkpoints.load() if run.resume else (TrainState(), None)
    meter = TrainingMeter(config, learner.fabric.device, batches, state)
    # Values that a killed session wrote after its last checkpoint are written again.
    purge_step = state.step + 1 if run.resume else None
    with open_scalars(run.folder / "tensorboard", run.trackers, purge_step) as scalars:

        def read(pending: PendingStep | None) -> StepReport | None:
            """Add a step's loss to the epoch's; refuse to go on when it is NaN or infinite."""
            if pending is None:
                return None
            report = pending.read()
            report.check_finite(config, batches, collate.dataset, checkpoints.last_good)
            state.add(report)
            masked.check(state, epoch_ends=state.batch == len(batches))
            scalars.log(
                {"train/loss": report.loss, "train/learning_rate": report.rate}, report.step
            )
            return report

        def save() -> None:
            scalars.flush()
            checkpoints.save(state)

        while state.epoch < config.epochs and state.bad_validations < config.stopping_step:
            batches.epoch = collate.epoch = state.epoch
            batches.start_batch = state.batch
            learner.wrapped.train()
            stream = iter(loader)
            # After iter(), which draws from torch's generator: a resumed epoch has drawn that before.
            if rng is not None:
                restore_rng(rng, learner.fabric.device)
                rng = None
            pending: PendingStep | None = None
            with stop.deferred(), meter.epoch() as bar:
                for group, positions in group_batches(learner, stream):
                    report = StepReport(
                        state.step + 1, learner.learning_rate, state.batch, positions
                    )
                    losses, state.micro_batch = accumulate(
                        learner, group, positions, state.micro_batch
                    )
                    norm = update(learner)
                    state.step += 1
                    state.batch += len(group)
                    # One step late, so that the device does not wait for the host to read it.
                    previous = read(pending)
                    report = replace(report, stop=stop.received, due=checkpoints.is_due())
                    pending = PendingStep(report, losses, norm, learner.model)
                    meter.advance(bar, group, report.rate)
                    # Several processes act on what all of them knew one step ago.
                    known = report if world_size() == 1 else previous
                    signal = known.stop if known else 0
                    due = checkpoints.is_due_at(state.step) or (known is not None and known.due)
                    if signal or (due and state.batch < len(batches)):
                        read(pending)
                        pending = None
                        save()
                    if signal:
                        raise stop.interruption(signal, f" after optimizer step {state.step}")
                read(pending)
                # Before the validation, which can be done again from here.
                save()
            stop.raise_if_received(f" after optimizer step {state.step}")
            record: dict[str, Any] = {
                "epoch": state.epoch + 1,
                "step": state.step,
                "loss": state.loss,
                "learning_rate": learner.learning_rate,
            }
            if (state.epoch + 1) % config.eval_step == 0 or state.epoch + 1 == config.epochs:
                learner.wrapped.eval()
                record["valid"] = metrics = validate().metrics
                scalars.log({f"valid/{name}": value for name, value in metrics.items()}, state.step)
                if state.improve(metrics[config.valid_metric], ties=config.valid_tie == "later"):
                    checkpoints.save_best(state)
            state.end_epoch(record, config.valid_metric)
            keep_going = run.keep_going if "valid" in record else None
            if keep_going and not keep_going(state.epoch, record["valid"]):
                log.info("training is ended after epoch %d.", state.epoch)
                break
        if state.bad_validations >= config.stopping_step:
            log.info(
                "stopping early: %s has not improved for %d validations.",
                config.valid_metric,
                state.bad_validations,
            )
        with stop.deferred():
            save()
        stop.raise_if_received(f" after optimizer step {state.step}")
    if state.best_epoch:
        log.info("the weights of epoch %d, the best one, are kept.", state.best_epoch)
        with whole_parameters(learner.fabric, learner.model, write=True):
            learner.load(run.folder / BEST_DIR)
    return state

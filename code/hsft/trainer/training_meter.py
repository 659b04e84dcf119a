"""Shows how far training is: a bar an epoch, with the loss, the learning rate and the time left."""

from __future__ import annotations

import time
from functools import partial

import torch

from hsft.config import Config
from hsft.data.dataset import TrainBatch
from hsft.trainer.optim import steps_per_epoch
from hsft.trainer.resume import TrainState
from hsft.trainer.sampler import SequenceBatches
from hsft.utils.distributed import world_size
from hsft.utils.progress import Meter, format_seconds


class TrainingMeter:
    """Makes each epoch's bar and moves it.

    Args:
        config: for the number of epochs and whether progress is shown.
        device: whose memory is shown.
        batches: the epochs' batches.
        state: where training stands; it is read whenever something is shown.
    """

    def __init__(
        self, config: Config, device: torch.device, batches: SequenceBatches, state: TrainState
    ) -> None:
        self._config, self._device = config, device
        self._batches, self._state = batches, state
        self._steps = config.epochs * steps_per_epoch(
            len(batches), config.gradient_accumulation_steps
        )
        self._began, self._first_step = time.monotonic(), state.step

    def epoch(self) -> Meter:
        """Return the bar of the epoch that begins or is continued."""
        config, state, batches = self._config, self._state, self._batches
        task = f"epoch {state.epoch + 1} of {config.epochs}"
        total = batches.sequences(len(batches))
        bar = Meter(task, total, "sequences", config.show_progress, device=self._device)
        bar.skip(batches.sequences(state.batch))
        return bar

    def advance(self, bar: Meter, group: list[TrainBatch], rate: float) -> None:
        """Count the batches of a step, after `state.batch` has.

        Args:
            bar: the epoch's.
            group: this process's batches; the others have about as many tokens.
            rate: the step's learning rate.
        """
        tokens = 0
        if bar.shown:
            tokens = world_size() * sum(int(batch.attention_mask.sum()) for batch in group)
        done = self._batches.sequences(self._state.batch)
        bar.advance(done - bar.done, tokens, partial(self._facts, rate))

    def _facts(self, rate: float) -> list[str]:
        state = self._state
        facts = [f"step {state.step:,} of {self._steps:,}"]
        # A step's loss is known one step later.
        if state.positions:
            facts.append(f"loss {state.loss:.4f}")
        facts.append(f"learning rate {rate:.2e}")
        if state.epoch + 1 < self._config.epochs:
            # Validations included; early stopping is not foreseen.
            pace = (time.monotonic() - self._began) / max(1, state.step - self._first_step)
            left = format_seconds(pace * (self._steps - state.step))
            facts.append(f"all epochs in at most {left}")
        return facts

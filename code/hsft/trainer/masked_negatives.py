"""What share of its negatives a loss masks: warns when it is high, refuses to train without any."""

from __future__ import annotations

import logging

from hsft.config import Config
from hsft.trainer.resume import TrainState
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import InputError

log = logging.getLogger(__name__)

# Share of masked negatives above which the log warns.
HIGH_MASKED_SHARE = 0.2
# Share of positions without a negative above which training is refused. Some are usual: the last
# batch of an epoch may be a single sequence.
MOST_EMPTY_SHARE = 0.5
# Positions of an epoch that are enough to judge by before it ends.
_ENOUGH_POSITIONS = 1000


class MaskedNegatives:
    """Watches the counts of one training.

    Args:
        config: for `loss` and `nce_thres`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._warned = False

    def check(self, state: TrainState, *, epoch_ends: bool = False) -> None:
        """Judge the current epoch so far.

        Args:
            state: with the counts of the steps that have been read.
            epoch_ends: judge whatever the number of positions.

        Raises:
            InputError: most positions have no negative left, so that the loss teaches nothing.
        """
        masked, pairs, empty, positions = state.negatives
        if not positions or not (epoch_ends or positions >= _ENOUGH_POSITIONS):
            return
        if empty > MOST_EMPTY_SHARE * positions:
            raise InputError(
                f"{empty:,} of {positions:,} positions in epoch {state.epoch + 1} have no negative "
                f"left, {self._reason()}, so training was stopped; {self._remedy()}."
            )
        if not self._warned and masked > HIGH_MASKED_SHARE * pairs:
            self._warned = True
            if is_rank_zero():
                log.warning(
                    "%.0f %% of the negatives are masked, since their cosine with the positive "
                    "exceeds nce_thres %g: the UserLLM learns from the others only; see "
                    "item_embedding_transform, and negatives: catalogue, which masks none.",
                    100 * masked / pairs,
                    self._config.nce_thres,
                )

    def _remedy(self) -> str:
        if self._config.trains_items_along and self._config.loss == "nce":
            return (
                "what the ItemLLM has made alike is not told apart any more: lower --item_lr_mult, or "
                "set --nce_thres 1.01, which masks no negative"
            )
        return "raise --train_batch_size, or use --negatives catalogue"

    def _reason(self) -> str:
        if self._config.loss == "nce":
            return (
                f"since every item they are contrasted with is the positive or has a cosine with it "
                f"above nce_thres {self._config.nce_thres:g}"
            )
        return "since every item they are contrasted with is the positive itself"

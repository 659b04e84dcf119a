"""`train_batch_size: auto`: what it stands for in a run."""

from __future__ import annotations

from pathlib import Path

import torch

from hsft.config import Config, load_config
from hsft.data.dataset import CachedEmbeddingTrainDataset
from hsft.data.split import Split
from hsft.report.batch_size import (
    FEWEST_STEPS,
    SMALLEST,
    batch_for_card,
    batch_for_processor,
    describe_for_card,
    describe_for_processor,
    most_for_steps,
)
from hsft.report.result import CONFIG_FILE
from hsft.run.dry_run import FILLED_SHARE, training_shape, with_batch_size
from hsft.trainer.fabric import choose_precision
from hsft.utils.distributed import world_size
from hsft.utils.gpu_memory import least_free_memory


def resolve_batch_size(
    config: Config,
    split: Split,
    device: torch.device,
    continued: Path | None = None,
) -> tuple[Config, str]:
    """Return the configuration with `train_batch_size: auto` replaced by a number.

    Collective: under torchrun every process takes the same, by the card with the least free memory.
    `qlora_quant_type: auto` is taken as nf4.

    Args:
        config: the configuration.
        split: of the run, for the number of its sequences and their lengths.
        device: where the model is trained.
        continued: folder of the run that is continued, which goes on with its number; None: a new
            run.

    Returns:
        The configuration, and a sentence that says what was taken and why; empty where nothing was
        to be resolved.

    Raises:
        InputError: as `assumed_shape`.
    """
    if not (config.chooses_batch_size and config.trains):
        return config, ""
    if continued is not None:
        kept = load_config([continued / CONFIG_FILE])[0]
        if not kept.chooses_batch_size:
            reason = f"train_batch_size: auto stays {kept.train_batch_size}, as the run began."
            return with_batch_size(config, kept.train_batch_size), reason
    known = config.model_copy(update={"precision": choose_precision(config)})
    shape = training_shape(with_batch_size(known, SMALLEST), split)
    sequences = len(CachedEmbeddingTrainDataset(split, config.MAX_ITEM_LIST_LENGTH))
    most = most_for_steps(
        sequences, config.epochs, config.gradient_accumulation_steps, world_size()
    )
    if device.type == "cuda":
        available = FILLED_SHARE * least_free_memory(device)
        size = batch_for_card(shape, most, available)
        figures = describe_for_card(shape, size, available)
    else:
        size = batch_for_processor(shape, most)
        figures = describe_for_processor(shape, size)
    sentence = (
        f"train_batch_size: auto takes {size}: {figures}; up to {most} would leave the run "
        f"{FEWEST_STEPS} optimizer steps."
    )
    return with_batch_size(config, size), sentence

"""`qlora_quant_type: auto`: what it stands for in a run."""

from __future__ import annotations

from pathlib import Path

import torch

from hsft.config import Config, load_config
from hsft.data.split import Split
from hsft.model.backbone import quantization_obstacle
from hsft.report.result import CONFIG_FILE
from hsft.run.dry_run import choose_quant_type, training_shape
from hsft.trainer.fabric import choose_precision
from hsft.utils.gpu_memory import least_free_memory


def resolve_quant_type(
    config: Config,
    split: Split,
    device: torch.device,
    continued: Path | None = None,
) -> tuple[Config, str]:
    """Return the configuration with `qlora_quant_type: auto` replaced by what it stands for.

    Collective: under torchrun every process takes the same, by the card with the least free memory.

    Args:
        config: the configuration.
        split: of the run, for the lengths of its sequences.
        device: where the model is trained.
        continued: folder of the run that is continued, which goes on with what it took; None: a new
            run.

    Returns:
        The configuration, and a sentence that says what was taken and why; empty where nothing was
        to be resolved.

    Raises:
        InputError: as `assumed_shape`.
    """
    if config.qlora_quant_type != "auto" or not (config.trains and config.use_qlora):
        return config, ""
    taken, reason = "auto", ""
    if continued is not None:
        taken = load_config([continued / CONFIG_FILE])[0].qlora_quant_type
        reason = f"qlora_quant_type: auto stays {taken}, as the run began."
    if taken == "auto":
        taken, reason = _choose(config, split, device)
    return config.model_copy(update={"qlora_quant_type": taken}), reason


def _choose(config: Config, split: Split, device: torch.device) -> tuple[str, str]:
    obstacle = quantization_obstacle(device.type)
    if obstacle is not None:
        return "none", f"qlora_quant_type: auto takes none (plain LoRA): {obstacle}."
    if device.type != "cuda":
        return "nf4", "qlora_quant_type: auto takes nf4; memory is looked at on CUDA only."
    if config.trains_items_along:
        return "nf4", (
            "qlora_quant_type: auto takes nf4; the memory of an ItemLLM that is trained along is not "
            "estimated."
        )
    known = config.model_copy(update={"precision": choose_precision(config)})
    free = least_free_memory(device)
    return choose_quant_type(training_shape(known, split), config.train_batch_size, free)

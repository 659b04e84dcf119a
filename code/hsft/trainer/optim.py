"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hsft.config import Config
from hsft.model.parameter_names import has_prefix, hllm_name
from hsft.model.weights import ITEM_LLM
from hsft.utils.errors import InputError


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> Optimizer:
    """Make AdamW over the trainable parameters.

    Matrices get weight decay; vectors and scalars (norms, biases, logit_scale) only with
    `weight_decay_on: all`. The ItemLLM's learning rate is `item_lr_mult` times the others', that of
    what `lr_mult_prefix` names `lr_mult_rate` times what it would be. With `decay_check_name` rate and
    decay are `modal_lr` and `modal_decay` of what it names, `rec_lr` and `rec_decay` of the others.

    Raises:
        InputError: nothing is trainable, or an 8-bit optimizer was asked for without CUDA.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise InputError(
            "no parameter is trainable with this configuration; check use_qlora and freeze_prefix."
        )
    args = config.optim_args
    least_dim = 0 if args.weight_decay_on == "all" else 2
    # The learning rate that is shown is the first group's: that of most weights.
    parts: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, weight in trainable:
        key = (name.startswith(ITEM_LLM), _is_named(name, config), weight.ndim < least_dim)
        parts.setdefault(key, []).append(weight)
    groups: list[dict[str, Any]] = []
    for (of_items, named, undecayed), weights in sorted(parts.items()):
        rate: float | None = args.learning_rate
        decay: float | None = args.weight_decay
        if config.decay_check_name is not None:
            rate = args.modal_lr if named else args.rec_lr
            decay = args.modal_decay if named else args.rec_decay
        assert rate is not None
        if named and config.lr_mult_rate is not None:
            rate *= config.lr_mult_rate
        groups.append(
            {
                "params": weights,
                "weight_decay": 0.0 if undecayed else decay,
                "lr": rate * (config.item_lr_mult if of_items else 1.0),
            }
        )
    kind = config.optimizer
    if kind in ("auto", "adamw"):
        # One kernel for all parameters. LoRA's states are a few MB, and bitsandbytes' 8-bit AdamW
        # launches kernels for every matrix.
        return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None)
    check_optimizer(config, device.type)
    import bitsandbytes as bnb

    factory = bnb.optim.PagedAdamW8bit if kind == "paged_adamw8bit" else bnb.optim.AdamW8bit
    optimizer: Optimizer = factory(groups)
    return optimizer


def _is_named(name: str, config: Config) -> bool:
    """Say whether `lr_mult_prefix` or `decay_check_name` names a parameter."""
    if config.decay_check_name is not None:
        return config.decay_check_name in hllm_name(name)
    return has_prefix(name, config.lr_mult_prefix)


def check_optimizer(config: Config, device: str) -> None:
    """Refuse an optimizer that cannot run on a kind of device.

    Raises:
        InputError: an 8-bit optimizer was asked for without CUDA.
    """
    if config.optimizer not in ("auto", "adamw") and device != "cuda":
        raise InputError(f"optimizer: {config.optimizer} needs a CUDA device; use adamw or auto.")


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Return the optimizer steps of an epoch: the last one may take fewer batches."""
    return math.ceil(batches / accumulation)


def build_schedule(optimizer: Optimizer, config: Config, total_steps: int) -> LambdaLR:
    """Make the schedule: linear warm-up over `warmup` of all steps, then the decay of `type`.

    Args:
        optimizer: whose learning rate is scheduled.
        config: for `scheduler_args`.
        total_steps: optimizer steps of the whole run.
    """
    settings = config.scheduler_args
    # HLLM does not round.
    warmup = settings.warmup * total_steps
    if not settings.warmup_from_zero:
        warmup = round(warmup)

    def factor(step: int) -> float:
        return schedule_factor(
            step, warmup, total_steps, settings.type, from_zero=settings.warmup_from_zero
        )

    return LambdaLR(optimizer, factor)


def schedule_factor(
    step: int, warmup: float, total: int, kind: str, *, from_zero: bool = False
) -> float:
    """Return the share of the peak learning rate used in an optimizer step.

    Args:
        step: number of the step, from 0.
        warmup: number of steps over which the share rises linearly.
        total: number of steps of the run.
        kind: `cosine`, `linear` or `constant`, from the warm-up to `total`.
        from_zero: the first step has share 0; else 1 / `warmup`.
    """
    if step < warmup:
        return (step if from_zero else step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

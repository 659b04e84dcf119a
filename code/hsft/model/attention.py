"""Which attention kernel a model runs with."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from hsft.model.structure import ModelKind
from hsft.utils.errors import InputError, one_line

VARLEN = "varlen"

# The flash kernels take heads of up to 256 numbers, a multiple of 8.
_WIDEST_HEAD, _HEAD_MULTIPLE = 256, 8


def choose_attention(
    requested: str,
    allow_flash: bool,
    device: torch.device,
    half: bool,
    kind: ModelKind | None = None,
    allow_varlen: bool = True,
) -> str:
    """Resolve `attn_implementation: auto`, and refuse what cannot run.

    `auto` is torch's variable-length kernel, flash-attn, sdpa or eager, the first of them that runs
    here and that the model has.

    Args:
        requested: `auto`, `varlen`, `sdpa`, `flash_attention_2` or `eager`.
        allow_flash: False keeps `auto` from flash-attn.
        device: where the model runs.
        half: whether it computes in bfloat16 or float16, as flash-attn needs.
        kind: of the model; None: one that has every kernel.
        allow_varlen: False keeps `auto` from `varlen`.

    Raises:
        InputError: `varlen` or `flash_attention_2` was asked for and cannot run here, or the model
            lacks the kernel.
    """
    obstacle = varlen_obstacle(kind, device, half)
    installed = importlib.util.find_spec("flash_attn") is not None
    runs = installed and half and device.type == "cuda"
    lacking = () if kind is None else kind.lacking_kernels
    if obstacle is None and VARLEN in lacking:
        obstacle = "a model that takes transformers' attention functions"
    if requested == VARLEN and obstacle is not None:
        raise InputError(
            f"attn_implementation: varlen needs {obstacle}; set --attn_implementation auto."
        )
    if requested == "auto" and obstacle is None and allow_varlen:
        return VARLEN
    if requested == "auto":
        flash = runs and allow_flash and "flash_attention_2" not in lacking
        return "flash_attention_2" if flash else "eager" if "sdpa" in lacking else "sdpa"
    if kind is not None and requested in lacking:
        raise InputError(
            f"attn_implementation: models of type {one_line(kind.model_type, 40)} do not "
            f"run with {requested}; set --attn_implementation auto or eager."
        )
    if requested == "flash_attention_2" and not runs:
        lacks = (
            "a CUDA device"
            if device.type != "cuda"
            else "the package flash-attn"
            if not installed
            else "a 16-bit precision"
        )
        raise InputError(
            f"attn_implementation: flash_attention_2 needs {lacks}; use auto or sdpa instead."
        )
    return requested


def varlen_obstacle(kind: ModelKind | None, device: torch.device, half: bool) -> str | None:
    """Say what keeps a model from variable-length attention, in words that follow "needs".

    Args:
        kind: of the model; None: one without peculiarities.
        device: where the model runs.
        half: whether it computes in bfloat16 or float16.

    Returns:
        None where it can run.
    """
    if device.type != "cuda":
        return "a CUDA device"
    if not has_varlen_kernel():
        return "torch 2.10 or later"
    # ROCm's build has no kernel behind it that was tried.
    if torch.version.hip is not None:
        return "an NVIDIA GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 or later"
    if not half:
        return "a 16-bit precision"
    return None if kind is None else kind.varlen_obstacle


def has_varlen_kernel() -> bool:
    """Say whether torch has the kernel, as 2.10 and later have; importing it takes seconds."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_peculiarity(model_config: Any) -> str | None:
    """Say what in a model's configuration keeps it from the kernel, as `varlen_obstacle` does.

    Args:
        model_config: as `load_model_config` gives.
    """
    kinds = set(getattr(model_config, "layer_types", None) or ())
    windowed = bool(getattr(model_config, "sliding_window", None)) and getattr(
        model_config, "use_sliding_window", True
    )
    if windowed or kinds - {"full_attention"}:
        return "a model without sliding windows"
    if getattr(model_config, "attn_logit_softcapping", None):
        return "a model without soft-capped attention"
    if getattr(model_config, "attention_dropout", 0.0):
        return "a model without attention dropout"
    heads = getattr(model_config, "num_attention_heads", None)
    width = getattr(model_config, "head_dim", None)
    hidden = getattr(model_config, "hidden_size", None)
    if width is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        width = hidden // heads
    if not isinstance(width, int) or width > _WIDEST_HEAD or width % _HEAD_MULTIPLE:
        return f"attention heads of a multiple of {_HEAD_MULTIPLE} numbers, {_WIDEST_HEAD} at most"
    return None

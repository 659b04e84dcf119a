"""Lightning Fabric for a configuration: device, precision, processes."""

from __future__ import annotations

import inspect
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from hsft.config import Config
from hsft.model.attention import VARLEN, choose_attention
from hsft.model.structure import ModelKind
from hsft.trainer.zero import check_deepspeed, deepspeed_strategy
from hsft.utils.distributed import TIMEOUT, world_size
from hsft.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Precision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]

_COMPUTE = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": torch.float32,
}

# torch's names of the processor features that make bfloat16 products fast.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def choose_device(config: Config) -> str:
    """Return `cpu` or `cuda` for the configuration's `device`.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda was asked for, but torch finds no CUDA device; use --device auto or "
            "install a CUDA build of torch and the NVIDIA driver."
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def choose_precision(config: Config) -> Precision:
    """Return Fabric's precision for the configuration's `precision`.

    A processor without bfloat16 instructions emulates them several times slower than float32.
    """
    if config.precision != "auto":
        return config.precision
    if choose_device(config) == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    known = torch.cpu.get_capabilities()
    native = any(known.get(name, False) for name in _CPU_BF16)
    return "bf16-mixed" if native else "32-true"


def compute_dtype(config: Config) -> torch.dtype:
    """Return the number type of matrix products under the configuration's precision."""
    return _COMPUTE[choose_precision(config)]


def check_device(config: Config) -> str:
    """Return `cpu` or `cuda`, having checked that precision and strategy can run there.

    Raises:
        InputError: they cannot.
    """
    device = choose_device(config)
    if device == "cpu" and choose_precision(config) == "16-mixed":
        raise InputError("precision: 16-mixed needs CUDA; use bf16-mixed or 32-true on the CPU.")
    if config.strategy == "deepspeed":
        check_deepspeed(config)
    return device


def attention_kernel(
    config: Config, device: torch.device, kind: ModelKind, *, rows: bool = True
) -> str:
    """Return the configuration's `attn_implementation`, `auto` resolved for a device and a model.

    Args:
        config: the configuration.
        device: where the model runs.
        kind: of the model.
        rows: whether a row may hold several sequences; else there is no use for `varlen`: `auto`
            does not take it, and sdpa stands in for it.

    Raises:
        InputError: what was asked for cannot run here, or not with this model.
    """
    asked = config.attn_implementation
    return choose_attention(
        "sdpa" if asked == VARLEN and not rows else asked,
        config.use_ft_flash_attn,
        device,
        half=compute_dtype(config) in (torch.bfloat16, torch.float16),
        kind=kind,
        allow_varlen=rows,
    )


def make_fabric(config: Config) -> Fabric:
    """Make and launch Fabric. Under torchrun its processes are used; else there is one.

    Raises:
        InputError: the precision or strategy cannot run on this device.
    """
    # Imported here, since it takes seconds: what else this module says is needed before a run too.
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    # Lightning's import sets its loggers to INFO: they would name the precision twice, and advise
    # TF32.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = check_device(config)
    precision = choose_precision(config)
    world = world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % local:
        raise InputError(
            f"torchrun started {world} processes, {local} of them on this machine; give every "
            f"machine the same --nproc_per_node."
        )
    strategy: Any = "auto"
    if config.strategy == "deepspeed":
        strategy = deepspeed_strategy(config, device)
    elif world > 1:
        # Buffers never change, and DDP would send the item table to everybody in each step. The
        # switch has been renamed in torch.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        strategy = DDPStrategy(timeout=TIMEOUT, **{name: False})
    fabric = Fabric(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=local if world > 1 else 1,
        num_nodes=max(1, world // local),
        strategy=strategy,
        precision=precision,
    )
    fabric.launch()
    # Losses and scores are float32 products of cosines under a factor of up to 100, which TF32
    # would round by up to 0.05.
    torch.set_float32_matmul_precision("highest")
    return fabric

"""Lightning Fabric for a configuration: device, precision, processes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from REC.config import Config
from REC.utils.errors import InputError

_COMPUTE = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": torch.float32,
}


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


def compute_dtype(config: Config) -> torch.dtype:
    """Return the number type of matrix products under the configuration's precision."""
    return _COMPUTE[config.precision]


def make_fabric(config: Config) -> Fabric:
    """Make and launch Fabric. Under torchrun its processes are used; else there is one.

    Raises:
        InputError: the precision or strategy cannot run on this device.
    """
    device = choose_device(config)
    if device == "cpu" and config.precision == "16-mixed":
        raise InputError("precision: 16-mixed needs CUDA; use bf16-mixed or 32-true on the CPU.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    strategy: Any = "auto"
    if config.strategy == "deepspeed":
        strategy = _deepspeed(config, device)
    elif world > 1:
        strategy = "ddp"
    fabric = Fabric(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=local if world > 1 else 1,
        num_nodes=max(1, world // local),
        strategy=strategy,
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def _deepspeed(config: Config, device: str) -> Any:
    if device != "cuda":
        raise InputError(
            "strategy: deepspeed needs a CUDA device: Lightning Fabric's DeepSpeed strategy "
            "supports no other; use strategy: ddp."
        )
    from lightning.fabric.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(
        stage=config.stage,
        gradient_clipping=config.clip_grad_norm,
        train_micro_batch_size_per_gpu=config.train_batch_size,
    )


def gather_ids(fabric: Fabric) -> Any:
    """Return a function that concatenates item numbers (int64 [n], n may differ) of all processes.

    Numbers travel, not vectors: every process has the item table, and looks the others' items up
    with its own adapter, whose gradient DDP averages.
    """
    if fabric.world_size == 1:
        return lambda ids: ids

    def gather(ids: Tensor) -> Tensor:
        sizes = fabric.all_gather(torch.tensor(len(ids), device=ids.device)).reshape(-1)
        padded = ids.new_zeros(int(sizes.max()))
        padded[: len(ids)] = ids
        everyone = fabric.all_gather(padded)
        return torch.cat([row[: int(n)] for row, n in zip(everyone, sizes, strict=True)])

    return gather


def sum_over_processes(fabric: Fabric) -> Any:
    """Return a function that adds up an int64 array over all processes, or None in a single one."""
    if fabric.world_size == 1:
        return None

    def total(values: np.ndarray) -> np.ndarray:
        here = torch.from_numpy(values).to(fabric.device)
        summed = fabric.all_reduce(here, reduce_op="sum")
        return np.asarray(summed.cpu().numpy())

    return total


def gather_objects(fabric: Fabric, value: Any) -> list[Any]:
    """Return the value of every process, in their order. All processes have to call it."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values

"""Memory of GPUs, whatever their make."""

from __future__ import annotations

import gc

import torch

from hsft.utils.distributed import all_gather

_NAMES = {"xpu": "XPU", "mps": "MPS"}


def release_unused_memory() -> None:
    """Give back what torch keeps of the GPU's memory for later, that of unreachable objects too."""
    gc.collect()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.get_device_module(device).empty_cache()


def least_free_memory(device: torch.device) -> int:
    """Return the bytes that every process can still have of its NVIDIA GPU.

    Collective: what is free, and the process's own unused cache, where that is least.
    """
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(all_gather(int(free) + unused))


def out_of_memory(device: torch.device) -> str:
    """Return the beginning of an error's sentence: `CUDA ran out of memory`."""
    return f"{_NAMES.get(device.type, 'CUDA')} ran out of memory"

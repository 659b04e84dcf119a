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

Device = Literal["cpu", "cuda", "xpu", "mps"]
Precision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]

_COMPUTE = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": torch.float32,
}

_REMEDY = {
    "cuda": "install a CUDA build of torch and the NVIDIA driver",
    "xpu": "install a build of torch for Intel GPUs and their driver",
    "mps": "run it on a Mac with Apple silicon",
}

# torch's names of the processor features that make bfloat16 products fast.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def available_devices() -> list[Device]:
    """Return the kinds of devices that torch finds here, `cpu` last."""
    there: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [name for name, is_there in there.items() if is_there]


def choose_device(config: Config) -> Device:
    """Return the kind of device for the configuration's `device`.

    `auto` takes CUDA and the CPU only: HSFT has not been tried on the others.

    Raises:
        InputError: what was asked for is not there.
    """
    there = available_devices()
    if config.device == "auto":
        return "cuda" if "cuda" in there else "cpu"
    if config.device not in there:
        raise InputError(
            f"device: {config.device} was asked for, but torch finds no {config.device.upper()} "
            f"device; use --device auto or {_REMEDY[config.device]}."
        )
    return config.device


def choose_precision(config: Config) -> Precision:
    """Return Fabric's precision for the configuration's `precision`.

    A processor without bfloat16 instructions emulates them several times slower than float32.
    """
    if config.precision != "auto":
        return config.precision
    device = choose_device(config)
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    if device == "xpu":
        native = torch.xpu.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "32-true"
    if device == "mps":
        return "32-true"
    known = torch.cpu.get_capabilities()
    native = any(known.get(name, False) for name in _CPU_BF16)
    return "bf16-mixed" if native else "32-true"


def compute_dtype(config: Config) -> torch.dtype:
    """Return the number type of matrix products under the configuration's precision."""
    return _COMPUTE[choose_precision(config)]


def check_device(config: Config) -> Device:
    """Return the kind of device, having checked that precision and strategy can run there.

    Raises:
        InputError: they cannot.
    """
    device = choose_device(config)
    if device != "cuda" and choose_precision(config) == "16-mixed":
        where = "the CPU" if device == "cpu" else device
        raise InputError(f"precision: 16-mixed needs CUDA; use bf16-mixed or 32-true on {where}.")
    if device in ("xpu", "mps"):
        if config.strategy == "deepspeed":
            raise InputError(
                f"strategy: deepspeed runs on CUDA and on the CPU, not on {device}; use --strategy ddp."
            )
        if world_size() > 1:
            raise InputError(
                f"device: {device} runs in a single process; start the program without torchrun."
            )
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
    if device == "xpu":
        return _launched(_fabric_on_xpu(precision))
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
        accelerator=device,
        devices=local if world > 1 else 1,
        num_nodes=max(1, world // local),
        strategy=strategy,
        precision=precision,
    )
    return _launched(fabric)


def _launched(fabric: Fabric) -> Fabric:
    fabric.launch()
    # Losses and scores are float32 products of cosines under a factor of up to 100, which TF32
    # would round by up to 0.05.
    torch.set_float32_matmul_precision("highest")
    return fabric


def _fabric_on_xpu(precision: Precision) -> Fabric:
    """Make Fabric for one Intel GPU, which Lightning does not know."""
    from lightning.fabric import Fabric
    from lightning.fabric.accelerators import Accelerator
    from lightning.fabric.plugins import MixedPrecision
    from lightning.fabric.strategies import SingleDeviceStrategy

    class XpuAccelerator(Accelerator):
        """The first Intel GPU."""

        def setup_device(self, device: torch.device) -> None:
            torch.xpu.set_device(device)

        def teardown(self) -> None:
            torch.xpu.empty_cache()

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("xpu", 0)]

        @staticmethod
        def auto_device_count() -> int:
            return 1

        @staticmethod
        def is_available() -> bool:
            return torch.xpu.is_available()

        @staticmethod
        def name() -> str:
            return "xpu"

    strategy = SingleDeviceStrategy(torch.device("xpu", 0), accelerator=XpuAccelerator())
    if precision == "bf16-mixed":
        # Lightning would make autocast's type CUDA.
        return Fabric(strategy=strategy, devices=1, plugins=MixedPrecision(precision, "xpu"))
    return Fabric(strategy=strategy, devices=1, precision=precision)

"""DeepSpeed's ZeRO under Lightning Fabric, on CUDA and on the CPU."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hsft.config import Config
from hsft.config.schema import ID_MODELS
from hsft.utils.distributed import TIMEOUT
from hsft.utils.errors import InputError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"


def deepspeed_strategy(config: Config, device: str) -> Any:
    """Make the strategy of `strategy: deepspeed`.

    Optimizer states (ZeRO stage 1), gradients (2) and parameters (3) are divided among the
    processes (arXiv 1910.02054). Lightning Fabric offers DeepSpeed on CUDA only, DeepSpeed itself
    also on the CPU, where gloo carries its messages.

    Args:
        config: for the stage, clipping, batch size.
        device: `cpu` or `cuda`.

    Raises:
        InputError: as `check_deepspeed`.
    """
    check_deepspeed(config)
    from lightning.fabric.strategies import DeepSpeedStrategy

    class DeepSpeedOnCpu(DeepSpeedStrategy):
        """Fabric's strategy without what it asks of GPUs: that there are any, and their numbers."""

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._setup_distributed()

        def _setup_distributed(self) -> None:
            import deepspeed

            # Without it gloo adds up gradients. DeepSpeed would compile this operator at the first
            # start, and a run that is killed meanwhile leaves a lock on which all later ones wait.
            deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OPERATOR] = False
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()
            self._config_initialized = True

        def _initialize_engine(
            self, model: nn.Module, optimizer: Any = None, scheduler: Any = None
        ) -> tuple[Any, Any, Any]:
            import deepspeed

            engine, optimizer, _, scheduler = deepspeed.initialize(
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=scheduler,
                config=self.config,
                dist_init_required=False,
            )
            return engine, optimizer, scheduler

    kind = DeepSpeedStrategy if device == "cuda" else DeepSpeedOnCpu
    # It announces every collective operation that it prepares.
    return kind(config=zero_settings(config, device), logging_level=logging.ERROR, timeout=TIMEOUT)


def check_deepspeed(config: Config) -> None:
    """Refuse `strategy: deepspeed` where it cannot run.

    Raises:
        InputError: this is Windows, the package is not installed, or it cannot train this model or
            continue a run.
    """
    if sys.platform == "win32":
        raise InputError(
            "strategy: deepspeed does not run on Windows; use --strategy ddp, or HSFT in WSL2."
        )
    if config.trains and config.auto_resume:
        raise InputError(
            "auto_resume is not supported under strategy: deepspeed, which spreads the state over "
            "its processes; use --strategy ddp."
        )
    if config.stage == 3 and config.model in ID_MODELS:
        raise InputError(
            f"model: {config.model} reads its item vectors outside of a layer's forward pass, where ZeRO "
            "stage 3 has them divided; use --stage 2 or --strategy ddp."
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "strategy: deepspeed needs the package deepspeed; install it or use strategy: ddp."
        )


def zero_settings(config: Config, device: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration; Fabric adds the precision."""
    return {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        # The trainer says where a step ends: see `gradient_sync`.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_grad_norm,
        # bitsandbytes' optimizers are not on DeepSpeed's list.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.stage,
            "contiguous_gradients": True,
            "overlap_comm": device == "cuda",
        },
    }


def uses_deepspeed(fabric: Fabric) -> bool:
    """Say whether the run is under `strategy: deepspeed`."""
    return hasattr(fabric.strategy, "zero_stage_3")


def engine_of(fabric: Fabric) -> Any:
    """Return DeepSpeed's engine; there is one after `fabric.setup`."""
    return fabric.strategy.model


@contextmanager
def whole_parameters(fabric: Fabric, model: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Bring the trainable parameters together that ZeRO stage 3 has divided.

    Collective: every process enters and leaves, whichever of them saves or loads inside.

    Args:
        fabric: the processes.
        model: whose parameters.
        write: keep what process 0 writes into them.
    """
    if not (uses_deepspeed(fabric) and fabric.strategy.zero_stage_3):
        yield
        return
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, modifier_rank=0 if write else None):
        yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()

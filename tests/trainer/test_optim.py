"""The schedule and the groups of the optimizer, HSFT's and HLLM's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hsft.config import Config, load_config
from hsft.config.schema import OptimArgs, SchedulerArgs
from hsft.trainer.optim import build_optimizer, build_schedule
from tests.helpers import ROOT

CPU = torch.device("cpu")


def rates(steps: int, **settings: object) -> list[float]:
    """Return the learning rate of every optimizer step, the peak being 1."""
    config = Config(
        optim_args=OptimArgs(learning_rate=1.0), scheduler_args=SchedulerArgs(**settings)
    )
    optimizer = build_optimizer(nn.Linear(2, 2), config, CPU)
    schedule = build_schedule(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return seen


def test_the_first_step_trains_unless_hllm_s_warm_up_is_asked_for() -> None:
    half = 0.5 * (1 + math.cos(math.pi / 2))
    assert rates(4, warmup=0.5) == pytest.approx([0.5, 1.0, 1.0, half])
    assert rates(4, warmup=0.5, warmup_from_zero=True) == pytest.approx([0.0, 0.5, 1.0, half])


@pytest.mark.parametrize("steps", [7, 15, 40])
def test_hllm_s_warm_up_and_cosine(steps: int) -> None:
    # As transformers' schedule, whose warm-up HLLM does not round.
    warmup = 0.1 * steps
    expected = [
        step / warmup
        if step < warmup
        else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for step in range(steps)
    ]
    assert rates(steps, warmup=0.1, warmup_from_zero=True) == pytest.approx(expected)


@pytest.mark.parametrize(("decayed", "of_vectors"), [("matrices", 0.0), ("all", 0.3)])
def test_what_decays(decayed: str, of_vectors: float) -> None:
    layer = nn.Linear(3, 2)
    settings = OptimArgs(weight_decay=0.3, weight_decay_on=decayed)
    groups = build_optimizer(layer, Config(optim_args=settings), CPU).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.3, id(layer.bias): of_vectors}


def test_hllm_s_own_training_is_one_file_away() -> None:
    files = ("overall/LLM_ddp", "HLLM/HLLM", "HLLM/hllm_original")
    config, _ = load_config([ROOT / "code" / f"{name}.yaml" for name in files])
    assert (config.optim_args.weight_decay_on, config.scheduler_args.warmup_from_zero) == (
        "all",
        True,
    )
    assert config.optim_args.weight_decay == 0.01
    assert (config.clip_grad_norm, config.use_qlora, config.stopping_step) == (0, False, 6)
    assert config.effective_negatives == "sampled"
    assert config.negatives_per_sequence(8) == config.MAX_ITEM_LIST_LENGTH + 1 == 51

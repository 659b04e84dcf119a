"""`train_batch_size: auto`: the rule, with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hsft.model.structure import DecoderSource, DecoderStructure
from hsft.report.batch_size import (
    batch_for_card,
    batch_for_processor,
    fixed_share,
    most_for_steps,
)
from hsft.report.memory import TrainingShape, estimate
from tests.decoders import shape

# Two layers of SmolLM2-135M: queries and results 576 x 576, keys and values 576 x 192, MLP 576 x 1536.
SMOLLM2 = DecoderStructure(
    hidden_size=576,
    layers=2,
    embedding_width=576,
    learned_positions=None,
    linear={
        f"{layer}.{name}": widths
        for layer in range(2)
        for name, widths in {
            **{"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)},
            **{"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)},
        }.items()
    },
    other_sizes=(),
    source=DecoderSource(Path("none")),
)
# The demo's setting on Amazon Beauty: 12,086 items of 384 numbers, 5.5 positions a user.
BEAUTY = TrainingShape(
    decoder=SMOLLM2,
    quant_type="none",
    lora_rank=8,
    lora_targets=("all-linear",),
    mixed=False,
    dtype=torch.float32,
    optimizer_8bit=False,
    checkpointing=False,
    items=12086,
    item_bytes=2,
    adapter="linear",
    adapter_rank=8,
    item_width=384,
    length=20,
    mean_length=5.5,
    masked_row=80,
    negatives="catalogue",
    num_negatives=0,
    budget_bytes=1 << 28,
)


@pytest.mark.parametrize(
    ("sequences", "epochs", "accumulation", "processes", "expected"),
    [
        # 22,332 / 256 are 88 batches, 6 times 528 steps; of 512 they would be 264.
        (22332, 6, 1, 1, 256),
        (22332, 6, 2, 1, 128),
        (22332, 6, 1, 2, 128),
        # 1,000 / 16 are 63 batches, 8 times 504 steps.
        (1000, 8, 1, 1, 16),
        # Too few whatever the batch, and enough whatever the batch.
        (30, 2, 1, 1, 8),
        (100, 1000, 1, 1, 64),
        (3, 1, 1, 1, 8),
    ],
)
def test_a_run_keeps_500_steps(
    sequences: int, epochs: int, accumulation: int, processes: int, expected: int
) -> None:
    assert most_for_steps(sequences, epochs, accumulation, processes) == expected


def test_the_catalogue_is_spread_over_a_batch() -> None:
    # Weights: 2 x 3,538,944; products a position: 4 x 7,077,888 + 6 x 12,086 x 576 = 70,080,768.
    # The adapter over the catalogue: 6 x 12,086 x 384 x 576 = 16,039,475,712 a step.
    # Of a step of 16 users: 16.04 / (16.04 + 6.17) = 72 %; of 128: 16.04 / (16.04 + 49.34) = 24.5 %.
    assert fixed_share(BEAUTY, 16) == pytest.approx(0.7223, abs=1e-4)
    assert fixed_share(BEAUTY, 128) == pytest.approx(0.2453, abs=1e-4)
    # Users a second by this count grow 2.7 times from 16 to 128; 310 and 830 tokens/s were measured.
    assert (1 - fixed_share(BEAUTY, 128)) / (1 - fixed_share(BEAUTY, 16)) == pytest.approx(
        830 / 310, rel=0.05
    )
    assert batch_for_processor(BEAUTY, 1024) == 128
    assert batch_for_processor(BEAUTY, 32) == 32
    # Drawn negatives in the catalogue's place: 1,024 of 12,086 leave 6 %.
    sampled = replace(BEAUTY, negatives="sampled", num_negatives=1024)
    # 6 x 1,024 x 221,184 = 1.359e9; 28,311,552 + 3,538,944 a position, 44 positions: 1.401e9.
    assert fixed_share(sampled, 8) == pytest.approx(0.4923, abs=1e-4)
    assert batch_for_processor(sampled, 1024) == 32
    assert batch_for_processor(replace(BEAUTY, negatives="in_batch"), 1024) == 8
    assert batch_for_processor(replace(BEAUTY, adapter="none"), 1024) == 8


def test_a_card_takes_what_fits(llama: Path) -> None:
    run = shape(llama, dtype=torch.bfloat16)
    # 40 positions a sequence: 204 sequences have 8,192.
    assert batch_for_card(run, 1024, None) == 128
    assert batch_for_card(run, 64, None) == 64
    assert batch_for_card(replace(run, mean_length=4.0), 4096, None) == 2048
    needed = estimate(run, 64).total
    assert batch_for_card(run, 1024, needed) == 64
    assert batch_for_card(run, 1024, needed - 1) == 32
    assert batch_for_card(run, 1024, estimate(run, 2).total) == 2
    assert batch_for_card(run, 1024, 0) == 1

"""The estimated time of steps and validations: counts by hand, and figures measured on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from hsft.model.meta import read_structure
from hsft.model.structure import DecoderSource
from hsft.report.memory import saved_bytes_per_token
from hsft.report.step_time import Card, seconds, training_work, validation_work
from hsft.run import dry_run
from hsft.run.dry_run import TINYLLAMA
from tests.conftest import Project
from tests.decoders import shape

BF16 = torch.bfloat16
CARD = Card("a card", 8, tflops=10, float32_tflops=1, bandwidth=100)
# Of a layer of the fixture `llama`: q and o 64 x 64, k and v 64 x 32, the MLP three times 64 x 128.
WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def test_a_step_counted_by_hand(llama: Path) -> None:
    plain = shape(llama, quant_type="none", dtype=BF16)
    work = training_work(plain, 3, 30, 10, (100, 10))
    # LoRA of rank 4 on q (64 + 64) and v (64 + 32) of two layers.
    lora = 4 * (128 + 96) * 2
    attention = 3 * 2 * 64 * 10 * 2
    assert work.products == 30 * (4 * WEIGHTS + 6 * lora + attention) == 9_400_320
    # 500 items of frozen embeddings: scores, scores again, and the queries' gradient.
    assert work.float32 == 6 * 30 * 500 * 64
    # Activations, 16-bit weights twice, AdamW on LoRA and the scale.
    assert work.traffic == 12 * 30 * 210 + 2 * 2 * WEIGHTS + 28 * (lora + 1) == 420_716
    assert work.kernels == 2 * 62 + 4 * 17 + 93 == 285
    assert work.operations == 285 + 2 * 77 + 4 * 23 + 5 == 536
    assert work.layer_products == 2 * 14
    assert work.dequantisations == 0
    device = 9_400_320 / 8e12 + 5_760_000 / 8e11 + 420_716 / 60e9 + 285 * 2e-6 + 28 * 8e-6
    assert (
        seconds(work, CARD, graph=True) == pytest.approx(device) == pytest.approx(809e-6, rel=1e-3)
    )
    assert seconds(work, CARD, graph=False) == pytest.approx(536 * 14e-6)
    # A card slow enough computes all the time, however kernels are launched.
    slow = replace(CARD, tflops=1e-4)
    assert seconds(work, slow, graph=False) == seconds(work, slow, graph=True) > 0.1


def test_what_quantisation_checkpointing_and_full_training_add(llama: Path) -> None:
    plain = training_work(shape(llama, quant_type="none", dtype=BF16), 3, 30, 10, (100, 10))
    nf4 = training_work(shape(llama, quant_type="nf4", dtype=BF16), 3, 30, 10, (100, 10))
    assert nf4.products == plain.products
    assert nf4.dequantisations == nf4.kernels - plain.kernels == 28
    # Half a byte read, two written and two read again, in place of two read.
    assert nf4.traffic - plain.traffic == 2 * WEIGHTS * (4.5 - 2)
    host = (536 + 28) * 14e-6 + 28 * 160e-6
    assert seconds(nf4, CARD, graph=False) == pytest.approx(host)
    again = training_work(
        shape(llama, quant_type="none", dtype=BF16, checkpointing=True), 3, 30, 10, (100, 10)
    )
    assert again.products - plain.products == 30 * (2 * WEIGHTS + 2 * 64 * 10 * 2)
    full = training_work(shape(llama, lora_rank=None, mixed=True, dtype=BF16), 3, 30, 10, (100, 10))
    assert full.products == 30 * (6 * WEIGHTS + 3 * 2 * 64 * 10 * 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The batch's items, one more a sequence than positions: forward and the weight's gradient.
        ({"negatives": "in_batch"}, 4 * 4096 * 33 + 8 * 30 * 30 * 64),
        (
            {"negatives": "sampled", "num_negatives": 99},
            4 * 4096 * (33 + 99) + 8 * 30 * 99 * 64,
        ),
        # Adapted items again in the backward pass, and their weight's gradient.
        ({"negatives": "catalogue"}, 4 * 4096 * 33 + 500 * (6 * 4096 + 8 * 30 * 64)),
    ],
)
def test_the_loss_with_a_linear_adapter(
    llama: Path, settings: dict[str, Any], expected: int
) -> None:
    work = training_work(shape(llama, dtype=BF16, adapter="linear", **settings), 3, 30, 10, (0, 0))
    assert work.float32 == expected
    frozen = training_work(shape(llama, dtype=BF16, **settings), 3, 30, 10, (0, 0))
    assert work.products == frozen.products
    # Without half precision the model's products are float32 ones too.
    full = training_work(shape(llama, adapter="linear", **settings), 3, 30, 10, (0, 0))
    assert (full.products, full.float32) == (0, work.float32 + work.products)


def test_a_validation_counted_by_hand(llama: Path) -> None:
    # The budget holds the scores and vectors of 5 users: 4 x 5 x (501 + 64) bytes.
    few = shape(llama, quant_type="nf4", dtype=BF16, adapter="linear", budget_bytes=11_300)
    work = validation_work(few, users=20, positions=6, batch=10, per_token=(100, 10))
    lora = 4 * (128 + 96) * 2
    assert work.products == 120 * (2 * WEIGHTS + 2 * lora + 2 * 64 * 6 * 2)
    # Items are adapted again for each of 4 groups.
    assert work.float32 == 2 * 500 * 64 * 20 + 4 * 2 * 4096 * 500
    kernels = 2 * (2 * 24 + 4 * 4 + 14)
    assert work.kernels == kernels + 2 * 14
    assert work.operations == kernels + 2 * (2 * 37 + 4 * 9 + 1) + 4 * 2 * 14
    traffic = 5 * 120 * 210 + 2 * 4.5 * WEIGHTS + 4 * 500 * 64 * 18 + 12 * 20 * 500
    assert work.traffic == traffic


# SmolLM2-135M, whose LoRA was on all layers.
SMOLLM2 = {
    **TINYLLAMA,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
H200 = Card("H200", 141, tflops=989, float32_tflops=67, bandwidth=4800)


@pytest.mark.parametrize("smol", [False, True])
def test_figures_measured_on_an_h200_are_met_within_a_fifth(llama: Path, smol: bool) -> None:
    sizes = SMOLLM2 if smol else TINYLLAMA
    nf4 = shape(
        llama,
        decoder=read_structure(DecoderSource(Path("x"), llama=sizes)),
        lora_rank=8,
        lora_targets=("all-linear",) if smol else ("q_proj", "v_proj"),
        mixed=True,
        dtype=BF16,
        negatives="in_batch",
        items=95_668,
    )
    sequences, tokens = (16, 800) if smol else (64, 1001)
    counted = saved_bytes_per_token(nf4)
    # docs/performance-gpu.md: milliseconds of `one row`, eager and as a graph.
    measured: dict[tuple[Literal["nf4", "none"], bool], float] = {
        ("nf4", False): 183.6 if smol else 97.1,
        ("nf4", True): 20.1 if smol else 23.67,
    }
    if not smol:
        measured |= {("none", False): 88.83, ("none", True): 20.89}
    for (kind, graph), milliseconds in measured.items():
        work = training_work(replace(nf4, quant_type=kind), sequences, tokens, 25, counted)
        # Kernel by kernel it is the processor's time, and processors differ more.
        share = 0.2 if graph else 0.4
        assert 1e3 * seconds(work, H200, graph=graph) == pytest.approx(milliseconds, rel=share)
    if not smol:
        # Users a second, on weights that are not quantised, without LoRA.
        plain = replace(nf4, lora_rank=None, mixed=False)
        for batch, budget, users in ((256, 1 << 28, 9112), (1024, 1 << 28, 9751)):
            work = validation_work(replace(plain, budget_bytes=budget), 20_000, 17, batch, counted)
            assert seconds(work, H200, graph=False) == pytest.approx(20_000 / users, rel=0.2)


def test_dry_run_multiplies_by_the_batches_of_an_epoch(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Card("a slow card", 24, tflops=1e-6, float32_tflops=1e-6, bandwidth=1e9)
    monkeypatch.setattr(dry_run, "CARDS", (slow, replace(slow, gib=1)))
    more = ("--dry_run", "True", "--use_qlora", "True", "--precision", "auto")
    code, out, err = project.run(*more, "--train_batch_size", "8")
    assert code == 0, err
    # 30 sequences, of 8, 8 and 7 positions in turn; ten epochs of 4 steps are too few for graphs.
    assert "an epoch (4 batches, launched kernel by kernel) and of a validation (30 users)" in out
    drawn: dict[str, Any] = {"negatives": "sampled", "num_negatives": 512, "negatives_logq": True}
    nf4 = shape(project.llama, dtype=BF16, mixed=True, lora_rank=8, items=20, **drawn)
    counted = saved_bytes_per_token(nf4)
    work = training_work(nf4, 8, 8 * 23 / 3, (2 * 64 + 49) / 23, counted)
    minutes, rest = divmod(round(4 * seconds(work, slow, graph=False)), 60)
    assert minutes >= 1
    *_, first, second = out.splitlines()
    assert first.split()[:3] == ["24", "GiB", f"{minutes}m{rest:02d}s"]
    assert first.endswith("a slow card")
    assert "does not fit" in second
    code, out, err = project.run(*more, "--train_batch_size", "8", "--epochs", "13")
    assert "an epoch (4 batches, as CUDA graphs)" in out
    (project.root / "dataset/tiny.csv").unlink()
    assert "No time is estimated without the interactions." in project.run(*more)[1]

"""Decoders as a run loads them, whole recommenders, and what they hold in memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.meta import read_structure
from hsft.model.norms import fuse_norms
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.structure import DecoderSource
from hsft.model.user_llm import UserLLM
from hsft.report.memory import TrainingShape

RANK = 4
LORA = LoraSettings(4, 8, 0.0, ("q_proj", "v_proj"), "none", torch.float32)
NCE = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")


def build(
    folder: Path,
    lora: LoraSettings | None = LORA,
    settings: LossSettings = NCE,
    adapter: str = "none",
) -> Recommender:
    """Make a recommender over 20 random items of 64 dimensions."""
    torch.manual_seed(1)
    decoder = load_decoder(folder, dtype=torch.float32, attention="sdpa", lora=lora)
    table = torch.randn(21, 64, generator=torch.Generator().manual_seed(2))
    table[0] = 0
    items = ItemTable(table, adapter)
    model = add_lora(decoder, lora, False) if lora else decoder
    return Recommender(UserLLM(model, items), settings)


def shape(folder: Path, **more: Any) -> TrainingShape:
    """Return the shape of a QLoRA training of a model folder."""
    base = TrainingShape(
        decoder=read_structure(DecoderSource(folder)),
        quant_type="nf4",
        lora_rank=RANK,
        lora_targets=("q_proj", "v_proj"),
        mixed=False,
        dtype=torch.float32,
        optimizer_8bit=False,
        checkpointing=False,
        items=500,
        item_bytes=2,
        adapter="none",
        adapter_rank=8,
        length=40,
        masked_row=None,
        negatives="catalogue",
        num_negatives=0,
        budget_bytes=1 << 28,
    )
    return replace(base, **more)


def real_model(folder: Path, asked: TrainingShape, double: bool = True) -> nn.Module:
    """Load the decoder of a shape with its adapter."""
    lora = LoraSettings(RANK, 8, 0.05, asked.lora_targets, asked.quant_type, asked.dtype, double)
    decoder = load_decoder(folder, dtype=asked.dtype, attention=asked.attention, lora=lora)
    fuse_norms(decoder)
    return add_lora(decoder, lora, asked.checkpointing)


def real_weight_bytes(model: nn.Module) -> int:
    """Add up what a decoder's weights hold, bitsandbytes' constants and tables included."""
    total = 0
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        total += weight.numel() * weight.element_size()
        for tensor in (getattr(weight, "SCB", None), *state_tensors(weight)):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


def state_tensors(weight: Any) -> list[torch.Tensor]:
    """Return the tensors that a 4-bit weight needs beside itself."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    actual = [state.absmax, state.code]
    if state.nested:
        offset = torch.as_tensor(state.offset)
        actual += [state.state2.absmax, state.state2.code, offset.reshape(1).float()]
    return actual


def saved_by_autograd(model: nn.Module, mixed: bool, packed: bool) -> int:
    """Add up what autograd saves over 6 x 40 positions."""
    batch, length, width = 6, 40, 192
    stored = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    for weight in model.parameters():
        stored |= {tensor.untyped_storage().data_ptr() for tensor in state_tensors(weight)}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stored:
            saved[storage.data_ptr()] = tensor
        return tensor

    # As `UserLLM` runs a decoder of bfloat16: without autocast.
    dtype = torch.bfloat16 if mixed else torch.float32
    vectors = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    autocast = nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        given = {"position_ids": torch.arange(20).repeat(batch, 2)} if packed else {}
        model(inputs_embeds=vectors, use_cache=False, **given)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

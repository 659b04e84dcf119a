"""The tests' tiny UserLLM as a `Recommender`."""

from __future__ import annotations

from pathlib import Path

import torch

from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM

LORA = LoraSettings(4, 8, 0.0, ("q_proj", "v_proj"), "none", torch.float32)
NCE = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")


def build(
    folder: Path,
    lora: LoraSettings | None = LORA,
    settings: LossSettings = NCE,
    adapter: str = "none",
) -> Recommender:
    torch.manual_seed(1)
    decoder = load_decoder(folder, dtype=torch.float32, attention="sdpa", lora=lora)
    table = torch.randn(21, 64, generator=torch.Generator().manual_seed(2))
    table[0] = 0
    items = ItemTable(table, adapter)
    model = add_lora(decoder, lora, False) if lora else decoder
    return Recommender(UserLLM(model, items), settings)

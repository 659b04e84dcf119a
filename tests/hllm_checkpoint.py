"""A tiny random HLLM checkpoint: the real key layout with two random Llamas in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.helpers import make_llama


@dataclass
class TinyHllm:
    """A checkpoint and what it was made from.

    Attributes:
        file: the checkpoint.
        base: a folder with the base model's config.json and tokenizer.
        item, user: the original modules.
        state: the state dict in the file.
    """

    file: Path
    base: Path
    item: Any
    user: Any
    state: dict[str, Tensor]

    @property
    def emb_token(self) -> Tensor:
        """[1, 1, 64]."""
        return self.state["item_emb_tokens"]


def make_hllm(folder: Path, *, logit_scale: float = 2.5) -> TinyHllm:
    """Write `pytorch_model.bin` with an ItemLLM and a UserLLM of different weights."""
    base = make_llama(folder / "base", seed=1)
    item = LlamaForCausalLM.from_pretrained(base).eval()
    user = LlamaForCausalLM.from_pretrained(make_llama(folder / "user", seed=2)).eval()
    state = {f"item_llm.{name}": value for name, value in item.state_dict().items()}
    state |= {f"user_llm.{name}": value for name, value in user.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    state["item_emb_tokens"] = 0.02 * torch.randn(1, 1, 64, generator=generator)
    state["logit_scale"] = torch.tensor(logit_scale)
    file = folder / "pytorch_model.bin"
    torch.save(state, file)
    return TinyHllm(file, base, item, user, state)

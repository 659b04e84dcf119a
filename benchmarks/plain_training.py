"""The usual way to train on item vectors: plain transformers and peft, right-padded to length L.

Every sequence is padded to the longest allowed length, an attention mask says what is real, logits
are made at all B x L positions and cross-entropy ignores the padded ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

_IGNORED = -100


class PlainModel(nn.Module):
    """A peft decoder on item vectors, with the linear item adapter and the softmax of HSFT's demo.

    Args:
        decoder: a transformers decoder, quantised or not.
        table: [I + 1, D] item vectors, row 0 the padding item.
        rank: LoRA rank (alpha is twice the rank, dropout 0.05).
        targets: LoRA's target modules.
        quantised: prepare the decoder by `prepare_model_for_kbit_training`.
        checkpointing: gradient checkpointing, which that function turns on by default.
        catalogue: contrast with all items; else with the batch's own targets.
        adapter: train a linear map on the item vectors.
        dropout: LoRA's.
    """

    table: Tensor

    def __init__(
        self,
        decoder: Any,
        table: Tensor,
        *,
        rank: int,
        targets: list[str] | str,
        quantised: bool,
        checkpointing: bool,
        catalogue: bool,
        adapter: bool,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        if quantised:
            decoder = prepare_model_for_kbit_training(
                decoder,
                use_gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        elif checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets
        )
        self.decoder = get_peft_model(decoder, settings)
        self.register_buffer("table", table)
        dim = table.shape[1]
        self.adapter = nn.Linear(dim, dim, bias=False) if adapter else None
        if self.adapter is not None:
            nn.init.zeros_(self.adapter.weight)
        self.logit_scale = nn.Parameter(torch.tensor(2.659))
        self.catalogue = catalogue
        self.dtype = next(p for n, p in decoder.named_parameters() if "norm" in n).dtype

    def _vectors(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        return rows if self.adapter is None else rows + self.adapter(rows)

    def forward(self, history: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch padded to [B, L]."""
        inputs = self._vectors(self.table[history]).to(self.dtype)
        states = self.decoder(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False)
        queries = F.normalize(states.last_hidden_state.float(), dim=-1).flatten(0, 1)
        if self.catalogue:
            pool = self._vectors(self.table[1:])
            labels = torch.where(mask, targets - 1, _IGNORED).flatten()
        else:
            pool = self._vectors(self.table[targets[mask]])
            labels = torch.full_like(targets, _IGNORED)
            labels[mask] = torch.arange(len(pool), device=labels.device)
            labels = labels.flatten()
        logits = self.logit_scale.exp() * queries @ F.normalize(pool, dim=-1).T
        return F.cross_entropy(logits, labels, ignore_index=_IGNORED)


def pad_to(length: int, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return history, mask and targets of a padded `TrainBatch`, padded on to [B, length]."""
    more = (0, length - batch.history.shape[1])
    return (
        F.pad(batch.history, more),
        F.pad(batch.attention_mask, more),
        F.pad(batch.targets, more),
    )

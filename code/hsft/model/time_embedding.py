"""Embeddings of the times in a history, added to what the UserLLM reads."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from hsft.data.time_fields import FIELD_SIZES


class TimeEmbedding(nn.Module):
    """The sum of one trained vector for each field of a time, all zero at first.

    Args:
        dim: D.
        of_next: the fields of a position's next item follow its own, and have vectors of their own.
    """

    offsets: Tensor

    def __init__(self, dim: int, of_next: bool) -> None:
        super().__init__()
        sizes = FIELD_SIZES * (2 if of_next else 1)
        offsets = [0, *itertools.accumulate(sizes)]
        self.register_buffer("offsets", torch.tensor(offsets[:-1]), persistent=False)
        self.weight = nn.Parameter(torch.zeros(offsets[-1], dim))

    def forward(self, fields: Tensor) -> Tensor:
        """Uint8 [..., F] as `ItemTimes.fields` gives them -> float32 [..., D]."""
        # A product instead of a gather: no [..., F, D], and gradients in the same order every time.
        rows = torch.zeros((*fields.shape[:-1], len(self.weight)), device=fields.device)
        rows.scatter_(-1, fields.long() + self.offsets, 1.0)
        summed: Tensor = rows.to(self.weight.dtype) @ self.weight
        return summed.float()

"""The last item's vector as the start of a user's vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LastItemResidual(nn.Module):
    """u = x / |x| + W h / |h|, of a position's item vector x and the UserLLM's output h.

    W is zero at first, so that an untrained model ranks as item kNN by the last item does, and
    training adds to that (a residual connection that starts as the identity, as in ReZero, arXiv
    2003.04887).

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, states: Tensor, vectors: Tensor) -> Tensor:
        """Return user vectors: float32 [..., D].

        Args:
            states: float [..., D], the UserLLM's output.
            vectors: float [..., D], the items' vectors, those that are scored.
        """
        update: Tensor = F.linear(F.normalize(states.float(), dim=-1), self.weight)
        return F.normalize(vectors.float(), dim=-1) + update.float()

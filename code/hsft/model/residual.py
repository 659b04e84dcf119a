"""The last items' vectors as the start of a user's vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.model.losses import normalize

_DECAY = 0.8


class HistoryResidual(nn.Module):
    """u_t = x_t + sum over k of a_k x_(t-k) + W h_t, of unit vectors x and h, k from 1 to N - 1.

    x are the vectors of the items read, as they are scored, and h the UserLLM's outputs. W is zero at
    first and a_k is 0.8^k, so that an untrained model ranks as item kNN by the last N items does, and
    training adds to that (a residual connection that starts as the identity, as in ReZero, arXiv
    2003.04887).

    Args:
        dim: D.
        items: N.
    """

    def __init__(self, dim: int, items: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))
        self.lags = nn.Parameter(_DECAY ** torch.arange(1, items)) if items > 1 else None

    def forward(self, states: Tensor, vectors: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return user vectors: float32 [B, T, D].

        Args:
            states: float [B, T, D], the UserLLM's output.
            vectors: float [B, T, D], the items' vectors.
            positions: int64 [B, T] when rows hold several histories: each item's number in its own.
        """
        units = normalize(vectors)
        users = units + F.linear(normalize(states), self.weight).float()
        if self.lags is None:
            return users
        for lag, factor in enumerate(self.lags[: units.shape[1] - 1], start=1):
            earlier = F.pad(units[:, :-lag], (0, 0, lag, 0)) * factor
            if positions is not None:
                earlier = earlier * (positions >= lag).unsqueeze(-1)
            users = users + earlier
        return users

"""How often items come up as negatives, for losses that are corrected for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hsft.data.interactions import PAD


class Proposal(nn.Module):
    """The distribution that a pool of negatives is drawn from: drawn items and the batch's targets.

    Both kinds together are draws from one mixture, so that an item counts alike whichever way it
    came (the balance heuristic of Veach and Guibas 1995).

    Args:
        target_shares: float64 [I + 1], the probability of each item as a training position's target.
        drawn_shares: float64 [I + 1], its probability as a drawn negative.
    """

    target_shares: Tensor
    drawn_shares: Tensor

    def __init__(self, target_shares: np.ndarray, drawn_shares: np.ndarray) -> None:
        super().__init__()
        for name, shares in (("target_shares", target_shares), ("drawn_shares", drawn_shares)):
            self.register_buffer(name, torch.from_numpy(shares).float(), persistent=False)

    def log_counts(self, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return the log of how often a position's pool is expected to hold each of its items.

        An item with the shares p and u comes up n u + (m - 1) p times among n drawn negatives and
        the targets of the m - 1 other positions.

        Args:
            targets: int64 [m], targets of the positions of all processes, 0 for fillers.
            drawn: int64 [n], drawn negatives of all processes.

        Returns:
            float32 [m + n], for the targets and then the drawn negatives.
        """
        others = (targets != PAD).sum() - 1
        pool = torch.cat([targets, drawn])
        by_draw = len(drawn) * self.drawn_shares[pool].float()
        expected = by_draw + others * self.target_shares[pool].float()
        return expected.clamp_min(torch.finfo(torch.float32).tiny).log()

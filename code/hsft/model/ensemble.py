"""Two models as one: the sum of their scores, each standardised over the catalogue for every user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer

_ITEMS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Member:
    """A model of an ensemble.

    Attributes:
        scorer: the model, in evaluation mode.
        max_length: how many of a history's last items it reads.
    """

    scorer: Scorer
    max_length: int


class Ensemble:
    """Scores by a weighted sum of z-scores: sum over models m of w_m (s_m - mean_m) / deviation_m.

    Mean and deviation are over all items of the catalogue, for each user by themselves. A mean is
    the same for all items, so it changes no ranking and is left out; the deviation of the scores
    u v over items v is sqrt(u C u) with the covariance C of the item vectors, so that user and item
    vectors of both models, side by side, give the sum as their dot product.

    Args:
        members: the models, with the same items.
        weights: w, one a model.

    Raises:
        ValueError: the models do not have the same number of items.
    """

    def __init__(self, members: Sequence[Member], weights: Sequence[float]) -> None:
        if len({member.scorer.num_items for member in members}) > 1:
            raise ValueError("the models of an ensemble need the same items")
        self._members = list(members)
        self._covariances = [item_covariance(member.scorer) for member in members]
        self.weights = list(weights)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return self._members[0].scorer.num_items

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Int64 [B, T] and [B] -> float32 [B, sum of the models' D]."""
        parts = []
        for member, covariance, weight in zip(
            self._members, self._covariances, self.weights, strict=True
        ):
            users = member.scorer.user_vectors(*last_items(history, lengths, member.max_length))
            with torch.autocast(users.device.type, enabled=False):
                exact = _exact(users)
                deviation = (exact @ covariance * exact).sum(dim=-1).clamp_min(0).sqrt()
                scaled = weight * exact / deviation.clamp_min(1e-12).unsqueeze(-1)
            parts.append(scaled.float().to(users.device))
        return torch.cat(parts, dim=-1)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Item numbers start..end-1 -> float32 [end - start, sum of the models' D]."""
        slices = [member.scorer.item_slice(start, end) for member in self._members]
        return torch.cat([part.float() for part in slices], dim=-1)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., sum of the models' D]."""
        vectors = [member.scorer.item_vectors(items) for member in self._members]
        return torch.cat([part.float() for part in vectors], dim=-1)


@torch.no_grad()
def item_covariance(scorer: Scorer) -> Tensor:
    """Return the covariance of a model's item vectors over its catalogue: float64 [D, D]."""
    stop = scorer.num_items + 1
    slices = [
        _exact(scorer.item_slice(start, min(start + _ITEMS_AT_A_TIME, stop)))
        for start in range(1, stop, _ITEMS_AT_A_TIME)
    ]
    mean = torch.stack([part.sum(dim=0) for part in slices]).sum(dim=0) / scorer.num_items
    products = [(part - mean).T @ (part - mean) for part in slices]
    return torch.stack(products).sum(dim=0) / scorer.num_items


def _exact(vectors: Tensor) -> Tensor:
    """Return vectors in float64, on the CPU where their device may have no such type."""
    return vectors.to(vectors.device if vectors.is_cuda else "cpu", torch.float64)


def last_items(history: Tensor, lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Cut histories to their last items.

    Args:
        history: int64 [B, T], right-padded with 0.
        lengths: int64 [B].
        most: items that are kept.

    Returns:
        int64 [B, at most `most`], right-padded with 0, and their lengths [B].
    """
    if history.shape[1] <= most:
        return history, lengths
    kept = lengths.clamp_max(most)
    steps = torch.arange(most, device=history.device)
    columns = (lengths - kept).unsqueeze(1) + steps
    cut = history.gather(1, columns.clamp_max(history.shape[1] - 1))
    return cut.masked_fill(steps >= kept.unsqueeze(1), PAD), kept


def choose_weight(ensemble: Ensemble, value: Callable[[], float]) -> float:
    """Set the weights of an ensemble of two to those of the highest value, and return the second.

    Tenths from 0 to 1 are tried, then the twentieths beside the best; of equals the lowest wins.

    Args:
        ensemble: its weights become (1 - w, w).
        value: the quality with the weights that are set, such as NDCG on validation users.
    """
    values: dict[int, float] = {}

    def try_all(twentieths: Sequence[int]) -> int:
        for step in twentieths:
            if 0 <= step <= 20 and step not in values:
                ensemble.weights = [1 - step / 20, step / 20]
                values[step] = value()
        return max(sorted(values), key=lambda step: values[step])

    best = try_all(range(0, 21, 2))
    best = try_all([best - 1, best + 1])
    ensemble.weights = [1 - best / 20, best / 20]
    return best / 20

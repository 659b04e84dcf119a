"""Several models as one: the sum of their scores, each standardised over the catalogue for every user."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer

# Numbers of item vectors held at once, in float64.
_VALUES_AT_A_TIME = 1 << 23
# Up to this width a covariance is cheaper than the scores of the whole catalogue.
_WIDEST_COVARIANCE = 2048
# Of the product of two vectors' lengths: scores that differ by less are equal in float32.
_ROUNDING = 1e-8


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

    Mean and deviation are over all items of the catalogue, seen ones included, for each user by
    themselves. The mean is the same for all items, so it changes no ranking and is left out. User
    and item vectors of the models, side by side, give the sum as their dot product.

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
        self._deviations = [score_deviation(member.scorer) for member in members]
        self.weights = list(weights)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return self._members[0].scorer.num_items

    @property
    def parts(self) -> list[Scorer]:
        """The models, in the order in which their vectors stand side by side."""
        return [member.scorer for member in self._members]

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Int64 [B, T] and [B] -> float32 [B, sum of the models' D]."""
        parts = []
        for member, deviation, weight in zip(
            self._members, self._deviations, self.weights, strict=True
        ):
            users = member.scorer.user_vectors(*last_items(history, lengths, member.max_length))
            with torch.autocast(users.device.type, enabled=False):
                exact = _exact(users)
                scaled = weight * exact / deviation(exact).unsqueeze(-1)
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
def score_deviation(scorer: Scorer) -> Callable[[Tensor], Tensor]:
    """Return a function from user vectors to the standard deviation of the users' scores.

    The variance of the scores u v over items v is u C u with the covariance C of the item vectors.
    Vectors too wide for C are multiplied with all items instead.

    Args:
        scorer: the model; its catalogue is read now.

    Returns:
        float64 [B, D] -> float64 [B]; infinite where the scores differ by no more than float32
        rounding, so that a model without an opinion has no say.
    """
    count, (mean, length) = scorer.num_items, _item_moments(scorer)
    starts = _slice_starts(scorer)

    def centred(start: int) -> Tensor:
        return _exact(scorer.item_slice(start, min(start + starts.step, count + 1))) - mean

    covariance = mean.new_zeros((len(mean), len(mean)) if len(mean) <= _WIDEST_COVARIANCE else 0)
    for start in starts if len(covariance) else ():
        part = centred(start)
        covariance.addmm_(part.T, part, alpha=1 / count)

    def deviation(users: Tensor) -> Tensor:
        if len(covariance):
            variance = (users @ covariance * users).sum(dim=-1)
        else:
            # In float32, as the scores themselves are: the products are the cost of a ranking.
            scores = (centred(start).float() @ users.float().T for start in starts)
            squares = [(part.double() ** 2).sum(dim=0) for part in scores]
            variance = torch.stack(squares).sum(dim=0) / count
        least = _ROUNDING * length * users.norm(dim=-1)
        return torch.where(variance > least**2, variance.sqrt(), torch.inf)

    return deviation


def _item_moments(scorer: Scorer) -> tuple[Tensor, Tensor]:
    """Return the mean of a model's item vectors, float64 [D], and their root mean square length."""
    stop, starts = scorer.num_items + 1, _slice_starts(scorer)
    sums, squares = [], []
    for start in starts:
        part = _exact(scorer.item_slice(start, min(start + starts.step, stop)))
        sums.append(part.sum(dim=0))
        squares.append((part**2).sum())
    mean = torch.stack(sums).sum(dim=0) / scorer.num_items
    return mean, (torch.stack(squares).sum() / scorer.num_items).sqrt()


def _slice_starts(scorer: Scorer) -> range:
    """Return where slices of the catalogue begin; the step is how many items a slice has."""
    width = scorer.item_slice(0, 1).shape[1]
    return range(1, scorer.num_items + 1, max(1, _VALUES_AT_A_TIME // width))


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


def weight_grid(models: int) -> np.ndarray:
    """Return the weights that are tried: all with a sum of 1 in steps of 0.05, of 0.1 for three.

    The most even ones come first, so that of equally good ones these are taken.

    Args:
        models: M, at least 2.

    Returns:
        float64 [W, M].
    """
    steps = 20 if models == 2 else 10
    counts = itertools.product(range(steps + 1), repeat=models - 1)
    grid = np.array([(*some, steps - sum(some)) for some in counts if sum(some) <= steps])
    evenness = np.abs(grid - steps / models).sum(axis=1)
    return grid[np.argsort(evenness, kind="stable")] / steps

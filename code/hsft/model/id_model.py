"""What the models on item ids share: their item table, masks of packed rows, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.config import Config
from hsft.model.item_table import AdaptedItems, ItemTable
from hsft.model.losses import split_chunks
from hsft.model.recommender import LossSettings, Similarity

# Standard deviation of the initial weights of embeddings.
INITIAL_DEVIATION = 0.02


class IdTable(ItemTable):
    """Trainable vectors of item numbers, in place of cached embeddings.

    Args:
        num_items: I; row 0 is the padding item.
        dim: D.
        width: dimensions C of the trained vectors. Where it is not D, a trained linear map without
            bias brings them to D, in inputs and targets alike; None: D.
    """

    def __init__(self, num_items: int, dim: int, width: int | None = None) -> None:
        super().__init__(torch.zeros(1, dim))
        width = dim if width is None else width
        self.weight = nn.Parameter(torch.randn(num_items + 1, width) * INITIAL_DEVIATION)
        self.projection = None if width == dim else nn.Linear(width, dim, bias=False)

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return len(self.weight) - 1

    def forward(self, items: Tensor | slice, adapted: AdaptedItems | None = None) -> Tensor:
        """Return the vectors of item numbers: int64 [...] or a slice -> float32 [..., D].

        None is adapted.
        """
        if isinstance(items, slice):
            return self._project(self.weight[items])
        return self._project(F.embedding(items, self.weight))

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        """Return one function per `size` items (without the padding item) that gives their vectors."""
        if self.projection is None:
            return split_chunks(self.weight[1:], size)
        return [partial(self._project, piece) for piece in self.weight[1:].split(size)]

    def _project(self, vectors: Tensor) -> Tensor:
        if self.projection is None:
            return vectors
        projected: Tensor = self.projection(vectors)
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


def position_vectors(table: Tensor, length: int, positions: Tensor | None) -> Tensor:
    """Return the vectors of a batch's positions: float [T, D], or [B, T, D] of packed rows.

    Args:
        table: float [L, D], of the numbers of items in a history.
        length: T.
        positions: int64 [B, T] when rows are packed: each item's number in its own history.
    """
    if positions is None:
        return table[:length]
    # Padding at a row's end is numbered on, beyond the longest history.
    return table[positions.clamp_max(len(table) - 1)]


def own_history(positions: Tensor) -> Tensor:
    """Return which positions each one of a packed row reads: bool [B, T, T].

    Args:
        positions: int64 [B, T], each item's number in its own history.
    """
    history = (positions == 0).cumsum(dim=1)
    same = history.unsqueeze(2) == history.unsqueeze(1)
    return same.tril()


def id_loss_settings(config: Config, scored_by: Similarity) -> LossSettings:
    """Return the loss of a model on item ids: a softmax over the catalogue or over drawn negatives.

    Negatives are drawn with `num_negatives` or `negatives: per_sequence`, as in HLLM; without either
    the softmax is full.

    Args:
        config: the configuration.
        scored_by: the similarity that `auto` stands for.
    """
    return LossSettings(
        loss="nce",
        negatives="sampled" if config.effective_negatives == "sampled" else "catalogue",
        nce_thres=config.nce_thres,
        budget_bytes=config.logits_budget_mb << 20,
        similarity=scored_by if config.similarity == "auto" else config.similarity,
        mean=config.loss_mean,
    )

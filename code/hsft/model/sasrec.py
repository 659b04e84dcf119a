"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) on item ids, on PyTorch's own transformer layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hsft.config import Config
from hsft.data.interactions import PAD
from hsft.model.item_table import ItemTable
from hsft.model.losses import split_chunks
from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder

_INITIAL_DEVIATION = 0.02


class IdTable(ItemTable):
    """Trainable vectors of item numbers, in place of cached embeddings.

    Args:
        num_items: I; row 0 is the padding item.
        dim: D.
    """

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__(torch.zeros(1, dim))
        self.weight = nn.Parameter(torch.randn(num_items + 1, dim) * _INITIAL_DEVIATION)

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return len(self.weight) - 1

    def forward(self, items: Tensor) -> Tensor:
        """Return the vectors of item numbers: int64 [...] -> float32 [..., D]."""
        return self.weight[items]

    def slice(self, start: int, end: int) -> Tensor:
        """Return the vectors of items start..end-1: float32 [end - start, D]."""
        return self.weight[start:end]

    @property
    def dim(self) -> int:
        """Embedding dimension D."""
        return self.weight.shape[1]

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        """Return one function per `size` items (without the padding item) that gives their vectors."""
        return split_chunks(self.weight[1:], size)


class SASRec(SequenceEncoder):
    """Causal self-attention over item and position embeddings.

    Args:
        num_items: I.
        max_length: longest history L.
        dim: width of item embeddings and layers.
        layers: self-attention layers.
        heads: attention heads; must divide `dim`.
        dropout: dropout probability.
    """

    def __init__(
        self, num_items: int, max_length: int, *, dim: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.items = IdTable(num_items, dim)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * _INITIAL_DEVIATION)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode every prefix of each history: int64 [B, T] -> [B, T, D]; rows are not packed."""
        assert positions is None
        length = history.shape[1]
        # Padding is on the right, where the causal mask hides it from every real position.
        states = self.items(history) * (history != PAD).unsqueeze(-1)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=history.device)
        states = self.dropout(states + self.positions[:length])
        return self.layers(states, mask=mask, is_causal=True)


def build_sasrec(config: Config, num_items: int) -> Recommender:
    """Make SASRec with a full softmax over dot products, its strongest published training."""
    shape = config.sasrec
    encoder = SASRec(
        num_items,
        config.MAX_ITEM_LIST_LENGTH,
        dim=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        dropout=shape.dropout,
    )
    settings = LossSettings(
        loss="nce",
        negatives="catalogue",
        nce_thres=config.nce_thres,
        budget_bytes=config.logits_budget_mb << 20,
        similarity="dot",
    )
    return Recommender(encoder, settings)

"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) on item ids, with PyTorch's or with LiGR's layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.config import Config
from hsft.data.interactions import PAD
from hsft.model.id_model import (
    INITIAL_DEVIATION,
    IdTable,
    id_loss_settings,
    own_history,
    position_vectors,
)
from hsft.model.recommender import Recommender, SequenceEncoder


class LigrLayer(nn.Module):
    """A layer whose residual branches are gated: LiGR's (arXiv 2502.03417), as eSASRec has it.

    x + sigmoid(G x) * attention(LN(x)), then x + sigmoid(H x) * SwiGLU(LN(x)) (arXiv 2508.06450).

    Args:
        dim, heads, dropout: shape; the hidden layer is 4 D wide.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm, self.hidden_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention_gate, self.hidden_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.read, self.write = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # SwiGLU: both of its factors in one product.
        self.widen, self.narrow = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float [B, T, D] -> [B, T, D]; position t reads positions 0..t.

        Args:
            states: float [B, T, D].
            mask: bool [B, T, T], True where position t reads position s; None: s <= t.
        """
        attended = self.dropout(self.write(self._attend(self.attention_norm(states), mask)))
        states = states + self.attention_gate(states).sigmoid() * attended
        factor, gate = self.widen(self.hidden_norm(states)).chunk(2, dim=-1)
        hidden = self.dropout(self.narrow(self.dropout(factor * F.silu(gate))))
        return states + self.hidden_gate(states).sigmoid() * hidden

    def _attend(self, states: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = states.shape
        parts = self.read(states).view(batch, length, 3, self.heads, dim // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind()
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if mask is None else mask.unsqueeze(1),
            dropout_p=rate,
            is_causal=mask is None,
        )
        return mixed.transpose(1, 2).reshape(batch, length, dim)


class SASRec(SequenceEncoder):
    """Causal self-attention over item and position embeddings.

    Args:
        num_items: I.
        max_length: longest history L.
        dim: width of item embeddings and layers.
        layers: self-attention layers.
        heads: attention heads; must divide `dim`.
        dropout: dropout probability.
        block: kind of layers, `transformer` (pre-norm, GELU) or `ligr`.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        block: str = "transformer",
    ) -> None:
        super().__init__()
        self.items = IdTable(num_items, dim)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * INITIAL_DEVIATION)
        self.dropout = nn.Dropout(dropout)
        self.heads = heads
        if block == "ligr":
            self.layers: nn.Module = nn.Sequential(
                *(LigrLayer(dim, heads, dropout) for _ in range(layers)), nn.LayerNorm(dim)
            )
            return
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def separates_sequences(self) -> bool:
        """Say whether the histories of one row do not see each other: they do not."""
        return True

    def forward(
        self, history: Tensor, positions: Tensor | None = None, cu_lengths: Tensor | None = None
    ) -> Tensor:
        """Encode every prefix of each history: int64 [B, T] -> [B, T, D].

        Args:
            history: item numbers, 0 where padded.
            positions: int64 [B, T] when rows are packed: each item's number in its own history.
            cu_lengths: not used; the rows of a kernel for sequences of any length.
        """
        length = history.shape[1]
        # Padding is on the right, where the causal mask hides it from every real position.
        states = self.items(history) * (history != PAD).unsqueeze(-1)
        states = self.dropout(states + position_vectors(self.positions, length, positions))
        mask = None if positions is None else own_history(positions)
        if isinstance(self.layers, nn.Sequential):
            *gated, norm = self.layers
            for layer in gated:
                states = layer(states, mask)
            normed: Tensor = norm(states)
            return normed
        if mask is None:
            hidden = nn.Transformer.generate_square_subsequent_mask(length, device=history.device)
        else:
            hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
            hidden = hidden.repeat_interleave(self.heads, dim=0)
        encoded: Tensor = self.layers(states, mask=hidden, is_causal=mask is None)
        return encoded


def build_sasrec(config: Config, num_items: int) -> Recommender:
    """Make SASRec with a softmax, which is full where no negatives are drawn: its strongest training.

    It is over dot products, or with `similarity: cosine` over cosines, as the UserLLM's is.
    """
    shape = config.sasrec
    encoder = SASRec(
        num_items,
        config.MAX_ITEM_LIST_LENGTH,
        dim=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        dropout=shape.dropout,
        block=shape.block,
    )
    return Recommender(
        encoder, id_loss_settings(config, "dot"), config.initial_logit_scale, config.fix_temp
    )

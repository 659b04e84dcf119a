"""HSTU, the hierarchical sequential transduction unit (Zhai et al. 2024, arXiv 2402.17152)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.config import Config
from hsft.model.id_model import (
    INITIAL_DEVIATION,
    IdTable,
    id_loss_settings,
    own_history,
    position_vectors,
)
from hsft.model.recommender import Recommender, SequenceEncoder

# Gaps of n seconds have the time bias of bucket floor(ln(max(n, 1)) / 0.301): those of 128 and above,
# longer than any history, share the last one.
LAST_TIME_BUCKET = 128
_BUCKET_WIDTH = 0.301
_EPSILON = 1e-6


class HstuLayer(nn.Module):
    """One HSTU layer: pointwise attention, whose output is gated, in place of softmax and MLP.

    With LN a layer norm without weights, U, V, Q, K = silu(LN(x) W) and n the longest history,

        a[t] = 1/n sum over s that t reads of silu(Q[t] K[s] + p[t - s] + r[bucket(t, s)]) V[s]
        y = x + W_o (U * LN(a)) + b_o

    (equations 1 to 3 of the paper). Q, K, V and U have D/heads dimensions a head; LN is over all D,
    and both biases are one for all heads. There is no softmax, so that how much of the history fits
    tells in the size of a; dividing by n keeps a in range where it is computed in few bits.

    Args:
        dim, heads: shape; `heads` divides `dim`.
        dropout: on U * LN(a).
        max_length: n.
        position_bias: with p, a trained number for each distance.
        time_bias: with r, a trained number for each bucket of a gap in time.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float,
        max_length: int,
        *,
        position_bias: bool,
        time_bias: bool,
    ) -> None:
        super().__init__()
        self.heads, self.max_length = heads, max_length
        self.read, self.write = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(dim, dim)
        nn.init.normal_(self.read.weight, std=INITIAL_DEVIATION)
        nn.init.xavier_uniform_(self.write.weight)
        nn.init.zeros_(self.write.bias)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = _biases(max_length) if position_bias else None
        self.time_bias = _biases(LAST_TIME_BUCKET + 1) if time_bias else None

    def forward(self, states: Tensor, reads: Tensor, buckets: Tensor | None = None) -> Tensor:
        """Float [B, T, D] -> [B, T, D].

        Args:
            states: float [B, T, D].
            reads: bool [B or 1, T, T], True where position t reads position s.
            buckets: int64 [B, T, T] of gaps in time, given if and only if there is a time bias.
        """
        batch, length, dim = states.shape
        parts = F.silu(self.read(F.layer_norm(states, (dim,), eps=_EPSILON))).chunk(4, dim=-1)
        gates, *rest = parts
        shape = (batch, length, self.heads, dim // self.heads)
        values, queries, keys = (part.view(shape).transpose(1, 2) for part in rest)
        scores = queries @ keys.transpose(2, 3)
        if self.position_bias is not None:
            steps = torch.arange(length, device=states.device)
            # Longer distances lie in other histories of the row, and negative ones in the future.
            distances = (steps.unsqueeze(1) - steps).clamp(0, self.max_length - 1)
            scores = scores + _look_up(self.position_bias, distances)
        if self.time_bias is not None and buckets is not None:
            scores = scores + _look_up(self.time_bias, buckets).unsqueeze(1)
        weights = F.silu(scores).masked_fill(~reads.unsqueeze(1), 0.0).to(values.dtype)
        attended = (weights @ values / self.max_length).transpose(1, 2).reshape(batch, length, dim)
        gated = gates * F.layer_norm(attended, (dim,), eps=_EPSILON)
        return states + self.write(self.dropout(gated))


def _biases(count: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count) * INITIAL_DEVIATION)


def _look_up(biases: Tensor, index: Tensor) -> Tensor:
    # The gradient of F.embedding adds up in a fixed order, that of plain indexing sorts more.
    return F.embedding(index, biases.unsqueeze(-1)).squeeze(-1)


class HSTU(SequenceEncoder):
    """HSTU layers over item vectors and position embeddings.

    Args:
        num_items: I.
        max_length: longest history L.
        dim: width D of the layers.
        layers: number of layers.
        heads: attention heads; must divide `dim`.
        dropout: dropout probability of each layer's gated output.
        input_dropout: dropout probability of what the first layer reads.
        item_width: dimensions of the trained item vectors, see `IdTable`; None: D.
        position_bias: with a trained bias for each distance, in each layer.
        time_bias: `own`: with a trained bias for the gap in time between the items of two positions;
            `next`: from the item read to the next one of the position, the item that is predicted
            there; None: without.
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
        input_dropout: float = 0.0,
        item_width: int | None = None,
        position_bias: bool = True,
        time_bias: str | None = None,
    ) -> None:
        super().__init__()
        self.items = IdTable(num_items, dim, item_width)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * INITIAL_DEVIATION)
        self.input_dropout = nn.Dropout(input_dropout)
        self.time_bias = time_bias
        self.layers = nn.ModuleList(
            HstuLayer(
                dim,
                heads,
                dropout,
                max_length,
                position_bias=position_bias,
                time_bias=time_bias is not None,
            )
            for _ in range(layers)
        )

    @property
    def reads_times(self) -> bool:  # type: ignore[override]
        """Whether `forward` takes the times of the items."""
        return self.time_bias is not None

    def separates_sequences(self) -> bool:
        """Say whether the histories of one row do not see each other: they do not."""
        return True

    def forward(
        self,
        history: Tensor,
        positions: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Encode every prefix of each history: int64 [B, T] -> [B, T, D].

        Args:
            history: item numbers, 0 where padded.
            positions: int64 [B, T] when rows are packed: each item's number in its own history.
            cu_lengths: not used; the rows of a kernel for sequences of any length.
            times: int64 [B, T, 1 or 2] as `ItemTimes` gives seconds, if and only if the model
                reads times.
        """
        if (times is None) != (self.time_bias is None):
            raise ValueError("times are given to a model that reads them, and to no other")
        length = history.shape[1]
        if positions is None:
            # Padding is on the right, where the causal mask hides it from every real position.
            reads = torch.ones(1, length, length, dtype=torch.bool, device=history.device).tril()
        else:
            reads = own_history(positions)
        embedded = position_vectors(self.positions, length, positions)
        # Mapped item vectors are float32 whatever the weights are, as scores need them.
        read = (self.items(history) + embedded).to(self.positions.dtype)
        states: Tensor = self.input_dropout(read)
        buckets = None if times is None else time_buckets(times[..., -1], times[..., 0])
        for layer in self.layers:
            states = layer(states, reads, buckets)
        return states


def time_buckets(query_times: Tensor, times: Tensor) -> Tensor:
    """Return the bucket of the gap between each two positions of a row: int64 [B, T, T].

    Args:
        query_times: int64 [B, T], seconds, of the positions that read.
        times: int64 [B, T], seconds, of the positions that are read.
    """
    gaps = (query_times.unsqueeze(2) - times.unsqueeze(1)).abs().clamp_min(1)
    return (gaps.float().log() / _BUCKET_WIDTH).long().clamp_max(LAST_TIME_BUCKET)


def build_hstu(config: Config, num_items: int) -> Recommender:
    """Make HSTU with HLLM's loss for it: a softmax over cosines, see `id_loss_settings`."""
    shape = config.hstu
    time_bias = None
    if config.use_timestamps:
        time_bias = "next" if config.predict_at == "target" else "own"
    encoder = HSTU(
        num_items,
        config.MAX_ITEM_LIST_LENGTH,
        dim=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        dropout=shape.dropout,
        input_dropout=shape.input_dropout,
        item_width=shape.item_width,
        position_bias=shape.position_bias,
        time_bias=time_bias,
    )
    return Recommender(
        encoder, id_loss_settings(config, "cosine"), config.initial_logit_scale, config.fix_temp
    )

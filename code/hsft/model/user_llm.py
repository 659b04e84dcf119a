"""The UserLLM: an LLM's decoder that reads item vectors instead of token embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.model.attention import VARLEN
from hsft.model.item_table import ItemTable
from hsft.model.recommender import SequenceEncoder
from hsft.model.residual import HistoryResidual
from hsft.model.time_embedding import TimeEmbedding


class UserLLM(SequenceEncoder):
    """HLLM's user side (arXiv 2409.12740, section 3.3).

    Histories are padded on the right and attention is causal, so real positions never see padding
    and no attention mask is needed, which keeps the fast kernels usable. Rotary embeddings are
    relative: positions counted from the left give the same result as HLLM's left padding.

    Rows of several histories are told to transformers by positions that start again: it then makes
    a block-diagonal causal mask (sdpa, eager) or calls the variable-length kernel
    (flash_attention_2, one row only). `varlen` attention is told where they start, in one row.

    Args:
        decoder: a transformers decoder (or a peft model around one) that takes `inputs_embeds`.
        items: the item table, D = the decoder's hidden size.
        max_length: most items of a history, for `varlen` attention.
        autocast: False runs the decoder outside of autocast: its weights are bfloat16 throughout.
        item_dropout: dropout probability of every number of the item vectors that are read, in
            training mode; the vectors that are scored are whole.
        times: embeds the times of items, which are added to their vectors; None: times are not read.
        residual: adds the last items' vectors to the output; None: the output stays as it is.
    """

    def __init__(
        self,
        decoder: nn.Module,
        items: ItemTable,
        *,
        max_length: int | None = None,
        autocast: bool = True,
        item_dropout: float = 0.0,
        times: TimeEmbedding | None = None,
        residual: HistoryResidual | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.items = items
        self.max_length = max_length
        self.autocast = autocast
        self.item_dropout = item_dropout
        self.times = times
        self.residual = residual

    @property
    def reads_times(self) -> bool:  # type: ignore[override]
        """Whether `forward` takes the times of the items."""
        return self.times is not None

    def forward(
        self,
        history: Tensor,
        positions: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        times: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """Encode every prefix of each history: int64 [B, T] -> [B, T, D].

        `times` is uint8 [B, T, F], given if and only if the model reads times.
        """
        if (times is None) != (self.times is None):
            raise ValueError("times are given to a model that reads them, and to no other")
        vectors = self.items(history) if vectors is None else vectors
        read = F.dropout(vectors, self.item_dropout, self.training)
        if self.times is not None:
            read = read + self.times(times)
        states = self._states(read.to(self._dtype), positions, cu_lengths)
        return states if self.residual is None else self.residual(states, vectors, positions)

    @property
    def varlen(self) -> bool:
        """Whether attention takes many histories in a single row."""
        config: Any = self.decoder.config
        return bool(config._attn_implementation == VARLEN)

    def separates_sequences(self) -> bool:
        """Say whether the histories of one row do not see each other, as `pack_sequences` needs.

        Some of transformers' models (OPT, BLOOM) attend over the whole row whatever the positions
        are. What is masked has a gradient of exactly zero, so one small pass tells.
        """
        if self.varlen:
            return True
        width = self.items.dim
        waves = torch.arange(4 * width, device=self.items.embeddings.device).sin().view(1, 4, width)
        vectors = waves.to(self._dtype, copy=True).requires_grad_()
        positions = torch.tensor([[0, 1, 0, 1]], device=vectors.device)
        modes = [(part, part.training) for part in self.decoder.modules()]
        self.decoder.eval()
        try:
            with torch.enable_grad():
                second = self._states(vectors, positions)[:, 2:].float()
                # Weighted, since the plain sum of what a LayerNorm gives does not change at all.
                (gradient,) = torch.autograd.grad((second * waves[:, :2]).sum(), vectors)
        except TypeError:  # the model takes no positions
            return False
        finally:
            for part, mode in modes:
                part.training = mode
        return bool((gradient[:, :2] == 0).all())

    @property
    def _dtype(self) -> torch.dtype:
        """Number type of what the decoder's layers read: that of the token embeddings."""
        embeddings: nn.Embedding = self.decoder.get_input_embeddings()  # type: ignore[operator]
        return embeddings.weight.dtype

    def _states(
        self, vectors: Tensor, positions: Tensor | None, cu_lengths: Tensor | None = None
    ) -> Tensor:
        given: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        if cu_lengths is not None:
            # The names under which transformers hands them to a flash kernel.
            given |= {
                "cu_seq_lens_q": cu_lengths,
                "cu_seq_lens_k": cu_lengths,
                "max_length_q": self.max_length,
                "max_length_k": self.max_length,
            }
        device_type = vectors.device.type
        off = nullcontext() if self.autocast else torch.autocast(device_type, enabled=False)
        with off:
            states: Tensor = self.decoder(
                inputs_embeds=vectors, use_cache=False, **given
            ).last_hidden_state
        return states

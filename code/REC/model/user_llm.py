"""The UserLLM: an LLM's decoder that reads item vectors in place of token embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from REC.model.item_table import ItemTable
from REC.model.recommender import SequenceEncoder


class UserLLM(SequenceEncoder):
    """HLLM's user side (arXiv 2409.12740, section 3.3).

    Histories are padded on the right and attention is causal, so real positions never see padding
    and no attention mask is needed, which keeps the fast kernels usable. Rotary embeddings are
    relative: positions counted from the left give the same result as HLLM's left padding.

    Rows of several histories are told to transformers by positions that start again: it then makes
    a block-diagonal causal mask (sdpa, eager) or calls the variable-length kernel
    (flash_attention_2, one row only).

    Args:
        decoder: a transformers decoder (or a peft model around one) that takes `inputs_embeds`.
        items: the item table, D = the decoder's hidden size.
    """

    def __init__(self, decoder: nn.Module, items: ItemTable) -> None:
        super().__init__()
        self.decoder = decoder
        self.items = items
        # Norm weights are never quantised: their number type is that of the residual stream. In a
        # list, since an attribute would register the parameter a second time.
        self._norm = [p for n, p in decoder.named_parameters() if n.endswith("norm.weight")][-1:]

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode every prefix of each history: int64 [B, T] -> [B, T, D]."""
        vectors = self.items(history).to(self._norm[0].dtype)
        where = {} if positions is None else {"position_ids": positions}
        return self.decoder(inputs_embeds=vectors, use_cache=False, **where).last_hidden_state

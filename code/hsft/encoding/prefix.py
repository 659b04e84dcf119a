"""What all item texts begin with, run through the ItemLLM once instead of once an item.

Every text starts with the prompt and the first key's name. Attention is causal, so the keys, values
and states at these positions do not depend on what follows; they are computed for one row, and the
rest of each text attends to them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

# Below this the saving is not worth the copies.
SHORTEST = 4


class _PrefixLayer(DynamicLayer):
    """A layer's keys and values of the prefix, [1, H, P, d], before those of any batch of rows.

    transformers' own layer would keep what it has seen of every batch, for tokens still to come.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.device, self.is_initialized = keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=2),
        )


class _PackedPrefixLayer(_PrefixLayer):
    """The same for texts one after the other in a single row, some of which begin with the prefix.

    Args:
        keys, values: [1, H, P, d].
        key_index: int64 [K], as in `PackedTexts`.
    """

    def __init__(self, keys: Tensor, values: Tensor, key_index: Tensor) -> None:
        super().__init__(keys, values)
        self._key_index = key_index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([self.keys, key_states], dim=2).index_select(2, self._key_index),
            torch.cat([self.values, value_states], dim=2).index_select(2, self._key_index),
        )


@dataclass(frozen=True)
class Prefix:
    """The first tokens of many texts, encoded.

    Attributes:
        tokens: int64 [P].
        argument: name of the decoder's argument for keys and values of earlier positions.
        layers: keys and values of the prefix, one a decoder layer.
        summed: float32 [1, D], the sum of the last hidden states at these positions.
    """

    tokens: np.ndarray
    argument: str
    layers: list[_PrefixLayer]
    summed: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def given(self) -> dict[str, Any]:
        """The decoder's arguments that put the prefix before any number of rows, padded texts."""
        return {"use_cache": True, self.argument: Cache(layers=list(self.layers))}

    def given_for_row(self, key_index: Tensor) -> dict[str, Any]:
        """Return the arguments that put the prefix before texts in a single row.

        Args:
            key_index: int64 [K], as in `PackedTexts`.
        """
        layers = [_PackedPrefixLayer(part.keys, part.values, key_index) for part in self.layers]
        return {"use_cache": True, self.argument: Cache(layers=layers)}


@torch.inference_mode()
def encode_prefix(model: PreTrainedModel, tokens: np.ndarray) -> Prefix | None:
    """Run a prefix through a decoder.

    Args:
        model: a decoder with its token embedding, in evaluation mode.
        tokens: int64 [P].

    Returns:
        The prefix; None where it is too short to pay, or where the model keeps something other
        than the keys and values of all positions (sliding windows, recurrent states).
    """
    if len(tokens) < SHORTEST:
        return None
    output = model(input_ids=torch.from_numpy(tokens)[None].to(model.device), use_cache=True)
    # transformers renamed `past_key_values`; models take and return one of the two.
    plain_model: Any = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(plain_model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    cache: Any = getattr(output, name, None)
    layers = getattr(cache, "layers", [])
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in layers)
    if not plain or len(layers) != model.config.num_hidden_layers:
        return None
    return Prefix(
        tokens=tokens,
        argument=name,
        layers=[_PrefixLayer(layer.keys, layer.values) for layer in layers],
        summed=output.last_hidden_state.float().sum(dim=1),
    )

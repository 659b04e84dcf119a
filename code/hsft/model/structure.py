"""What a decoder's configuration and class tell of it, as plain records without weights.

Transformers makes them (`backbone.model_kind`, `meta.read_structure`), and seconds go by until it is
imported; the checks and estimates that read them need neither transformers nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

QuantType = Literal["nf4", "fp4", "int8", "none"]


@dataclass(frozen=True)
class DecoderSource:
    """Where a decoder's configuration comes from, and how it is cut.

    Attributes:
        folder: a transformers model folder.
        layers: the first N decoder layers are kept; None: all.
        keep_token_embedding: else the vocabulary is cut to one token.
        trust_remote_code: let transformers run code from the folder.
        llama: arguments of transformers' LlamaConfig, in place of the folder's config.json.
    """

    folder: Path
    layers: int | None = None
    keep_token_embedding: bool = False
    trust_remote_code: bool = False
    llama: Mapping[str, int] | None = None


@dataclass(frozen=True)
class ModelKind:
    """What `config.json` and the class that transformers builds for it tell.

    Attributes:
        model_type: transformers' name of the kind of model.
        hidden_size, num_hidden_layers: None where the configuration has no such whole number from 1.
        quantization: `quant_method` and `load_in_8bit` of weights that were saved quantised; None:
            they were not.
        looks_ahead: positions see later ones, as in an encoder.
        takes_vectors: the class reads `inputs_embeds`; True where transformers knows no class.
        lacking_kernels: of `sdpa`, `flash_attention_2` and `varlen`, those that the class cannot use.
        varlen_obstacle: what keeps its attention from torch's variable-length kernel, in words that
            follow "needs"; None: nothing.
    """

    model_type: str
    hidden_size: int | None
    num_hidden_layers: int | None
    quantization: Mapping[str, Any] | None
    looks_ahead: bool
    takes_vectors: bool
    lacking_kernels: tuple[str, ...]
    varlen_obstacle: str | None


@dataclass(frozen=True)
class DecoderStructure:
    """A decoder's sizes, as built without numbers.

    Attributes:
        hidden_size: D.
        layers: decoder layers.
        embedding_width: dimensions of the vectors that it reads.
        learned_positions: rows of its table of learned positions; None: it has none.
        linear: name of a linear layer -> (numbers that it reads, numbers that it gives).
        other_sizes: number of weights of every tensor that is not a linear layer's matrix.
        source: what it was built from.
    """

    hidden_size: int
    layers: int
    embedding_width: int
    learned_positions: int | None
    linear: Mapping[str, tuple[int, int]]
    other_sizes: tuple[int, ...]
    source: DecoderSource = field(compare=False)

    @property
    def sizes(self) -> list[int]:
        """Number of weights of every tensor."""
        return [*(math.prod(widths) for widths in self.linear.values()), *self.other_sizes]


@dataclass(frozen=True)
class DecoderTraining:
    """How a decoder is trained, as far as what autograd saves depends on it.

    Attributes:
        quant_type: of the frozen weights; `none` is plain LoRA.
        lora_rank: None trains all weights.
        lora_targets: module names, or `[all-linear]`.
        dtype: name of the number type of products.
        residual_dtype: name of that of norms and residual stream.
        autocast: whether it runs under autocast.
        attention: `sdpa` or `eager`.
        row_length: positions of a row.
        masked: whether its attention takes a mask.
    """

    quant_type: QuantType
    lora_rank: int | None
    lora_targets: tuple[str, ...]
    dtype: str
    residual_dtype: str
    autocast: bool
    attention: Literal["sdpa", "eager"]
    row_length: int
    masked: bool

    @property
    def quantised(self) -> bool:
        """Whether the decoder's linear layers are quantised."""
        return self.lora_rank is not None and self.quant_type != "none"

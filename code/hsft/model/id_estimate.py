"""What the estimates need of SASRec and HSTU: the sizes of their weights, and what autograd saves.

The models are built on torch's meta device and run in its FakeTensorMode, which has shapes and no
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hsft.config import Config
from hsft.model.fake_tensors import SavedBytes, give_fake_storage
from hsft.model.hstu import build_hstu
from hsft.model.recommender import Recommender, SequenceEncoder
from hsft.model.sasrec import LigrLayer, build_sasrec
from hsft.model.structure import DecoderSource, DecoderStructure

# Rows of the fake batch: enough that what is saved once a layer hardly counts.
_ROWS = 64


@dataclass(frozen=True)
class IdModel:
    """A model on item ids, as the estimates see it.

    Attributes:
        kind: `sasrec`, `ligr` or `hstu`: the kind of its layers.
        structure: its sizes without the item table.
        item_width: dimensions of the trained item vectors.
        heads: attention heads.
    """

    kind: str
    structure: DecoderStructure
    item_width: int
    heads: int


def read_id_model(config: Config) -> IdModel:
    """Read the sizes of `model: sasrec` or `hstu`, whose layers are counted without numbers."""
    shape = config.hstu if config.model == "hstu" else config.sasrec
    kind = "hstu"
    width = config.hstu.item_width
    if config.model == "sasrec":
        kind = "ligr" if config.sasrec.block == "ligr" else "sasrec"
        width = None
    encoder = _build(config, shape.layers)
    linear, others = {}, []
    for name, weight in encoder.named_parameters():
        if name.startswith("items."):
            continue
        if weight.ndim == 2 and name != "positions":
            linear[name] = (weight.shape[1], weight.shape[0])
        else:
            others.append(weight.numel())
    structure = DecoderStructure(
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        embedding_width=shape.hidden_size,
        learned_positions=config.MAX_ITEM_LIST_LENGTH,
        linear=linear,
        other_sizes=tuple(others),
        source=DecoderSource(Path(config.model)),
    )
    return IdModel(kind, structure, width or shape.hidden_size, shape.heads)


def count_saved_bytes(
    config: Config, row_length: int, *, packed: bool, dtype: torch.dtype, autocast: bool
) -> tuple[float, float]:
    """Count what autograd saves on a GPU for `model: sasrec` or `hstu`.

    Dropout keeps a byte for each number, and softmax attention queries, keys, values, mask, output and a
    float32 for each row, as the kernels of a GPU do.

    Args:
        config: the configuration.
        row_length: positions of a row.
        packed: whether rows hold several histories, for which a mask is made.
        dtype: of the weights.
        autocast: whether the forward pass runs under autocast.

    Returns:
        (bytes per position and layer, bytes per position outside the layers).
    """
    one, two = (
        _saved(config, layers, row_length, packed, dtype, autocast=autocast) for layers in (1, 2)
    )
    positions = _ROWS * row_length
    return (two - one) / positions, (2 * one - two) / positions


def _build(config: Config, layers: int) -> SequenceEncoder:
    build: Callable[[Config, int], Recommender] = build_sasrec
    key = "sasrec"
    if config.model == "hstu":
        build, key = build_hstu, "hstu"
    shape = getattr(config, key).model_copy(update={"layers": layers})
    with torch.device("meta"):
        return build(config.model_copy(update={key: shape}), 1).encoder


def _saved(
    config: Config,
    layers: int,
    row_length: int,
    packed: bool,
    dtype: torch.dtype,
    *,
    autocast: bool,
) -> int:
    encoder = _build(config, layers)
    with FakeTensorMode():
        give_fake_storage(encoder, dtype)
        _save_as_on_gpu(encoder)
        saved = SavedBytes(encoder.train())
        history = torch.ones(_ROWS, row_length, dtype=torch.int64)
        given: dict[str, Tensor] = {}
        if packed:
            given["positions"] = torch.zeros(_ROWS, row_length, dtype=torch.int64)
        if encoder.reads_times:
            given["times"] = torch.zeros(_ROWS, row_length, 1, dtype=torch.int64)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with saved.hooks(), mixed:
            encoder(history, **given)
    return saved.total


class _Dropout(nn.Dropout):
    """Saves what dropout saves on a GPU: a byte for each number."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.p else input


def _save_as_on_gpu(encoder: SequenceEncoder) -> None:
    """Have dropout save what it saves on a GPU; attention's own, which saves a seed, is left out."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = _Dropout
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, LigrLayer):
            module.rate = 0.0

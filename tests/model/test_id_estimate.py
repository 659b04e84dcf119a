"""What the estimates read of SASRec and HSTU, against the models themselves and what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hsft.config import Config
from hsft.config.loader import load_config
from hsft.model.hstu import build_hstu
from hsft.model.id_estimate import count_saved_bytes, read_id_model
from hsft.model.recommender import Recommender
from hsft.model.sasrec import build_sasrec
from hsft.run.setup import packed_row_length

LENGTH, ITEMS, LAYERS = 10, 30, 3
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"model": "sasrec"},
    "ligr": {"model": "sasrec", "sasrec": {"block": "ligr"}},
    "hstu": {"model": "hstu"},
    "hstu with times": {"model": "hstu", "use_timestamps": True},
    "hstu with a projection": {"model": "hstu", "hstu": {"item_width": 8}},
}


def settings(name: str, dropout: float = 0.0) -> Config:
    more = MODELS[name]
    section = "hstu" if more["model"] == "hstu" else "sasrec"
    shape = {"hidden_size": 32, "layers": LAYERS, "heads": 2, "dropout": dropout}
    given = {**more, section: {**shape, **more.get(section, {})}, "dataset": None}
    given |= {"MAX_ITEM_LIST_LENGTH": LENGTH, "loss": "nce"}
    return load_config(["overall/LLM_ddp.yaml"], given)[0]


def built(config: Config) -> Recommender:
    return (build_hstu if config.model == "hstu" else build_sasrec)(config, ITEMS)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_model(name: str) -> None:
    config = settings(name)
    encoder = built(config).encoder
    known = read_id_model(config)
    assert sum(known.structure.sizes) == sum(
        weight.numel()
        for name, weight in encoder.named_parameters()
        if not name.startswith("items.")
    )
    assert known.structure.layers == LAYERS
    assert known.item_width == next(encoder.items.parameters()).shape[1]


def saved_by_autograd(encoder: torch.nn.Module, rows: int, packed: bool) -> int:
    """Add up what autograd saves over rows of full histories, two in each if packed."""
    length = 2 * LENGTH if packed else LENGTH
    history = torch.randint(1, ITEMS + 1, (rows, length))
    given: dict[str, Tensor] = {}
    if packed:
        given["positions"] = torch.arange(LENGTH).repeat(rows, 2)
    if encoder.reads_times:
        given["times"] = torch.arange(length).expand(rows, length)[..., None] * 1000
    stored = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in stored:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder(history, **given)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_within_5_percent_of_what_autograd_saves(name: str, packed: bool) -> None:
    config = settings(name)
    rows, length = 32, 2 * LENGTH if packed else LENGTH
    real = saved_by_autograd(built(config).encoder.train(), rows, packed)
    layer, rest = count_saved_bytes(
        config, length, packed=packed, dtype=torch.float32, autocast=False
    )
    assert rows * length * (LAYERS * layer + rest) == pytest.approx(real, rel=0.05)


def test_dropout_keeps_a_byte_for_each_number() -> None:
    def layer(dropout: float, name: str) -> float:
        config = settings(name, dropout)
        counted = count_saved_bytes(
            config, LENGTH, packed=False, dtype=torch.float32, autocast=False
        )
        return counted[0]

    # Of HSTU on the gated output of 32 numbers; of the transformer on two outputs and a hidden layer of 128.
    assert layer(0.5, "hstu") - layer(0.0, "hstu") == 32
    assert layer(0.5, "sasrec") - layer(0.0, "sasrec") == 2 * 32 + 128


def test_rows_of_long_histories_are_short() -> None:
    def row_length(longest: int, name: str = "hstu") -> int | None:
        longer = {"MAX_ITEM_LIST_LENGTH": longest}
        return packed_row_length(settings(name).model_copy(update=longer), "sdpa")

    assert [row_length(longest) for longest in (10, 50, 64, 100, 200, 500)] == [
        *(40, 200, 256, 256, 256, 500)
    ]
    assert row_length(200, "sasrec") == 256
    assert packed_row_length(Config(MAX_ITEM_LIST_LENGTH=200), "sdpa") == 800

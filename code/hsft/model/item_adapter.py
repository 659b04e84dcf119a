"""A trained item adapter that lies beside a model, in its `hllm_extra.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hsft.config import Config
from hsft.model.folder import EXTRA_FILE
from hsft.model.item_table import ItemTable
from hsft.utils.errors import InputError

PREFIX = "item_adapter."
_LINEAR, _LOW_RANK = {"weight"}, {"0.weight", "1.weight"}


def adapter_shape(
    config: Config, extra: Mapping[str, Tensor], folder: str | Path, *, train: bool
) -> tuple[str, int]:
    """Say which adapter a model has: the configuration's when it is trained, else the stored one.

    Args:
        config: the configuration.
        extra: as `read_extra` returns.
        folder: the model folder it is from.
        train: whether the configuration's trainable parts are built.

    Returns:
        `item_adapter` and `item_adapter_rank` for an `ItemTable`.

    Raises:
        InputError: the stored adapter is none of this program's, or is not of the kind that is to
            be trained.
    """
    asked = config.item_adapter if train else "none"
    stored = _stored(extra)
    if not stored:
        return asked, config.item_adapter_rank
    kind, rank = _kind(stored, Path(folder) / EXTRA_FILE)
    if asked != "none" and (asked, config.item_adapter_rank if asked == "lowrank" else rank) != (
        kind,
        rank,
    ):
        like = kind if kind == "linear" else f"{kind} with item_adapter_rank {rank}"
        raise InputError(
            f"the model in {folder} comes with a trained item adapter ({like}), which item_adapter "
            f"{asked} cannot go on from; set --item_adapter {kind}"
            f"{f' --item_adapter_rank {rank}' if kind == 'lowrank' else ''}, or none to keep it as "
            f"it is."
        )
    return kind, rank


def load_adapter(table: ItemTable, extra: Mapping[str, Tensor], *, trained: bool) -> None:
    """Put a stored adapter into a table that was made for it; without one, do nothing.

    Args:
        table: made with `adapter_shape`.
        extra: as `read_extra` returns.
        trained: whether training goes on from it; else it is frozen.

    Raises:
        InputError: it is of other dimensions than the item embeddings.
    """
    stored = _stored(extra)
    if not stored:
        return
    assert table.adapter is not None
    own = table.adapter.state_dict()
    for name, value in stored.items():
        if own[name].shape != value.shape:
            raise InputError(
                f"{EXTRA_FILE} beside the UserLLM: {PREFIX}{name} has shape {tuple(value.shape)}, "
                f"the item embeddings need {tuple(own[name].shape)}; export the run again."
            )
    table.adapter.load_state_dict({name: value.to(torch.float32) for name, value in stored.items()})
    table.adapter.requires_grad_(trained)


def adapter_tensors(table: ItemTable) -> dict[str, Tensor]:
    """Return a table's adapter as `hllm_extra.safetensors` stores it: float32, empty without one."""
    if table.adapter is None:
        return {}
    return {
        f"{PREFIX}{name}": value.detach().float().cpu().contiguous()
        for name, value in table.adapter.state_dict().items()
    }


def _stored(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)
    }


def _kind(stored: Mapping[str, Tensor], path: Path) -> tuple[str, int]:
    if all(value.ndim == 2 for value in stored.values()):
        if stored.keys() == _LINEAR:
            return "linear", 1
        if stored.keys() == _LOW_RANK:
            return "lowrank", len(stored["0.weight"])
    raise InputError(f"{path} holds an item adapter of an unknown kind; export the run again.")

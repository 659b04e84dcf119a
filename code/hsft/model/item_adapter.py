"""A trained item adapter that lies beside a model, in its `hllm_extra.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hsft.config import Config
from hsft.model.backbone import read_extra
from hsft.model.folder import EXTRA_FILE
from hsft.model.item_table import ItemTable
from hsft.utils.errors import InputError

PREFIX = "item_adapter."
_LINEAR, _LOW_RANK = {"weight"}, {"0.weight", "1.weight"}
_MLP = {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}
# The matrix of each kind that reads the embeddings: its second dimension is their width.
_FIRST = ("weight", "0.weight", "hidden.weight")


def adapter_shape(
    config: Config,
    extra: Mapping[str, Tensor],
    folder: str | Path,
    *,
    train: bool,
    rectangular: bool,
) -> tuple[str, int]:
    """Say which adapter a model has: the configuration's when it is trained, else the stored one.

    Args:
        config: the configuration.
        extra: as `read_extra` returns.
        folder: the model folder it is from.
        train: whether the configuration's trainable parts are built.
        rectangular: whether the item embeddings are of another width than the UserLLM; they then
            pass through the configuration's adapter, as it starts, before training too.

    Returns:
        `item_adapter` and `item_adapter_rank` for an `ItemTable`.

    Raises:
        InputError: the stored adapter is none of this program's, or is not of the kind that is to
            be trained.
    """
    asked = config.item_adapter if train else "none"
    stored = _stored(extra)
    if not stored:
        return config.item_adapter if rectangular else asked, config.item_adapter_rank
    kind, rank = _kind(stored, Path(folder) / EXTRA_FILE)
    if asked != "none" and (asked, config.item_adapter_rank if asked == "lowrank" else rank) != (
        kind,
        rank,
    ):
        like = f"{kind} with item_adapter_rank {rank}" if kind == "lowrank" else kind
        raise InputError(
            f"the model in {folder} comes with a trained item adapter ({like}), which item_adapter "
            f"{asked} cannot go on from; set --item_adapter {kind}"
            f"{f' --item_adapter_rank {rank}' if kind == 'lowrank' else ''}, or none to keep it as "
            f"it is."
        )
    return kind, rank


def user_extra(config: Config) -> dict[str, Tensor]:
    """Return what lies beside the weights of the UserLLM that a run begins with, as `read_extra`.

    Raises:
        InputError: the file is damaged.
    """
    return read_extra(config.user_pretrain_dir or "") if config.loads_user_llm else {}


def check_width(
    config: Config,
    extra: Mapping[str, Tensor],
    cache: str | Path,
    width: int,
    hidden_size: int,
) -> None:
    """Refuse item embeddings that neither the UserLLM nor an adapter before it reads.

    Args:
        config: the configuration.
        extra: as `read_extra` returns for the UserLLM's folder.
        cache: the item cache's name.
        width: dimensions of its embeddings.
        hidden_size: of the UserLLM.

    Raises:
        InputError: the widths differ and no adapter maps one to the other, or the adapter that
            comes with the UserLLM is for embeddings of another width.
    """
    reads = adapter_width(_stored(extra))
    if reads is not None and reads != width:
        raise InputError(
            f"item cache {cache} has {width} dimensions, but the item adapter that comes with the "
            f"UserLLM in {config.user_pretrain_dir} reads {reads}; name the cache that it was "
            f"trained with, or change --user_pretrain_dir."
        )
    if reads is None and width != hidden_size and config.item_adapter == "none":
        raise InputError(
            f"item cache {cache} has {width} dimensions, but the UserLLM in "
            f"{config.user_pretrain_dir} has hidden size {hidden_size}; set --item_adapter linear "
            f"(or mlp, lowrank) to train a projection, or make the cache with the ItemLLM that "
            f"belongs to this UserLLM."
        )


def adapter_width(adapter: Mapping[str, Tensor]) -> int | None:
    """Return the width of the embeddings that an adapter's tensors read, None for no adapter."""
    widths = (adapter[name].shape[-1] for name in _FIRST if name in adapter and adapter[name].ndim)
    return next(widths, None)


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
    expected = table.adapter.state_dict()
    if expected.keys() != stored.keys():
        odd = min(expected.keys() ^ stored.keys())
        raise InputError(
            f"{EXTRA_FILE} beside the UserLLM: its item adapter is for other embeddings than the "
            f"item cache's ({PREFIX}{odd}); name the cache that it was trained with."
        )
    for name, value in stored.items():
        if expected[name].shape != value.shape:
            raise InputError(
                f"{EXTRA_FILE} beside the UserLLM: {PREFIX}{name} has shape {tuple(value.shape)}, "
                f"the item embeddings need {tuple(expected[name].shape)}; export the run again."
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
    matrices = [value.ndim == (1 if name.endswith("bias") else 2) for name, value in stored.items()]
    names = set(stored)
    if all(matrices):
        if names == _LINEAR:
            return "linear", 1
        if names == _LOW_RANK:
            return "lowrank", len(stored["0.weight"])
        if names in (_MLP, _MLP | {"skip.weight"}):
            return "mlp", 1
    raise InputError(f"{path} holds an item adapter of an unknown kind; export the run again.")

"""Write one side of a checkpoint as sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hsft.hub.layout import EMB_TOKEN, EXTRAS, Layout, check_tensors, open_side
from hsft.model.folder import EXTRA_FILE
from hsft.utils.errors import InputError, brief
from hsft.utils.progress import Meter

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"


def write_weights(
    folder: Path, checkpoint: Path, layout: Layout, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Check a checkpoint as a whole, then write one side's weights and the two extras.

    Args:
        folder: where to; `model*.safetensors`, an index when there are several, and
            `hllm_extra.safetensors` (float32 `logit_scale` [] and, where the checkpoint has it,
            `item_emb_tokens` [1, 1, D]).
        checkpoint: an HLLM checkpoint.
        layout: what it must hold.
        dtype: number type of the weights written.
        shard_bytes: largest weights file; a larger tensor is a file of its own.

    Raises:
        InputError: the checkpoint does not fit, holds NaN or infinity, or the disk is full.
    """
    stored = open_side(checkpoint, layout.side)
    check_tensors(stored, layout, checkpoint)
    if layout.side == "item" and EMB_TOKEN not in stored:
        log.warning(
            "%s has no %s, as an HLLM trained with mean pooling (item_emb_token_n: 0): its items "
            "will be mean-pooled.",
            checkpoint,
            EMB_TOKEN,
        )
    shapes = layout.stored_shapes
    extras = {
        name: _cast(stored[name], torch.float32, f"{checkpoint}: '{name}'").reshape(shapes[name])
        for name in EXTRAS
        if name in stored
    }
    del stored
    _save(extras, folder / EXTRA_FILE)
    plan = split_torch_state_dict_into_shards(
        {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape in layout.shapes.items()
        },
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with Meter("converting", len(layout.shapes), "tensors") as shown:
        for file, names in plan.filename_to_tensors.items():
            _write_shard(folder / file, names, checkpoint, layout, dtype, shown)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    target: Path,
    names: Sequence[str],
    checkpoint: Path,
    layout: Layout,
    dtype: torch.dtype,
    shown: Meter,
) -> None:
    # Mapped again for each shard: pages already read count as this process's memory until the
    # mapping is closed, and would add up to the whole side.
    stored = open_side(checkpoint, layout.side)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name in stored:
            where = f"{checkpoint}: '{layout.key(name)}'"
            tensors[name] = _cast(stored.pop(name), dtype, where)
        else:
            tensors[name] = torch.zeros(layout.shapes[name], dtype=dtype)
        shown.advance()
    _save(tensors, target)


def _cast(value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Copy a tensor to a number type.

    Raises:
        InputError: it holds NaN or infinity, before or after.
    """
    # Copied even when the type stays, so that what is written does not depend on the mapped file.
    result = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _is_finite(result):
        return result
    if _is_finite(value):
        raise InputError(f"{where} has values too large for --dtype float16; use bfloat16.")
    raise InputError(f"{where} holds NaN or infinity; the checkpoint is damaged, fetch it again.")


def _is_finite(value: Tensor) -> bool:
    # aminmax passes NaN on and, unlike isfinite, needs no memory of the tensor's size.
    low, high = torch.aminmax(value)
    return bool(low.isfinite() and high.isfinite())


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(
            f"cannot write {target.name}: {brief(error)}; free some space or give another --out."
        ) from error

"""Trained id vectors of items that lie beside a model, by item id, in the format of an item cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hsft.data.cache import ItemCache, open_cache, save_cache
from hsft.model.folder import ID_FILE
from hsft.model.item_table import ItemTable
from hsft.utils.errors import InputError
from hsft.utils.files import is_file


def read_id_vectors(folder: str | Path, hidden_size: int) -> ItemCache | None:
    """Read the id vectors beside a model: float32 [n, D], None where there are none.

    Raises:
        InputError: the file is damaged, or the vectors are not as wide as the model.
    """
    path = Path(folder) / ID_FILE
    if not is_file(path):
        return None
    stored = open_cache(path)
    if stored.dim != hidden_size:
        raise InputError(
            f"{path} has {stored.dim} dimensions, but the UserLLM beside it has hidden size "
            f"{hidden_size}; export the run again."
        )
    return stored


def load_id_vectors(
    table: ItemTable, stored: ItemCache, item_ids: np.ndarray, *, trained: bool
) -> None:
    """Give a table the stored id vectors of its items; items that have none stay at zero.

    Args:
        table: made with `id_items`.
        stored: as `read_id_vectors` returns.
        item_ids: str [I + 1], entry 0 the padding item.
        trained: whether training goes on from them; else they are frozen.
    """
    assert table.id_vectors is not None
    rows = torch.from_numpy(stored.rows_of(item_ids[1 : len(table.id_vectors)]))
    with torch.no_grad():
        table.id_vectors[1:][rows >= 0] = stored.embeddings[rows[rows >= 0]].float()
    table.id_vectors.requires_grad_(trained)


def save_id_vectors(table: ItemTable, item_ids: np.ndarray, folder: Path) -> None:
    """Write a table's id vectors into a model folder, in float32.

    Args:
        table: made with `id_items`.
        item_ids: str [I + 1], entry 0 the padding item, of as many items as have id vectors.
        folder: the model folder.
    """
    assert table.id_vectors is not None
    vectors = table.id_vectors.detach()[1:].float().cpu().contiguous()
    save_cache(folder / ID_FILE, [str(item) for item in item_ids[1:]], vectors, {})

"""The catalogue's embeddings on the device, gathered by item number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.data.cache import ItemCache
from hsft.data.interactions import PAD
from hsft.utils.errors import InputError


class ItemTable(nn.Module):
    """Frozen item embeddings, with an optional trainable map after them.

    Args:
        embeddings: [I + 1, D]; row 0 is the padding item.
        adapter: `none`; `linear`, x + Wx with W [D, D] starting at 0; or `lowrank`,
            x + B(A x) with A [rank, D] random and B [D, rank] starting at 0. Both start as the
            identity, so an untrained table scores as without one.
        rank: rank of `lowrank`.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor, adapter: str = "none", rank: int = 64) -> None:
        super().__init__()
        # Not persistent: the cache is on disk already and must not be copied into checkpoints.
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.adapter: nn.Module | None = None
        dim = embeddings.shape[1]
        if adapter == "linear":
            self.adapter = nn.Linear(dim, dim, bias=False)
            nn.init.zeros_(self.adapter.weight)
        elif adapter == "lowrank":
            down, up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
            nn.init.zeros_(up.weight)
            self.adapter = nn.Sequential(down, up)

    @property
    def dim(self) -> int:
        """Embedding dimension D."""
        return self.embeddings.shape[1]

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return self.embeddings.shape[0] - 1

    def forward(self, items: Tensor) -> Tensor:
        """Return the vectors of item numbers: int64 [...] -> float32 [..., D]."""
        return self._adapt(self.embeddings[items])

    def slice(self, start: int, end: int) -> Tensor:
        """Return the vectors of items start..end-1, without a gather: float32 [end - start, D]."""
        return self._adapt(self.embeddings[start:end])

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        """Return one function per `size` items (without the padding item) that gives their vectors.

        Nothing is converted or adapted before a function is called, so that a caller who drops the
        vectors again never holds more than [size, D] of them in float32.
        """
        stop = self.num_items + 1
        return [
            partial(self.slice, start, min(start + size, stop)) for start in range(1, stop, size)
        ]

    def _adapt(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        if self.adapter is None:
            return vectors
        # The adapter's weights are 16-bit under bf16-true and DeepSpeed.
        return vectors + self.adapter(vectors.to(self._adapter_dtype)).float()

    @property
    def _adapter_dtype(self) -> torch.dtype:
        assert self.adapter is not None
        return next(self.adapter.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> ItemTable:
        # `module.bfloat16()`, as DeepSpeed and bf16-true call it, would round the cache.
        kept = self.embeddings
        super()._apply(fn, recurse)
        if self.embeddings.dtype != kept.dtype:
            self.embeddings = kept.to(self.embeddings.device)
        return self


def table_from_cache(
    cache: ItemCache, item_ids: np.ndarray, transform: str = "none", own_items: int | None = None
) -> Tensor:
    """Gather the catalogue's rows of a cache into one matrix.

    Args:
        cache: the item cache.
        item_ids: str [I + 1], entry 0 the padding item; every other id is in the cache.
        transform: `none`, `standardize` or `whiten`.
        own_items: the transform is fitted on the first n items and applied to all; None fits it on
            all of them.

    Returns:
        [I + 1, D], row 0 zeros; the cache's dtype, or float32 after a transform.
    """
    rows = cache.rows_of(item_ids[1:])
    table = torch.zeros((len(item_ids), cache.dim), dtype=cache.embeddings.dtype)
    torch.index_select(cache.embeddings, 0, torch.from_numpy(rows), out=table[1:])
    if transform == "none":
        return table
    table = table.float()
    fit = fit_standardize if transform == "standardize" else fit_whiten
    end = len(table) if own_items is None else own_items + 1
    table[1:] = fit(table[1:end])(table[1:])
    table[PAD] = 0.0
    return table


def sample_cosines(
    cache: ItemCache, item_ids: np.ndarray, transform: str = "none", items: int = 2048
) -> np.ndarray:
    """Return cosines between different items, as they are after the transform.

    Args:
        cache: the item cache.
        item_ids: str [I + 1], entry 0 the padding item; every other id is in the cache.
        transform: as for `table_from_cache`, fitted on the sample.
        items: evenly spaced items that are compared, at most; whitening, which needs several times
            more vectors than dimensions, takes all items when there are fewer.

    Returns:
        float32 [pairs]: of every two of at most 64 items, else of each item with 16 others.
    """
    count = len(item_ids) - 1
    if transform == "whiten":
        items = max(items, 4 * cache.dim)
    numbers = np.unique(np.linspace(1, count, min(count, items)).astype(np.int64))
    sample = np.concatenate([item_ids[:1], item_ids[numbers]])
    vectors = F.normalize(table_from_cache(cache, sample, transform)[1:].float(), dim=-1)
    n = len(vectors)
    if n <= 64:
        rows, columns = np.triu_indices(n, 1)
    else:
        steps = np.unique(np.geomspace(1, n // 2, 16).astype(np.int64))
        rows = np.repeat(np.arange(n), len(steps))
        columns = (rows + np.tile(steps, n)) % n
    cosines = torch.cat(
        [(vectors[rows[at]] * vectors[columns[at]]).sum(dim=-1) for at in _blocks(len(rows))]
    )
    return cosines.numpy()


def _blocks(count: int, size: int = 4096) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


# A fixed map of vectors: float32 [n, D] -> float32 [n, D].
Transform = Callable[[Tensor], Tensor]


def fit_standardize(rows: Tensor) -> Transform:
    """Fit the map that gives every dimension mean 0 and variance 1 over `rows`, float32 [n, D].

    Dimensions that are constant over the rows become 0, whatever else is mapped.
    """
    mean = rows.mean(dim=0)
    deviation = (rows - mean).pow(2).mean(dim=0).sqrt()

    def apply(vectors: Tensor) -> Tensor:
        centred = vectors - mean
        return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0)

    return apply


def fit_whiten(rows: Tensor, floor: float = 1e-3) -> Transform:
    """Fit the PCA map that gives `rows`, float32 [n, D], a covariance near the identity.

    Directions with less than `floor` of the mean variance are damped rather than blown up.
    """
    mean = rows.mean(dim=0)
    centred = (rows - mean).double()
    covariance = centred.T @ centred / len(centred)
    values, directions = torch.linalg.eigh(covariance)
    scale = (values.clamp_min(0) + floor * values.mean()).rsqrt()

    def apply(vectors: Tensor) -> Tensor:
        return (((vectors - mean).double() @ directions) * scale).float()

    return apply


def check_dim(cache: ItemCache, hidden_size: int, user_dir: str) -> None:
    """Refuse a cache that the UserLLM cannot read.

    Raises:
        InputError: the cache's dimension differs from the UserLLM's hidden size.
    """
    refuse_other_dim(cache.path or "made now", cache.dim, hidden_size, user_dir)


def refuse_other_dim(cache: str | Path, dim: int, hidden_size: int, user_dir: str) -> None:
    """Refuse a cache of `dim` dimensions for a UserLLM of another hidden size.

    Raises:
        InputError: they differ.
    """
    if dim != hidden_size:
        raise InputError(
            f"item cache {cache} has {dim} dimensions, but the UserLLM in {user_dir} has hidden "
            f"size {hidden_size}; make the cache with the ItemLLM that belongs to this UserLLM, or "
            f"change --user_pretrain_dir."
        )

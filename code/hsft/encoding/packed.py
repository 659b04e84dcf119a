"""Texts one after the other in a single row, for variable-length attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTexts:
    """B texts in one row of N positions, without the prefix where they begin with it.

    Attributes:
        ids: int64 [1, N], token ids; 0 where the emb token stands.
        positions: int64 [1, N], each token's number in its own text, the prefix counted.
        is_emb_token: bool [1, N].
        cu_lengths: int32 [S + 1], where each text starts in the row, and N.
        cu_keys: int32 [S + 1], where each text's keys start, and K.
        key_index: int64 [K], the keys that each text sees, text after text, as numbers in the P keys
            of the prefix followed by the N of the row.
        pooled: int64 [B, W], positions in the row whose states are averaged into each embedding.
        counts: int64 [B], how many of these count in each row of `pooled`.
        before: int64 [B], P for texts that begin with the prefix, else 0.
        longest: most positions of a text, without the prefix.
        longest_keys: most keys of a text.
    """

    ids: Tensor
    positions: Tensor
    is_emb_token: Tensor
    cu_lengths: Tensor
    cu_keys: Tensor
    key_index: Tensor
    pooled: Tensor
    counts: Tensor
    before: Tensor
    longest: int
    longest_keys: int

    def to(self, device: torch.device) -> PackedTexts:
        """Copy the tensors to a device; from pinned memory without waiting for it."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedTexts:
        """Copy the tensors to pinned memory."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PackedTexts:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def pack_texts(
    tokens: Sequence[np.ndarray], prefix: np.ndarray | None = None, *, emb_token: bool = False
) -> PackedTexts:
    """Put texts into one row.

    Args:
        tokens: token ids of B texts, each int64 [0..].
        prefix: int64 [P], encoded already: texts that begin with it continue after it, others are
            read whole. None: there is none.
        emb_token: every text is followed by the emb token, whose state is its embedding; else the
            states of all its tokens are averaged.
    """
    prefix = np.empty(0, dtype=np.int64) if prefix is None else prefix
    size = len(prefix)
    begins = np.array([size > 0 and np.array_equal(ids[:size], prefix) for ids in tokens])
    before = np.where(begins, size, 0).astype(np.int64)
    rest = [ids[cut:] for ids, cut in zip(tokens, before.tolist(), strict=True)]
    lengths = np.array([len(ids) for ids in rest], dtype=np.int64) + int(emb_token)
    # A row has a position at least.
    sequences = lengths if lengths.any() else np.append(lengths, 1)
    cuts = np.pad(before, (0, len(sequences) - len(before)))
    ends = np.cumsum(sequences)
    starts, total = ends - sequences, int(ends[-1])
    is_emb_token = np.zeros(total, dtype=bool)
    if emb_token:
        is_emb_token[ends - 1] = True
    flat = np.concatenate([*rest, np.empty(0, dtype=np.int64)])
    ids = np.zeros(total, dtype=np.int64)
    ids[np.flatnonzero(~is_emb_token)[: len(flat)]] = flat
    positions = np.arange(total) + np.repeat(cuts - starts, sequences)
    keys = sequences + cuts
    key_ends = np.cumsum(keys)
    number = np.arange(key_ends[-1]) - np.repeat(key_ends - keys, keys)
    after_prefix = number - np.repeat(cuts, keys)
    key_index = np.where(after_prefix < 0, number, size + np.repeat(starts, keys) + after_prefix)
    counts = np.ones_like(lengths) if emb_token else lengths
    width = np.arange(max(int(counts.max(initial=1)), 1))
    first = (ends - 1 if emb_token else starts)[: len(tokens)]
    pooled = np.minimum(first[:, None] + width, total - 1)
    return PackedTexts(
        ids=torch.from_numpy(ids[None]),
        positions=torch.from_numpy(positions[None]),
        is_emb_token=torch.from_numpy(is_emb_token[None]),
        cu_lengths=_bounds(ends),
        cu_keys=_bounds(key_ends),
        key_index=torch.from_numpy(key_index),
        pooled=torch.from_numpy(pooled),
        counts=torch.from_numpy(counts),
        before=torch.from_numpy(before),
        longest=int(sequences.max()),
        longest_keys=int(keys.max()),
    )


def _bounds(ends: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))

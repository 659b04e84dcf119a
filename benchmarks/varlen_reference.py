"""Variable-length attention one sequence after the other, with the signature of torch's kernel."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's `varlen_attn` computes, one sequence after the other, on any device.

    The number type is free, but under autocast, where the kernel would meet no other than autocast's.

    Args:
        query: [T, H, d].
        key, value: [K, Hkv, d].
        cu_seq_q, cu_seq_k: int32 [S + 1]; a sequence may have more keys than queries, and its last
            query stands beside its last key.
        max_q, max_k: most positions of a sequence; longer ones are refused.
        scale: of the scores; 1 / sqrt(d) when None.
        window_size: positions seen to the left and right, -1 for all of them.
        enable_gqa: H may be a multiple of Hkv.

    Returns:
        [T, H, d].
    """
    types = {query.dtype, key.dtype, value.dtype}
    if len(types) > 1 or (torch.float32 in types and torch.is_autocast_enabled(query.device.type)):
        raise RuntimeError(f"the kernel takes one half-precision number type, not {types}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("query and key have different numbers of heads")
    bounds = itertools.pairwise(cu_seq_q.tolist())
    key_bounds = itertools.pairwise((cu_seq_q if cu_seq_k is None else cu_seq_k).tolist())
    parts = []
    for (start, end), (first, last) in zip(bounds, key_bounds, strict=True):
        if end - start > max_q or last - first > max_k:
            raise ValueError(
                f"a sequence of {end - start} positions and {last - first} keys is longer than "
                f"{max_q} and {max_k}"
            )
        if start == end:
            continue
        q = query[start:end].transpose(0, 1)
        k, v = (part[first:last].transpose(0, 1) for part in (key, value))
        keys = torch.arange(last - first, device=query.device)
        behind = keys[start - end :, None] - keys
        left, right = window_size
        seen = torch.ones_like(behind, dtype=torch.bool)
        if left >= 0:
            seen &= behind <= left
        if right >= 0:
            seen &= -behind <= right
        parts.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)

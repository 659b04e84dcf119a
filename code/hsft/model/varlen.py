"""Variable-length attention of torch (`torch.nn.attention.varlen`) as an attention of transformers.

Sequences stand one after the other in a single row; their cumulative lengths come with the call, as
transformers hands them to the flash-attn package, and no mask is made. Grouped key and value heads
are not repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from hsft.model.attention import VARLEN


def _kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


# torch 2.10 and later have it. Looked up once: torch.compile cannot trace an import.
varlen_attn = _kernel()


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of a row, in the form that transformers calls.

    Without `cu_seq_lens_q` every row is one sequence, padded on the right at most, and torch's
    scaled_dot_product_attention computes it.

    Args:
        module: the attention layer; not used.
        query: [B, H, T, d]; B is 1 where `cu_seq_lens_q` is given. Under autocast it is computed in
            autocast's number type, else in the given one.
        key, value: [B, Hkv, T, d], H a multiple of Hkv.
        attention_mask: not used.
        dropout: must be 0 with `cu_seq_lens_q`: the kernel has none.
        scaling: of the scores; 1 / sqrt(d) when None.
        cu_seq_lens_q: int32 [S + 1], 0, the ends of the sequences, T last.
        max_length_q: most positions of a sequence.
        cu_seq_lens_k, max_length_k: the same of the keys, where sequences have keys of earlier
            positions: the last query of a sequence sees all its keys. As for queries when None.

    Returns:
        [B, T, H, d], and None in place of the attention weights.
    """
    if cu_seq_lens_q is None:
        length, seen = query.shape[2], key.shape[2]
        mask = None
        if length not in (1, seen):
            # Keys of positions before these: torch's is_causal would align the first of both.
            mask = torch.ones(length, seen, dtype=torch.bool, device=query.device)
            mask = mask.tril(seen - length)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and length > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2), None
    assert varlen_attn is not None
    # [1, H, T, d] -> [T, H, d]: views, as the kernel reads any strides of the first two.
    # Rotary embeddings of float32 states give float32 under autocast, which the kernel does not take.
    dtype = _kernel_dtype(query)
    q, k, v = (part[0].to(dtype).transpose(0, 1) for part in (query, key, value))
    keys = (cu_seq_lens_q, max_length_q) if cu_seq_lens_k is None else (cu_seq_lens_k, max_length_k)
    lengths = (cu_seq_lens_q, keys[0], max_length_q, keys[1])
    grouped = {"enable_gqa": True} if _GROUPED and q.shape[1] != k.shape[1] else {}
    scale = {} if scaling is None else {"scale": scaling}
    return varlen_attn(q, k, v, *lengths, **_CAUSAL, **grouped, **scale).unsqueeze(0), None


def _kernel_dtype(query: Tensor) -> torch.dtype:
    """Return the number type that attention computes in: autocast's where there is one."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def causal_setting(parameters: Collection[str]) -> dict[str, Any]:
    """Return the argument that makes `varlen_attn` causal: torch 2.13 renamed it."""
    return {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}


_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
_CAUSAL = causal_setting(_PARAMETERS)
# Before it had the argument, the kernel took grouped heads without being told.
_GROUPED = "enable_gqa" in _PARAMETERS


# Not registered with AttentionMaskInterface: transformers then makes no mask, and does not look for
# sequences in the positions, which would wait for the GPU.
AttentionInterface.register(VARLEN, varlen_attention_forward)

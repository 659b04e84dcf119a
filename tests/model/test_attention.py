"""Variable-length attention: its wiring into transformers, against one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from benchmarks.varlen_reference import reference_varlen_attn
from hsft.data.dataset.packing import Buckets, one_row
from hsft.model import attention
from hsft.model.attention import choose_attention, varlen_obstacle
from hsft.model.backbone import load_decoder, model_kind
from hsft.model.item_table import ItemTable
from hsft.model.user_llm import UserLLM
from hsft.model.varlen import causal_setting, varlen_attention_forward

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
CUDA = torch.device("cuda")


def causal_by_hand(q: Any, k: Any, v: Any, scale: float, window: int | None = None) -> Any:
    """[n, H, d] and [n, Hkv, d] -> [n, H, d] in NumPy, position by position."""
    n, heads, _ = q.shape
    out = np.zeros_like(q)
    for head in range(heads):
        kv_head = head // (heads // k.shape[1])
        for t in range(n):
            first = 0 if window is None else max(0, t - window)
            scores = q[t, head] @ k[first : t + 1, kv_head].T * scale
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[first : t + 1, kv_head]
    return out


@given(LENGTHS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("window", [None, 0, 3])
def test_the_reference_attends_within_each_sequence(
    window: int | None, lengths: list[int], kv_heads: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    total, heads = sum(lengths), kv_heads * group
    q = rng.normal(size=(total, heads, 8))
    k, v = rng.normal(size=(2, total, kv_heads, 8))
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    actual = reference_varlen_attn(
        torch.from_numpy(q),
        torch.from_numpy(k),
        torch.from_numpy(v),
        cu,
        cu,
        max(lengths),
        max(lengths),
        scale=0.3,
        window_size=(-1 if window is None else window, 0),
        enable_gqa=heads != kv_heads,
    )
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = slice(start, end)
        expected = causal_by_hand(q[part], k[part], v[part], 0.3, window)
        np.testing.assert_allclose(actual[part].numpy(), expected, rtol=1e-6, atol=1e-9)


@given(LENGTHS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
@pytest.mark.usefixtures("emulated_varlen")
def test_transformers_layout_reaches_the_kernel(
    lengths: list[int], kv_heads: int, group: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, heads = sum(lengths), kv_heads * group
    q = torch.randn(1, heads, total, 8, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, total, 8, generator=generator)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    actual, weights = varlen_attention_forward(
        torch.nn.Identity(), q, k, v, None, 0.0, 0.3, cu_seq_lens_q=cu, max_length_q=9
    )
    assert weights is None
    assert actual.shape == (1, total, heads, 8)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own_q, own_k, own_v = (x[:, :, start:end] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(
            own_q, own_k, own_v, is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(actual[:, start:end], expected.transpose(1, 2))


@pytest.mark.usefixtures("emulated_varlen")
def test_float32_weights_under_autocast_reach_the_kernel_in_half(llama: Path) -> None:
    # As full fine-tuning trains them; the kernel, and what stands for it here, refuses float32.
    table = ItemTable(torch.randn(21, 64))
    encoder = UserLLM(
        load_decoder(llama, dtype=torch.float32, attention="varlen"), table, max_length=9
    )
    layout = one_row(np.array([3, 5]))
    row = (torch.arange(1, 9)[None], torch.from_numpy(layout.positions))
    with torch.autocast("cpu", torch.bfloat16):
        states = encoder(*row, torch.from_numpy(layout.cu_lengths))
    exact = encoder(*row, torch.from_numpy(layout.cu_lengths))
    torch.testing.assert_close(states.float(), exact, rtol=0.1, atol=0.1)
    states.float().sum().backward()
    weight = encoder.decoder.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr,index]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_causal_argument_of_either_torch() -> None:
    assert causal_setting(["query", "is_causal"]) == {"is_causal": True}
    assert causal_setting(["query", "window_size", "enable_gqa"]) == {"window_size": (-1, 0)}


@given(LENGTHS, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
@pytest.mark.usefixtures("emulated_varlen")
def test_a_row_of_histories_gives_the_states_of_each_alone(
    llama: Path, lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    table = ItemTable(torch.randn(21, 64))
    encoder = UserLLM(
        load_decoder(llama, dtype=torch.float32, attention="varlen"), table, max_length=9
    ).eval()
    history = torch.randint(1, 21, (1, sum(lengths)))
    for buckets in (None, Buckets(8, len(lengths) + 2, 9)):
        layout = one_row(np.array(lengths), buckets)
        padded = F.pad(history, (0, layout.padding))
        with torch.no_grad():
            actual = encoder(
                padded, torch.from_numpy(layout.positions), torch.from_numpy(layout.cu_lengths)
            )[0]
            for start, end in zip(
                layout.cu_lengths[: len(lengths)].tolist(),
                layout.cu_lengths[1 : len(lengths) + 1].tolist(),
                strict=True,
            ):
                alone = encoder(history[:, start:end])[0]
                torch.testing.assert_close(actual[start:end], alone, rtol=1e-4, atol=1e-5)
        assert actual.isfinite().all()


@given(LENGTHS, st.integers(1, 40), st.integers(0, 4), st.integers(9, 12))
@settings(max_examples=60, deadline=None)
def test_a_bucket_fixes_every_shape(
    lengths: list[int], step: int, missing: int, max_length: int
) -> None:
    buckets = Buckets(step, len(lengths) + missing, max_length)
    layout = one_row(np.array(lengths), buckets)
    width = layout.positions.shape[1]
    assert width % step == 0
    assert 0 < layout.padding == width - sum(lengths) <= step
    assert len(layout.cu_lengths) == buckets.sequences + buckets.fillers + 1
    assert layout.cu_lengths[-1] == width
    spans = np.diff(layout.cu_lengths)
    assert spans.min() >= 0
    assert spans.max() <= max_length
    assert spans[: len(lengths)].tolist() == lengths
    assert layout.positions[0].tolist() == [n for span in spans for n in range(span)]


def test_what_keeps_a_model_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    llama = model_kind(LlamaConfig(hidden_size=64, num_attention_heads=4))
    assert varlen_obstacle(llama, CUDA, half=True) is None
    assert choose_attention("auto", True, CUDA, True, llama) == "varlen"
    assert choose_attention("varlen", True, CUDA, True, llama) == "varlen"
    assert varlen_obstacle(llama, torch.device("cpu"), half=True) == "a CUDA device"
    assert varlen_obstacle(llama, CUDA, half=False) == "a 16-bit precision"
    windowed, whole = (model_kind(MistralConfig(sliding_window=size)) for size in (8, None))
    assert "windows" in str(varlen_obstacle(windowed, CUDA, half=True))
    assert varlen_obstacle(whole, CUDA, half=True) is None
    narrow = model_kind(LlamaConfig(hidden_size=24, num_attention_heads=2))
    assert "heads" in str(varlen_obstacle(narrow, CUDA, half=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(varlen_obstacle(llama, CUDA, half=True))
    assert choose_attention("auto", False, CUDA, True, llama) == "sdpa"
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda: False)
    assert "2.10" in str(varlen_obstacle(llama, CUDA, half=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel runs nowhere")
def test_the_kernel_computes_what_the_reference_does() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    lengths = [1, 50, 7, 0, 33]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 8, 91, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 91, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    actual, _ = varlen_attention_forward(
        torch.nn.Identity(), q, k, v, None, 0.0, 0.125, cu_seq_lens_q=cu, max_length_q=50
    )
    q, k, v = (part[0].transpose(0, 1).float() for part in (q, k, v))
    expected = reference_varlen_attn(
        q, k, v, cu, cu, 50, 50, scale=0.125, window_size=(-1, 0), enable_gqa=True
    )
    torch.testing.assert_close(actual[0].float(), expected, rtol=2e-2, atol=1e-2)

"""Layers with fewer kernels: they compute what transformers', peft's and bitsandbytes' do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, Gemma2Config, LlamaConfig

from benchmarks import launches
from hsft.data.dataset import TrainBatch
from hsft.model.accelerate import compile_layers
from hsft.model.backbone import LoraSettings, add_lora, computes_in_bfloat16, load_decoder
from hsft.model.fast_layers import (
    Linear4bit,
    LoraLinear,
    LoraLinear4bit,
    dequantize_in_training,
)
from hsft.model.item_table import ItemTable
from hsft.model.norms import RMSNorm, fuse_norms
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM
from hsft.report.step_time import training_work
from tests.decoders import shape
from tests.helpers import ROOT, make_llama


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_dequantised_product_is_bitsandbytes(kind: str, double: bool) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128,
        64,
        bias=True,
        compute_dtype=torch.float32,
        compress_statistics=double,
        quant_type=kind,
    )
    layer.load_state_dict({"weight": torch.randn(64, 128), "bias": torch.randn(64)})
    layer.to("cpu")
    x = torch.randn(3, 5, 128, requires_grad=True)
    upstream = torch.randn(3, 5, 64)
    expected = layer(x)
    (wanted_grad,) = torch.autograd.grad((expected * upstream).sum(), x)
    dequantize_in_training(layer)
    assert type(layer) is Linear4bit
    actual = layer(x)
    (grad,) = torch.autograd.grad((actual * upstream).sum(), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad, wanted_grad)


def lora(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> LoraSettings:
    return LoraSettings(4, 8, dropout, ("q_proj", "v_proj", "down_proj"), kind, dtype)


def adapted(
    folder: Path,
    settings: LoraSettings,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Any:
    torch.manual_seed(1)
    decoder = load_decoder(folder, dtype=dtype, attention=attention, lora=settings)
    fuse_norms(decoder)
    model = add_lora(decoder, settings, False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["nf4", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_lora_layers_compute_what_pefts_do(llama: Path, kind: str, training: bool) -> None:
    model = adapted(llama, lora(kind, dropout=0.3)).train(training)
    vectors = torch.randn(2, 6, 64)
    layers = [part for part in model.modules() if isinstance(part, LoraLinear | LoraLinear4bit)]
    assert len(layers) == 6
    results = []
    for theirs in (True, False):
        if theirs:
            for layer in layers:
                parent: Any = next(k for k in type(layer).__mro__ if k.__module__[:4] == "peft")
                layer.forward = parent.forward.__get__(layer)  # type: ignore[method-assign]
        else:
            for layer in layers:
                del layer.forward
        torch.manual_seed(7)
        states = model(inputs_embeds=vectors).last_hidden_state
        model.zero_grad()
        states.pow(2).sum().backward()
        results.append((states.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (expected, gradients), (actual, found_gradients) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_a_quantised_decoder_of_bfloat16_stays_so(llama: Path) -> None:
    model = adapted(llama, lora("nf4", torch.bfloat16), torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    assert computes_in_bfloat16(model)
    assert sum(isinstance(part, Linear4bit) for part in model.modules()) == 14
    states = model(inputs_embeds=torch.randn(1, 3, 64).bfloat16()).last_hidden_state
    assert states.dtype == torch.bfloat16
    states.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained)
    half = adapted(llama, lora("nf4", torch.float16), torch.float16)
    assert not computes_in_bfloat16(half)
    assert {p.dtype for n, p in half.named_parameters() if "norm" in n} == {torch.float32}
    assert not computes_in_bfloat16(adapted(llama, lora("int8", torch.bfloat16), torch.bfloat16))


def test_norms_are_replaced_where_they_compute_the_same() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = AutoModel.from_config(LlamaConfig(**sizes))
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 1.0, 0.3)
    vectors = torch.randn(2, 5, 32)
    expected = model(inputs_embeds=vectors).last_hidden_state
    names = set(model.state_dict())
    assert fuse_norms(model) == 5
    assert isinstance(model.norm, RMSNorm)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(inputs_embeds=vectors).last_hidden_state, expected)
    gemma = AutoModel.from_config(Gemma2Config(**sizes))
    for name, weight in gemma.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 0.0, 0.3)
    assert fuse_norms(gemma) == 0


class Dispatched(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def batch() -> TrainBatch:
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0]])
    mask = history > 0
    scored = torch.tensor([0, 1, 2, 3, 4, 5])
    return TrainBatch(
        history, mask, targets, mask, torch.tensor([[9, 10], [11, 12]]), scored=scored
    )


@pytest.mark.parametrize("negatives", ["in_batch", "sampled", "catalogue"])
@pytest.mark.parametrize("loss", ["nce", "bce"])
def test_a_step_reads_nothing_from_the_device(llama: Path, loss: Any, negatives: Any) -> None:
    if (loss, negatives) == ("bce", "catalogue"):
        pytest.skip("a full softmax is nce's")
    similarity: Any = "cosine" if loss == "nce" else "dot"
    settings = LossSettings(loss, negatives, 0.99, 200, similarity)
    decoder = adapted(llama, lora("nf4", torch.bfloat16, 0.05), torch.bfloat16, "varlen")
    table = ItemTable(torch.randn(21, 64), "linear")
    model = Recommender(UserLLM(decoder, table, autocast=False), settings).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    with Dispatched() as seen:
        model(batch()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        reads = [name for name in seen.names if "_local_scalar" in name or "nonzero" in name]
    assert not reads
    assert seen.names
    optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to wait for")
def test_a_step_waits_for_nothing_on_cuda(llama: Path) -> None:
    settings = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")
    decoder = adapted(llama, lora("none", torch.bfloat16, 0.05), torch.bfloat16, "varlen")
    table = ItemTable(torch.randn(21, 64))
    model = Recommender(UserLLM(decoder, table, autocast=False), settings).cuda().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    given = batch().to(torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(given).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_of(folder: Path, dtype: torch.dtype, autocast: bool) -> tuple[float, list[Tensor]]:
    settings = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")
    decoder = adapted(folder, lora("nf4", torch.bfloat16), dtype)
    torch.manual_seed(3)
    table = ItemTable(torch.randn(21, 64))
    model = Recommender(UserLLM(decoder, table, autocast=autocast), settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = model(batch())
    value.backward()
    return value.item(), [p.grad for p in decoder.parameters() if p.requires_grad]


def test_the_loss_without_autocast_is_that_with_it_to_bfloat16s_rounding(llama: Path) -> None:
    exact, _ = losses_of(llama, torch.float32, autocast=False)
    mixed, mixed_gradients = losses_of(llama, torch.float32, autocast=True)
    pure, gradients = losses_of(llama, torch.bfloat16, autocast=False)
    # Three significant digits are what bfloat16's 8 bits leave over a few layers.
    assert pure == pytest.approx(mixed, rel=2e-2)
    assert pure == pytest.approx(exact, rel=2e-2)
    flat = torch.cat([g.flatten() for g in gradients])
    mixed_flat = torch.cat([g.flatten() for g in mixed_gradients])
    assert torch.cosine_similarity(flat, mixed_flat, dim=0) > 0.99


def measured_launches(layers: int) -> list[dict[str, Any]]:
    """Count launches in a process of its own.

    Now and then torch raises std::bad_alloc when it dispatches a custom operator, with gigabytes free;
    such a process is started again.
    """
    code = (
        "import json, sys; sys.path[:0] = sys.argv[2:]; from benchmarks import launches; "
        "print(json.dumps(launches.measure(layers=int(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(layers), str(ROOT), str(ROOT / "code")]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "bad_alloc" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_hsft_launches_no_more_than_it_did(tmp_path: Path) -> None:
    rows = measured_launches(layers=4)
    by_way = {row["way"]: row["launches"] for row in rows}
    # Per layer and, the optimizer and the loss included, beside the layers; by count, not by time.
    assert by_way["NF4: HSFT, one row"] <= 4 * 115 + 130
    assert by_way["bfloat16: HSFT, one row"] <= 4 * 98 + 130
    assert by_way["NF4: HSFT, one row"] < by_way["NF4: plain transformers + peft"]
    # What --dry_run takes these to be.
    folder = make_llama(tmp_path / "llama", layers=4)
    for row in rows:
        kind, _, way = row["way"].partition(": ")
        if way == "HSFT, one row":
            quant_type = "nf4" if kind == "NF4" else "none"
            expected = training_work(shape(folder, quant_type=quant_type), 8, 90, 12, (0, 0))
            assert row["launches"] == pytest.approx(expected.kernels, rel=0.03)
            assert row["launches"] + row["views"] == pytest.approx(expected.operations, rel=0.03)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="no C++ compiler: torch.compile writes no code for the CPU without one",
)


@needs_compiler
def test_a_compiled_layer_launches_no_more_than_it_did() -> None:
    kernels = launches.compiled_layer("nf4")
    # Called: 7 products each way, 4 of two LoRA adapters forward and 8 backward, attention each way,
    # random numbers, and 7 weights dequantised each way.
    assert 14 + 12 + 2 + 14 <= kernels.called <= 43
    assert 0 < kernels.generated <= 22
    # A step of TinyLlama's 22 layers, with about 91 kernels beside them; 2,511 without compilation.
    assert 22 * kernels.total + 91 <= 1_524


@needs_compiler
def test_a_compiled_layer_keeps_no_dequantised_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a kernel's place: what computes nothing, and needs no compiler's seconds.
    nothing = mock.Mock(return_value=mock.Mock(return_value=None))
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", nothing)
    # Wider than the batch is long, so that no activation is as large as a weight.
    folder = make_llama(tmp_path / "llama", hidden=128)
    lora = LoraSettings(2, 4, 0.0, ("q_proj", "v_proj"))
    decoder = add_lora(
        load_decoder(folder, dtype=torch.bfloat16, attention="sdpa", lora=lora), lora, False
    )
    assert compile_layers(decoder) == 2
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        inductor_config.patch(force_disable_caches=True),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        read = torch.randn(1, 8, 128, dtype=torch.bfloat16, requires_grad=True)
        decoder(inputs_embeds=read, use_cache=False)
    assert nothing.called
    assert any(tensor.dtype == torch.uint8 for tensor in kept)
    largest = max(tensor.numel() for tensor in kept if tensor.is_floating_point())
    assert largest < 128 * 64  # the smallest weight, of the key heads

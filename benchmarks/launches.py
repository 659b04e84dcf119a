"""Operations that a training step dispatches, plain against HSFT by variant, counted on the CPU.

    python benchmarks/launches.py              # TinyLlama's 22 layers, tiny widths

On a GPU nearly every operation that is no view launches a kernel, and at about 14 us each thousands of
them take longer than their work. How many there are does not depend on the widths, so a narrow model
of as many layers is counted, in bfloat16 and with attention as on a GPU: torch's variable-length kernel
is one operation, and so are its RMS norm and one quantised layer's 4-bit weight, dequantised.

Where layers are compiled, the kernels in the code that Inductor writes for a layer's forward and backward
pass are counted: those that it generates, and the library's that this code calls. It is written for the
CPU; for a GPU Inductor fuses much the same.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from transformers import LlamaConfig, LlamaModel

from benchmarks.dispatched import Dispatched
from benchmarks.plain_training import PlainModel, pad_to
from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainCollate
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.model import norms, varlen
from hsft.model.accelerate import compile_layers
from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.norms import fuse_norms
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM
from hsft.utils.files import write_json, write_text
from hsft.utils.logs import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH, LENGTH, BATCH = 22, 64, 12, 8


@torch.library.custom_op("hsft_count::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone()


@torch.library.custom_op("hsft_count::attention_backward", mutates_args=())
def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [g.clone(), k.clone(), v.clone()]


# What torch.compile asks of operations that it does not look into.
_attention.register_fake(lambda q, k, v: torch.empty_like(q))
_attention_backward.register_fake(
    lambda g, q, k, v: [torch.empty_like(tensor) for tensor in (g, k, v)]
)
_attention.register_autograd(
    lambda ctx, g: tuple(_attention_backward(g, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("hsft_count::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("hsft_count::rms_norm_backward", mutates_args=())
def _rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return g.clone()


_rms_norm.register_autograd(
    lambda ctx, g: (_rms_norm_backward(g, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make attention and norms one operation each way, as they are on a GPU; results are not real."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        result: Tensor = _attention(q, k, v)
        return result

    def norm(module: norms.RMSNorm, x: Tensor) -> Tensor:
        result: Tensor = _rms_norm(x, module.weight)
        return result

    kept = varlen.varlen_attn, norms.RMSNorm.forward
    varlen.varlen_attn, norms.RMSNorm.forward = attend, norm  # type: ignore
    try:
        yield
    finally:
        varlen.varlen_attn, norms.RMSNorm.forward = kept  # type: ignore[method-assign]


def make_data(folder: Path, layers: int) -> CachedEmbeddingTrainDataset:
    """Save a random model and make sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaModel(config).to(torch.bfloat16).save_pretrained(folder)
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, LENGTH + 3, BATCH)
    data = Interactions(
        item_ids=np.arange(51).astype(str),
        user_ids=np.arange(BATCH).astype(str),
        items=rng.integers(1, 51, sizes.sum()).astype(np.int32),
        timestamps=np.arange(sizes.sum()),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
    )
    return CachedEmbeddingTrainDataset(leave_one_out(data), LENGTH)


def ours(
    folder: Path, dataset: CachedEmbeddingTrainDataset, kind: str, *, rows: bool
) -> Callable[[], None]:
    """Make a training step of HSFT, batches in one row or (rows: False) masked rows."""
    lora = LoraSettings(8, 16, 0.05, ("q_proj", "v_proj"), kind)
    kernel = "varlen" if rows else "sdpa"
    decoder = load_decoder(folder, dtype=torch.bfloat16, attention=kernel, lora=lora)
    fuse_norms(decoder)
    loss = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")
    encoder = UserLLM(add_lora(decoder, lora, False), _table(), max_length=LENGTH, autocast=False)
    model = Recommender(encoder, loss).train()
    batch = TrainCollate(dataset, row_length=4 * LENGTH, pack_below=1.1, single_row=rows)(
        np.arange(BATCH)
    )
    return _step(model, lambda: model(batch))


def plain(folder: Path, dataset: CachedEmbeddingTrainDataset, kind: str) -> Callable[[], None]:
    """Make a training step of plain transformers and peft under autocast."""
    lora = LoraSettings(8, 16, 0.05, ("q_proj", "v_proj"), kind)
    decoder = load_decoder(folder, dtype=torch.bfloat16, attention="sdpa", lora=lora)
    model = PlainModel(
        decoder,
        _table().embeddings,
        rank=8,
        targets=["q_proj", "v_proj"],
        quantised=kind != "none",
        checkpointing=False,
        catalogue=False,
        adapter=False,
    )
    batch = pad_to(LENGTH, TrainCollate(dataset)(np.arange(BATCH)))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = model(*batch)
        return value

    return _step(model, loss)


def _table() -> ItemTable:
    return ItemTable(torch.randn(51, WIDTH, generator=torch.Generator().manual_seed(1)).half())


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # `fused`, one kernel, as on CUDA.
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass(frozen=True)
class LayerKernels:
    """Kernels of a compiled layer, its forward and backward pass.

    Attributes:
        generated: that Inductor writes.
        called: of libraries: products, attention, dequantisation, seeds.
    """

    generated: int
    called: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.generated + self.called


# Calls in the code that Inductor writes.
_GENERATED = re.compile(r"^ +(?:cpp|triton)_\w+\(", re.MULTILINE)
_CALLED = re.compile(r"(?:extern_kernels|torch\.ops|aten)\.[\w.]+\(")


def compiled_layer(kind: str) -> LayerKernels:
    """Compile a layer as `compile: layers` does, and count the kernels of the code.

    The layer's input has a gradient, as that of every layer but the first. No C++ is compiled, and
    nothing that the layer computes is real.

    Args:
        kind: of quantisation, as `qlora_quant_type`.
    """
    lora = LoraSettings(8, 16, 0.05, ("q_proj", "v_proj"), kind)
    with tempfile.TemporaryDirectory() as name, ExitStack() as patches:
        dataset = make_data(Path(name), 1)
        decoder = load_decoder(name, dtype=torch.bfloat16, attention="varlen", lora=lora)
        fuse_norms(decoder)
        encoder = UserLLM(
            add_lora(decoder, lora, False), _table(), max_length=LENGTH, autocast=False
        ).train()
        batch = TrainCollate(dataset, single_row=True)(np.arange(BATCH))
        vectors = torch.randn(*batch.history.shape, WIDTH).requires_grad_()
        # Norms are real here: Inductor fuses them.
        attend = mock.patch.object(
            varlen, "varlen_attn", lambda q, k, v, *_, **__: _attention(q, k, v)
        )
        # In a kernel's place: what computes nothing.
        nothing = mock.patch.object(
            AsyncCompile, "cpp_pybinding", return_value=mock.Mock(return_value=None)
        )
        for patch in (attend, nothing, inductor_config.patch(force_disable_caches=True)):
            patches.enter_context(patch)
        assert compile_layers(encoder.decoder) == 1

        def step() -> None:
            states = encoder(batch.history, batch.positions, batch.cu_lengths, vectors=vectors)
            states.float().sum().backward()

        _, codes = run_and_get_code(step)
    bodies = [code[code.index("def call(") :] for code in codes]
    return LayerKernels(
        sum(len(_GENERATED.findall(body)) for body in bodies),
        sum(len(_CALLED.findall(body)) for body in bodies),
    )


def compiled_step(kind: str, layers: int) -> int:
    """Return the kernels of a training step with compiled layers, the rest of it as dispatched."""
    beside = []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            dataset = make_data(Path(name), number)
            step = ours(Path(name), dataset, kind, rows=True)
            with as_on_a_gpu():
                beside.append(count(step).launches)
    # Every layer launches the same, so that the rest is what a model without layers would.
    return 2 * beside[0] - beside[1] + layers * compiled_layer(kind).total


def count(step: Callable[[], None]) -> Dispatched:
    """Count what a step dispatches, after one that sets the optimizer up."""
    step()
    with Dispatched() as seen:
        step()
    return seen


def measure(layers: int = LAYERS) -> list[dict[str, Any]]:
    """Count every variant: way, launches, views, conversions between number types."""
    counted = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_data(folder, layers)
        steps = {
            "NF4: plain transformers + peft": plain(folder, dataset, "nf4"),
            "NF4: HSFT, masked rows": ours(folder, dataset, "nf4", rows=False),
            "NF4: HSFT, one row": ours(folder, dataset, "nf4", rows=True),
            "bfloat16: plain transformers + peft": plain(folder, dataset, "none"),
            "bfloat16: HSFT, one row": ours(folder, dataset, "none", rows=True),
        }
        for way, step in steps.items():
            # Only now: norms are replaced in models where they compute the same.
            with as_on_a_gpu():
                seen = count(step)
            counted.append(
                {
                    "way": way,
                    "launches": seen.launches,
                    "views": sum(seen.counts.values()) - seen.launches,
                    "conversions": seen.counts["_to_copy"],
                    "most": seen.counts.most_common(12),
                }
            )
    return counted


def measure_compiled(layers: int = LAYERS) -> list[dict[str, Any]]:
    """Count the kernels with compiled layers: way, launches; views and conversions are inside."""
    return [
        {"way": f"{name}: HSFT, one row, compiled layers", "launches": compiled_step(kind, layers)}
        for name, kind in (("NF4", "nf4"), ("bfloat16", "none"))
    ]


def markdown(rows: Sequence[dict[str, Any]], layers: int) -> str:
    """Write the counts as a Markdown table."""
    lines = [
        f"Operations of one training step, {layers} layers, LoRA on q_proj and v_proj:",
        "",
        "| way | launches | views | conversions |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['way']} | {row['launches']:,} | "
        + " | ".join(f"{row[key]:,}" if key in row else "" for key in ("views", "conversions"))
        + " |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    set_up_logging(quiet=True)
    rows = measure(args.layers) + measure_compiled(args.layers)
    page = markdown(rows, args.layers)
    write_json(args.out / "launches.json", rows)
    write_text(args.out / "launches.md", page)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

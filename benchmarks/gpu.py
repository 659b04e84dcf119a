"""Everything about speed and memory that needs a GPU, in one run of under six minutes.

    python benchmarks/gpu.py                        # all sections
    python benchmarks/gpu.py --only checks training

TinyLlama-1.1B's shape, random weights, lengths like Pixel200K's, QLoRA on q_proj and v_proj. The plain
way (transformers + peft, padded to L) and HSFT's variants run in this process one after the other on
the same sequences. Every figure is printed and written to `gpu.json` as soon as it is there, so that a
run that is cut short loses nothing; `gpu.md` is the same as Markdown tables.
`--tiny True` runs the same code on a CPU with tiny shapes: a test of the script, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel

from benchmarks.padding_data import PIXEL_ITEMS, pixel_like, sequences
from benchmarks.plain_training import PlainModel, pad_to
from benchmarks.varlen_reference import reference_varlen_attn
from hsft.config import Config
from hsft.config.loader import load_config
from hsft.data.cache import open_cache, save_cache
from hsft.data.dataset import TrainBatch, TrainCollate
from hsft.data.interactions import Interactions
from hsft.data.split import Split, leave_one_out
from hsft.encoding.item_llm import ItemEncoder, length_batches
from hsft.evaluator import ranking
from hsft.evaluator.tensor_cores import tensor_core_ranks
from hsft.model import varlen
from hsft.model.accelerate import compile_layers
from hsft.model.attention import VARLEN
from hsft.model.backbone import load_decoder
from hsft.model.norms import fuse_norms
from hsft.model.varlen import varlen_attention_forward, varlen_attn
from hsft.report.memory import CUDA_CONTEXT, GIB, estimate
from hsft.run.dry_run import TINYLLAMA, training_shape
from hsft.run.setup import Data, build_user_llm, lora_settings, make_evaluator
from hsft.run.train_and_rank import accelerate, evaluate, make_train_loader, train_and_rank
from hsft.trainer.fabric import compute_dtype, make_fabric
from hsft.trainer.optim import build_optimizer
from hsft.utils.environment import device_name
from hsft.utils.errors import EXIT_BAD_INPUT, EXIT_OK, one_line
from hsft.utils.files import read_json, write_json, write_text
from hsft.utils.logs import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
# Dense bfloat16 tensor-core peaks with float32 accumulation, from NVIDIA's data sheets and
# architecture white papers, in TFLOPS. The longest name that fits wins.
PEAK_TFLOPS = {
    "RTX 3060": 25.6,
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 4070": 58.3,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "T4": 65.0,
    "L4": 121.0,
    "A10": 125.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
}
PLAIN = "plain transformers + peft, padded to L"
TINY = {
    "vocab_size": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# The most steps until every bucket that comes up often has its graph.
_WARM_UP = 12


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Attributes:
        label: its name.
        keys: configuration keys that differ from the repository's files.
        layers: compile the decoder layers, whatever `compile` says.
        fused: leave 4-bit products to bitsandbytes' own choice of kernel.
        float32_residual: norms and residual stream in float32 under autocast, as peft prepares it.
    """

    label: str
    keys: dict[str, Any] = field(default_factory=dict)
    layers: bool = False
    fused: bool = False
    float32_residual: bool = False


ROWS: dict[str, Any] = {"attn_implementation": "sdpa", "compile": "off"}
OURS = Variant("HSFT")
VARIANTS = [
    Variant("masked rows of 4L, float32 residual", ROWS, fused=True, float32_residual=True),
    Variant("masked rows of 4L", ROWS),
    Variant("one row", {"compile": "off"}),
    Variant("one row, bitsandbytes' kernels", {"compile": "off"}, fused=True),
    Variant("one row, paged 8-bit AdamW", {"compile": "off", "optimizer": "paged_adamw8bit"}),
    Variant("one row, CUDA graph", {"compile": "graph"}),
    Variant("one row, compiled layers, CUDA graph", {"compile": "graph"}, layers=True),
]
BF16: dict[str, Any] = {"qlora_quant_type": "none"}


def compiles(variant: Variant) -> bool:
    """Say whether a variant waits for torch.compile, which takes minutes on a CPU."""
    return variant.layers or variant.keys.get("compile") == "layers"


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        args: the command line.
        folder: of the random model and its cache.
        data: interactions and item cache.
        out: folder of the results.
        result: everything measured so far.
    """

    args: argparse.Namespace
    folder: Path
    data: Data
    out: Path
    result: dict[str, Any]

    @property
    def tiny(self) -> bool:
        """Whether this is a test of the script."""
        return bool(self.args.tiny == "True")

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Print a row, and write all rows."""
        self.result["rows"].append({"section": section, **row})
        sys.stdout.write(f"[{section}] {describe(row)}\n")
        sys.stdout.flush()
        write_json(self.out / "gpu.json", self.result)
        write_text(self.out / "gpu.md", markdown(self.result))

    def attempt(self, section: str, label: str, work: Callable[[], dict[str, Any]]) -> Any:
        """Add what `work` returns; an error becomes a row that says so. Skip what `--rows` leaves out."""
        if not re.search(self.args.rows, label):
            return None
        began = time.perf_counter()
        try:
            row = {"label": label, **work()}
        except Exception as error:  # one variant that fails must not cost the others
            traceback.print_exc(limit=-4)
            row = {"label": label, "error": f"{type(error).__name__}: {one_line(error, 300)}"}
        row["seconds"] = round(time.perf_counter() - began, 1)
        self.add(section, row)
        clear()
        return row

    def config(
        self, variant: Variant, *, rank: int = 8, length: int = 50, batch: int = 64
    ) -> Config:
        """Return a variant's configuration: the repository's files for HLLM with QLoRA."""
        files = [ROOT / "code/overall/LLM_ddp.yaml", ROOT / "code/HLLM/HLLM.yaml"]
        values = {
            "use_qlora": True,
            "qlora_r": rank,
            "qlora_alpha": 2 * rank,
            "MAX_ITEM_LIST_LENGTH": length,
            "train_batch_size": batch,
            "user_pretrain_dir": str(self.folder / "model"),
            "item_cache_path": str(self.folder / "cache.safetensors"),
            "negatives": "in_batch",
            "dataset": "pixel-like",
            "qlora_quant_type": "nf4",
            "show_progress": False,
            **variant.keys,
        }
        return load_config(files, values)[0]


def describe(row: dict[str, Any]) -> str:
    """Return a row in a line."""
    cells = []
    for key, value in row.items():
        if key.endswith("_bytes"):
            cells.append(
                f"{key[:-6]} {value / GIB:.2f} GiB" if value is not None else f"{key[:-6]} -"
            )
        elif isinstance(value, float):
            cells.append(f"{key} {value:,.4g}")
        else:
            cells.append(str(value) if key == "label" else f"{key} {value}")
    return " | ".join(cells)


def prepare(folder: Path, sizes: dict[str, int], items: int) -> None:
    """Save a random model and a random item cache."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    vectors = torch.randn(items, sizes["hidden_size"]).half()
    save_cache(folder / "cache.safetensors", [str(n + 1) for n in range(items)], vectors, {})


@dataclass
class Trained:
    """A model that is ready to be trained: a step at a time, batch after batch."""

    model: Any
    wrapped: Any
    optimizer: Any
    graphs: Any
    loader: Any
    fabric: Any

    def batches(self) -> Iterator[TrainBatch]:
        """Yield batches without end."""
        for epoch in itertools.count():
            self.loader.batch_sampler.epoch = self.loader.collate_fn.epoch = epoch
            yield from self.loader

    def gradients(self, batch: TrainBatch) -> torch.Tensor:
        """Compute a batch's loss and add up its gradients."""
        if self.graphs is not None:
            captured: torch.Tensor = self.graphs.step(batch)
            return captured
        loss: torch.Tensor = self.wrapped(batch.to(self.fabric.device))
        self.fabric.backward(loss)
        return loss.detach()

    def step(self, batch: TrainBatch) -> torch.Tensor:
        """Take an optimizer step and return the loss."""
        loss = self.gradients(batch)
        self.fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=1.0, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def build(bench: Bench, config: Config, variant: Variant) -> Trained:
    """Build a variant as `main.py` does."""
    fabric = make_fabric(config)
    fabric.seed_everything(config.seed, verbose=False)
    bench.result["device"] = device_name(fabric.device)
    model = build_user_llm(config, bench.data, fabric, train=True)
    encoder: Any = model.encoder
    if variant.float32_residual:
        for weight in encoder.decoder.parameters():
            if weight.dtype == torch.bfloat16:
                weight.data = weight.data.float()
        encoder.autocast = True
    if variant.fused:
        import bitsandbytes as bnb

        for module in encoder.decoder.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.__class__ = bnb.nn.Linear4bit
    dataset = sequences(bench.data.interactions, config.MAX_ITEM_LIST_LENGTH)
    loader = make_train_loader(config, dataset, fabric)
    optimizer = build_optimizer(model, config, fabric.device)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    if variant.layers:
        compile_layers(encoder.decoder)
    graphs = accelerate(config, model, wrapped, loader, 10**6, fabric)
    return Trained(model, wrapped, wrapped_optimizer, graphs, loader, fabric)


def build_plain(bench: Bench, config: Config) -> tuple[Any, Any, Any, Any]:
    """Build the plain loop's model, on the same sequences: wrapped, optimizer, loader, fabric."""
    assert bench.data.cache is not None
    fabric = make_fabric(config)
    fabric.seed_everything(config.seed, verbose=False)
    bench.result["device"] = device_name(fabric.device)
    lora = lora_settings(config)
    decoder = load_decoder(
        config.user_pretrain_dir or "",
        dtype=compute_dtype(config),
        attention="sdpa",
        lora=lora,
        device=fabric.device,
    )
    table = torch.cat([torch.zeros(1, bench.data.cache.dim).half(), bench.data.cache.embeddings])
    model = PlainModel(
        decoder,
        table,
        rank=lora.rank,
        targets=list(lora.target_modules),
        quantised=lora.quant_type != "none",
        checkpointing=config.gradient_checkpointing,
        catalogue=config.negatives == "catalogue",
        adapter=False,
    ).to(fabric.device)
    kind = "paged_adamw8bit" if fabric.device.type == "cuda" else "adamw"
    optimizer = build_optimizer(model, config.model_copy(update={"optimizer": kind}), fabric.device)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    dataset = sequences(bench.data.interactions, config.MAX_ITEM_LIST_LENGTH)
    loader = make_train_loader(config, dataset, fabric)
    loader.collate_fn = TrainCollate(dataset)
    return wrapped, wrapped_optimizer, loader, fabric


def measure(
    step: Callable[[TrainBatch], Any],
    batches: Iterator[TrainBatch],
    device: torch.device,
    count: int,
    warm_up: int,
    captures: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Time steps alone, waiting for each, and then as many without waiting, loading included.

    Peak memory is of all of them, in bytes. The steps without waiting are repeated while graphs
    are still captured among them (`captures` counts these), four times at most: a run captures
    each shape once.
    """
    times, reals = [], []
    for number, batch in enumerate(itertools.islice(batches, warm_up + count)):
        synchronize(device)
        began = time.perf_counter()
        step(batch)
        synchronize(device)
        if number >= warm_up:
            times.append(time.perf_counter() - began)
            reals.append(int(batch.attention_mask.sum()))
    for _ in range(4):
        before, began, real = captures(), time.perf_counter(), 0
        for batch in itertools.islice(batches, count):
            step(batch)
            real += int(batch.attention_mask.sum())
        synchronize(device)
        seconds = time.perf_counter() - began
        if captures() == before:
            break
    rates = [tokens / alone for tokens, alone in zip(reals, times, strict=True)]
    return {
        "ms": 1e3 * statistics.median(times),
        "real_tokens_per_s": statistics.median(rates),
        "overlapped_tokens_per_s": real / seconds,
        "peak_bytes": peak_bytes(device),
    }


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors took since `clear_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def clear_peak() -> None:
    """Start to count the peak again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def train_plain(bench: Bench, config: Config) -> dict[str, Any]:
    """Measure the plain loop."""
    wrapped, optimizer, loader, fabric = build_plain(bench, config)

    def step(batch: TrainBatch) -> None:
        padded = pad_to(config.MAX_ITEM_LIST_LENGTH, batch)
        loss = wrapped(*(part.to(fabric.device) for part in padded))
        fabric.backward(loss)
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measure(step, iter(loader), fabric.device, bench.args.steps, 3)


def train_ours(bench: Bench, config: Config, variant: Variant) -> dict[str, Any]:
    """Measure a variant, and put the memory estimate and the model FLOPs utilisation beside it."""
    trained = build(bench, config, variant)
    warm_up = 3 if bench.tiny else _WARM_UP
    device = trained.fabric.device
    graphs = trained.graphs
    measured = measure(
        trained.step,
        trained.batches(),
        device,
        bench.args.steps,
        warm_up,
        lambda: graphs.graphs if graphs else 0,
    )
    # Without the driver's own memory, which the measured peak leaves out too.
    lengths = trained.loader.dataset.lengths
    shape = replace(
        training_shape(config),
        mean_length=float(lengths.mean()),
        length_deviation=float(lengths.std()),
    )
    guess = estimate(shape, config.train_batch_size).total - CUDA_CONTEXT
    peak = peak_tflops(bench.result["device"], bench.args.peak_tflops)
    used = flops_per_token(config) * measured["overlapped_tokens_per_s"]
    return {
        **measured,
        "estimate_bytes": guess,
        "mfu": used / (peak * 1e12) if peak else None,
        "graphs": graphs.graphs if graphs else 0,
        "capture_s": round(graphs.seconds, 2) if graphs else 0.0,
    }


def flops_per_token(config: Config) -> int:
    """Return a training step's model FLOPs a position: 2 N forward and 2 N for the inputs' gradients.

    N counts the linear layers. Frozen weights get no gradient; LoRA's own products and attention
    over at most 50 positions are left out.
    """
    linear = training_shape(config).decoder.linear.values()
    return 4 * sum(read * given for read, given in linear)


def peak_tflops(name: str, given: float | None) -> float | None:
    """Return the device's peak, as given or looked up by name."""
    fitting = [key for key in PEAK_TFLOPS if key in name]
    return given or (PEAK_TFLOPS[max(fitting, key=len)] if fitting else None)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear() -> None:
    """Free what the last variant held."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    clear_peak()


# --- sections


def checks(bench: Bench) -> None:
    """Compare the fast ways with the simple ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench.attempt("checks", "varlen against one sequence at a time", partial(check_varlen, device))
    bench.attempt("checks", "a step waits for nothing", partial(check_waits, bench))
    check_losses(bench, compiled=False)


def compiled(bench: Bench) -> None:
    """Compare the losses of compiled layers with those of the simple way."""
    check_losses(bench, compiled=True)


def check_losses(bench: Bench, *, compiled: bool) -> None:
    """Compare the losses of fast ways, those that torch compiles or the others, with masked rows'."""
    simple = Variant("masked rows", ROWS, float32_residual=True)
    steps = 3 if bench.tiny else 30
    rate: dict[str, Any] = {"qlora_dropout": 0.0, "optim_args": {"learning_rate": 1e-3}}
    reference: dict[str, Any] = {}
    for variant in (
        simple,
        Variant("one row", {"compile": "off"}),
        Variant("one row, CUDA graph", {"compile": "graph"}),
        Variant("bfloat16, masked rows", {**BF16, **ROWS}),
        Variant("bfloat16, one row, CUDA graph", {**BF16, "compile": "graph"}),
        Variant("one row, compiled layers, CUDA graph", {"compile": "graph"}, layers=True),
    ):
        if variant is not simple and (compiles(variant) != compiled or (bench.tiny and compiled)):
            continue
        keyed = Variant(
            variant.label,
            {**variant.keys, **rate},
            variant.layers,
            variant.fused,
            variant.float32_residual,
        )
        bench.attempt(
            "checks",
            f"losses: {variant.label}",
            partial(losses_of, bench, keyed, steps, reference),
        )


def check_varlen(device: torch.device) -> dict[str, Any]:
    """Compare the kernel's result and gradients with the reference in float32."""
    if varlen_attn is None or device.type != "cuda":
        return {"skipped": "no variable-length kernel here"}
    torch.manual_seed(0)
    lengths = [1, 50, 7, 0, 33, 18, 0, 5]
    total = sum(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    worst: dict[str, float] = {}
    for heads, kv_heads, width in ((32, 4, 64), (9, 3, 64), (4, 4, 128)):
        q = torch.randn(1, heads, total, width, device=device, dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, kv_heads, total, width, device=device, dtype=torch.bfloat16)
        upstream = torch.randn(total, heads, width, device=device)
        results = []
        for exact in (False, True):
            given: Any = [part.detach().clone().requires_grad_() for part in (q, k, v)]
            query, key, value = given
            if exact:
                query, key, value = (part[0].transpose(0, 1).float() for part in given)
                out = reference_varlen_attn(
                    query,
                    key,
                    value,
                    cu,
                    cu,
                    50,
                    50,
                    scale=0.125,
                    window_size=(-1, 0),
                    enable_gqa=True,
                )
            else:
                rows, _ = varlen_attention_forward(
                    torch.nn.Identity(),
                    query,
                    key,
                    value,
                    None,
                    scaling=0.125,
                    cu_seq_lens_q=cu,
                    max_length_q=50,
                )
                out = rows[0]
            (out.float() * upstream).sum().backward()
            results.append([out.detach().float(), *(part.grad.float() for part in given)])
        errors = [
            float((actual - expected).norm() / expected.norm())
            for actual, expected in zip(*results, strict=True)
        ]
        worst[f"{heads}/{kv_heads} x {width}"] = max(errors)
    return {
        "passed": all(error < 1e-2 for error in worst.values()),
        "relative_error": max(worst.values()),
        "by_shape": {shape: f"{error:.1e}" for shape, error in worst.items()},
    }


def check_waits(bench: Bench) -> dict[str, Any]:
    """Run a step with torch set to refuse any wait for the device."""
    config = bench.config(Variant("", {"compile": "off"}))
    trained = build(bench, config, OURS)
    batches = [batch.to(trained.fabric.device) for batch in itertools.islice(trained.loader, 3)]
    if trained.fabric.device.type != "cuda":
        return {"skipped": "no CUDA device"}
    trained.step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trained.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}


def losses_of(
    bench: Bench, variant: Variant, steps: int, reference: dict[str, Any]
) -> dict[str, Any]:
    """Train some steps without dropout; compare losses with those of the first variant of its kind."""
    config = bench.config(variant)
    trained = build(bench, config, variant)
    kind = config.qlora_quant_type
    losses = [float(trained.step(batch)) for batch in itertools.islice(trained.batches(), steps)]
    base = reference.setdefault(kind, losses)
    tail = max(1, steps // 4)
    furthest = max(abs(loss - other) / other for loss, other in zip(losses, base, strict=True))
    return {
        "passed": furthest < 2e-2,
        "first_loss": losses[0],
        "last_losses": statistics.mean(losses[-tail:]),
        "reference_last_losses": statistics.mean(base[-tail:]),
        "furthest_relative": furthest,
        "graphs": trained.graphs.graphs if trained.graphs else 0,
    }


def training(bench: Bench) -> None:
    """Measure the plain way and HSFT's variants at 64 x 50, NF4 and bfloat16 weights."""
    batch, length = (4, 10) if bench.tiny else (64, 50)
    kinds: list[tuple[str, dict[str, Any]]] = [("NF4", {}), ("bfloat16", BF16)]
    for kind, keys in kinds:
        config = bench.config(Variant("", keys), length=length, batch=batch)
        bench.attempt("training", f"{kind}: {PLAIN}", partial(train_plain, bench, config))
    # What compiles comes last: it takes longest, and a run may be cut short.
    for variant in sorted(VARIANTS, key=compiles):
        only_cuda = "optimizer" in variant.keys
        if bench.tiny and (only_cuda or compiles(variant)):
            continue
        for kind, keys in kinds:
            if kind == "bfloat16" and (variant.fused or only_cuda):
                continue
            keyed = replace(variant, keys={**variant.keys, **keys})
            config = bench.config(keyed, length=length, batch=batch)
            label = f"{kind}: {variant.label}"
            bench.attempt("training", label, partial(train_ours, bench, config, keyed))


def grid(bench: Bench) -> None:
    """Measure the plain way and HSFT as it is set over ranks, lengths and batch sizes."""
    sizes = (
        [(4, 10, 4)]
        if bench.tiny
        else [(8, 50, 16), (8, 50, 256), (64, 50, 64), (8, 10, 64), (64, 10, 16)]
    )
    for rank, length, batch in sizes:
        where = f"r {rank}, L {length}, batch {batch}"
        config = bench.config(OURS, rank=rank, length=length, batch=batch)
        half = bench.config(Variant("", BF16), rank=rank, length=length, batch=batch)
        bench.attempt("grid", f"NF4, {where}: plain", partial(train_plain, bench, config))
        bench.attempt("grid", f"NF4, {where}: HSFT", partial(train_ours, bench, config, OURS))
        bench.attempt("grid", f"bfloat16, {where}: HSFT", partial(train_ours, bench, half, OURS))


def run(bench: Bench) -> None:
    """Run the program itself: with and without CUDA graphs, and under a cap that halves batches."""
    interactions = pixel_like(seed=1, users=300 if bench.tiny else 3000)
    rows = ["item_id,user_id,timestamp"]
    owners = np.repeat(np.arange(len(interactions.offsets) - 1), np.diff(interactions.offsets))
    rows += [
        f"{item},{user},{time}"
        for time, (item, user) in enumerate(zip(interactions.items, owners, strict=True))
    ]
    write_text(bench.folder / "pixel.csv", "\n".join(rows) + "\n")
    losses: dict[str, list[float]] = {}
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    for label, keys, cap in (
        ("compile: off", {"compile": "off"}, 0.0),
        ("compile: auto", {"compile": "auto"}, 0.0),
        ("compile: auto under a cap of 2 GiB", {"compile": "auto"}, 2.0),
    ):
        if cap and not total:
            continue

        def work(label: str = label, keys: dict[str, Any] = keys, cap: float = cap) -> Any:
            if cap:
                torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
            try:
                return real_run(bench, label, keys, losses)
            finally:
                if cap:
                    torch.cuda.set_per_process_memory_fraction(1.0)

        bench.attempt("run", label, work)


def real_run(
    bench: Bench, label: str, keys: dict[str, Any], losses: dict[str, list[float]]
) -> dict[str, Any]:
    """Fine-tune and evaluate through `main.py`'s function; say its times and losses."""
    values = {
        "data_path": str(bench.folder),
        "dataset": "pixel",
        "checkpoint_dir": str(bench.folder / "saved"),
        "run_name": f"run{len(losses)}",
        "epochs": 2,
        "qlora_dropout": 0.0,
        # Each part of a halved batch meets the same negatives, so that the loss stays the same.
        "num_negatives": 512,
        **keys,
    }
    length, batch = (10, 8) if bench.tiny else (50, 64)
    folder = train_and_rank(bench.config(Variant("", values), length=length, batch=batch))
    result = read_json(folder / "result.json")
    training = result["training"]
    losses[label] = [record["loss"] for record in training["history"]]
    first = next(iter(losses.values()))
    return {
        "losses": [round(loss, 4) for loss in losses[label]],
        "passed": all(
            abs(value - other) / other < 2e-2
            for value, other in zip(losses[label], first, strict=True)
        ),
        "micro_batch": training["micro_batch"],
        "training_s": round(result["timings_s"]["training"], 1),
        "tokens_per_s": 2 * training["transitions_per_epoch"] / result["timings_s"]["training"],
        "evaluation_s": round(result["timings_s"]["evaluation"], 1),
    }


def evaluation(bench: Bench) -> None:
    """Rank the whole catalogue for every user with the untrained UserLLM."""
    split = leave_one_out(pixel_like(seed=3, users=500 if bench.tiny else 100_000))
    reference: list[np.ndarray] = []
    large = {"eval_batch_size": 1024, "logits_budget_mb": 2048}
    for label, keys, layers in (
        ("256 users, padded rows", {"attn_implementation": "sdpa"}, False),
        ("256 users, one row", {}, False),
        ("1,024 users, one row", large, False),
        ("1,024 users, one row, compiled layers", large, True),
    ):
        if layers and bench.tiny:
            continue
        config = bench.config(Variant("", keys))
        bench.attempt(
            "evaluation",
            label,
            partial(rank_all, bench, config, split, layers, reference),
        )

    for label, near in (("targets near the top", True), ("targets anywhere", False)):
        bench.attempt("evaluation", f"ranking alone, {label}", partial(rank_alone, bench, near))


def rank_alone(bench: Bench, near: bool) -> dict[str, Any]:
    """Time the ranking of random unit vectors, in float32 and on tensor cores, and compare ranks.

    Args:
        bench: the sizes and the device.
        near: users stand near their targets, which then rank first or nearly so, as those of a
            trained model; else targets are items like any other.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, dim, users = (2000, 64, 50) if bench.tiny else (PIXEL_ITEMS, 2048, 2048)
    draw = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(count + 1, dim, generator=draw), dim=-1).to(device)
    targets = torch.randint(1, count + 1, (users,), generator=draw).to(device)
    vectors = torch.randn(users, dim, generator=draw).to(device) / dim**0.5
    if near:
        vectors += 0.1 * items[targets]
    vectors = F.normalize(vectors, dim=-1)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    budget = 1 << 28
    at_a_time = ranking.items_at_a_time(dim, budget, device)

    def item_slice(start: int, end: int) -> torch.Tensor:
        return items[start:end]

    def in_float32() -> torch.Tensor:
        scores = ranking.full_scores(vectors, item_slice, count, at_a_time)
        return ranking.full_ranks(scores, targets, nothing, nothing)

    def on_tensor_cores() -> torch.Tensor | None:
        return tensor_core_ranks(
            vectors,
            item_slice,
            count,
            targets,
            (nothing, nothing),
            items_at_a_time=at_a_time,
            budget_bytes=budget,
        )

    rates, ranked = [], []
    for way in (in_float32, on_tensor_cores):
        way()
        synchronize(device)
        began = time.perf_counter()
        ranked.append(way())
        synchronize(device)
        rates.append(users / (time.perf_counter() - began))
    exact, placed = ranked
    assert exact is not None
    return {
        "float32_users_per_s": rates[0],
        "tensor_cores_users_per_s": rates[1],
        "left_to_float32": placed is None,
        "ranks_equal": None if placed is None else float((placed == exact).float().mean()),
        "mean_rank": float(exact.double().mean()),
    }


def rank_all(
    bench: Bench, config: Config, split: Split, layers: bool, reference: list[np.ndarray]
) -> dict[str, Any]:
    """Time an evaluation; compare its ranks with those of the first way."""
    fabric = make_fabric(config)
    model = build_user_llm(config, bench.data, fabric, train=False).eval()
    if layers:
        encoder: Any = model.encoder
        compile_layers(encoder.decoder)
    few = leave_one_out(pixel_like(seed=2, users=100 if bench.tiny else 8000))
    small = make_evaluator(config, few, "test", fabric)
    began = time.perf_counter()
    evaluate(config, model, small, fabric)
    warm_up = time.perf_counter() - began
    evaluator = make_evaluator(config, split, "test", fabric)
    clear_peak()
    evaluation = evaluate(config, model, evaluator, fabric)
    reference.append(evaluation.ranks)
    near = np.abs(evaluation.ranks - reference[0]) <= 0.01 * bench.data.interactions.num_items
    return {
        "users_per_s": len(evaluation.ranks) / evaluation.seconds,
        "warm_up_s": round(warm_up, 1),
        "ranks_within_1_percent": float(near.mean()),
        "peak_bytes": peak_bytes(fabric.device),
    }


def caching(bench: Bench) -> None:
    """Encode items with a model of TinyLlama's shape, emb token, 8 to 64 tokens each, 12 shared."""
    folder = bench.folder / "item"
    sizes = {**(TINY if bench.tiny else TINYLLAMA), "vocab_size": 1000}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 65, 200 if bench.tiny else 20_000)
    prefix = rng.integers(0, 1000, 12)
    tokens = [rng.integers(0, 1000, size) for size in lengths]
    for ids in tokens:
        ids[:12] = prefix[: len(ids)]
    reference: list[torch.Tensor] = []
    budgets = (512,) if bench.tiny else (8192, 32768)
    for attention_name, label, ahead, compiled in (
        ("sdpa", "padded, one batch after the other", False, False),
        ("sdpa", "padded, next batch prepared ahead", True, False),
        (VARLEN, "one row, next batch prepared ahead", True, False),
        (VARLEN, "one row, compiled layers, prefix read with each text", True, True),
    ):
        if compiled and bench.tiny:
            continue
        with emulated_kernel() if bench.tiny else nullcontext():
            encoder = item_encoder(folder, attention_name, compiled)
            # Texts of fewer than 12 tokens are read whole.
            encoder.share_prefix(prefix)
            for budget in budgets:
                bench.attempt(
                    "caching",
                    f"{label}, batches of {budget:,} tokens",
                    partial(encode_catalogue, encoder, tokens, budget, ahead, reference),
                )
        del encoder


def item_encoder(folder: Path, attention_name: str, compiled: bool) -> ItemEncoder:
    """Load the random ItemLLM as `item_caching.py` does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_decoder(folder, dtype=dtype, attention=attention_name, keep_token_embedding=True)
    model = model.to(device)
    if device.type == "cuda":
        fuse_norms(model)
    emb_token = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    encoder = ItemEncoder(model, None, emb_token.to(device), 64)
    if compiled:
        encoder.compile()
    return encoder


def encode_catalogue(
    encoder: ItemEncoder,
    tokens: list[np.ndarray],
    budget: int,
    ahead: bool,
    reference: list[torch.Tensor],
) -> dict[str, Any]:
    """Time the encoding of all items; compare the embeddings with those of the first way."""
    lengths = np.array([len(ids) for ids in tokens])
    batches = list(length_batches(lengths, budget, 1))
    texts = [[tokens[row] for row in batch.tolist()] for batch in batches]
    packed = encoder.packed

    def encode(some: list[list[np.ndarray]]) -> list[torch.Tensor]:
        return list(encoder.encode_all(some) if ahead else map(encoder.encode, some))

    encode([texts[0], texts[-1]])
    synchronize(encoder.model.device)
    began = time.perf_counter()
    embeddings = torch.cat(encode(texts))
    seconds = time.perf_counter() - began
    by_item = torch.empty_like(embeddings)
    by_item[torch.from_numpy(np.concatenate(batches))] = embeddings
    reference.append(by_item)
    furthest = (by_item - reference[0]).norm(dim=1) / reference[0].norm(dim=1)
    return {
        "passed": float(furthest.max()) < 0.1,
        "tokens_per_s": float(lengths.sum() + len(lengths)) / seconds,
        "items_per_s": len(lengths) / seconds,
        "one_row": packed,
        "furthest_relative": float(furthest.max()),
        "peak_bytes": peak_bytes(encoder.model.device),
    }


@contextmanager
def emulated_kernel() -> Iterator[None]:
    """Put the reference in the place of torch's variable-length kernel, which wants a GPU."""
    kept = varlen.varlen_attn, varlen._CAUSAL, varlen._GROUPED
    varlen.varlen_attn = reference_varlen_attn
    varlen._CAUSAL, varlen._GROUPED = {"window_size": (-1, 0)}, True
    try:
        yield
    finally:
        varlen.varlen_attn, varlen._CAUSAL, varlen._GROUPED = kept


# SmolLM2-135M's shape.
SMOLLM2 = {
    "vocab_size": 1,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


def demo(bench: Bench) -> None:
    """Train with the demo's full setting: SmolLM2's shape, MovieLens-100K's sizes."""
    folder = bench.folder / "demo"
    folder.mkdir()
    items, users = 1682, 943
    prepare(folder, TINY if bench.tiny else SMOLLM2, items)
    rng = np.random.default_rng(0)
    count = users * 106
    data = Data(
        leave_one_out(
            Interactions(
                user_ids=np.arange(users).astype(str),
                item_ids=np.arange(items + 1).astype(str),
                items=rng.integers(1, items + 1, count).astype(np.int32),
                timestamps=np.arange(count),
                offsets=np.arange(users + 1) * 106,
            )
        ),
        open_cache(folder / "cache.safetensors"),
    )
    demo_bench = Bench(bench.args, folder, data, bench.out, bench.result)
    files = [ROOT / "demo/demo.yaml", ROOT / "demo/full.yaml"]
    for label, keys, layers in (
        ("masked rows of 4L, gradient checkpointing", {**ROWS, "gradient_checkpointing": True}, False),
        ("one row", {"compile": "off"}, False),
        ("one row, CUDA graph", {"compile": "graph"}, False),
        ("one row, compiled layers, CUDA graph", {"compile": "graph"}, True),
    ):  # fmt: skip
        if layers and bench.tiny:
            continue
        values = {
            **keys,
            "use_qlora": True,
            "user_pretrain_dir": str(folder / "model"),
            "item_cache_path": str(folder / "cache.safetensors"),
            "show_progress": False,
        }
        config = load_config([ROOT / "code/overall/LLM_ddp.yaml", *files], values)[0]
        variant = Variant(label, keys, layers)
        demo_bench.attempt(
            "demo",
            label,
            partial(train_ours, demo_bench, config, variant),
        )


def caps(bench: Bench) -> None:
    """Find the largest batch that trains under 6, 8 and 12 GiB, NF4 and L 50."""
    if not torch.cuda.is_available():
        bench.add("caps", {"label": "skipped", "reason": "no CUDA device"})
        return
    total = torch.cuda.get_device_properties(0).total_memory
    config = bench.config(Variant("", {"compile": "off"}))
    for cap in (6, 8, 12):

        def work(cap: int = cap) -> dict[str, Any]:
            torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
            try:
                return largest_batch(bench, config)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)

        bench.attempt("caps", f"{cap} GiB", work)


def largest_batch(bench: Bench, config: Config) -> dict[str, Any]:
    """Raise the batch size until a step runs out of memory, then halve the gap three times."""
    trained = build(bench, config, OURS)
    collate = trained.loader.collate_fn
    order = np.random.default_rng(0).permutation(len(collate.dataset))

    def fits(size: int) -> bool:
        try:
            trained.step(collate(order[:size]))
        except torch.OutOfMemoryError:
            fitting = False
        else:
            fitting = True
        trained.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return fitting

    low, high = 0, 64
    while fits(high) and high < len(order):
        low, high = high, 2 * high
    for _ in range(3):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    positions = int(trained.loader.collate_fn.dataset.lengths[order[:low]].sum())
    return {"largest_batch": low, "positions": positions}


def deepspeed(bench: Bench) -> None:
    """Run ZeRO stages 2 and 3 for an epoch of few users, plain LoRA and NF4, through main.py."""
    if importlib.util.find_spec("deepspeed") is None:
        bench.add("deepspeed", {"label": "skipped", "reason": "deepspeed is not installed"})
        return
    if bench.tiny:
        bench.add("deepspeed", {"label": "skipped", "reason": "tests/trainer has it on the CPU"})
        return
    for stage, kind in ((0, "none"), (2, "none"), (3, "none"), (2, "nf4")):
        keys = {"qlora_quant_type": kind}
        if stage:
            keys |= {"strategy": "deepspeed", "stage": str(stage)}
        command = [sys.executable, str(ROOT / "code/main.py"), "--config_file"]
        command += [str(ROOT / "code/overall/LLM_ddp.yaml"), str(ROOT / "code/HLLM/HLLM.yaml")]
        keys |= {
            "use_qlora": "True",
            "user_pretrain_dir": str(bench.folder / "model"),
            "item_cache_path": str(bench.folder / "cache.safetensors"),
            "data_path": str(bench.folder),
            "dataset": "pixel",
            "epochs": "1",
            "show_progress": "False",
            "checkpoint_dir": str(bench.folder / f"deepspeed{stage}{kind}"),
        }
        command += [word for key, value in keys.items() for word in (f"--{key}", value)]

        def work(command: list[str] = command) -> dict[str, Any]:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            table = [line for line in done.stdout.splitlines() if "NDCG@10" in line]
            last = done.stderr.strip().splitlines()[-1:] if done.returncode else table
            return {"exit_code": done.returncode, "said": " ".join(last)[:200]}

        label = f"ZeRO-{stage}, {kind}" if stage else f"DDP, {kind}"
        bench.attempt("deepspeed", label, work)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "checks": checks,
    "training": training,
    "compiled": compiled,
    "run": run,
    "evaluation": evaluation,
    "grid": grid,
    "demo": demo,
    "caching": caching,
    "caps": caps,
    "deepspeed": deepspeed,
}


def markdown(result: dict[str, Any]) -> str:
    """Write the result as Markdown tables, one a section."""
    lines = [
        f"{result.get('device', '')}, torch {torch.__version__}; medians of {result['steps']} steps. "
        f"Real tokens are positions trained.",
    ]
    for section in dict.fromkeys(row["section"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["section"] == section]
        keys = list(
            dict.fromkeys(key for row in rows for key in row if key not in ("section", "seconds"))
        )
        lines += ["", f"### {section}", "", f"| {' | '.join(map(_heading, keys))} |"]
        lines.append(f"| --- |{' ---: |' * (len(keys) - 1)}")
        lines += [f"| {' | '.join(_cell(key, row.get(key)) for key in keys)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _heading(key: str) -> str:
    named = {"estimate_bytes": "--dry_run GiB", "mfu": "MFU", "label": "way"}
    return named.get(key, key.replace("_bytes", " GiB").replace("_per_s", "/s").replace("_", " "))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return f"{value / GIB:.2f}"
    if key == "mfu":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return one_line(value, 200).replace("|", "/")


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", choices=["True", "False"], default="False")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rows", default="", help="regular expression of the rows to measure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the device")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    tiny = args.tiny == "True"
    if not tiny and not torch.cuda.is_available():
        sys.stderr.write(
            "error: torch finds no CUDA device; --tiny True tries the script on a CPU.\n"
        )
        return EXIT_BAD_INPUT
    warnings.filterwarnings("ignore")
    set_up_logging(quiet=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, TINY if tiny else {**TINYLLAMA, "vocab_size": 1}, PIXEL_ITEMS)
        interactions = pixel_like(users=500 if tiny else 20_000)
        data = Data(leave_one_out(interactions), open_cache(folder / "cache.safetensors"))
        result = {"steps": args.steps, "tiny": tiny, "torch": torch.__version__, "rows": []}
        bench = Bench(args, folder, data, args.out, result)
        for section in args.only:
            try:
                SECTIONS[section](bench)
            except Exception as error:  # a section that fails must not cost the others
                traceback.print_exc(limit=-4)
                bench.add(section, {"label": section, "error": one_line(error, 300)})
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s in all: {args.out / 'gpu.json'}\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

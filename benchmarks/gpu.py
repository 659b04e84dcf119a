"""Everything about speed and memory that needs a GPU, in one run of under six minutes.

    python benchmarks/gpu.py                        # all sections
    python benchmarks/gpu.py --only checks training
    python benchmarks/gpu.py --seconds 200          # no row begins after that

TinyLlama-1.1B's shape, random weights, lengths like Pixel200K's, QLoRA on q_proj and v_proj. The plain
way (transformers + peft, padded to L) and HSFT's variants run in this process one after the other on
the same sequences. Every figure is printed and written to `gpu.json` as soon as it is there, so that a
run that is cut short loses nothing; `gpu.md` is the same as Markdown tables.
`--tiny True` runs the same code on a CPU with tiny shapes: a test of the script, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import itertools
import logging
import math
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel
from transformers.utils import logging as transformers_logging

from benchmarks.dispatched import Dispatched
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
from hsft.model.accelerate import StepGraphs, compile_layers
from hsft.model.attention import VARLEN
from hsft.model.backbone import load_decoder
from hsft.model.norms import fuse_norms
from hsft.model.varlen import varlen_attention_forward, varlen_attn
from hsft.report import memory
from hsft.report.memory import CUDA_CONTEXT, GIB, TrainingShape, estimate
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
# Tokens of the random model's vocabulary; the UserLLM reads none of them.
_VOCABULARY = 1000
# Steps before those that are timed: kernels are chosen, the optimizer's states made.
_WARM_UP = 3
# Until every bucket that comes up often has its graph; fewer where many rows are measured.
_GRAPH_WARM_UP, _GRID_GRAPH_WARM_UP = 12, 8
# Steps of the grid's rows, and of the demo's.
_GRID_STEPS, _DEMO_STEPS = 5, 8

T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Attributes:
        label: its name.
        keys: configuration keys that differ from the repository's files.
        fused: leave 4-bit products to bitsandbytes' own choice of kernel.
        float32_residual: norms and residual stream in float32 under autocast, as peft prepares it.
    """

    label: str
    keys: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    float32_residual: bool = False


ROWS: dict[str, Any] = {"attn_implementation": "sdpa", "compile": "off"}
BF16: dict[str, Any] = {"qlora_quant_type": "none"}
OURS = Variant("HSFT")
# Each with a model of its own.
NF4_VARIANTS = [
    Variant("masked rows of 4L, float32 residual", ROWS, fused=True, float32_residual=True),
    Variant("masked rows of 4L", ROWS),
    Variant("one row, bitsandbytes' kernels", {"compile": "off"}, fused=True),
]
BF16_VARIANTS = [Variant("masked rows of 4L", ROWS)]
# All with one model. The last one compiles its layers in place.
ONE_ROW_VARIANTS = [
    Variant("one row", {"compile": "off"}),
    Variant("one row, CUDA graph", {"compile": "graph"}),
    Variant("one row, compiled layers, CUDA graph", {"compile": "layers_graph"}),
]


def compiles(variant: Variant) -> bool:
    """Say whether a variant waits for torch.compile, which takes minutes on a CPU."""
    return str(variant.keys.get("compile")).startswith("layers")


class Shared(Generic[T]):
    """An object that several rows use: made for the first of them, and again after one that failed.

    Args:
        make: makes the object.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None

    def get(self) -> T:
        """Return the object."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def drop(self) -> None:
        """Forget the object, so that its memory is free."""
        self._made = None


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        args: the command line.
        folder: of the random model and its cache.
        data: interactions and item cache.
        out: folder of the results.
        result: everything measured so far.
        began: when the run began, by `time.perf_counter`.
        plain: the plain way's rows for NF4, by rank, length and batch size.
    """

    args: argparse.Namespace
    folder: Path
    data: Data
    out: Path
    result: dict[str, Any]
    began: float
    plain: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        """Whether this is a test of the script."""
        return bool(self.args.tiny == "True")

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Print a row, and write all rows."""
        self.result["rows"].append({"section": section, **row})
        sys.stdout.write(f"[{section}] {describe(row)}\n")
        sys.stdout.flush()
        self.write()

    def write(self) -> None:
        """Write all rows."""
        write_json(self.out / "gpu.json", self.result)
        write_text(self.out / "gpu.md", markdown(self.result))

    def attempt(
        self,
        section: str,
        label: str,
        work: Callable[[], dict[str, Any]],
        shared: Shared[Any] | None = None,
    ) -> None:
        """Add what `work` returns; an error becomes a row that says so.

        Rows that `--rows` leaves out are skipped, and those for which `--seconds` leaves no time.
        `shared` is what `work` uses along with other rows.
        """
        if not re.search(self.args.rows, label):
            return
        limit = self.args.seconds
        if limit is not None and time.perf_counter() - self.began > limit:
            self.result["left_out"].append(f"[{section}] {label}")
            return
        clear_peak()
        began = time.perf_counter()
        try:
            row = {"label": label, **work()}
        except Exception as error:  # one variant that fails must not cost the others
            traceback.print_exc(limit=-4)
            row = {"label": label, "error": f"{type(error).__name__}: {one_line(error, 300)}"}
            if shared is not None:
                shared.drop()
        row["seconds"] = round(time.perf_counter() - began, 1)
        self.add(section, row)
        clear()

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
    # On a GPU drawing a billion numbers takes no time.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaModel(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    model.to(torch.bfloat16).cpu().save_pretrained(folder / "model")
    vectors = torch.randn(items, sizes["hidden_size"]).half()
    save_cache(folder / "cache.safetensors", [str(n + 1) for n in range(items)], vectors, {})


@dataclass
class Trained:
    """A model that is ready to be trained: a step at a time, batch after batch."""

    model: Any
    wrapped: Any
    optimizer: Any
    graphs: StepGraphs | None
    loader: Any
    fabric: Any

    def exchange(self, bench: Bench, config: Config) -> Trained:
        """Take the batches of another configuration, and what its `compile` says of launches."""
        self.release()
        dataset = sequences(bench.data.interactions, config.MAX_ITEM_LIST_LENGTH)
        adapted = self.model.encoder.items.adapter is not None
        self.loader = make_train_loader(config, dataset, self.fabric, list_items=adapted)
        self.model.encoder.max_length = config.longest_list_length
        # Steps enough that `compile: auto` does not find the run too short.
        self.graphs = accelerate(config, self.model, self.wrapped, self.loader, 10**6, self.fabric)
        return self

    def release(self) -> None:
        """Free CUDA graphs and gradients."""
        self.optimizer.zero_grad()
        if self.graphs is not None:
            self.graphs.release()
        self.graphs = None

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
    optimizer = build_optimizer(model, config, fabric.device)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    return Trained(model, wrapped, wrapped_optimizer, None, None, fabric).exchange(bench, config)


@dataclass
class Plain:
    """The plain loop's model, on the same sequences."""

    wrapped: Any
    optimizer: Any
    fabric: Any

    def step(self, length: int, batch: TrainBatch) -> None:
        """Take an optimizer step on a batch, padded to `length`."""
        padded = pad_to(length, batch)
        loss = self.wrapped(*(part.to(self.fabric.device) for part in padded))
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_plain(bench: Bench, config: Config) -> Plain:
    """Build the plain loop's model."""
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
    return Plain(wrapped, wrapped_optimizer, fabric)


@dataclass(frozen=True)
class Timed:
    """What `measure` finds.

    Attributes:
        row: the figures.
        positions: most positions computed in a step, padding counted.
    """

    row: dict[str, Any]
    positions: int


def measure(
    step: Callable[[TrainBatch], Any],
    batches: Iterator[TrainBatch],
    device: torch.device,
    count: int,
    warm_up: int,
    captures: Callable[[], int] = lambda: 0,
) -> Timed:
    """Time steps alone, waiting for each, and then as many without waiting, loading included.

    Peak memory is of all of them, in bytes. The steps without waiting are repeated while graphs
    are still captured among them (`captures` counts these), four times at most: a run captures
    each shape once.
    """
    times, reals, most = [], [], 0
    for number, batch in enumerate(itertools.islice(batches, warm_up + count)):
        synchronize(device)
        began = time.perf_counter()
        step(batch)
        synchronize(device)
        most = max(most, batch.history.numel())
        if number >= warm_up:
            times.append(time.perf_counter() - began)
            reals.append(int(batch.attention_mask.sum()))
    for _ in range(4):
        before, began, real = captures(), time.perf_counter(), 0
        for batch in itertools.islice(batches, count):
            step(batch)
            real += int(batch.attention_mask.sum())
            most = max(most, batch.history.numel())
        synchronize(device)
        seconds = time.perf_counter() - began
        if captures() == before:
            break
    rates = [tokens / alone for tokens, alone in zip(reals, times, strict=True)]
    row = {
        "ms": 1e3 * statistics.median(times),
        "real_tokens_per_s": statistics.median(rates),
        "overlapped_tokens_per_s": real / seconds,
        "peak_bytes": peak_bytes(device),
    }
    return Timed(row, most)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors took since `clear_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def clear_peak() -> None:
    """Start to count the peak again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def train_plain(
    bench: Bench, config: Config, shared: Shared[Plain] | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Measure the plain loop; `shared` has its model, None: it is built."""
    plain = build_plain(bench, config) if shared is None else shared.get()
    dataset = sequences(bench.data.interactions, config.MAX_ITEM_LIST_LENGTH)
    loader = make_train_loader(config, dataset, plain.fabric)
    loader.collate_fn = TrainCollate(dataset)
    clear_peak()
    row = measure(
        partial(plain.step, config.MAX_ITEM_LIST_LENGTH),
        iter(loader),
        plain.fabric.device,
        steps or bench.args.steps,
        2,
    ).row
    if config.qlora_quant_type == "nf4":
        bench.plain[_size(config)] = row
    return row


def _size(config: Config) -> tuple[int, int, int]:
    """Return rank, length and batch size."""
    return config.qlora_r, config.MAX_ITEM_LIST_LENGTH, config.train_batch_size


def train_ours(
    bench: Bench,
    config: Config,
    variant: Variant,
    shared: Shared[Trained] | None = None,
    steps: int | None = None,
    graph_warm_up: int = _GRAPH_WARM_UP,
) -> dict[str, Any]:
    """Measure a variant beside the plain way, the memory estimate and the model FLOPs utilisation.

    Args:
        bench: the sizes and the data.
        config: the variant's configuration.
        variant: the way of training.
        shared: has a model of the same weights; None: it is built.
        steps: that are timed; None: as the command line says.
        graph_warm_up: steps before them where CUDA graphs are captured.
    """
    trained = shared.get().exchange(bench, config) if shared else build(bench, config, variant)
    clear_peak()
    device, graphs = trained.fabric.device, trained.graphs

    def captures() -> int:
        return 0 if graphs is None else graphs.graphs

    timed = measure(
        trained.step,
        trained.batches(),
        device,
        steps or bench.args.steps,
        _WARM_UP if graphs is None else graph_warm_up,
        captures,
    )
    row = timed.row
    counted = {
        "graphs": captures(),
        "capture_s": 0.0 if graphs is None else round(graphs.seconds, 2),
    }
    trained.release()
    shape = shape_of(config, trained.loader.dataset.lengths)
    size = config.train_batch_size
    per_token = memory.saved_bytes_per_token(shape)
    # Estimates are without the driver's own memory, which the measured peak leaves out too.
    peak = peak_tflops(bench.result["device"], bench.args.peak_tflops)
    used = flops_per_token(config) * row["overlapped_tokens_per_s"]
    plain = bench.plain.get(_size(config), {})
    return {
        **row,
        "against_plain": _ratio(row, plain, "overlapped_tokens_per_s"),
        "memory_of_plain": _ratio(row, plain, "peak_bytes"),
        "estimate_bytes": estimate(shape, size, per_token).total - CUDA_CONTEXT,
        "estimate_of_largest_bytes": estimate(
            with_positions(shape, size, timed.positions), size, per_token
        ).total
        - CUDA_CONTEXT,
        "mfu": used / (peak * 1e12) if peak else None,
        **counted,
    }


def _ratio(row: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    above, below = row.get(key), other.get(key)
    return float(above / below) if above and below else None


def shape_of(config: Config, lengths: np.ndarray) -> TrainingShape:
    """Return what the memory of training on sequences of these lengths depends on."""
    return replace(
        training_shape(config),
        mean_length=float(lengths.mean()),
        length_deviation=float(lengths.std()),
    )


def with_positions(shape: TrainingShape, batch_size: int, positions: int) -> TrainingShape:
    """Return a shape whose largest batch has so many positions."""
    return replace(shape, mean_length=positions / batch_size, length_deviation=0.0)


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
        clear_workspaces()
        torch.cuda.empty_cache()
    clear_peak()


def clear_workspaces() -> None:
    """Free what torch keeps for cuBLAS, 32 MiB a thread and stream on Hopper; products make it again.

    What a row's graphs were captured with would count in the peak of later rows. No graph may be
    replayed afterwards.
    """
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if free is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        free()


# --- sections


def checks(bench: Bench) -> None:
    """Compare the fast ways with the simple ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench.attempt("checks", "varlen against one sequence at a time", partial(check_varlen, device))
    bench.attempt("checks", "a step waits for nothing", partial(check_waits, bench))
    bench.attempt("checks", "operations dispatched in a step", partial(check_dispatched, bench))
    simple = Variant("masked rows", ROWS, float32_residual=True)
    steps = 3 if bench.tiny else 20
    rate: dict[str, Any] = {"qlora_dropout": 0.0, "optim_args": {"learning_rate": 1e-3}}
    reference: dict[str, Any] = {}
    for variant in (
        simple,
        Variant("one row", {"compile": "off"}),
        Variant("one row, CUDA graph", {"compile": "graph"}),
        Variant("bfloat16, masked rows", {**BF16, **ROWS}),
        Variant("bfloat16, one row, CUDA graph", {**BF16, "compile": "graph"}),
    ):
        keyed = replace(variant, keys={**variant.keys, **rate})
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


def check_dispatched(bench: Bench) -> dict[str, Any]:
    """Count the operations that a training step dispatches, kernel by kernel and as a CUDA graph."""
    trained = build(bench, bench.config(Variant("", {"compile": "off"})), OURS)
    batch = next(trained.batches())
    # Kernels are chosen, and the optimizer's states made.
    trained.step(batch)
    with Dispatched() as eager:
        trained.step(batch)
    row: dict[str, Any] = {
        "passed": eager.launches <= 3000,
        "operations": eager.launches,
        "views": eager.counts.total() - eager.launches,
    }
    trained.exchange(bench, bench.config(Variant("", {"compile": "graph"})))
    if trained.graphs is None:
        return row
    batch = next(trained.batches())
    for _ in range(4):
        trained.step(batch)
    with Dispatched() as replayed:
        trained.step(batch)
    return {
        **row,
        "passed": row["passed"] and trained.graphs.graphs == 1 and replayed.launches <= 1000,
        "graph_operations": replayed.launches,
        "graph_views": replayed.counts.total() - replayed.launches,
    }


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
    kinds: list[tuple[str, dict[str, Any], list[Variant]]] = [
        ("NF4", {}, NF4_VARIANTS),
        ("bfloat16", BF16, BF16_VARIANTS),
    ]

    def config(variant: Variant, keys: dict[str, Any]) -> Config:
        keyed = replace(variant, keys={**variant.keys, **keys})
        return bench.config(keyed, length=length, batch=batch)

    for kind, keys, _ in kinds:
        work = partial(train_plain, bench, config(OURS, keys))
        bench.attempt("training", f"{kind}: {PLAIN}", work)
    for kind, keys, variants in kinds:
        for variant in variants:
            work = partial(train_ours, bench, config(variant, keys), variant)
            bench.attempt("training", f"{kind}: {variant.label}", work)
        first = ONE_ROW_VARIANTS[0]
        shared = Shared(partial(build, bench, config(first, keys), first))
        for variant in ONE_ROW_VARIANTS:
            if bench.tiny and compiles(variant):
                continue
            work = partial(train_ours, bench, config(variant, keys), variant, shared)
            bench.attempt("training", f"{kind}: {variant.label}", work, shared)
        shared.drop()
        clear()


def grid(bench: Bench) -> None:
    """Measure the plain way and HSFT as it is set over ranks, lengths and batch sizes.

    Each has one model for each rank; rows differ in the batches.
    """
    ranks, sizes = (8, 64), [(50, 64), (50, 16), (50, 256), (10, 64), (10, 16), (10, 256)]
    if bench.tiny:
        ranks, sizes = (8, 4), [(10, 4), (6, 2)]
    steps = min(_GRID_STEPS, bench.args.steps)
    for rank in ranks:
        # As long as the longest: what is shared is built once.
        longest = bench.config(OURS, rank=rank, length=sizes[0][0], batch=sizes[0][1])
        plain = Shared(partial(build_plain, bench, longest))
        for length, batch in sizes:
            config = bench.config(OURS, rank=rank, length=length, batch=batch)
            bench.attempt(
                "grid",
                f"r {rank}, {batch} x {length}: plain",
                partial(train_plain, bench, config, plain, steps),
                plain,
            )
        plain.drop()
        clear()
        ours = Shared(partial(build, bench, longest, OURS))
        for length, batch in sizes:
            config = bench.config(OURS, rank=rank, length=length, batch=batch)
            bench.attempt(
                "grid",
                f"r {rank}, {batch} x {length}: HSFT",
                partial(train_ours, bench, config, OURS, ours, steps, _GRID_GRAPH_WARM_UP),
                ours,
            )
        ours.drop()
        clear()


@dataclass(frozen=True)
class Run:
    """A whole run.

    Attributes:
        label: its name.
        keys: configuration keys.
        like: label of the run that has the same losses; None: there is none.
        cap: GiB that the process may take; 0: any number. Batches are halved where it is set.
    """

    label: str
    keys: dict[str, Any]
    like: str | None = "compile: off"
    cap: float = 0.0


def run(bench: Bench) -> None:
    """Run the program itself: by kinds of `compile` and of batches, and where batches are halved."""
    # Steps enough for `compile: auto` to capture graphs.
    interactions = pixel_like(seed=1, users=100 if bench.tiny else 1700)
    rows = ["item_id,user_id,timestamp"]
    owners = np.repeat(np.arange(len(interactions.offsets) - 1), np.diff(interactions.offsets))
    rows += [
        f"{item},{user},{time}"
        for time, (item, user) in enumerate(zip(interactions.items, owners, strict=True))
    ]
    write_text(bench.folder / "pixel.csv", "\n".join(rows) + "\n")
    losses: dict[str, list[float]] = {}
    large = 32 if bench.tiny else 512
    graph: dict[str, Any] = {"compile": "graph", "train_batch_size": large}
    for each in (
        Run("compile: off", {"compile": "off"}),
        Run("compile: auto", {"compile": "auto"}),
        Run(f"batch {large}", graph, None),
        # 208 sequences fit.
        Run(f"batch {large} under a cap of 6 GiB", graph, f"batch {large}", 6.0),
        Run("train_batch_size: auto", {"train_batch_size": "auto", "epochs": 1}, None),
        Run("compile: layers_graph", {"compile": "layers_graph"}),
    ):
        on_cpu = not torch.cuda.is_available()
        if on_cpu and (each.cap or compiles(Variant("", each.keys))):
            continue
        with slow_collection():
            bench.attempt("run", each.label, partial(real_run, bench, each, losses))


@contextmanager
def memory_cap(allowed: float | None) -> Iterator[None]:
    """Let torch take so many bytes of the GPU's memory; None: all of it."""
    if allowed is None:
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def real_run(bench: Bench, each: Run, losses: dict[str, list[float]]) -> dict[str, Any]:
    """Fine-tune and evaluate through `main.py`'s function; say its times and losses."""
    values = {
        "data_path": str(bench.folder),
        "dataset": "pixel",
        "checkpoint_dir": str(bench.folder / "saved"),
        "run_name": re.sub(r"\W+", "-", each.label),
        "overwrite": True,
        "epochs": 2,
        # Measured by itself.
        "eval_baseline": False,
        "qlora_dropout": 0.0,
        # Each part of a halved batch meets the same negatives, so that the loss stays the same.
        "num_negatives": 512,
        **each.keys,
    }
    length, batch = (10, 8) if bench.tiny else (50, 64)
    config = bench.config(Variant("", values), length=length, batch=batch)
    with memory_cap(each.cap * GIB or None), redirect_stdout(io.StringIO()):
        folder = train_and_rank(config)
    result = read_json(folder / "result.json")
    training = result["training"]
    losses[each.label] = [record["loss"] for record in training["history"]]
    compared = losses.get(each.like or each.label, losses[each.label])
    furthest = max(
        abs(value - other) / other
        for value, other in zip(losses[each.label], compared, strict=True)
    )
    taken = result["config"]["train_batch_size"]
    halved = training["micro_batch"] is not None and training["micro_batch"] < taken
    finite = all(map(math.isfinite, losses[each.label]))
    seconds = result["timings_s"]["training"]
    return {
        "losses": [round(loss, 4) for loss in losses[each.label]],
        "furthest_relative": furthest,
        "passed": finite and furthest < 2e-2 and halved == bool(each.cap),
        "train_batch_size": taken,
        "micro_batch": training["micro_batch"],
        "training_s": round(seconds, 1),
        "tokens_per_s": len(training["history"]) * training["transitions_per_epoch"] / seconds,
        "evaluation_s": round(result["timings_s"]["evaluation"], 1),
        "peak_bytes": peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def evaluation(bench: Bench) -> None:
    """Rank the whole catalogue for every user with the untrained UserLLM."""
    split = leave_one_out(pixel_like(seed=3, users=100 if bench.tiny else 20_000))
    reference: list[np.ndarray] = []
    large = {"eval_batch_size": 1024, "logits_budget_mb": 2048}
    for label, keys, layers in (
        ("256 users, padded rows", {"attn_implementation": "sdpa"}, False),
        ("256 users, one row", {}, False),
        ("1,024 users, logits_budget_mb 2,048, one row", large, False),
        ("1,024 users, logits_budget_mb 2,048, one row, compiled layers", large, True),
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
    few = leave_one_out(pixel_like(seed=2, users=20 if bench.tiny else 2000))
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
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 65, 200 if bench.tiny else 20_000)
    prefix = rng.integers(0, _VOCABULARY, 12)
    tokens = [rng.integers(0, _VOCABULARY, size) for size in lengths]
    for ids in tokens:
        ids[:12] = prefix[: len(ids)]
    reference: list[torch.Tensor] = []
    small, large = (512, 1024) if bench.tiny else (8192, 32768)
    for attention_name, label, ahead, compiled, budgets in (
        ("sdpa", "padded, one batch after the other", False, False, (small,)),
        (VARLEN, "one row, next batch prepared ahead", True, False, (small, large)),
        (VARLEN, "one row, compiled layers, prefix read with each text", True, True, (large,)),
    ):
        if compiled and bench.tiny:
            continue
        with emulated_kernel() if bench.tiny else nullcontext():
            shared = Shared(
                partial(item_encoder, bench.folder / "model", attention_name, compiled, prefix)
            )
            for budget in budgets:
                bench.attempt(
                    "caching",
                    f"{label}, batches of {budget:,} tokens",
                    partial(encode_catalogue, shared, tokens, budget, ahead, reference),
                    shared,
                )
            shared.drop()
            clear()


def item_encoder(
    folder: Path, attention_name: str, compiled: bool, prefix: np.ndarray
) -> ItemEncoder:
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
    # Texts of fewer than 12 tokens are read whole.
    encoder.share_prefix(prefix)
    return encoder


def encode_catalogue(
    shared: Shared[ItemEncoder],
    tokens: list[np.ndarray],
    budget: int,
    ahead: bool,
    reference: list[torch.Tensor],
) -> dict[str, Any]:
    """Time the encoding of all items; compare the embeddings with those of the first way."""
    encoder = shared.get()
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
    items, users = 1682, 40 if bench.tiny else 943
    prepare(folder, TINY if bench.tiny else SMOLLM2, items)
    clear()
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
    demo_bench = Bench(bench.args, folder, data, bench.out, bench.result, bench.began)
    steps = min(_DEMO_STEPS, bench.args.steps)
    files = [ROOT / "demo/demo.yaml", ROOT / "demo/full.yaml"]
    checkpointed = Variant(
        "masked rows of 4L, gradient checkpointing", {**ROWS, "gradient_checkpointing": True}
    )
    for variant in (checkpointed, *ONE_ROW_VARIANTS):
        if bench.tiny and compiles(variant):
            continue
        values = {
            **variant.keys,
            "use_qlora": True,
            "user_pretrain_dir": str(folder / "model"),
            "item_cache_path": str(folder / "cache.safetensors"),
            "show_progress": False,
        }
        config = load_config([ROOT / "code/overall/LLM_ddp.yaml", *files], values)[0]
        demo_bench.attempt(
            "demo",
            variant.label,
            partial(train_ours, demo_bench, config, variant, None, steps),
        )
        if variant is checkpointed:
            demo_bench.attempt(
                "memory",
                f"demo, {variant.label}",
                partial(step_memory, demo_bench, config, variant),
            )


def step_memory(bench: Bench, config: Config, variant: Variant) -> dict[str, Any]:
    """Say what a training step holds at each of its stages, and what --dry_run counts for it.

    The batch is the one of the first 50 with the most positions.
    """
    trained = build(bench, config, variant)
    device = trained.fabric.device
    row: dict[str, Any] = {"built_bytes": allocated(device), "build_peak_bytes": peak_bytes(device)}
    batches = itertools.islice(trained.batches(), 3 if bench.tiny else 50)
    batch = max(batches, key=lambda batch: batch.history.numel())
    trained.step(batch)
    synchronize(device)
    with_workspaces = allocated(device)
    clear_workspaces()
    row["held_bytes"] = allocated(device)
    row["workspace_bytes"] = with_workspaces - row["held_bytes"]
    clear_peak()
    loss = trained.wrapped(batch.to(device))
    synchronize(device)
    row |= {"after_forward_bytes": allocated(device), "forward_peak_bytes": peak_bytes(device)}
    clear_peak()
    trained.fabric.backward(loss)
    synchronize(device)
    row |= {"after_backward_bytes": allocated(device), "backward_peak_bytes": peak_bytes(device)}
    clear_peak()
    trained.optimizer.step()
    synchronize(device)
    row["update_peak_bytes"] = peak_bytes(device)
    positions = batch.history.numel()
    shape = shape_of(config, trained.loader.dataset.lengths)
    shape = with_positions(shape, config.train_batch_size, positions)
    parts = estimate(shape, config.train_batch_size)
    row |= {f"estimated_{name.replace(' ', '_')}_bytes": size for name, size in memory.rows(parts)}
    return {"positions": positions, **row}


def allocated(device: torch.device) -> int:
    """Return what tensors on a GPU take, in bytes; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def caps(bench: Bench) -> None:
    """Find the largest batch that trains under 6, 8 and 12 GiB, NF4 and L 50."""
    if not torch.cuda.is_available():
        bench.add("caps", {"label": "skipped", "reason": "no CUDA device"})
        return
    config = bench.config(Variant("", {"compile": "off"}))
    shared = Shared(partial(build, bench, config, OURS))
    for cap in (6, 8, 12):
        work = partial(largest_batch, shared, cap * GIB)
        bench.attempt("caps", f"{cap} GiB", work, shared)
    shared.drop()
    clear()


def largest_batch(shared: Shared[Trained], allowed: int) -> dict[str, Any]:
    """Raise the batch size until a step runs out of memory, then halve the gap three times."""
    trained = shared.get()
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

    with memory_cap(allowed):
        low, high = 0, 64
        while fits(high) and high < len(order):
            low, high = high, 2 * high
        for _ in range(3):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    positions = int(collate.dataset.lengths[order[:low]].sum())
    return {"largest_batch": low, "positions": positions}


def lost_capture(bench: Bench) -> None:
    """Run out of memory within the capture of a CUDA graph. The last section: CUDA may not recover."""
    label = "out of memory within a capture"
    bench.attempt("lost_capture", label, partial(check_lost_capture, bench))


def check_lost_capture(bench: Bench) -> dict[str, Any]:
    """Say whether steps go on, and can be captured, after a capture that ran out of memory."""
    config = bench.config(Variant("", {"compile": "graph", "qlora_dropout": 0.0}))
    trained = build(bench, config, OURS)
    graphs = trained.graphs
    if graphs is None:
        return {"skipped": "no CUDA device"}
    batch = next(trained.batches())

    def loss_of_batch() -> float:
        loss = float(trained.gradients(batch))
        trained.optimizer.zero_grad()
        return loss

    first = loss_of_batch()
    # The last one before the capture.
    loss_of_batch()
    gc.collect()
    torch.cuda.empty_cache()
    exhausted = False
    # Less than a step needs: the capture fails, and the step without it.
    with memory_cap(torch.cuda.memory_reserved() + GIB / 2):
        try:
            loss_of_batch()
        except torch.OutOfMemoryError:
            exhausted = True
    trained.optimizer.zero_grad()
    after = loss_of_batch()
    kept_stream = torch.cuda.current_stream() == torch.cuda.default_stream()
    trained.exchange(bench, config)
    assert trained.graphs is not None
    again = [loss_of_batch() for _ in range(4)][-1]
    furthest = max(abs(after - first), abs(again - first)) / first
    return {
        "passed": exhausted
        and not graphs.enabled
        and kept_stream
        and trained.graphs.graphs == 1
        and furthest < 1e-2,
        "exhausted": exhausted,
        "gave_up_graphs": not graphs.enabled,
        "kept_stream": kept_stream,
        "captures_afterwards": trained.graphs.graphs,
        "furthest_relative": furthest,
    }


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "checks": checks,
    "training": training,
    "run": run,
    "grid": grid,
    "evaluation": evaluation,
    "demo": demo,
    "caching": caching,
    "caps": caps,
    "lost_capture": lost_capture,
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
    if result["left_out"]:
        lines += ["", f"Left out for want of time: {'; '.join(result['left_out'])}."]
    return "\n".join(lines) + "\n"


def _heading(key: str) -> str:
    named = {
        "estimate_bytes": "--dry_run GiB",
        "estimate_of_largest_bytes": "--dry_run of the largest batch GiB",
        "mfu": "MFU",
        "label": "way",
    }
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
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, help="no row begins after so many; default: all do"
    )
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the device")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    tiny = args.tiny == "True"
    if not tiny and not torch.cuda.is_available():
        sys.stderr.write(
            "error: torch finds no CUDA device; --tiny True tries the script on a CPU.\n"
        )
        return EXIT_BAD_INPUT
    began = time.perf_counter()
    with silent_libraries(), quick_collection(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {**(TINY if tiny else TINYLLAMA), "vocab_size": _VOCABULARY}
        prepare(folder, sizes, PIXEL_ITEMS)
        clear()
        interactions = pixel_like(users=500 if tiny else 20_000)
        data = Data(leave_one_out(interactions), open_cache(folder / "cache.safetensors"))
        result: dict[str, Any] = {
            "steps": args.steps,
            "tiny": tiny,
            "torch": torch.__version__,
            "rows": [],
            "left_out": [],
        }
        bench = Bench(args, folder, data, args.out, result, began)
        sys.stdout.write(f"model and data made in {time.perf_counter() - began:.0f} s\n")
        sys.stdout.flush()
        for section in args.only:
            try:
                SECTIONS[section](bench)
            except Exception as error:  # a section that fails must not cost the others
                traceback.print_exc(limit=-4)
                bench.add(section, {"label": section, "error": one_line(error, 300)})
        result["seconds"] = round(time.perf_counter() - began, 1)
        bench.write()
    for row in result["left_out"]:
        sys.stdout.write(f"left out: {row}\n")
    sys.stdout.write(f"{result['seconds']:.0f} s in all: {args.out / 'gpu.json'}\n")
    return EXIT_OK


@contextmanager
def quick_collection() -> Iterator[None]:
    """Keep the garbage collector from going through the imported packages, half a second a row."""
    importlib.import_module("lightning.fabric")
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def slow_collection() -> Iterator[None]:
    """Let the garbage collector do what it does in a run, within `quick_collection`.

    No model may be there afterwards: what is frozen is never freed.
    """
    gc.unfreeze()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silence warnings, log lines and progress bars of other packages."""
    level = logging.getLogger().level
    set_up_logging(quiet=True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
        logging.getLogger().setLevel(level)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Fine-tuning at TinyLlama-1.1B's shape on a GPU, HSFT against plain transformers + peft.

    python benchmarks/gpu.py --peak_tflops 71      # the card's dense bfloat16 peak, if unknown here

Random weights, lengths like Pixel200K's, NF4 QLoRA. Both ways run in this process one after the other,
on the same sequences; the plain way pads to L. Also compares --dry_run's estimate with the peak.
`--tiny True` runs the same code on a CPU with tiny shapes: a test of the script, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.padding_data import PIXEL_ITEMS, pixel_like, sequences
from benchmarks.plain_training import PlainModel, pad_to
from hsft.config import Config
from hsft.config.loader import load_config
from hsft.data.cache import open_cache, save_cache
from hsft.data.dataset import TrainBatch, TrainCollate
from hsft.data.split import leave_one_out
from hsft.model.backbone import load_decoder
from hsft.report.memory import CUDA_CONTEXT, GIB, estimate, meta_decoder
from hsft.run.dry_run import TINYLLAMA, training_shape
from hsft.run.setup import Data, build_user_llm, lora_settings
from hsft.run.train_and_rank import make_train_loader
from hsft.trainer.fabric import compute_dtype, make_fabric
from hsft.trainer.optim import build_optimizer
from hsft.utils.environment import device_name
from hsft.utils.errors import EXIT_BAD_INPUT, EXIT_OK
from hsft.utils.files import write_json, write_text
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
PLAIN, OURS = "plain transformers + peft, padded to L", "HSFT"
TINY = {
    "vocab_size": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def prepare(folder: Path, sizes: dict[str, int], items: int) -> None:
    """Save a random model and a random item cache."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    vectors = torch.randn(items, sizes["hidden_size"]).half()
    save_cache(folder / "cache.safetensors", [str(n + 1) for n in range(items)], vectors, {})


def configuration(folder: Path, rank: int, length: int, batch: int, args: Any) -> Config:
    """Return the run's configuration: the repo's files for HLLM with QLoRA."""
    files = [ROOT / "code/overall/LLM_ddp.yaml", ROOT / "code/HLLM/HLLM.yaml"]
    values = {
        "use_qlora": True,
        "qlora_r": rank,
        "qlora_alpha": 2 * rank,
        "MAX_ITEM_LIST_LENGTH": length,
        "train_batch_size": batch,
        "user_pretrain_dir": str(folder / "model"),
        "item_cache_path": str(folder / "cache.safetensors"),
        "negatives": args.negatives,
        "attn_implementation": args.attention,
        "gradient_checkpointing": args.checkpointing,
        "dataset": "pixel-like",
    }
    return load_config(files, values)[0]


def ours(config: Config, data: Data, fabric: Any) -> Iterable[tuple[Callable[[], Any], int]]:
    """Yield (a step's loss, real positions) as HSFT trains."""
    model = build_user_llm(config, data, fabric, train=True)
    dataset = sequences(data.interactions, config.MAX_ITEM_LIST_LENGTH)
    loader = make_train_loader(config, dataset, data, fabric)
    optimizer = build_optimizer(model, config, fabric.device)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    for batch in loader:
        moved = TrainBatch(*(part.to(fabric.device) for part in batch))

        def step(batch: TrainBatch = moved) -> None:
            loss = wrapped(batch)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=1.0)
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()

        yield step, int(batch.attention_mask.sum())


def usual(config: Config, data: Data, fabric: Any) -> Iterable[tuple[Callable[[], Any], int]]:
    """Yield (a step's loss, real positions) of the plain loop on the same sequences."""
    assert data.cache is not None
    lora = lora_settings(config)
    decoder = load_decoder(
        config.user_pretrain_dir or "",
        dtype=compute_dtype(config),
        attention="sdpa",
        lora=lora,
        device=fabric.device,
    )
    hidden = data.cache.dim
    table = torch.cat([torch.zeros(1, hidden).half(), data.cache.embeddings])
    model = PlainModel(
        decoder,
        table,
        rank=lora.rank,
        targets=list(lora.target_modules),
        quantised=True,
        checkpointing=config.gradient_checkpointing,
        catalogue=config.negatives == "catalogue",
        adapter=False,
    ).to(fabric.device)
    optimizer = build_optimizer(model, config, fabric.device)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    dataset = sequences(data.interactions, config.MAX_ITEM_LIST_LENGTH)
    loader = make_train_loader(config, dataset, data, fabric)
    loader.collate_fn = TrainCollate(dataset)
    for batch in loader:
        moved = [part.to(fabric.device) for part in pad_to(config.MAX_ITEM_LIST_LENGTH, batch)]

        def step(inputs: Sequence[torch.Tensor] = moved) -> None:
            loss = wrapped(*inputs)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=1.0)
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()

        yield step, int(batch.attention_mask.sum())


def measure(
    steps: Iterable[tuple[Callable[[], Any], int]], device: torch.device, count: int
) -> dict[str, Any]:
    """Time `count` steps after three of warm-up; peak memory is of all of them, in bytes."""
    cuda = device.type == "cuda"
    rates = []
    for number, (step, real) in enumerate(steps):
        if number >= count + 3:
            break
        _synchronize(device)
        began = time.perf_counter()
        step()
        _synchronize(device)
        if number >= 3:
            rates.append(real / (time.perf_counter() - began))
    return {
        "real_tokens_per_s": statistics.median(rates),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def flops_per_token(config: Config) -> int:
    """Return a training step's model FLOPs a position: 2 N forward and 2 N for the inputs' gradients.

    N counts the linear layers. Frozen weights get no gradient; LoRA's own products and attention
    over at most 50 positions are left out.
    """
    model = meta_decoder(training_shape(config).model_config)
    return 4 * sum(
        part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear)
    )


def peak_tflops(name: str, given: float | None) -> float | None:
    """Return the device's peak, as given or looked up by name."""
    fitting = [key for key in PEAK_TFLOPS if key in name]
    return given or (PEAK_TFLOPS[max(fitting, key=len)] if fitting else None)


def markdown(result: dict[str, Any]) -> str:
    """Write the result as a Markdown table."""
    lines = [
        f"{result['device']}, NF4 QLoRA on q_proj and v_proj, negatives {result['negatives']}, "
        f"{result['attention']} attention; real tokens/s are medians of {result['steps']} steps.",
        "",
        "| r | L | batch | way | peak GiB | --dry_run GiB | real tokens/s | times plain | MFU |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [
            row["r"],
            row["L"],
            row["batch"],
            row["way"],
            _cell(row["peak_bytes"], GIB, ".2f"),
            _cell(row["estimate_bytes"], GIB, ".2f"),
            f"{row['real_tokens_per_s']:,.0f}",
            f"{row['times_plain']:.2f}",
            _cell(row["mfu"], 1, ".1%"),
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, unit: float, kind: str) -> str:
    return "" if value is None else format(value / unit, kind)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", choices=["True", "False"], default="False")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--negatives", default="in_batch", choices=["in_batch", "catalogue"])
    parser.add_argument("--attention", default="auto", choices=["auto", "sdpa"])
    parser.add_argument("--checkpointing", action="store_true", help="in both ways")
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the device")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    tiny = args.tiny == "True"
    if not tiny and not torch.cuda.is_available():
        sys.stderr.write(
            "error: torch finds no CUDA device; --tiny True tries the script on a CPU.\n"
        )
        return EXIT_BAD_INPUT
    set_up_logging(quiet=True)
    interactions = pixel_like(users=500 if tiny else 20_000)
    result: dict[str, Any] = {
        "negatives": args.negatives,
        "attention": args.attention,
        "steps": args.steps,
        "tiny": tiny,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, TINY if tiny else {**TINYLLAMA, "vocab_size": 1}, PIXEL_ITEMS)
        data = Data(leave_one_out(interactions), open_cache(folder / "cache.safetensors"))
        for rank, length, batch in (
            (r, n, b) for r in args.ranks for n in args.lengths for b in args.batches
        ):
            config = configuration(folder, rank, length, batch, args)
            fabric = make_fabric(config)
            fabric.seed_everything(config.seed, verbose=False)
            result["device"] = device_name(fabric.device)
            peak = peak_tflops(result["device"], args.peak_tflops)
            guess = estimate(training_shape(config), batch).total - CUDA_CONTEXT
            plain_rate = 0.0
            for way, build in ((PLAIN, usual), (OURS, ours)):
                _clear(fabric.device)
                found = measure(build(config, data, fabric), fabric.device, args.steps)
                rate = found["real_tokens_per_s"]
                plain_rate = plain_rate or rate
                used = flops_per_token(config) * rate
                result["rows"].append(
                    {
                        "r": rank,
                        "L": length,
                        "batch": batch,
                        "way": way,
                        **found,
                        # Without the driver's own memory, which the measured peak leaves out too.
                        "estimate_bytes": guess if way == OURS else None,
                        "times_plain": rate / plain_rate,
                        "mfu": used / (peak * 1e12) if peak else None,
                    }
                )
            sys.stdout.write(markdown({**result, "rows": result["rows"][-2:]}) + "\n")
            sys.stdout.flush()
    write_json(args.out / "gpu.json", result)
    write_text(args.out / "gpu.md", markdown(result))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

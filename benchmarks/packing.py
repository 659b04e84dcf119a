"""Padding and training throughput on the CPU, all ways side by side in one run.

    python benchmarks/packing.py --repeats 5

Ways of laying out the same sequences: padded to the fixed length L with plain transformers and peft
(the usual way); padded to L, padded to the batch's longest, grouped by length, packed into rows, and
one row with linear layers on real positions only, all with HSFT's model. Every repeat runs every way
once, on its own batches of the same seeded epoch; figures are medians over repeats.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.padding_data import demo, pixel_like, sequences
from benchmarks.plain_training import PlainModel, pad_to
from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainBatch, TrainCollate
from hsft.data.dataset.packing import real_share
from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM
from hsft.trainer.sampler import SequenceBatches
from hsft.utils.files import write_json, write_text
from hsft.utils.logs import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
_RANK, _DROPOUT = 8, 0.05
_ONE_ROW = 1 << 30
USUAL = "plain transformers + peft, padded to L"
USUAL_CHECKPOINTED = "the same with peft's default gradient checkpointing"
FIXED, PADDED, GROUPED = "HSFT, padded to L", "HSFT, padded to longest", "HSFT, grouped by length"
PACKED, ROW, UNPADDED = (
    "HSFT, packed rows of {}L",
    "HSFT, one row",
    "HSFT, one row, attention padded",
)


@dataclass(frozen=True)
class Case:
    """A dataset and batch shape."""

    name: str
    length: int
    batch_size: int
    catalogue: bool


class PaddedBlocks:
    """Attention of one packed row, computed on sequences padded to the longest: no masked squares.

    Registered with transformers as an attention implementation; tried here, not used by HSFT.
    """

    name = "padded_blocks"

    def __init__(self) -> None:
        self.gather = self.scatter = torch.empty(0)
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, lambda *_, **__: None)

    def set_lengths(self, lengths: np.ndarray) -> None:
        """Lay out the next batch: sequences of these lengths, one after the other in one row."""
        steps = np.arange(lengths.max())
        starts = np.cumsum(lengths) - lengths
        mask = steps < lengths[:, None]
        self.gather = torch.from_numpy(np.where(mask, starts[:, None] + steps, 0))
        self.scatter = torch.from_numpy(np.flatnonzero(mask))

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend: [1, H, N, d] -> [1, N, H, d]."""
        q, k, v = (part[0][:, self.gather].transpose(0, 1) for part in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)[self.scatter].unsqueeze(0), None


def batches(
    dataset: CachedEmbeddingTrainDataset, size: int, grouped: bool = False
) -> list[np.ndarray]:
    """Return the sample numbers of a seeded epoch's batches."""
    return [
        np.asarray(batch)
        for batch in SequenceBatches(dataset.lengths, size, seed=1, group_by_length=grouped)
    ]


def waste(
    name: str, dataset: CachedEmbeddingTrainDataset, length: int, size: int
) -> dict[str, Any]:
    """Return real / computed positions of each layout over a whole epoch."""
    plain, grouped = batches(dataset, size), batches(dataset, size, grouped=True)
    lengths = dataset.lengths
    return {
        "data": name,
        "L": length,
        "batch": size,
        "sequences": len(dataset),
        "transitions": int(lengths.sum()),
        "padded to L": float(lengths.sum() / (len(lengths) * length)),
        "padded to longest": real_share(lengths, plain, None),
        "grouped": real_share(lengths, grouped, None),
        "packed rows of 4L": real_share(lengths, plain, 4 * length),
        "one row": real_share(lengths, plain, _ONE_ROW),
    }


def lora(quantised: bool, dtype: torch.dtype) -> LoraSettings:
    """Return the demo's LoRA settings."""
    kind = "nf4" if quantised else "none"
    return LoraSettings(_RANK, 2 * _RANK, _DROPOUT, ("all-linear",), kind, dtype)


def ways(
    case: Case,
    dataset: CachedEmbeddingTrainDataset,
    folder: Path,
    layers: int,
    quantised: bool,
    precision: str,
    steps: int,
) -> dict[str, Callable[[int], int]]:
    """Build the models; each way runs the steps of a repeat and returns its real positions."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    generator = torch.Generator().manual_seed(0)
    settings = lora(quantised, dtype)

    def decoder() -> Any:
        return load_decoder(folder, dtype=dtype, attention="sdpa", layers=layers, lora=settings)

    items = dataset.interactions.num_items
    first = decoder()
    table = torch.randn(items + 1, first.config.hidden_size, generator=generator).half()
    loss = LossSettings(
        "nce", "catalogue" if case.catalogue else "in_batch", 0.99, 1 << 28, "cosine"
    )
    ours = Recommender(UserLLM(add_lora(first, settings, False), ItemTable(table, "linear")), loss)
    usual = {
        checkpointing: PlainModel(
            decoder(),
            table,
            rank=_RANK,
            targets="all-linear",
            quantised=quantised,
            checkpointing=checkpointing,
            catalogue=case.catalogue,
            adapter=True,
            dropout=_DROPOUT,
        )
        for checkpointing in (False, True)
    }
    optimizers = {
        model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for model in (ours, *usual.values())
    }
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    orders = {grouped: batches(dataset, case.batch_size, grouped) for grouped in (False, True)}

    def step(model: nn.Module, *inputs: Any) -> None:
        with mixed:
            value = model(*inputs)
        value.backward()
        optimizer = optimizers[model]
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    blocks = PaddedBlocks()
    peft_model: Any = ours.encoder.decoder
    base = peft_model.get_base_model()

    def run(
        model: nn.Module,
        row_length: int | None,
        prepare: Callable[[TrainBatch], tuple[Any, ...]],
        *,
        grouped: bool = False,
        attention: str = "sdpa",
    ) -> Callable[[int], int]:
        collate = TrainCollate(dataset, row_length=row_length, pack_below=1.1)

        def repeat(number: int) -> int:
            model.train()
            if model is ours:
                base.config._attn_implementation = attention
            real = 0
            for batch in orders[grouped][number * steps : (number + 1) * steps]:
                if attention == blocks.name:
                    blocks.set_lengths(dataset.lengths[batch])
                step(model, *prepare(collate(batch)))
                real += int(dataset.lengths[batch].sum())
            return real

        return repeat

    def padded_on(batch: TrainBatch) -> tuple[Any, ...]:
        history, mask, targets = pad_to(case.length, batch)
        return (TrainBatch(history, mask, targets, mask, batch.negatives),)

    def as_is(batch: TrainBatch) -> tuple[Any, ...]:
        return (batch,)

    if precision == "bf16-mixed":
        # What the precision costs, not the layouts again: without the instructions it is slow.
        return {
            USUAL: run(usual[False], None, lambda batch: pad_to(case.length, batch)),
            PADDED: run(ours, None, as_is),
        }
    return {
        USUAL: run(usual[False], None, lambda batch: pad_to(case.length, batch)),
        USUAL_CHECKPOINTED: run(usual[True], None, lambda batch: pad_to(case.length, batch)),
        FIXED: run(ours, None, padded_on),
        PADDED: run(ours, None, as_is),
        GROUPED: run(ours, None, as_is, grouped=True),
        **{PACKED.format(n): run(ours, n * case.length, as_is) for n in (2, 4, 8)},
        ROW: run(ours, _ONE_ROW, as_is),
        UNPADDED: run(ours, _ONE_ROW, as_is, attention=blocks.name),
    }


def measure(
    ways: dict[str, Callable[[int], int]], repeats: int
) -> dict[str, dict[str, float | list[float]]]:
    """Run every way in turn, `repeats` times after a warm-up, and return real positions per second."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            real = way(number)
            if number:
                rates[name].append(real / (time.perf_counter() - began))
    usual = statistics.median(rates[USUAL])
    return {
        name: {
            "real_tokens_per_s": statistics.median(values),
            "times_usual": statistics.median(values) / usual,
            "all": values,
        }
        for name, values in rates.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """Write the result as Markdown tables."""
    columns = ["padded to L", "padded to longest", "grouped", "packed rows of 4L", "one row"]
    lines = ["## Real positions / computed positions", ""]
    lines += [f"| data | L | batch | sequences | {' | '.join(columns)} |"]
    lines += [f"| --- |{' ---: |' * (3 + len(columns))}"]
    for row in result["waste"]:
        cells = [f"{row[column]:.1%}" for column in columns]
        head = f"| {row['data']} | {row['L']} | {row['batch']} | {row['sequences']:,} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    for run in result["throughput"]:
        lines += ["", f"## {run['title']}", "", "| way | real tokens/s | times the usual way |"]
        lines.append("| --- | ---: | ---: |")
        for name, row in run["ways"].items():
            lines.append(f"| {name} | {row['real_tokens_per_s']:.0f} | {row['times_usual']:.2f} |")
    about = result["about"]
    lines += ["", f"{about['threads']} threads, {about['cpu']}, torch {about['torch']}, median of "]
    lines[-1] += f"{about['repeats']} repeats of {about['steps']} steps."
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per repeat and way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--users", type=int, default=200_000, help="users of the synthetic data")
    parser.add_argument(
        "--precision", nargs="+", default=["32-true"], choices=["32-true", "bf16-mixed"]
    )
    parser.add_argument("--kinds", nargs="+", default=["nf4", "lora"], choices=["nf4", "lora"])
    parser.add_argument("--cases", nargs="+", type=int, help="numbers of the cases to time")
    parser.add_argument(
        "--user_dir", type=Path, default=ROOT / "model_checkpoints" / "SmolLM2-135M-Instruct"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    set_up_logging(quiet=True)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    data = {"ml-100k": demo(ROOT), "Pixel200K-like": pixel_like(users=args.users)}
    result: dict[str, Any] = {
        "about": {
            "threads": args.threads,
            "cpu": platform.processor() or platform.machine(),
            "capabilities": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "repeats": args.repeats,
            "steps": args.steps,
            "layers": args.layers,
        },
        "waste": [
            waste(name, sequences(data[name], length), length, size)
            for name, length, size in (
                ("ml-100k", 20, 16),
                ("ml-100k", 50, 16),
                ("Pixel200K-like", 10, 64),
                ("Pixel200K-like", 50, 16),
                ("Pixel200K-like", 50, 64),
            )
        ],
        "throughput": [],
    }
    sys.stdout.write(markdown(result))
    cases = [
        Case("ml-100k", 20, 16, True),
        Case("ml-100k", 50, 16, True),
        Case("Pixel200K-like", 50, 16, False),
    ]
    for case in [cases[n] for n in args.cases or range(len(cases))]:
        dataset = sequences(data[case.name], case.length)
        for precision in args.precision:
            for kind in args.kinds:
                quantised = kind == "nf4"
                built = ways(
                    case, dataset, args.user_dir, args.layers, quantised, precision, args.steps
                )
                title = (
                    f"{case.name}, L {case.length}, batch {case.batch_size}, "
                    f"{'catalogue softmax' if case.catalogue else 'in-batch'}, "
                    f"{'NF4 QLoRA' if quantised else 'LoRA'}, {precision}"
                )
                measured = measure(built, args.repeats)
                result["throughput"].append({"title": title, "ways": measured})
                sys.stdout.write(markdown({**result, "waste": []}).rpartition("## ")[2] + "\n")
                sys.stdout.flush()
    write_json(args.out / "packing.json", result)
    write_text(args.out / "packing.md", markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

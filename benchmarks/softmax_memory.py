"""Peak memory and time of the losses over many items, in blocks and with everything materialised.

    python benchmarks/softmax_memory.py --repeats 3
    python benchmarks/softmax_memory.py --negatives 512 4096 28672 --items 95668 --positions 3200 --dim 2048

Every measurement is a child process: forward and backward of one loss on frozen item vectors; reported
is the growth of its peak resident memory over what it held before, the table included. The first
command measures the softmax over the whole catalogue. With `--negatives` HLLM's loss against so many
drawn negatives is measured beside it: their vectors are looked up in the table, as in a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import torch
import torch.nn.functional as F

from hsft.model.item_table import ItemTable
from hsft.model.losses import catalogue_softmax, info_nce
from hsft.utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def plain(
    queries: torch.Tensor, table: ItemTable, targets: torch.Tensor, scale: torch.Tensor
) -> Any:
    """Compute the loss as the formula reads, with float32 items and all logits."""
    items = F.normalize(table.slice(1, table.num_items + 1), dim=-1)
    logits = scale.exp() * F.normalize(queries, dim=-1) @ items.T
    return F.cross_entropy(logits, targets)


def plain_info_nce(
    queries: torch.Tensor, positives: torch.Tensor, pool: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Compute HLLM's loss as its formula reads, with all logits."""
    q, p, n = (F.normalize(rows, dim=-1) for rows in (queries, positives, pool))
    negative = (q @ n.T).masked_fill(p @ n.T > 0.99, -torch.inf)
    logits = torch.cat([(q * p).sum(dim=-1, keepdim=True), negative], dim=-1) * scale.exp()
    return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.long))


def loss_of(
    way: str,
    queries: torch.Tensor,
    table: ItemTable,
    targets: torch.Tensor,
    scale: torch.Tensor,
    negatives: int,
    budget_bytes: int,
) -> torch.Tensor:
    """Compute one loss.

    Args:
        way: `plain` or `chunks`.
        queries: [T, D].
        table: the item vectors.
        targets: int64 [T], from 0.
        scale: log of the factor on the cosines.
        negatives: drawn items; 0: all items of the table.
        budget_bytes: for `chunks`.
    """
    if not negatives:
        if way == "plain":
            return plain(queries, table, targets, scale)
        return catalogue_softmax(queries, table, targets, scale, budget_bytes=budget_bytes)
    drawn = torch.randint(1, table.num_items + 1, (negatives,))
    positives, pool = table(targets + 1), table(drawn)
    if way == "plain":
        return plain_info_nce(queries, positives, pool, scale)
    counts = torch.zeros(4, dtype=torch.int64)
    ids = (targets + 1, drawn)
    return info_nce(
        queries, positives, pool, scale, budget_bytes=budget_bytes, item_ids=ids, counts=counts
    )


def child(way: str, negatives: int, items: int, positions: int, args: argparse.Namespace) -> None:
    """Measure once and print the result as JSON."""
    torch.manual_seed(0)
    stored = torch.empty(items + 1, args.dim, dtype=getattr(torch, args.dtype))
    for part in stored.split(4096):
        part.copy_(torch.randn(part.shape))
    table = ItemTable(stored, args.adapter)
    queries = torch.randn(positions, args.dim, requires_grad=True)
    targets = torch.randint(items, (positions,))
    scale = torch.tensor(2.659, requires_grad=True)
    # Threads and libraries are set up before the measurement.
    few = (queries[:2], ItemTable(stored[:64]), targets[:2] % 60, scale, negatives and 8)
    for each in ("plain", "chunks"):
        loss_of(each, *few, 64).backward()
    with suppress(OSError):
        # Linux: the high-water mark starts again from what is held now.
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    loss = loss_of(way, queries, table, targets, scale, negatives, args.budget_mb * MIB)
    loss.backward()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    measured = {"mib": grown / MIB, "seconds": seconds, "cpu": worked}
    sys.stdout.write(json.dumps({**measured, "loss": float(loss.detach())}) + "\n")


def measure(
    way: str, negatives: int, items: int, positions: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Run a child process and return what it printed."""
    command = [sys.executable, __file__, "--child", way, "--items", str(items)]
    command += ["--positions", str(positions), "--dim", str(args.dim), "--dtype", args.dtype]
    command += ["--budget_mb", str(args.budget_mb), "--adapter", args.adapter]
    command += ["--negatives", str(negatives)]
    # glibc then gives every freed tensor back, so that the peak is of what is held, not of its heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 96_282, 400_000])
    parser.add_argument("--negatives", type=int, nargs="+", default=[])
    parser.add_argument("--positions", type=int, nargs="+", default=[320, 1_280])
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--budget_mb", type=int, default=256)
    parser.add_argument("--adapter", default="none", choices=["none", "linear", "lowrank"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=["plain", "chunks"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.negatives[0], args.items[0], args.positions[0], args)
        return 0
    rows = []
    for items, positions, negatives in product(args.items, args.positions, [*args.negatives, 0]):
        runs: dict[str, list[dict[str, Any]]] = {"plain": [], "chunks": []}
        for _ in range(args.repeats):
            for way, measured in runs.items():
                measured.append(measure(way, negatives, items, positions, args))
        row: dict[str, Any] = {"items": items, "positions": positions, "negatives": negatives}
        for way, measured in runs.items():
            for key in ("mib", "seconds", "cpu", "loss"):
                row[f"{way}_{key}"] = statistics.median(run[key] for run in measured)
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    lines = [
        f"Forward and backward, D {args.dim}, {args.dtype} items, item adapter {args.adapter}, budget "
        f"{args.budget_mb} MiB, medians of {args.repeats}; memory is the growth of peak RSS.",
        "",
        "| items | positions | negatives | plain MiB | chunks MiB | plain s | chunks s | "
        "plain CPU s | chunks CPU s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{row[f'{way}_{key}']:,.{digits}f}"
            for key, digits in (("mib", 0), ("seconds", 2), ("cpu", 2))
            for way in ("plain", "chunks")
        ]
        negatives = f"{row['negatives']:,}" if row["negatives"] else "all items"
        lines.append(
            f"| {row['items']:,} | {row['positions']:,} | {negatives} | {' | '.join(cells)} |"
        )
    write_json(
        args.out / "softmax_memory.json", {"arguments": vars(args) | {"out": None}, "rows": rows}
    )
    write_text(args.out / "softmax_memory.md", "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

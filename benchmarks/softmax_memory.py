"""Peak memory and time of the catalogue softmax, in chunks and with everything materialised.

    python benchmarks/softmax_memory.py --repeats 3

Every measurement is a child process: forward and backward of one loss on frozen float16 item vectors;
reported is the growth of its peak resident memory over what it held before, the table included.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import torch
import torch.nn.functional as F

from hsft.model.item_table import ItemTable
from hsft.model.losses import catalogue_softmax
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


def child(way: str, items: int, positions: int, dim: int, budget_mb: int, adapter: str) -> None:
    """Measure once and print the result as JSON."""
    torch.manual_seed(0)
    stored = torch.empty(items + 1, dim, dtype=torch.float16)
    for part in stored.split(4096):
        part.copy_(torch.randn(part.shape))
    table = ItemTable(stored, adapter)
    queries = torch.randn(positions, dim, requires_grad=True)
    targets = torch.randint(items, (positions,))
    scale = torch.tensor(2.659, requires_grad=True)
    # Threads and libraries are set up before the measurement.
    plain(queries[:2], ItemTable(stored[:64]), targets[:2] % 60, scale).backward()
    few = ItemTable(stored[:64])
    catalogue_softmax(queries[:2], few, targets[:2] % 60, scale, budget_bytes=1 << 14).backward()
    with suppress(OSError):
        # Linux: the high-water mark starts again from what is held now.
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if way == "plain":
        loss = plain(queries, table, targets, scale)
    else:
        loss = catalogue_softmax(queries, table, targets, scale, budget_bytes=budget_mb * MIB)
    loss.backward()
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    measured = {"mib": grown / MIB, "seconds": seconds, "loss": float(loss.detach())}
    sys.stdout.write(json.dumps(measured) + "\n")


def measure(way: str, items: int, positions: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run a child process and return what it printed, or that it ran out of memory."""
    command = [sys.executable, __file__, "--child", way, "--items", str(items)]
    command += ["--positions", str(positions), "--dim", str(args.dim)]
    command += ["--budget_mb", str(args.budget_mb), "--adapter", args.adapter]
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
    parser.add_argument("--positions", type=int, nargs="+", default=[320, 1_280])
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--budget_mb", type=int, default=256)
    parser.add_argument("--adapter", default="none", choices=["none", "linear", "lowrank"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=["plain", "chunks"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        sizes = (args.items[0], args.positions[0], args.dim)
        child(args.child, *sizes, args.budget_mb, args.adapter)
        return 0
    rows = []
    for items in args.items:
        for positions in args.positions:
            runs: dict[str, list[dict[str, Any]]] = {"plain": [], "chunks": []}
            for _ in range(args.repeats):
                for way, measured in runs.items():
                    measured.append(measure(way, items, positions, args))
            row: dict[str, Any] = {"items": items, "positions": positions}
            for way, measured in runs.items():
                for key in ("mib", "seconds", "loss"):
                    row[f"{way}_{key}"] = statistics.median(run[key] for run in measured)
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    lines = [
        f"Catalogue softmax, forward and backward, D {args.dim}, item adapter {args.adapter}, budget "
        f"{args.budget_mb} MiB, medians of {args.repeats}; memory is the growth of peak RSS.",
        "",
        "| items | positions | plain MiB | chunks MiB | plain s | chunks s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{row[f'{way}_{key}']:,.{digits}f}"
            for key, digits in (("mib", 0), ("seconds", 2))
            for way in ("plain", "chunks")
        ]
        lines.append(f"| {row['items']:,} | {row['positions']:,} | {' | '.join(cells)} |")
    write_json(
        args.out / "softmax_memory.json", {"arguments": vars(args) | {"out": None}, "rows": rows}
    )
    write_text(args.out / "softmax_memory.md", "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

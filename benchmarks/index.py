"""FAISS indexes over synthetic items: time to build, memory, queries a second, recall@10.

    python benchmarks/index.py                        1 million items
    python benchmarks/index.py --items 10000000       needs 3 times 4 x items x dim bytes of memory
    python benchmarks/index.py --tiny True            seconds, to see that it runs

Items are unit vectors in clusters of about 100, users lie near items. Every index is built, tuned and
searched in a child process, as `export.py --format embeddings` does it; memory is the growth of its
peak resident memory over what it held before, from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np

from hsft.config.options import add_flag
from hsft.finished.item_index import (
    INDEX_KINDS,
    RECALL_AT,
    build_index,
    recall,
    require_faiss,
    search_width,
    tune,
)
from hsft.utils.environment import versions
from hsft.utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
SEED = 2020
_ITEMS_AT_A_TIME = 50_000
# Deviation of an item from its cluster's centre, and of a user from an item, in every dimension.
_SPREAD = 0.5


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_vectors(folder: Path, items: int, users: int, dim: int) -> None:
    """Write `items.f32`, `users.f32` and `exact.i64`, the rows of each user's best items."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((max(1, items // 100), dim), dtype=np.float32)
    near = rng.choice(items, users, replace=users > items)
    origins = np.empty((users, dim), dtype=np.float32)
    with (folder / "items.f32").open("wb") as file:
        for start in range(0, items, _ITEMS_AT_A_TIME):
            count = min(_ITEMS_AT_A_TIME, items - start)
            near_centre = centres[rng.integers(len(centres), size=count)]
            block = _unit(
                near_centre + _SPREAD * rng.standard_normal((count, dim), dtype=np.float32)
            )
            block.tofile(file)
            here = (near >= start) & (near < start + count)
            origins[here] = block[near[here] - start]
    noise = rng.standard_normal((users, dim), dtype=np.float32)
    given = _unit(origins + _SPREAD * noise / dim**0.5)
    given.tofile(folder / "users.f32")
    best, scores = np.empty((users, 0), dtype=np.int64), np.empty((users, 0), dtype=np.float32)
    for start in range(0, items, _ITEMS_AT_A_TIME):
        block = read(folder, dim, start, min(start + _ITEMS_AT_A_TIME, items))
        rows = np.broadcast_to(np.arange(start, start + len(block)), (users, len(block)))
        scores = np.concatenate([scores, given @ block.T], axis=1)
        best = np.concatenate([best, rows], axis=1)
        kept = np.argpartition(-scores, min(RECALL_AT, scores.shape[1]) - 1, axis=1)[:, :RECALL_AT]
        scores = np.take_along_axis(scores, kept, axis=1)
        best = np.take_along_axis(best, kept, axis=1)
    best.tofile(folder / "exact.i64")


def read(folder: Path, dim: int, start: int, end: int) -> np.ndarray:
    """Read item vectors start..end-1: float32 [end - start, D]."""
    count, offset = (end - start) * dim, 4 * start * dim
    vectors: np.ndarray = np.fromfile(folder / "items.f32", np.float32, count, offset=offset)
    return vectors.reshape(-1, dim)


def _peak_mb() -> float:
    # Of this program alone: what getrusage gives has the parent's peak in it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def child(kind: Any, folder: Path, items: int, dim: int, repeats: int) -> dict[str, Any]:
    """Build, tune and search one index."""
    faiss = require_faiss()
    users = np.fromfile(folder / "users.f32", np.float32).reshape(-1, dim)
    exact = np.fromfile(folder / "exact.i64", np.int64).reshape(len(users), -1)
    before = _peak_mb()
    began = time.perf_counter()
    index = build_index(kind, lambda start, end: read(folder, dim, start, end), items, dim)
    built = time.perf_counter() - began
    memory = _peak_mb() - before
    began = time.perf_counter()
    tune(index, users[::2], exact[::2])
    tuned = time.perf_counter() - began
    asked, answers = users[1::2], exact[1::2]
    together, rows = [], exact
    for _ in range(repeats):
        began = time.perf_counter()
        rows = index.search(asked, RECALL_AT)[1]
        together.append(time.perf_counter() - began)
    alone = []
    for user in asked[:200]:
        began = time.perf_counter()
        index.search(user[None], RECALL_AT)
        alone.append(time.perf_counter() - began)
    faiss.write_index(index, str(folder / kind))
    width = search_width(index)
    return {
        "kind": kind,
        "build_s": built,
        "tune_s": tuned,
        "peak_mb": memory,
        "file_mb": (folder / kind).stat().st_size / 1e6,
        "queries_per_s": len(asked) / min(together),
        "one_query_ms": 1e3 * float(np.median(alone)),
        "recall@10": recall(rows, answers),
        "search": "" if width is None else " ".join(map(str, width)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "| items | index | build s | tune s | peak MB | file MB | queries/s | one query ms "
        "| recall@10 | search |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['items']:,} | {row['kind']} | {row['build_s']:,.1f} | {row['tune_s']:,.1f} "
            f"| {row['peak_mb']:,.0f} | {row['file_mb']:,.0f} | {row['queries_per_s']:,.0f} "
            f"| {row['one_query_ms']:,.2f} | {row['recall@10']:.4f} | {row['search']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--users", type=int, default=2_000, help="half of them choose the width")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=INDEX_KINDS, default=list(INDEX_KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="folder for the vectors (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add_flag(parser, "--tiny", "2,000 items of 16 dimensions and 40 users")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, folder, items = args.child
        measured = child(kind, Path(folder), int(items), args.dim, args.repeats)
        sys.stdout.write(json.dumps(measured) + "\n")
        return 0
    if args.tiny:
        args.items, args.users, args.dim = [2_000], 40, 16
    rows = []
    for items in args.items:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            make_vectors(Path(folder), items, args.users, args.dim)
            for kind in args.kinds:
                command = [sys.executable, __file__, "--child", kind, folder, str(items)]
                command += ["--dim", str(args.dim), "--repeats", str(args.repeats)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
                rows.append({"items": items, **json.loads(done.stdout.splitlines()[-1])})
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
                sys.stdout.flush()
    about = {
        "dim": args.dim,
        "users": args.users,
        "seed": SEED,
        "threads": require_faiss().omp_get_max_threads(),
        "versions": versions(),
    }
    write_json(args.out / "index.json", {**about, "rows": rows})
    write_text(args.out / "index.md", table(rows))
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

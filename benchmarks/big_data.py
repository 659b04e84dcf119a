"""Read and split interactions of the size of Pixel8M: rows a second and memory.

    python benchmarks/big_data.py --rows 16000000

writes a CSV of random interactions (28 bytes a row, deleted at the end), as many a user and an item as in
Pixel8M (158 million rows, 8.9 million users, 408 thousand items), in random order. A process of its own
reads it as a run does, splits it and cuts the training sequences. Reported are the time of each stage, by
the clock and of the processor, and the peaks of anonymous memory, which the process cannot give back, and
of pages of mapped files in memory, which the system drops where it needs room. Memory is sampled 50 times
a second from /proc (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROWS_PER_USER, ROWS_PER_ITEM = 17.8, 388
_BLOCK = 1 << 20
_MIB = 1 << 20
_FIELDS = ("RssAnon", "RssFile")


def write_csv(path: Path, rows: int, seed: int = 0) -> None:
    """Write a CSV of random interactions, a block at a time.

    Args:
        path: the file.
        rows: interactions.
        seed: of users, items and times.
    """
    rng = np.random.default_rng(seed)
    users, items = max(1, int(rows / ROWS_PER_USER)), max(1, rows // ROWS_PER_ITEM)
    with path.open("wb") as stream:
        stream.write(b"item_id,user_id,timestamp\n")
        for begin in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - begin)
            columns = (
                (ord("i"), 6, rng.integers(items, size=count)),
                (ord("u"), 7, rng.integers(users, size=count)),
                (None, 10, rng.integers(1_600_000_000, 1_660_000_000, size=count)),
            )
            parts = [part for column in columns for part in _cells(*column)]
            parts[-1][:] = ord("\n")
            stream.write(np.concatenate(parts, axis=1).tobytes())


def _cells(letter: int | None, digits: int, values: np.ndarray) -> list[np.ndarray]:
    """Write numbers of so many digits after a letter: uint8 [n, width] each, and one for a comma."""
    powers = 10 ** np.arange(digits - 1, -1, -1)
    numbers = (values[:, None] // powers % 10 + ord("0")).astype(np.uint8)
    comma = np.full((len(values), 1), ord(","), dtype=np.uint8)
    first = [] if letter is None else [np.full((len(values), 1), letter, dtype=np.uint8)]
    return [*first, numbers, comma]


class PeakMemory:
    """Samples this process's memory in a thread, and keeps the peaks since the last `take`."""

    def __init__(self) -> None:
        self._peaks = dict.fromkeys(_FIELDS, 0)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._sample()
            time.sleep(0.02)

    def _sample(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in _FIELDS:
                self._peaks[name] = max(self._peaks[name], int(value.split()[0]) << 10)

    def take(self) -> tuple[int, int]:
        """Return the peaks of anonymous memory and mapped files in bytes, and start again."""
        self._sample()
        peaks = self._peaks
        self._peaks = dict.fromkeys(_FIELDS, 0)
        return peaks["RssAnon"], peaks["RssFile"]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measure(path: Path) -> None:
    """Read and split a file, and print a row of the table for each stage."""
    from hsft.config import Config
    from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
    from hsft.data.interactions import read_interactions
    from hsft.data.split import make_split

    memory = PeakMemory()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        memory.take()
        begin, worked = time.perf_counter(), time.process_time()
        yield
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        anonymous, mapped = memory.take()
        row = (
            name,
            f"{seconds:.1f}",
            f"{worked:.1f}",
            f"{rows / seconds:,.0f}" if seconds > 0.5 else "",
        )
        _say(f"| {' | '.join(row)} | {anonymous // _MIB:,} | {mapped // _MIB:,} |")

    anonymous, mapped = (size // _MIB for size in memory.take())
    _say(f"| modules imported | | | | {anonymous:,} | {mapped:,} |")
    rows = path.stat().st_size // 28
    with stage("read, checked and sorted"):
        interactions = read_interactions(path)
    with stage("split: leave_one_out"):
        split = make_split(Config(), interactions)
    with stage("training sequences"):
        CachedEmbeddingTrainDataset(split, 10)
    with stage("test users"):
        CachedEmbeddingEvalDataset(split, "test", 10)
    with stage("split: global_time"):
        make_split(Config(split="global_time"), interactions)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16_000_000, help="interactions")
    parser.add_argument("--folder", default=None, help="where the file is written (default: /tmp)")
    parser.add_argument("--read", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.read:
        measure(Path(options.read))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "big.csv"
        write_csv(path, options.rows)
        size = path.stat().st_size / 2**30
        _say(f"{options.rows:,} rows, a CSV of {size:.2f} GiB\n")
        _say(
            "| stage | s | CPU s | rows/s | peak anonymous memory, MiB | peak of mapped files, MiB |"
        )
        _say("| --- | --- | --- | --- | --- | --- |")
        subprocess.run([sys.executable, __file__, "--read", str(path)], check=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))
    sys.exit(main(sys.argv[1:]))

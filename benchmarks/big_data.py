"""Read interactions and item information of the size of Pixel8M: rows a second and memory.

    python benchmarks/big_data.py --rows 16000000
    python benchmarks/big_data.py --items 407082 --text_bytes 200 --tokenizer model_checkpoints/NAME

The first writes a CSV of random interactions (28 bytes a row, deleted at the end), as many a user
and an item as in Pixel8M (158 million rows, 8.9 million users, 408 thousand items), in random
order. A process of its own reads it as a run does, splits it, cuts the training sequences, hashes
what the test users are scored on, and prepares drawn negatives; `--tie_order shuffle` reads it with
the ties drawn. The second writes a CSV of item information, texts of random words, and reads it as
item_caching.py does before the ItemLLM's first batch: texts read and checked, items without text
looked for, and with `--tokenizer` the texts tokenised into the folder of the cache's parts.
Reported are the time of each stage, by the clock and of the processor, and the peaks of anonymous
memory, which the process cannot give back, and of pages of mapped files in memory, which the system
drops where it needs room. Memory is sampled 50 times a second from /proc (Linux).
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
from typing import Any

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


def write_information(path: Path, items: int, text_bytes: int, seed: int = 0) -> None:
    """Write a CSV of item information with random words.

    Args:
        path: the file.
        items: rows; one in a hundred is without text.
        text_bytes: mean length of a row's title, tag and description together.
        seed: of words and lengths.
    """
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, size=(5000, 9)).astype(np.uint8)
    lengths = rng.integers(2, 10, size=5000)
    words = [row[:n].tobytes().decode() for row, n in zip(letters, lengths.tolist(), strict=True)]
    # A word and its blank have 6.5 bytes in the mean. Descriptions come up again, which no reader notices.
    counts = rng.poisson(max(0.0, text_bytes / 6.5 - 6), size=1000).tolist()
    described = [" ".join(rng.choice(words, size=count)) for count in counts]
    numbers = rng.integers(1000, size=(items, 2)).tolist()
    with path.open("w", encoding="utf-8") as stream:
        stream.write("item_id,title,tag,description\n")
        for item, (first, second) in enumerate(numbers):
            title = " ".join(words[first : first + 5])
            cells = "," if item % 100 == 99 else f'{words[second]},"{described[second]}"'
            stream.write(f"i{item:07},{'' if cells == ',' else title},{cells}\n")


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


class Stages:
    """Prints a row of the table for each stage, and one for what is held before the first."""

    def __init__(self) -> None:
        self._memory = PeakMemory()
        anonymous, mapped = (size // _MIB for size in self._memory.take())
        _say(f"| modules imported | | | | {anonymous:,} | {mapped:,} |")

    @contextmanager
    def stage(self, name: str, rows: int) -> Iterator[None]:
        """Measure what the context does with so many rows."""
        self._memory.take()
        begin, worked = time.perf_counter(), time.process_time()
        yield
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        anonymous, mapped = self._memory.take()
        row = (
            name,
            f"{seconds:.1f}",
            f"{worked:.1f}",
            f"{rows / seconds:,.0f}" if seconds > 0.5 else "",
        )
        _say(f"| {' | '.join(row)} | {anonymous // _MIB:,} | {mapped // _MIB:,} |")


def measure_information(path: Path, tokenizer: str | None, text_format: Any) -> None:
    """Read item information as item_caching.py does, and print a row of the table for each stage."""
    from hsft.data.item_text import read_item_texts, unfit_texts
    from hsft.encoding.tokens import tokenize_to_folder

    tokenize = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer)

        def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
            encoded = loaded(list(texts), truncation=False, padding=False)["input_ids"]
            return [np.asarray(ids[:256], dtype=np.int64) for ids in encoded]

    stages = Stages()
    keys = ["title", "tag", "description"]
    with path.open("rb") as stream:
        rows = sum(1 for _ in stream) - 1
    with stages.stage("texts read and checked", rows):
        items = read_item_texts(path, keys, "Compress: ", text_format)
    with stages.stage("items without text", rows):
        unfit_texts(items, path, keys, [], path)
    if tokenize is not None:
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
            stages.stage("texts tokenised", rows),
        ):
            tokenize_to_folder(tokenize, items.texts, Path(folder), show_progress=False)


def measure(path: Path, tie_order: Any) -> None:
    """Read and split a file, and print a row of the table for each stage."""
    from hsft.config import Config
    from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
    from hsft.data.interactions import read_interactions
    from hsft.data.negatives import NegativeSampler
    from hsft.data.split import make_split
    from hsft.evaluator.evaluator import EvalProtocol
    from hsft.evaluator.fingerprint import evaluation_fingerprint

    protocol = EvalProtocol(
        kind="full", topk=(10,), metrics=("Recall",), candidates=0, seed=0, budget_bytes=0
    )
    stages = Stages()
    rows = path.stat().st_size // 28
    with stages.stage("read, checked and sorted", rows):
        interactions = read_interactions(path, tie_order)
    with stages.stage("split: leave_one_out", rows):
        split = make_split(Config(), interactions)
    with stages.stage("training sequences", rows):
        CachedEmbeddingTrainDataset(split, 10)
    with stages.stage("test users", rows):
        test_users = CachedEmbeddingEvalDataset(split, "test", 10)
    with stages.stage("fingerprint of the test users", rows):
        evaluation_fingerprint(test_users, protocol)
    with stages.stage("negatives' exclusions", rows):
        NegativeSampler(interactions, held_out=split.held_out)
    with stages.stage("split: global_time", rows):
        make_split(Config(split="global_time"), interactions)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16_000_000, help="interactions")
    parser.add_argument("--items", type=int, default=0, help="item information of so many items")
    parser.add_argument("--text_bytes", type=int, default=200, help="mean length of an item's text")
    parser.add_argument("--text_format", default="plain", choices=["plain", "hllm", "sentences"])
    parser.add_argument("--tie_order", default="file", choices=["file", "shuffle"])
    parser.add_argument("--tokenizer", help="a model folder, to tokenise the texts too")
    parser.add_argument("--folder", default=None, help="where the file is written (default: /tmp)")
    parser.add_argument("--read", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.read and options.items:
        measure_information(Path(options.read), options.tokenizer, options.text_format)
        return 0
    if options.read:
        measure(Path(options.read), options.tie_order)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "big.csv"
        if options.items:
            write_information(path, options.items, options.text_bytes)
        else:
            write_csv(path, options.rows)
        rows, size = options.items or options.rows, path.stat().st_size / 2**30
        _say(f"{rows:,} rows, a CSV of {size:.2f} GiB\n")
        _say(
            "| stage | s | CPU s | rows/s | peak anonymous memory, MiB | peak of mapped files, MiB |"
        )
        _say("| --- | --- | --- | --- | --- | --- |")
        subprocess.run([sys.executable, __file__, *argv, "--read", str(path)], check=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))
    sys.exit(main(sys.argv[1:]))

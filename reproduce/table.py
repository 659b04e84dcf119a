"""What the scripts of this folder share: a table's rows, their commands, and the figures beside them."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TINY_LLAMA = "model_checkpoints/TinyLlama-1.1B"
# The same with an emb token that is to be trained.
TINY_ITEM_LLM = f"{TINY_LLAMA}-item"
FETCH = (
    f"hf download TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --local-dir {TINY_LLAMA}",
)
FETCH_BOTH = (*FETCH, f"python reproduce/emb_token.py {TINY_LLAMA} {TINY_ITEM_LLM}")
# HLLM trains all weights of both LLMs in batches of 512 sequences over all of its GPUs; here one process
# holds such a batch, the items of which are encoded in chunks (gradient caching).
HLLM = (
    *("--config_file", "code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml"),
    "code/HLLM/hllm_original.yaml",
)
# Both LLMs as HLLM starts: TinyLlama, on the item side with a new emb token.
BOTH_LLMS = (*HLLM, "--item_pretrain_dir", TINY_ITEM_LLM, "--user_pretrain_dir", TINY_LLAMA)
END_TO_END = ("--train_item_llm", "full", "--epochs", "5", "--optim_args.learning_rate", "1e-4")
IDS = ("--config_file", "code/overall/LLM_ddp.yaml")
# TinyLlama's width and number of layers, which make 462 million weights beside the items'; the number
# of heads is TinyLlama's, as no source names it.
HSTU_1B = (
    *("code/IDNet/hstu.yaml", "--hstu.hidden_size", "2048", "--hstu.layers", "22"),
    *("--hstu.heads", "32", "--hstu.item_width", "512", "--precision", "bf16-mixed"),
)
HSTU_1B_ABOUT = "HSTU of TinyLlama's width and depth on trained item ids, HLLM's HSTU-1B"
# The exit code of what cannot be run, as that of the project's programs.
_REFUSED = 2
NOT_PUBLISHED = "not published in what this page cites"
TOPK = ("--topk", "[5, 10, 50, 200]", "--valid_metric", "NDCG@200")


@dataclass(frozen=True)
class Row:
    """One row of a published table.

    Attributes:
        name: what to call it on the command line.
        about: what is trained, one line.
        published: metric -> percent, as in the paper (arXiv 2409.12740) or in HLLM's README.
        training: words for code/main.py.
        caching: words for item_caching.py; None: no item cache is read.
        gpu_hours: what is expected of one card, an A100 or H100; an estimate, see README.md.
        cost: what the authors needed, where they say so.
        first: what has to be done before, as commands or a sentence.
        refused: why the row cannot be run here; empty: it can.
    """

    name: str
    about: str
    published: Mapping[str, float]
    training: tuple[str, ...]
    gpu_hours: float
    caching: tuple[str, ...] | None = None
    cost: str = ""
    first: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Table:
    """The rows on one data set.

    Attributes:
        dataset: its name.
        prepare: the command that makes its two files.
        rows: the rows.
    """

    dataset: str
    prepare: str
    rows: tuple[Row, ...]


def commands(table: Table, row: Row, options: Sequence[str]) -> list[list[str]]:
    """Return a row's commands, without the interpreter.

    Args:
        table: the row's table.
        row: the row.
        options: keys of code/main.py that are added to each command.
    """
    run = ["--dataset", table.dataset, "--run_name", run_name(table, row)]
    training = ["code/main.py", *_merged([*row.training, *TOPK, *run], options)]
    if row.caching is None or _is_on("dry_run", options):
        # An estimate reads no cache.
        return [training]
    caching = _merged([*row.caching, "--dataset", table.dataset], options)
    return [["item_caching.py", *caching], training]


def _merged(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Add options to a row's words; a key that is among both takes the option's value."""
    given = {word for word in options if word.startswith("--")}
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = word not in given
        if keep:
            kept.append(word)
    return [*kept, *options]


def run_name(table: Table, row: Row) -> str:
    """Return the name of a row's run."""
    return f"{table.dataset}-{row.name}"


def compare(row: Row, measured: Mapping[str, float]) -> str:
    """Write measured beside published figures, both in percent.

    Args:
        row: the row.
        measured: metric -> value from 0 to 1.
    """
    lines = [f"{'metric':<12}{'published':>12}{'measured':>12}"]
    for metric in row.published or measured:
        percent = f"{row.published[metric]:.3f}" if metric in row.published else "-"
        value = f"{100 * measured[metric]:.3f}" if metric in measured else "-"
        lines.append(f"{metric:<12}{percent:>12}{value:>12}")
    if not row.published:
        lines.append(f"published: {NOT_PUBLISHED}")
    return "\n".join(lines) + "\n"


def main(table: Table, script: str, argv: Sequence[str]) -> int:
    """List a table's rows, or run one of them.

    Args:
        table: the table.
        script: the name of the calling file.
        argv: a row's name and keys of code/main.py; empty: the rows are listed.

    Returns:
        The exit code of the command that failed, else 0; 2 for a row that cannot be run here.
    """
    parser = argparse.ArgumentParser(
        prog=script,
        description=f"Repeat what HLLM's paper reports on {table.dataset}: without arguments, list the "
        f"rows; with a row's name, run it. Further words are keys of code/main.py: --check True looks "
        f"at files and settings alone, --dry_run True estimates memory and time.",
    )
    parser.add_argument("row", nargs="?", choices=[row.name for row in table.rows])
    given, options = parser.parse_known_args(argv)
    if given.row is None:
        sys.stdout.write(describe(table, script))
        return 0
    row = next(row for row in table.rows if row.name == given.row)
    if row.refused:
        sys.stderr.write(f"error: {row.refused}.\n")
        return _REFUSED
    for line in row.first:
        sys.stdout.write(f"before: {line}\n")
    for words in commands(table, row, options):
        sys.stdout.write(f"$ python {shlex.join(words)}\n")
        sys.stdout.flush()
        done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=False)
        if done.returncode:
            return done.returncode
    if not (_is_on("check", options) or _is_on("dry_run", options)):
        folder = Path(_value("checkpoint_dir", options) or "saved") / run_name(table, row)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        sys.stdout.write(f"\nin percent:\n{compare(row, result['rows'][-1]['metrics'])}")
    return 0


def describe(table: Table, script: str) -> str:
    """Write a table's rows with their published figures and how each is run."""
    lines = [f"{table.dataset}, published in percent. Data: {table.prepare}", ""]
    for row in table.rows:
        figures = ", ".join(f"{metric} {value:.3f}" for metric, value in row.published.items())
        lines.append(f"python {script} {row.name}")
        lines.append(f"    {row.about}")
        lines.append(f"    published: {figures or NOT_PUBLISHED}")
        if row.refused:
            lines.append(f"    refused: {row.refused}")
            continue
        authors = f"; the authors: {row.cost}" if row.cost else ""
        lines.append(f"    expected: {expected_time(row.gpu_hours)}{authors}")
    return "\n".join(lines) + "\n"


def expected_time(gpu_hours: float) -> str:
    """Write how long a row is expected to take on one card, and on eight in data parallel."""
    return f"one card about {_duration(gpu_hours)}, eight about {_duration(gpu_hours / 8)}"


def _duration(hours: float) -> str:
    if hours < 0.95:
        return f"{max(round(hours * 60), 1)} minutes"
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _value(key: str, options: Sequence[str]) -> str | None:
    """Return a key's value among options, the last one given."""
    values = [value for word, value in itertools.pairwise(options) if word == f"--{key}"]
    return values[-1] if values else None


def _is_on(key: str, options: Sequence[str]) -> bool:
    last = bool(options) and options[-1] == f"--{key}"
    return last or (_value(key, options) or "false").lower() == "true"

"""Run the demo: the programs that a user runs, on MovieLens-100K."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "code"))

from hsft.config.options import add_flag  # noqa: E402

RUNS = "runs/demo"
# A folder of runs is written by one program at a time.
REFERENCES = f"{RUNS}/references"
LOG = f"{REFERENCES}/log.txt"
TUNED = f"{RUNS}/ml-100k-qlora"
# Run name -> what its command adds. The first one is what the others are tested against.
ROWS = {
    "pop": ["--model", "pop"],
    "random": ["--model", "random"],
    "item_knn": ["--model", "item_knn"],
    "item_knn-mean": ["--model", "item_knn", "--knn_history", "mean"],
    "sasrec": [],
    "baseline": ["--val_only", "True"],
}

NEXT = f"""
What to look at next:
  . .venv/bin/activate                        makes `python` the one that has HSFT's packages
  {RUNS}/report.html                       open it in a browser
  python code/recommend.py --run {TUNED} --serve 8000
  python code/export.py --run {TUNED}
  tensorboard --logdir {RUNS}
"""


@dataclass(frozen=True)
class Steps:
    """The demo's commands, without the interpreter.

    Attributes:
        llm: prepares the LLM, which takes as long as data, encoder and cache together.
        data: interactions, encoder, and the items' cache.
        tuning: the fine-tuning; needs both.
        references: the other models, the last of which needs the LLM.
        tables: what reads all runs.
        example: recommends to a user.
    """

    llm: list[list[str]]
    data: list[list[str]]
    tuning: list[list[str]]
    references: list[list[str]]
    tables: list[list[str]]
    example: list[list[str]]


def steps(full: bool) -> Steps:
    """Return the demo's commands, with all layers and long histories or without."""
    setting = ["demo/demo.yaml", *(["demo/full.yaml"] if full else [])]
    hllm = ["code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml", *setting]
    sasrec = ["code/overall/LLM_ddp.yaml", *setting, "code/baselines/sasrec.yaml"]
    train = ["code/main.py", "--config_file"]
    finished = [*(f"{REFERENCES}/ml-100k-{name}" for name in ROWS), TUNED]
    return Steps(
        llm=[["demo/prepare_llm.py"]],
        data=[
            ["demo/prepare_data.py"],
            ["demo/prepare_encoder.py"],
            ["item_caching.py", "--config_file", *hllm],
        ],
        tuning=[
            [
                *(*train, *hllm, "--use_qlora", "True"),
                *("--run_name", Path(TUNED).name, "--overwrite", "True"),
            ]
        ],
        references=[
            [
                *(*train, *(sasrec if name == "sasrec" else hllm), *flags),
                *("--checkpoint_dir", REFERENCES),
                *("--run_name", f"ml-100k-{name}", "--overwrite", "True"),
            ]
            for name, flags in ROWS.items()
        ],
        tables=[
            ["code/compare.py", *finished, "--out", RUNS],
            ["code/report.py", *finished, "--out", f"{RUNS}/report.html"],
        ],
        example=[["code/recommend.py", "--run", TUNED, "--user", "196"]],
    )


def run(step: list[str], output: IO[str] | None = None, threads: int | None = None) -> int:
    """Run a command, its output written to a file or shown, and return its exit code."""
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    (output or sys.stdout).write(f"\n$ python {shlex.join(step)}\n")
    (output or sys.stdout).flush()
    done = subprocess.run(
        [sys.executable, *step],
        cwd=ROOT,
        check=False,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env={**os.environ, **chosen},
    )
    return done.returncode


def run_all(commands: list[list[str]], stop: Event, **settings: Any) -> int:
    """Run commands one after the other.

    Args:
        commands: without the interpreter.
        stop: no further command is run once it is set.
        settings: as for `run`.

    Returns:
        The exit code of the one that failed, or 0.
    """
    for command in commands:
        if stop.is_set():
            return 0
        if code := run(command, **settings):
            return code
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the first failing step's exit code, or 0."""
    parser = argparse.ArgumentParser(
        prog="python demo/run.py",
        description=__doc__,
        epilog="examples:\n  python demo/run.py\n  python demo/run.py --full",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flag(parser, "--full", "all layers and long histories (hours on a CPU)")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    plan = steps(args.full)
    code = run_models(plan)
    if code:
        return code
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write(f"\nThe demo took {minutes:.1f} minutes; its runs are in {RUNS}/.\n{NEXT}")
    return 0


def run_models(plan: Steps) -> int:
    """Run the commands in two lanes on half of the processor's cores each.

    Products of these small models gain little from a second core. The fine-tuning waits for the item
    cache, which is written while the LLM is prepared; the other models run beside it.

    Returns:
        The exit code of what failed, or 0.
    """
    stop = Event()
    first = partial(run_all, stop=stop, threads=max(1, (os.cpu_count() or 1) // 2))
    log = ROOT / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(
        f"data, encoder, item cache and {len(plan.references)} other models run beside the LLM and "
        f"its fine-tuning; their output is in {LOG}\n"
    )
    with log.open("w", encoding="utf-8") as output, ThreadPoolExecutor(1) as pool:
        second = partial(first, output=output)
        data = pool.submit(second, plan.data)
        references = pool.submit(lambda: data.result() or second(plan.references))
        code = first(plan.llm) or data.result() or first(plan.tuning)
        if code:
            stop.set()
        code = references.result() or code
        if not code:
            example = pool.submit(second, plan.example)
            code = first(plan.tables) or example.result()
    sys.stdout.write(log.read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

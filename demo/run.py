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
from pathlib import Path
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
        first: what the models need.
        tuning: the fine-tuning.
        references: the other models, which run beside the fine-tuning.
        last: what reads all runs.
    """

    first: list[list[str]]
    tuning: list[str]
    references: list[list[str]]
    last: list[list[str]]


def steps(full: bool) -> Steps:
    """Return the demo's commands, with all layers and long histories or without."""
    setting = ["demo/demo.yaml", *(["demo/full.yaml"] if full else [])]
    hllm = ["code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml", *setting]
    sasrec = ["code/overall/LLM_ddp.yaml", *setting, "code/baselines/sasrec.yaml"]
    train = ["code/main.py", "--config_file"]
    finished = [*(f"{REFERENCES}/ml-100k-{name}" for name in ROWS), TUNED]
    return Steps(
        first=[
            ["demo/prepare_data.py"],
            ["demo/prepare_encoder.py"],
            ["demo/prepare_llm.py"],
            ["item_caching.py", "--config_file", *hllm],
        ],
        tuning=[
            *(*train, *hllm, "--use_qlora", "True"),
            *("--run_name", Path(TUNED).name, "--overwrite", "True"),
        ],
        references=[
            [
                *(*train, *(sasrec if name == "sasrec" else hllm), *flags),
                *("--checkpoint_dir", REFERENCES),
                *("--run_name", f"ml-100k-{name}", "--overwrite", "True"),
            ]
            for name, flags in ROWS.items()
        ],
        last=[
            ["code/compare.py", *finished, "--out", RUNS],
            ["code/report.py", *finished, "--out", f"{RUNS}/report.html"],
            ["code/recommend.py", "--run", TUNED, "--user", "196"],
        ],
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


def run_all(commands: list[list[str]], **settings: Any) -> int:
    """Run commands one after the other and return the first failing one's exit code, or 0."""
    return next(filter(None, (run(step, **settings) for step in commands)), 0)


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
    code = run_all(plan.first) or run_models(plan) or run_all(plan.last)
    if code:
        return code
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write(f"\nThe demo took {minutes:.1f} minutes; its runs are in {RUNS}/.\n{NEXT}")
    return 0


def run_models(plan: Steps) -> int:
    """Fine-tune, with the other models beside it on half of the processor's cores each.

    Products of these small models gain little from a second core.

    Returns:
        The exit code of what failed, or 0.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    log = ROOT / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(
        f"\n{len(plan.references)} other models run meanwhile, their output in {LOG}\n"
    )
    with log.open("w", encoding="utf-8") as output, ThreadPoolExecutor(1) as pool:
        others = pool.submit(run_all, plan.references, output=output, threads=threads)
        code = run(plan.tuning, threads=threads)
        other_code = others.result()
    sys.stdout.write(log.read_text(encoding="utf-8"))
    return code or other_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run the demo: the programs a user runs, one after the other, on MovieLens-100K and SmolLM2-135M."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ["--config_file", "code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml", "demo/demo.yaml"]
RUNS = "runs/demo"
# The first one is what the others are tested against.
ROWS = ("pop", "random", "item_knn", "sasrec", "baseline", "qlora")


def steps(full: bool) -> list[list[str]]:
    """Return the demo's commands, without the interpreter."""
    config = [*CONFIG, *(["demo/full.yaml"] if full else [])]
    main = ["code/main.py", *config, "--overwrite", "True"]
    names = {name: f"ml-100k-{name}" for name in ROWS}
    return [
        ["demo/prepare_data.py"],
        ["demo/prepare_llm.py"],
        ["item_caching.py", *config],
        *([*main, "--model", name, "--run_name", names[name]] for name in ROWS[:3]),
        [
            *("code/main.py", "--config_file", "code/overall/LLM_ddp.yaml", "demo/demo.yaml"),
            *("code/baselines/sasrec.yaml", "--overwrite", "True", "--run_name", names["sasrec"]),
        ],
        [*main, "--val_only", "True", "--run_name", names["baseline"]],
        [*main, "--use_qlora", "True", "--run_name", names["qlora"]],
        [
            "code/compare.py",
            *(f"{RUNS}/{names[name]}" for name in ROWS),
            *("--out", RUNS),
        ],
    ]


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the first failing step's exit code, or 0."""
    parser = argparse.ArgumentParser(prog="python demo/run.py", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="all layers and long histories (hours on a CPU)"
    )
    args = parser.parse_args(argv)
    began = time.perf_counter()
    for step in steps(args.full):
        sys.stdout.write(f"\n$ python {shlex.join(step)}\n")
        sys.stdout.flush()
        code = subprocess.run([sys.executable, *step], cwd=ROOT, check=False).returncode
        if code:
            return code
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write(f"\nThe demo took {minutes:.1f} minutes; its runs are in {RUNS}/.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

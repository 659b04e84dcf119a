"""Run the demo: the programs a user runs, one after the other, on MovieLens-100K."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "code"))

from hsft.config.options import add_flag  # noqa: E402

RUNS = "runs/demo"
# Run name -> what its command adds. The first one is what the others are tested against.
ROWS = {
    "pop": ["--model", "pop"],
    "random": ["--model", "random"],
    "item_knn": ["--model", "item_knn"],
    "item_knn-mean": ["--model", "item_knn", "--knn_history", "mean"],
    "sasrec": [],
    "baseline": ["--val_only", "True"],
    "qlora": ["--use_qlora", "True"],
}

NEXT = f"""
What to look at next:
  . .venv/bin/activate                        makes `python` the one that has HSFT's packages
  {RUNS}/report.html                       open it in a browser
  python code/recommend.py --run {RUNS}/ml-100k-qlora --serve 8000
  python code/export.py --run {RUNS}/ml-100k-qlora
  tensorboard --logdir {RUNS}
"""


def steps(full: bool) -> list[list[str]]:
    """Return the demo's commands, without the interpreter."""
    setting = ["demo/demo.yaml", *(["demo/full.yaml"] if full else [])]
    hllm = ["code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml", *setting]
    sasrec = ["code/overall/LLM_ddp.yaml", *setting, "code/baselines/sasrec.yaml"]
    runs = {name: f"ml-100k-{name}" for name in ROWS}
    return [
        ["demo/prepare_data.py"],
        ["demo/prepare_encoder.py"],
        ["demo/prepare_llm.py"],
        ["item_caching.py", "--config_file", *hllm],
        *(
            [
                *("code/main.py", "--config_file", *(sasrec if name == "sasrec" else hllm)),
                *(*flags, "--run_name", runs[name], "--overwrite", "True"),
            ]
            for name, flags in ROWS.items()
        ),
        ["code/compare.py", *(f"{RUNS}/{run}" for run in runs.values()), "--out", RUNS],
        [
            "code/report.py",
            *(f"{RUNS}/{run}" for run in runs.values()),
            "--out",
            f"{RUNS}/report.html",
        ],
        ["code/recommend.py", "--run", f"{RUNS}/{runs['qlora']}", "--user", "196"],
    ]


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
    commands = steps(args.full)
    for number, step in enumerate(commands, start=1):
        sys.stdout.write(f"\nstep {number} of {len(commands)}\n$ python {shlex.join(step)}\n")
        sys.stdout.flush()
        code = subprocess.run([sys.executable, *step], cwd=ROOT, check=False).returncode
        if code:
            return code
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write(f"\nThe demo took {minutes:.1f} minutes; its runs are in {RUNS}/.\n{NEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure HSFT against the usual way (`benchmarks/naive.py`), side by side.

    python benchmarks/run.py --size pixel200k

Every stage and side runs in a process of its own, so that peak memory is each one's own. Results go
to `<out>/results.json` and `<out>/results.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "code"), str(ROOT)]

from benchmarks import report, stages, synthetic  # noqa: E402
from hsft.utils import environment  # noqa: E402
from hsft.utils.files import write_json, write_text  # noqa: E402

FORMAT = 1


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return 0, or 1 when a stage failed."""
    args = _parser().parse_args(argv)
    if args.child:
        return _child(args)
    unknown = sorted(set(args.stages) - set(stages.STAGES))
    if unknown:
        sys.stderr.write(f"error: no stage {unknown[0]}; there are {', '.join(stages.STAGES)}\n")
        return 2
    context = _context(args)
    began = time.perf_counter()
    if set(args.stages) & set(stages.SYNTHETIC_STAGES):
        _say(f"making the {args.size} files in {args.work} unless they are there")
        # In a process of its own too: this one stays small.
        failed = _measure(args, "prepare", "files").get("error")
        if failed:
            return 1
    results: list[dict[str, Any]] = []
    document: dict[str, Any] = {}
    for stage in args.stages:
        for side in stages.STAGES[stage]:
            results.append(_measure(args, stage, side))
        # After every stage, so that an interrupted run leaves what it measured.
        document = {
            "format": FORMAT,
            "command": _command(args),
            "seed": args.seed,
            "size": dataclasses.asdict(context.size),
            "repeats": args.repeats,
            "seconds": round(time.perf_counter() - began, 1),
            "machine": machine(args.threads),
            "versions": environment.versions(),
            "git_revision": environment.git_revision(ROOT),
            "results": results,
            "agreement": report.agreement(results),
        }
        write_json(args.out / "results.json", document)
        write_text(args.out / "results.md", report.markdown(document))
    sys.stdout.write(report.markdown(document))
    if args.page:
        report.copy_into(args.page, args.size, report.markdown(document))
    _say(f"wrote {args.out / 'results.json'} and {args.out / 'results.md'}")
    return int(any("error" in result for result in results))


def _command(args: argparse.Namespace) -> str:
    chosen = "" if args.stages == list(stages.STAGES) else f" --stages {','.join(args.stages)}"
    return (
        f"python benchmarks/run.py --size {args.size} --repeats {args.repeats} "
        f"--threads {args.threads}{chosen}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(synthetic.SIZES), default="pixel200k")
    parser.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        default=list(stages.STAGES),
        help=f"comma-separated, of {', '.join(stages.STAGES)}; default: all",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--seed", type=int, default=synthetic.SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / ".work" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks" / ".work", help="folder of made files"
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown file to copy the tables into, such as docs/performance.md",
    )
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "SIDE", "FILE"), help="internal")
    return parser


def _context(args: argparse.Namespace) -> stages.Context:
    return stages.Context(
        size=synthetic.SIZES[args.size],
        work=args.work,
        repeats=max(1, args.repeats),
        seed=args.seed,
        quick=args.size == "small",
    )


def _measure(args: argparse.Namespace, stage: str, side: str) -> dict[str, Any]:
    """Run one side of a stage in a new process and return what it reported."""
    _say(f"{stage}: {side}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [
            *(sys.executable, str(Path(__file__).resolve()), "--size", args.size),
            *("--repeats", str(args.repeats), "--threads", str(args.threads)),
            *("--seed", str(args.seed), "--work", str(args.work)),
            *("--child", stage, side, str(file)),
        ]
        done = subprocess.run(command, check=False, stdout=sys.stderr)
        if done.returncode or not file.is_file():
            return {"stage": stage, "side": side, "error": f"exit code {done.returncode}"}
        return json.loads(file.read_text(encoding="utf-8"))


def _child(args: argparse.Namespace) -> int:
    import torch

    stage, side, file = args.child
    torch.set_num_threads(args.threads)
    context = _context(args)
    if stage == "prepare":
        stages.prepare(context)
        write_json(file, {})
        return 0
    result: dict[str, Any] = {"stage": stage, "side": side}
    try:
        figures = stages.STAGES[stage][side](context)
    except stages.Skipped as skipped:
        result["skipped"] = str(skipped)
    else:
        result["figures"] = [figure.as_dict() for figure in figures]
        result["extra"] = context.extra
    result["peak_rss_mb"] = stages.peak_rss_mb()
    write_json(file, result)
    return 0


def machine(threads: int) -> dict[str, Any]:
    """Describe the processor, memory and threads in general words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "threads": threads,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": platform.system(),
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

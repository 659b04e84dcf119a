# PYTHON_ARGCOMPLETE_OK
"""Print and save the table of several runs, with intervals and paired tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.config.options import Parser
from hsft.utils.errors import EXIT_OK
from hsft.utils.program import run_program

EXAMPLES = (
    "python code/compare.py saved/Pixel200K-pop saved/Pixel200K-qlora",
    "python code/compare.py saved/a saved/b saved/c --out tables",
    "python code/compare.py runs/demo/ml-100k-pop runs/demo/ml-100k-qlora",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("python code/compare.py", __doc__ or "", EXAMPLES)
    parser.add_argument(
        "runs",
        nargs="+",
        help="run folders; the others are tested against the first one's first row",
    )
    parser.add_argument(
        "--out", help="folder of comparison.md, .csv and .png (default: the last run's folder)"
    )
    args = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.report.compare import load_comparison
    from hsft.report.comparison_files import blocks, save_comparison
    from hsft.report.terminal import write_blocks

    comparison = load_comparison(args.runs)
    # Saved first: whoever reads the output may stop before its end.
    paths = save_comparison(comparison, Path(args.out or args.runs[-1]))
    write_blocks(blocks(comparison))
    sys.stdout.write("\nsaved: " + ", ".join(map(str, paths)) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

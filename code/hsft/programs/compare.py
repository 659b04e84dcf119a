"""`hsft compare`: code/compare.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hsft.config.options import Parser
from hsft.utils.errors import EXIT_OK

EXAMPLES = (
    "compare saved/Pixel200K-pop saved/Pixel200K-qlora",
    "compare saved/a saved/b saved/c --out tables",
    "compare runs/demo/references/ml-100k-pop runs/demo/ml-100k-qlora",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("compare", EXAMPLES)
    parser.add_argument(
        "runs",
        nargs="+",
        help="run folders, or hf://OWNER/NAME; the others are tested against the first one's first "
        "row",
    )
    parser.add_argument(
        "--out", help="folder of comparison.md, .csv and .png (default: the last run's folder)"
    )
    args = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.hub.repository import output_folder
    from hsft.report.compare import load_comparison
    from hsft.report.comparison_files import blocks, save_comparison
    from hsft.report.terminal import write_blocks

    comparison = load_comparison(args.runs)
    # Saved first: whoever reads the output may stop before its end.
    paths = save_comparison(comparison, Path(args.out or output_folder(args.runs[-1])))
    write_blocks(blocks(comparison))
    sys.stdout.write("\nsaved: " + ", ".join(map(str, paths)) + "\n")
    return EXIT_OK

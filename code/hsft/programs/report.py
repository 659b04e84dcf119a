"""`hsft report`: code/report.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hsft.config.options import Parser, add_location_options, location_overrides
from hsft.utils.errors import EXIT_OK, InputError
from hsft.utils.logs import set_up_logging

EXAMPLES = (
    "report saved/Pixel200K-qlora",
    "report saved/Pixel200K-pop saved/Pixel200K-qlora --out report.html",
    "report saved/Pixel200K-qlora --users 17,42 --out report.html",
    "report saved/Pixel200K-warm-qlora --cold_start Pixel200K",
    "report runs/demo/references/ml-100k-pop runs/demo/ml-100k-qlora --users 1,42",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("report", EXAMPLES)
    parser.add_argument(
        "runs",
        nargs="+",
        help="run folders, or hf://OWNER/NAME, scored on the same users; every model is compared "
        "with the best other",
    )
    parser.add_argument("--out", help="the page (default: report.html in the last run's folder)")
    parser.add_argument(
        "--examples",
        type=int,
        default=12,
        metavar="N",
        help="example users, drawn at random; 0 shows none and loads no model (default: 12). They "
        "are shown with the lists of two models: the last fine-tuned one and the same UserLLM "
        "before training, or the first and the last row where none is fine-tuned",
    )
    parser.add_argument("--users", default="", metavar="ID,ID", help="show these users instead")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draw of example users (default: 0)"
    )
    parser.add_argument(
        "--cold_start",
        metavar="DATASET",
        help="add how the last run ranks items that were held out from its data; DATASET is the "
        "data with those items (prepare_data.py hold-out makes such data)",
    )
    add_location_options(parser)
    args = parser.parse_args(argv)
    for name in ("examples", "seed"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} is {getattr(args, name)}; give a number from 0 up.")
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.write_report import write_report
    from hsft.hub.repository import output_folder

    set_up_logging()
    target = write_report(
        args.runs,
        Path(args.out or output_folder(args.runs[-1]) / "report.html"),
        examples=args.examples,
        users=list(dict.fromkeys(user for user in args.users.split(",") if user)),
        seed=args.seed,
        overrides=location_overrides(args),
        full_dataset=args.cold_start,
    )
    sys.stdout.write(f"report: {target}\n")
    return EXIT_OK

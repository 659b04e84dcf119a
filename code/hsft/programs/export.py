"""`hsft export`: code/export.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hsft.config.options import Parser, add_flag, add_location_options, location_overrides
from hsft.config.schema import DType
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging

EXAMPLES = (
    "export --run saved/Pixel200K-qlora",
    "export --run saved/Pixel200K-qlora --dtype float32 --evaluate True",
    "export --run saved/Pixel200K-qlora --format adapter --out UserLLM-lora",
    "export --run runs/demo/ml-100k-qlora --evaluate True",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("export", EXAMPLES)
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of a finished run")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write (default: RUN/export, or RUN/export-adapter for --format adapter)",
    )
    parser.add_argument(
        "--format",
        choices=("merged", "adapter"),
        default="merged",
        help="merged: one transformers model, without quantisation; adapter: LoRA in peft's format "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="bfloat16",
        help="number type of merged weights (default: %(default)s)",
    )
    add_flag(
        parser,
        "--evaluate",
        "score the merged model as the run was scored, for the card's table",
    )
    add_flag(parser, "--overwrite", "replace an earlier export")
    add_location_options(parser)
    args = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.export import ExportOptions, default_folder, export

    set_up_logging()
    run = Path(args.run)
    out = export(
        ExportOptions(
            run=run,
            out=Path(args.out) if args.out else default_folder(run, args.format),
            format=args.format,
            dtype=args.dtype,
            evaluate=args.evaluate,
            overwrite=args.overwrite,
            overrides=location_overrides(args),
        )
    )
    sys.stdout.write(f"exported: {out}\n")
    return EXIT_OK

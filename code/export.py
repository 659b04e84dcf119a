# PYTHON_ARGCOMPLETE_OK
"""Export a fine-tuned UserLLM: a plain model folder, or the adapter, with a model card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.config.options import Parser, add_places, places, true_or_false
from hsft.config.schema import DType
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging
from hsft.utils.program import run_program

EXAMPLES = (
    "python code/export.py --run saved/Pixel200K-qlora",
    "python code/export.py --run saved/Pixel200K-qlora --dtype float32 --evaluate True",
    "python code/export.py --run saved/Pixel200K-qlora --format adapter --out UserLLM-lora",
    "python code/export.py --run runs/demo/ml-100k-qlora --evaluate True",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("python code/export.py", __doc__ or "", EXAMPLES)
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
    parser.add_argument(
        "--evaluate",
        type=true_or_false,
        default=False,
        metavar="True|False",
        help="score the merged model as the run was scored, for the card's table "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        type=true_or_false,
        default=False,
        metavar="True|False",
        help="replace an earlier export (default: %(default)s)",
    )
    add_places(parser)
    args = parser.parse_args(list(argv))
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.export import ExportOptions, export

    set_up_logging()
    default = "export" if args.format == "merged" else "export-adapter"
    out = export(
        ExportOptions(
            run=Path(args.run),
            out=Path(args.out) if args.out else Path(args.run) / default,
            format=args.format,
            dtype=args.dtype,
            evaluate=args.evaluate,
            overwrite=args.overwrite,
            places=places(args),
        )
    )
    sys.stdout.write(f"exported: {out}\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

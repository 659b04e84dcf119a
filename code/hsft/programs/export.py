"""`hsft export`: code/export.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hsft.config.options import Parser, add_flag, add_location_options, location_overrides
from hsft.config.schema import DType
from hsft.utils.errors import EXIT_OK, InputError
from hsft.utils.logs import set_up_logging

EXAMPLES = (
    "export --run saved/Pixel200K-qlora",
    "export --run saved/Pixel200K-qlora --dtype float32 --evaluate True",
    "export --run saved/Pixel200K-qlora --format adapter --out UserLLM-lora",
    "export --run saved/Pixel200K-qlora --format embeddings",
    "export --run saved/Pixel200K-qlora --format embeddings --vector_files parquet --index hnsw",
    "export --run saved/Pixel200K-qlora --format onnx --evaluate True",
    "export --run runs/demo/ml-100k-qlora --evaluate True",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("export", EXAMPLES)
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of a finished run")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write (default: RUN/export for --format merged, else RUN/export-FORMAT)",
    )
    parser.add_argument(
        "--format",
        choices=("merged", "adapter", "embeddings", "onnx"),
        default="merged",
        help="merged: one transformers model, without quantisation; adapter: LoRA in peft's format; "
        "embeddings: the vectors of all items and users, with an index; onnx: ONNX graphs of the merged "
        "UserLLM and of its map of items (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="number type of merged weights (default: bfloat16), or of embeddings: float16 or float32 "
        "(default: float32); onnx is float32",
    )
    add_flag(
        parser,
        "--evaluate",
        "score the merged model or the ONNX graphs as the run was scored, for the card's table",
    )
    add_flag(parser, "--overwrite", "replace an earlier export")
    group = parser.add_argument_group("with --format embeddings")
    group.add_argument(
        "--vector_files",
        choices=("safetensors", "parquet"),
        help="files of the vectors; parquet needs pyarrow (default: safetensors)",
    )
    group.add_argument(
        "--index",
        choices=("auto", "flat", "hnsw", "ivf", "none"),
        help="FAISS index over the items, which needs faiss-cpu; auto: flat up to 50,000 items, hnsw "
        "up to a million, then ivf (default: auto)",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="which of the run's models: untrained or fine-tuned (default: fine-tuned, where the "
        "run has one)",
    )
    add_location_options(parser)
    args = parser.parse_args(argv)
    run = Path(args.run)
    shared: dict[str, Any] = {
        "run": run,
        "overwrite": args.overwrite,
        "overrides": location_overrides(args),
    }
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.export import ExportOptions, default_folder, export

    set_up_logging()
    shared["out"] = Path(args.out) if args.out else default_folder(run, args.format)
    if args.format == "embeddings":
        from hsft.finished.export_embeddings import EmbeddingOptions, export_embeddings

        if args.evaluate:
            raise InputError(
                "--evaluate scores a merged model; leave it out with --format embeddings."
            )
        out = export_embeddings(
            EmbeddingOptions(
                **shared,
                files=args.vector_files or "safetensors",
                dtype=args.dtype or "float32",
                index=args.index or "auto",
                model=args.model,
            )
        )
    else:
        for name in ("vector_files", "index", "model"):
            if getattr(args, name) is not None:
                raise InputError(
                    f"--{name} has no meaning without --format embeddings; leave it out."
                )
        out = export(
            ExportOptions(
                **shared,
                format=args.format,
                dtype=args.dtype or ("float32" if args.format == "onnx" else "bfloat16"),
                evaluate=args.evaluate,
            )
        )
    sys.stdout.write(f"exported: {out}\n")
    return EXIT_OK

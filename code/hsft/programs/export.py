"""`hsft export`: code/export.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hsft.config.options import (
    Parser,
    add_flag,
    add_location_options,
    location_overrides,
    true_or_false,
)
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
    "export --run saved/Pixel200K-qlora --format run --push_to_hub me/Pixel200K-qlora",
    "export --run runs/demo/ml-100k-qlora --evaluate True",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("export", EXAMPLES)
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="folder of a finished run, or hf://OWNER/NAME"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write (default: RUN/export for --format merged, else RUN/export-FORMAT)",
    )
    parser.add_argument(
        "--format",
        choices=("merged", "adapter", "embeddings", "onnx", "run"),
        default="merged",
        help="merged: one transformers model, without quantisation; adapter: LoRA in peft's format; "
        "embeddings: the vectors of all items and users, with an index; onnx: ONNX graphs of the merged "
        "UserLLM and of its map of items; run: all that this program and the others read of the run, its "
        "data included (default: %(default)s)",
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
    group = parser.add_argument_group("on the hub")
    group.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload the exported folder to this repository, which is made where there is none",
    )
    add_flag(group, "--private", "make a private repository; a public one is refused", default=True)
    group.add_argument(
        "--with_data",
        type=true_or_false,
        metavar="True|False",
        help="with --format run: include interactions, item information and item cache (default: True, "
        "and False with --private False)",
    )
    add_location_options(parser)
    args = parser.parse_args(argv)
    _refuse_contradictions(args)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.export import default_folder
    from hsft.hub.repository import check_push, output_folder, push_folder, run_folder

    set_up_logging()
    if args.push_to_hub is not None:
        check_push(args.push_to_hub)
    out = _export(
        args,
        {
            "run": run_folder(args.run),
            "out": Path(args.out or default_folder(output_folder(args.run), args.format)),
            "overwrite": args.overwrite,
            "overrides": location_overrides(args),
        },
    )
    sys.stdout.write(f"exported: {out}\n")
    if args.push_to_hub is not None:
        url = push_folder(out, args.push_to_hub, private=args.private)
        sys.stdout.write(f"pushed: {url}\n")
    return EXIT_OK


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.format != "embeddings":
        for name in ("vector_files", "index", "model"):
            if getattr(args, name) is not None:
                raise InputError(
                    f"--{name} has no meaning without --format embeddings; leave it out."
                )
    if args.format != "run" and args.with_data is not None:
        raise InputError("--with_data has no meaning without --format run; leave it out.")
    if args.format in ("embeddings", "run") and args.evaluate:
        raise InputError(
            f"--evaluate scores a merged model; leave it out with --format {args.format}."
        )
    if args.format == "run" and args.dtype is not None:
        raise InputError(
            "--format run copies the weights as they are; leave --dtype out, or use --format merged."
        )
    if args.push_to_hub is None and not args.private:
        raise InputError("--private has no meaning without --push_to_hub; leave it out.")


def _export(args: argparse.Namespace, shared: dict[str, Any]) -> Path:
    # Imported here, as above.
    if args.format == "embeddings":
        from hsft.finished.export_embeddings import EmbeddingOptions, export_embeddings

        return export_embeddings(
            EmbeddingOptions(
                **shared,
                files=args.vector_files or "safetensors",
                dtype=args.dtype or "float32",
                index=args.index or "auto",
                model=args.model,
            )
        )
    if args.format == "run":
        from hsft.finished.export_run import RunOptions, export_run

        with_data = args.private if args.with_data is None else args.with_data
        return export_run(RunOptions(**shared, with_data=with_data))
    from hsft.finished.export import ExportOptions, export

    return export(
        ExportOptions(
            **shared,
            format=args.format,
            dtype=args.dtype or ("float32" if args.format == "onnx" else "bfloat16"),
            evaluate=args.evaluate,
        )
    )

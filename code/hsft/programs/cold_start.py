"""`hsft cold-start`: code/cold_start.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hsft.config.options import Parser, add_flag, add_location_options, location_overrides
from hsft.utils.errors import EXIT_OK
from hsft.utils.logs import set_up_logging

EXAMPLES = (
    "cold-start --run saved/Pixel200K-warm-qlora --dataset Pixel200K"
    " --item_cache_path dataset/pixel200k_item_embeddings.safetensors",
    # On the demo's data: without a tenth of the items, evaluated there, and on those items.
    "prepare hold-out --dataset ml-100k",
    "train --config_file code/overall/LLM_ddp.yaml code/HLLM/HLLM.yaml demo/demo.yaml"
    " --dataset ml-100k-warm --item_cache_path dataset/ml-100k_item_embeddings.safetensors"
    " --val_only True",
    "cold-start --run runs/demo/ml-100k-warm-baseline --dataset ml-100k",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = Parser("cold-start", EXAMPLES)
    parser.add_argument(
        "--run",
        metavar="RUN_DIR",
        required=True,
        help="folder that main.py made, or hf://OWNER/NAME, on data without some items",
    )
    parser.add_argument(
        "--dataset", metavar="FULL", required=True, help="name of the data with those items"
    )
    add_flag(parser, "--json", "print JSON and nothing else")
    add_location_options(parser)
    options = parser.parse_args(argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.finished.cold_start import blocks, cold_start
    from hsft.report.terminal import write_blocks

    set_up_logging()
    rows = cold_start(
        options.run, options.dataset, {"show_progress": True, **location_overrides(options)}
    )
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        write_blocks(blocks(rows))
    return EXIT_OK

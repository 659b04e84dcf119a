"""The command line of download_itemllm.py and download_userllm.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from huggingface_hub import constants

from hsft.config.options import Parser, add_flag
from hsft.config.schema import DType

if TYPE_CHECKING:
    from hsft.hub.layout import Side

DEFAULT_REPO = "ByteDance/HLLM"
DEFAULT_CHECKPOINT = "1B_Pixel8M"
# The checkpoints that HLLM's authors publish, and what each was trained on.
CHECKPOINTS = {
    "1B_Pixel8M": "Pixel8M",
    "1B_books_neg512": "Amazon Books with 512 negatives",
    "1B_books": "Amazon Books with 28,672 negatives",
}
_REFUSED_CHECKPOINT = "7B_books"
_FILE = "{}/pytorch_model.bin"
DEFAULT_BASE_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ImportOptions:
    """What to import and where to; `--help` of the programs says what each option means."""

    side: Side
    out: Path
    from_file: Path | None
    sha256: str | None
    repo: str
    file: str
    revision: str
    base_repo: str
    base_revision: str
    base_dir: Path | None
    cache: Path
    dtype: str
    shard_bytes: int
    force: bool


def parse_options(side: Side, argv: Sequence[str]) -> ImportOptions:
    """Read a download program's command line.

    Raises:
        InputError: an option is unknown or has a value that it cannot have.
    """
    args = _parser(side).parse_args(argv)
    return ImportOptions(
        side=side,
        # A linked folder is replaced where it really is, so that the link stays.
        out=Path(args.out).resolve(),
        from_file=Path(args.from_file) if args.from_file else None,
        sha256=args.sha256,
        repo=args.repo,
        file=args.file or _FILE.format(args.checkpoint),
        revision=args.revision,
        base_repo=args.base_repo,
        base_revision=args.base_revision,
        base_dir=Path(args.base_dir) if args.base_dir else None,
        cache=Path(args.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute(),
        dtype=args.dtype,
        shard_bytes=args.max_shard_size,
        force=args.force,
    )


def _parser(side: Side) -> argparse.ArgumentParser:
    name = f"{side.capitalize()}LLM"
    program = f"download-{side}llm"
    parser = Parser(
        program, [program, f"{program} --from_file pytorch_model.bin --base_dir TinyLlama-1.1B"]
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=f"model_checkpoints/{name}_complete",
        help="model folder to make (default: %(default)s); it appears whole or not at all",
    )
    add_flag(
        parser,
        "--force",
        "replace an import that is there; without it a finished one is left alone",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="bfloat16",
        help="number type of the weights written (default: %(default)s, which HLLM computed in and "
        "whose range holds every float32 weight; float32 for --precision 32-true or to train all "
        "weights; float16 for cards without bfloat16)",
    )
    parser.add_argument(
        "--max_shard_size",
        metavar="SIZE",
        type=_size,
        default="250MB",
        help="largest weights file, for example 500MB or 2GB (default: %(default)s); memory use "
        "grows with it: three times this when float32 becomes bfloat16",
    )
    _add_checkpoint_options(parser)
    _add_base_options(parser, side)
    return parser


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("where the checkpoint comes from")
    source.add_argument(
        "--from_file",
        metavar="FILE",
        help="an already downloaded pytorch_model.bin; the checkpoint is then not fetched",
    )
    source.add_argument(
        "--sha256", metavar="HEX", type=_sha256, help="checksum that the checkpoint must have"
    )
    source.add_argument(
        "--repo", default=DEFAULT_REPO, help="hub repository (default: %(default)s)"
    )
    which = source.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint",
        metavar="NAME",
        type=_checkpoint,
        default=DEFAULT_CHECKPOINT,
        help=f"one of HLLM's published checkpoints, about 8.8 GB each: "
        f"{', '.join(f'{name} (trained on {data})' for name, data in CHECKPOINTS.items())} "
        f"(default: %(default)s)",
    )
    which.add_argument("--file", help="another file in the repository")
    source.add_argument(
        "--revision",
        default="main",
        help="branch, tag or commit of the repository (default: %(default)s)",
    )
    source.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="Hugging Face cache to download to (default: HF_HUB_CACHE, else HF_HOME/hub, else "
        "~/.cache/huggingface/hub); the download stays there for the other LLM's import, and "
        "`hf cache rm` frees the space",
    )


def _add_base_options(parser: argparse.ArgumentParser, side: Side) -> None:
    base = parser.add_argument_group("where config.json and the tokenizer come from")
    base.add_argument(
        "--base_dir",
        metavar="DIR",
        help="a local folder with the base model's config.json"
        + (" and tokenizer" if side == "item" else "")
        + ", instead of the hub",
    )
    base.add_argument(
        "--base_repo",
        default=DEFAULT_BASE_REPO,
        help="hub repository of the base model (default: %(default)s)",
    )
    base.add_argument(
        "--base_revision",
        default="main",
        help="branch, tag or commit of the base model (default: %(default)s)",
    )


def _checkpoint(text: str) -> str:
    if text == _REFUSED_CHECKPOINT:
        raise argparse.ArgumentTypeError(
            "7B_books is made of Baichuan2-7B, which transformers knows only by code in its "
            "repository, and no such code is run; use 1B_books, trained on the same data"
        )
    if text not in CHECKPOINTS:
        raise argparse.ArgumentTypeError(
            f"'{text}' is none of {', '.join(CHECKPOINTS)}; name another file with --file"
        )
    return text


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    value = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write for example 500MB or 2GB")
    return value


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no SHA-256 of 64 hex digits")
    return text.lower()

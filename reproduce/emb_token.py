"""Make an ItemLLM with a new emb token, as HLLM starts from: `python reproduce/emb_token.py FOLDER OUT`.

FOLDER is a plain LLM in transformers' form. OUT gets its files, linked where the disk allows it, and
`hllm_extra.safetensors` with an emb token drawn from a normal distribution and HLLM's initial logit
scale. A token like this embeds nothing until it is trained (`train_item_llm`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hsft.model.backbone import EXTRA_FILE  # noqa: E402
from hsft.model.losses import LOGIT_SCALE_INIT  # noqa: E402
from hsft.utils.errors import EXIT_OK, InputError  # noqa: E402
from hsft.utils.files import atomic_path, is_file  # noqa: E402
from hsft.utils.program import run_program  # noqa: E402

# HLLM draws it with the initializer_range of its Llama configuration.
_DEVIATION = 0.02


def make_item_llm(source: Path, target: Path, seed: int) -> None:
    """Write `target`, whole or not at all.

    Args:
        source: the plain LLM's folder.
        target: the folder to make.
        seed: of the emb token.

    Raises:
        InputError: `source` has no configuration with a hidden size, has an emb token already, or
            `target` exists.
    """
    config = source / "config.json"
    if not is_file(config):
        raise InputError(f"{config} is not a file; name a folder of an LLM in transformers' form.")
    width = json.loads(config.read_text(encoding="utf-8")).get("hidden_size")
    if not isinstance(width, int) or width < 1:
        raise InputError(f"{config} has no hidden_size; name a folder of a decoder.")
    if (source / EXTRA_FILE).exists():
        raise InputError(f"{source} has {EXTRA_FILE} already, with a trained emb token: use it.")
    if target.exists():
        raise InputError(f"{target} exists; move it away or name another folder.")
    generator = torch.Generator().manual_seed(seed)
    extra = {
        "item_emb_tokens": torch.randn(1, 1, width, generator=generator) * _DEVIATION,
        "logit_scale": torch.tensor(LOGIT_SCALE_INIT),
    }
    with atomic_path(target) as folder:
        folder.mkdir()
        for path in source.iterdir():
            if path.is_file():
                _link(path.resolve(), folder / path.name)
        save_file(extra, folder / EXTRA_FILE)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = argparse.ArgumentParser(prog="emb_token.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=2020)
    args = parser.parse_args(argv)
    make_item_llm(args.source, args.target, args.seed)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))

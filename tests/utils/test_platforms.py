"""The first thing that goes wrong on another platform is said in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hsft.config import Config
from hsft.trainer import zero
from hsft.utils import files
from hsft.utils.errors import InputError
from tests.conftest import Project
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("words", "package"),
    [
        # Without site-packages, as by a Python that is not the virtual environment's.
        (["-S", "code/main.py", "--help"], "yaml"),
        (["-S", "item_caching.py"], "yaml"),
        # torch alone is lacking.
        (
            [
                "-c",
                "import runpy, sys; sys.modules['torch'] = None; "
                "sys.argv = ['main.py', '--dry_run']; "
                "runpy.run_path('code/main.py', run_name='__main__')",
            ],
            "torch",
        ),
    ],
)
def test_a_missing_package_is_one_line(words: list[str], package: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the package {package} is missing in {sys.executable}")
    assert "pip install -r requirements.txt" in line


def test_a_system_without_bitsandbytes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "bitsandbytes" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, out, err = project.run("--use_qlora", "True")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "qlora_quant_type: nf4 needs the package bitsandbytes" in err
    assert "--qlora_quant_type none" in err
    assert not (project.root / "saved").exists()
    # What does not quantise does not need it.
    assert project.run("--val_only", "True")[0] == 0


# What Windows lacks is taken away after torch and its like have been imported: these know Windows.
POSIX_ONLY = """
import os, runpy, select, sys
import filelock, lightning.fabric, pandas, peft, psutil, tensorboard, transformers
import torch.utils.tensorboard
from transformers import LlamaModel
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "pathconf", "sysconf", "getuid", "geteuid", "pwrite"):
    delattr(os, name)
del select.poll
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("more", [("--check", "True"), ("--epochs", "1", "--log_wandb", "False")])
def test_training_uses_nothing_that_windows_lacks(project: Project, more: tuple[str, ...]) -> None:
    words = [*project.arguments, "--model", "sasrec", "--num_threads", "1", *more]
    done = subprocess.run(
        [sys.executable, "-c", POSIX_ONLY, str(ROOT / "code" / "main.py"), *words],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (project.root / "saved").exists() == ("--epochs" in more)


def test_deepspeed_is_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero.sys, "platform", "win32")
    with pytest.raises(InputError, match="deepspeed does not run on Windows; use --strategy ddp"):
        zero.check_deepspeed(Config(strategy="deepspeed"))


def test_a_folder_s_names_need_no_sync_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    monkeypatch.setattr(files.sys, "platform", "win32")
    files.write_text(tmp_path / "file", "text")
    # The file's content alone.
    assert len(synced) == 1
    assert (tmp_path / "file").read_text() == "text"

"""The first thing that goes wrong on another platform is said in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

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

"""What a bad input must lead to: one clear line, exit code 2, nothing left behind, nothing run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import Project

CSV = "dataset/tiny.csv"
INFORMATION = "information/tiny.csv"
CACHE = "dataset/tiny_item_embeddings.safetensors"
HEADER = b"item_id,user_id,timestamp\n"
CANARY = "canary"


def files_under(root: Path) -> set[Path]:
    """Every path below a folder but `saved`, which a run that fails after its start leaves empty."""
    return {path for path in root.rglob("*") if path.relative_to(root).parts != ("saved",)}


def expect_refusal(
    project: Project, run: Callable[[], tuple[int, str, str]], words: Sequence[str]
) -> str:
    """Run a program and check that it ends as bad input must; return the line."""
    before = files_under(project.root)
    code, out, err = run()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, (out, err)
    assert out == ""
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    assert errors[0].isprintable()
    assert "Traceback" not in err
    assert files_under(project.root) == before
    assert not (project.root / CANARY).exists()
    return errors[0]


class Canary:
    """Pickles to a call that leaves a file, if anybody unpickles it for real."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (CANARY, "w")


def to_folder(path: Path) -> None:
    """Put a folder in a file's place."""
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    """Put a named pipe in a file's place: opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def to_device(path: Path) -> None:
    """Put a link to an endless device in a file's place."""
    path.unlink()
    path.symlink_to("/dev/zero")

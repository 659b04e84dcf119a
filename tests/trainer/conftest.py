"""Fixtures of the tests of training."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project
from tests.training_runs import (
    RUN,
    folder,
    outcome,
    result,
)


@pytest.fixture
def undisturbed(project: Project) -> dict[str, Any]:
    """The outcome of `RUN` without interruption."""
    code, _, err = project.run(*RUN, "--run_name", "whole")
    assert code == 0, err
    assert not (folder(project, "whole") / "checkpoints").exists()
    assert result(project, "whole")["training"]["resumed_from"] == []
    return outcome(project, "whole")


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the options given; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no tmpfs can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)

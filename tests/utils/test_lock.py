"""One run a folder, whoever is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hsft.utils.errors import InputError
from hsft.utils.lock import LOCK_FILE, OWNER_FILE, locked
from tests.helpers import ROOT

HOLD = """
import os, sys, time
from hsft.utils.lock import locked
with locked(sys.argv[1]):
    # The child stands for a loader's worker, which outlives its parent for some seconds.
    worker = os.fork() if len(sys.argv) > 2 else ""
    if worker != 0:
        print("held", worker, flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "code"), *sys.path])},
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with locked(folder, "--here"):
        with (
            pytest.raises(InputError, match=rf"run \(process {os.getpid()} on .*own --here\."),
            locked(folder, "--here"),
        ):
            pass
        # A refusal leaves the lock as it is.
        with pytest.raises(InputError), locked(folder):
            pass
    assert not folder.exists()
    with locked(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        assert read_line(process) == "held"
        owner = rf"run \(process {process.pid} on {socket.gethostname()}\)"
        with pytest.raises(InputError, match=owner), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    (tmp_path / OWNER_FILE).write_bytes(b"\xff")  # half written
    with locked(tmp_path):
        assert (tmp_path / OWNER_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_workers_that_outlive_their_parent_hold_no_lock(tmp_path: Path) -> None:
    process = hold(tmp_path, "fork")
    worker = int(read_line(process).removeprefix("held "))
    try:
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it is still there
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(InputError, match="cannot be written: Not a directory")
    with refused, locked(tmp_path / "file" / "saved"):
        pass

"""A lock that keeps a second run out of a folder and ends with the process that holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hsft.utils.errors import InputError, one_line

LOCK_FILE = ".lock"
# Beside the lock, since Windows lets nobody read a locked file.
OWNER_FILE = ".lock-owner"

# The file of a run that is just ending is tried again until it is gone.
_TIMEOUT_SECONDS = 0.3


@contextmanager
def locked(folder: str | Path, key: str = "--checkpoint_dir") -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    The system releases the lock when the process ends, however it ends; files that a killed process
    left behind lock nothing.

    Args:
        folder: the folder.
        key: the option that names it, for errors.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    created = not folder.exists()
    lock = FileLock(folder / LOCK_FILE)
    owner = folder / OWNER_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_TIMEOUT_SECONDS)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout as error:
        raise InputError(
            f"another run{_name_of(owner)} is writing to {folder}; wait for it or give this run its "
            f"own {key}."
        ) from error
    except OSError as error:
        lock.release()
        raise InputError(
            f"the folder {folder} cannot be written: {error.strerror or error}; free some space or "
            f"change {key}."
        ) from error
    try:
        yield
    finally:
        # Before the release, after which they may be another run's. Windows keeps an open file.
        with suppress(OSError):
            owner.unlink()
            (folder / LOCK_FILE).unlink()
        lock.release()
        if created and not any(folder.iterdir()):
            folder.rmdir()


def _name_of(owner: Path) -> str:
    try:
        return f" ({one_line(owner.read_text(encoding='utf-8').strip(), 200)})"
    except (OSError, ValueError):
        return ""

"""A lock file that keeps a second run out of a folder and outlives no process."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsft.utils.errors import InputError

LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: str | Path, key: str = "--checkpoint_dir") -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    The lock is the file `.lock`: JSON with the owner's process id, host, boot and start time. It
    is stale, and taken over with a line in the log, when its process is gone or its number now
    belongs to a process that started at another time. A lock of another host cannot be checked
    and counts as held.

    Args:
        folder: the folder.
        key: what names it, for errors.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / LOCK_FILE
    own = _identity()
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, own, key)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be written: {error.strerror or error}; free some space or "
            f"change {key}."
        ) from error
    try:
        yield
    finally:
        _release(path, own)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _identity() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "started": _started(os.getpid()),
    }


def _acquire(path: Path, own: dict[str, Any], key: str) -> None:
    with _guarded(path) as handle:
        owner = _parse(os.read(handle, 1 << 16))
        if owner is not None and _alive(owner, own):
            raise InputError(
                f"another run (process {owner['pid']} on {owner['host']}) is writing to "
                f"{path.parent}; wait for it or give this run its own {key}"
                + ("." if owner["host"] == own["host"] else f", or delete {path} if it is gone.")
            )
        if owner is not None:
            log.warning(
                "took over the lock %s: process %s, which held it, is gone.", path, owner["pid"]
            )
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(own).encode(), 0)
            os.fsync(handle)
        except OSError:
            path.unlink()
            raise


def _release(path: Path, own: dict[str, Any]) -> None:
    try:
        with _guarded(path) as handle:
            if _parse(os.read(handle, 1 << 16)) == own:
                path.unlink()
    except OSError as error:
        log.warning("the lock %s could not be removed: %s.", path, error.strerror)


@contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """Open the lock file with its flock held, so that reading and writing it is one action.

    The flock is not kept: workers inherit it and would hold it after their parent was killed.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Its last owner may have deleted the file while this process waited.
            if not _is_at(handle, path):
                continue
            yield handle
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _parse(content: bytes) -> dict[str, Any] | None:
    """Return a lock's owner, or None for an empty file or one that a crash left half written."""
    try:
        owner = json.loads(content)
        return {
            "pid": int(owner["pid"]),
            "host": str(owner["host"]),
            "boot": owner["boot"],
            "started": owner["started"],
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _alive(owner: dict[str, Any], own: dict[str, Any]) -> bool:
    if owner["host"] != own["host"]:
        return True
    if owner["boot"] != own["boot"]:
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is there and belongs to somebody else
    return bool(_started(owner["pid"]) == owner["started"])


def _boot() -> str | None:
    """Return the id of this boot of the machine; None where the system has none to read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None where it cannot be read.

    A dead process that its parent has not collected yet has none either: it holds no lock.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses itself (proc_pid_stat(5)).
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])

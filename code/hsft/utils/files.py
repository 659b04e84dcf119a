"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hsft.utils.errors import InputError, one_line

MAX_JSON_BYTES = 64 << 20


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; rename it to `target` when the block succeeds.

    If the block raises, the temporary file or folder is removed and `target` stays as it was.
    A folder replaces an older folder of that name. What is renamed has reached the disk.

    Raises:
        InputError: the folder of `target` cannot be created or written, or the disk is full.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.unlink()
        yield temporary
        # mkstemp's and safetensors' 0600 would otherwise surprise people who share a folder.
        for path in (temporary, *temporary.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.chmod(0o666 & ~_umask())
        _fsync(temporary)
        if temporary.is_dir() and target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
        _fsync_entry(target.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error
    finally:
        if temporary is not None:
            remove(temporary)


def cannot_write(target: Path, error: Exception) -> InputError:
    """Return the error that says why a file or folder could not be written."""
    return InputError(
        f"cannot write {target}: {_reason(error)}; free some space or choose another folder."
    )


def _reason(error: Exception) -> str:
    # The system's words, such as "No space left on device".
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # safetensors: "Error while serializing: I/O error: No space left on device (os error 28)"
    return str(error).rpartition("error: ")[2].partition(" (os error")[0]


def write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `target` atomically. NaN and infinity are refused."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    path = require_file(path, str(path), "make or fetch it again")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; it is damaged.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a readable JSON file ({one_line(error, 120)}); make or fetch it again."
        ) from error


def is_file(path: str | Path) -> bool:
    """Say whether a regular file is there; False too for a name that the system refuses."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Say whether a folder is there; False too for a name that the system refuses."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def require_file(path: str | Path, name: str, remedy: str) -> Path:
    """Return the path of a regular file. Pipes and devices are refused: opening one may never end.

    Args:
        path: the file.
        name: what to call it in an error, path included.
        remedy: half a sentence on how to fix it.

    Raises:
        InputError: it is missing, a folder, or no regular file.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; {remedy}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name} cannot be read: {reason}; {remedy}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{name} is {kind}, not a file; {remedy}.")
    return path


def sha256(
    path: str | Path,
    chunk_bytes: int = 1 << 20,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str:
    """Return the hex SHA-256 of a file, read in chunks of `chunk_bytes` bytes.

    Args:
        path: the file.
        chunk_bytes: bytes held at once.
        on_bytes: called with the length of each chunk, to show progress.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def free_bytes(path: str | Path) -> int:
    """Return the free bytes of the disk that `path`, or its nearest existing parent, is on."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    os.replace(new, target)
    remove(old)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left of `atomic_path` in a folder. No process may write there."""
    if not folder.is_dir():
        return
    for pattern in (".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            remove(path)


def discard(path: Path) -> None:
    """Remove a file or folder so that it is never seen half removed under its own name."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, hidden)
    remove(hidden)


def _fsync(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _fsync(inner)
    _fsync_entry(path)


def _fsync_entry(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        return  # Windows opens no folder, and writes names by itself
    # Windows needs a file that is open for writing.
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

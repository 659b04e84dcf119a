"""Results that take seconds to compute, kept as JSON in the user's cache folder.

A record is found by the SHA-256 of all that it depends on, so that it never has to be thrown away:
what has changed has another name. The whole folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hsft.utils.errors import InputError
from hsft.utils.files import atomic_path, is_file

log = logging.getLogger(__name__)

_MOST_BYTES = 16 << 20
# Packages whose version every record depends on.
_PACKAGES = ("torch", "transformers")
_MAKERS = Path(__file__).parents[1] / "model"


def records_folder() -> Path | None:
    """Return the folder of the records, None where the user has no home.

    On Windows it is in `LOCALAPPDATA`, elsewhere in `XDG_CACHE_HOME` (XDG Base Directory
    Specification), by default `~/.cache`.
    """
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        # The specification wants relative paths to be ignored.
        folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "hsft"


def remember(
    name: str,
    depends_on: Mapping[str, Any] | None,
    make: Callable[[], Any],
    packages: tuple[str, ...] = (),
) -> Any:
    """Return what is kept, or make and keep it.

    A file that is damaged, of other content or not writable is no error: the record is made again.
    What `make` raises is kept nowhere.

    Args:
        name: what the record is.
        depends_on: JSON values; the versions of torch and transformers and the code of
            `hsft.model` are added. None: nothing is read or kept.
        make: returns a JSON value other than None.
        packages: further packages whose versions it depends on.

    Returns:
        The JSON value, as it reads from a file: tuples are lists.
    """
    folder = None if depends_on is None else records_folder()
    if depends_on is None or folder is None:
        return _as_read(make())
    key = {
        "record": name,
        "depends_on": _as_read(depends_on),
        "versions": {package: _version(package) for package in (*_PACKAGES, *packages)},
        "code": _code(),
    }
    path = folder / f"{_digest(key)}.json"
    value = _read(path, key)
    if value is None:
        value = _as_read(make())
        _write(path, key, value)
    return value


def _as_read(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _code() -> str:
    """Return a SHA-256 of the code that makes the records."""
    digest = hashlib.sha256()
    for path in sorted(_MAKERS.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, key: Mapping[str, Any]) -> Any:
    """Return a file's record, None where it is missing, damaged or another's."""
    try:
        if not is_file(path) or path.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key or content["sha256"] != _digest(content["value"]):
            return None
        return content["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, key: Mapping[str, Any], value: Any) -> None:
    content = {"key": key, "sha256": _digest(value), "value": value}
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    except InputError as error:
        # A home that is full or cannot be written costs time, no more.
        log.debug("%s is not kept: %s", path, error)

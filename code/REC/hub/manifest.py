"""`import.json`: what an imported model folder says about where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from REC.utils.errors import InputError
from REC.utils.files import read_json

MANIFEST_FILE = "import.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read an imported folder's `import.json`.

    Raises:
        InputError: there is none, or it is not as an import writes it.
    """
    path = Path(folder) / MANIFEST_FILE
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(name), dict) for name in ("files", "source", "base")
    ):
        raise InputError(f"{path} is not as an import writes it; move {folder} away.")
    return manifest


def origin(folder: str | Path) -> dict[str, Any] | None:
    """Return checkpoint, base model and number type of an imported folder, None for any other."""
    if not (Path(folder) / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(folder)
    return {name: manifest.get(name) for name in ("source", "base", "dtype")}

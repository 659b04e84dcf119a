"""`import.json` and `export.json`: what a model folder says about where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsft.utils.errors import InputError
from hsft.utils.files import read_json

MANIFEST_FILE, EXPORT_FILE = "import.json", "export.json"


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


def exported_from(folder: str | Path) -> str | None:
    """Return the name of the run that a folder was exported from, None for any other folder.

    Raises:
        InputError: its `export.json` is damaged.
    """
    path = Path(folder) / EXPORT_FILE
    manifest = read_json(path) if path.is_file() else None
    run = manifest.get("run") if isinstance(manifest, dict) else None
    return run if isinstance(run, str) else None


def user_llm_origin(folder: str | Path) -> dict[str, Any] | None:
    """Return what is known of where a UserLLM's folder came from: an import or an export."""
    run = exported_from(folder)
    return origin(folder) if run is None else {"exported_from": run}

"""`import.json` and `export.json`: what a model folder says about where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsft.utils.errors import InputError
from hsft.utils.files import read_json

MANIFEST_FILE, EXPORT_FILE = "import.json", "export.json"
# What `export.json` calls a run that was exported as a whole.
RUN_FORMAT = "run"
# HLLM's published checkpoints: part of their files' names -> the data set that they were trained on, and
# part of the names of data sets that are drawn from the same log.
_TRAINED_ON = {"pixel8m": ("Pixel8M", "pixel"), "books": ("Amazon Books", "book")}


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


def pretraining_overlap(folder: str | Path, dataset: str | None) -> str | None:
    """Warn of an imported checkpoint that may have been trained on a data set's held-out items.

    Args:
        folder: an LLM's folder.
        dataset: name of the data set that it is evaluated on.

    Returns:
        A sentence; None where the checkpoint is not known to have seen such data.
    """
    imported = origin(folder)
    if imported is None:
        return None
    source = imported["source"]
    file = str(source.get("file") or source.get("path") or "").lower()
    for part, (name, word) in _TRAINED_ON.items():
        if part in file and word in (dataset or "").lower():
            return (
                f"{folder} is a checkpoint that was trained on {name}, which is drawn from the same "
                f"log as {dataset}: it may have been trained on the items that are held out here, so "
                f"compare it with models from the same checkpoint only."
            )
    return None


def is_exported_run(folder: str | Path) -> bool:
    """Say whether a folder is a run that was exported as a whole, with paths of its own."""
    path = Path(folder) / EXPORT_FILE
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("format") == RUN_FORMAT


def user_llm_origin(folder: str | Path) -> dict[str, Any] | None:
    """Return what is known of where a UserLLM's folder came from: an import or an export."""
    run = exported_from(folder)
    return origin(folder) if run is None else {"exported_from": run}

"""`result.json` and the per-user ranks of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from REC.evaluator.evaluator import Evaluation
from REC.utils.errors import InputError
from REC.utils.files import atomic_path, read_json, write_json

RESULT_FILE = "result.json"
RANKS_FILE = "ranks.safetensors"


def write_result(run_dir: Path, result: dict[str, Any], evaluations: dict[str, Evaluation]) -> None:
    """Write `result.json` and, first, the ranks it summarises.

    Args:
        run_dir: the run's folder.
        result: plain data.
        evaluations: row name -> evaluation; users and ranks are stored as `<name>.users` and
            `<name>.ranks`, so that runs can be compared user by user.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, evaluation in evaluations.items():
        arrays[f"{name}.users"] = evaluation.users.astype(np.int64)
        arrays[f"{name}.ranks"] = evaluation.ranks.astype(np.int64)
    with atomic_path(run_dir / RANKS_FILE) as temporary:
        save_file(arrays, temporary)
    write_json(run_dir / RESULT_FILE, result)


def read_result(run_dir: str | Path) -> dict[str, Any]:
    """Read a finished run's `result.json`.

    Raises:
        InputError: the folder is no finished run, or the file is damaged.
    """
    path = Path(run_dir) / RESULT_FILE
    if not path.is_file():
        raise InputError(f"{run_dir} is no finished run: it has no {RESULT_FILE}.")
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise InputError(f"{path} is not a result of this program; run the command again.")
    return result


def read_ranks(run_dir: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a row's users and ranks: two int64 [E].

    Raises:
        InputError: the file is missing, damaged or lacks the row.
    """
    path = Path(run_dir) / RANKS_FILE
    try:
        arrays = load_file(path)
        return arrays[f"{name}.users"], arrays[f"{name}.ranks"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read or lacks the row '{name}'; run the command again."
        ) from error


def pack_evaluation(found: Evaluation) -> dict[str, Any]:
    """Turn an evaluation into what a checkpoint can hold."""
    return {
        "phase": found.phase,
        "users": torch.from_numpy(found.users.astype(np.int64)),
        "ranks": torch.from_numpy(found.ranks.astype(np.int64)),
        "metrics": {name: float(value) for name, value in found.metrics.items()},
        "seconds": found.seconds,
    }


def unpack_evaluation(packed: dict[str, Any]) -> Evaluation:
    """Return the evaluation that `pack_evaluation` was given."""
    arrays = {name: packed[name].numpy() for name in ("users", "ranks")}
    return Evaluation(**{**packed, **arrays})


def plain(value: Any) -> Any:
    """Turn numpy and torch scalars into plain numbers, and non-finite ones into None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value

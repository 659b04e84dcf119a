"""`result.json` and the per-user ranks of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from hsft.evaluator.metrics import PER_USER, UNRANKED
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import atomic_path, is_file, is_folder, read_json, require_file, write_json
from hsft.utils.program import command

# torch is imported where it is needed, since results are compared without it.
if TYPE_CHECKING:
    from hsft.evaluator.evaluator import Evaluation

# Format 2 has `fingerprint`, and `UNRANKED` for targets that format 1 ranked last among all items.
RESULT_FORMAT = 2
CONFIG_FILE, RESULT_FILE = "config.yaml", "result.json"
RANKS_FILE = "ranks.safetensors"
# Names of the UserLLM's rows: as it was loaded, and trained.
UNTRAINED, TUNED = "untrained", "fine-tuned"
# Runs that an error names at most.
_LISTED = 5


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


def not_a_run(folder: Path, expected: str, lacking: str) -> InputError:
    """Return an error that says what a folder is that was taken for a run.

    Args:
        folder: what was named.
        expected: what it should be, such as `finished run`.
        lacking: the file that it does not have.
    """
    if not is_folder(folder):
        is_there = "is a file and no folder" if folder.exists() else "does not exist"
        return InputError(f"{folder} {is_there}; {_name_a_run(folder.parent)}.")
    if is_file(folder / CONFIG_FILE) and lacking == RESULT_FILE:
        return unfinished(folder)
    return InputError(f"{folder} is no {expected}: it has no {lacking}; {_name_a_run(folder)}.")


def _name_a_run(parent: Path) -> str:
    """Return what to do where a folder is no run: name one of the runs in `parent`, if it has any."""
    try:
        inside = sorted(path.parent for path in parent.glob(f"*/{CONFIG_FILE}"))
    except OSError:
        inside = []
    if not inside:
        return "name the folder of a run"
    more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
    return f"the runs in {parent} are {', '.join(path.name for path in inside[:_LISTED])}{more}: name one"


def unfinished(folder: Path) -> InputError:
    """Return an error for a run that was stopped, with the command that continues it."""
    config = shlex.quote(str(folder / CONFIG_FILE))
    return InputError(
        f"{folder} is no finished run: it was stopped, or still goes on (it has no {RESULT_FILE}); "
        f"continue it with: {command('train')} --config_file {config} --auto_resume True."
    )


def read_result(run_dir: str | Path) -> dict[str, Any]:
    """Read a finished run's `result.json`.

    Raises:
        InputError: the folder is no finished run, or the file is damaged.
    """
    path = Path(run_dir) / RESULT_FILE
    if not is_file(path):
        raise not_a_run(Path(run_dir), "finished run", RESULT_FILE)
    result = read_json(path)
    wrong = _first_wrong(result)
    if wrong is not None:
        raise InputError(
            f"{path} is not a result of this program ({wrong}); run the command again."
        )
    return result


def split_sentence(result: Mapping[str, Any]) -> str:
    """Say how a run's held-out items were chosen, and what that leaks.

    Args:
        result: as `read_result` returns.
    """
    time = result.get("data", {}).get("split")
    if not isinstance(time, dict) or time.get("kind") != "global_time":
        return (
            "leave-one-out by time: the last item of each user, the one before it for validation. Other "
            "users' training items may be of later times than a user's held-out item, which a model "
            "in use could not have seen (split: global_time)"
        )
    valid, test = (one_line(time.get(f"{phase}_from_shown"), 40) for phase in ("valid", "test"))
    return (
        f"global time: training before {valid}, validation from then on, test from {test} on; a user's "
        f"first item in a period is held out"
    )


def _first_wrong(result: Any) -> str | None:
    """Name the first part of a result that is not as `write_result`'s callers make it."""
    if not isinstance(result, dict):
        return "it is no mapping"
    for key in ("dataset", "phase", "protocol"):
        if not isinstance(result.get(key), str):
            return f"its {key} is no text"
    rows, config = result.get("rows"), result.get("config")
    if not isinstance(rows, list) or not rows:
        return "it has no rows"
    if not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        return "a row has no name"
    if not all(_is_numbers(row.get("metrics", {})) for row in rows):
        return "a row's metrics are no numbers"
    if not isinstance(result.get("data", {}), dict):
        return "its data is no mapping"
    fingerprint = result.get("fingerprint", {})
    if not isinstance(fingerprint, dict) or not all(
        isinstance(value, str) for value in fingerprint.values()
    ):
        return "its fingerprint is no text"
    for key in ("timings_s", "peak_memory"):
        if not _is_numbers(result.get(key, {})):
            return f"its {key} are no numbers"
    training = result.get("training") or {}
    if not isinstance(training, dict) or not _is_history(training.get("history", [])):
        return "its training has no history"
    if not isinstance(config, dict) or not isinstance(config.get("optim_args", {}), dict):
        return "it has no config"
    if not isinstance(result.get("environment", {}), dict):
        return "its environment is no mapping"
    metrics, topk = config.get("metrics"), config.get("topk")
    if not isinstance(metrics, list) or not any(name in list(PER_USER) for name in metrics):
        return "its config has no metrics"
    if not isinstance(topk, list) or not topk or not all(map(_is_cut_off, topk)):
        return "its config has no topk"
    return None


def _is_history(records: Any) -> bool:
    return isinstance(records, list) and all(
        isinstance(record, dict)
        and _is_numbers({"epoch": record.get("epoch"), "loss": record.get("loss") or 0.0})
        and _is_numbers(record.get("valid") or {})
        for record in records
    )


def _is_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()
    )


def _is_cut_off(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def read_ranks(run_dir: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a row's users and ranks: two int64 [E].

    A rank is at least 1, and `UNRANKED` where the target is no candidate.

    Raises:
        InputError: the file is missing, damaged or lacks the row, or the folder's result is.
    """
    path = Path(run_dir) / RANKS_FILE
    require_file(path, str(path), "run the command again")
    try:
        arrays = load_file(path)
        users, ranks = arrays[f"{name}.users"], arrays[f"{name}.ranks"]
    except Exception as error:  # safetensors' numpy reader also raises for types numpy lacks
        raise InputError(
            f"{path} cannot be read or lacks the row '{one_line(name, 80)}'; run the command again."
        ) from error
    sound = (
        users.dtype == ranks.dtype == np.int64
        and users.ndim == 1
        and users.shape == ranks.shape
        and len(users)
        and ranks.min() >= 1
    )
    if not sound:
        raise InputError(
            f"{path}: the row '{one_line(name, 80)}' is not a list of users and their ranks; run "
            f"the command again."
        )
    return users, _unranked_in_format_1(read_result(run_dir), ranks)


def _unranked_in_format_1(result: dict[str, Any], ranks: np.ndarray) -> np.ndarray:
    """Replace the rank after the last item, which results of format 1 give to masked targets."""
    items = result.get("data", {}).get("items")
    if result.get("format", 1) != 1 or not isinstance(items, int):
        return ranks
    return np.where(ranks > items, UNRANKED, ranks)


def pack_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Turn an evaluation into what a checkpoint can hold."""
    import torch

    return {
        "phase": evaluation.phase,
        "users": torch.from_numpy(evaluation.users.astype(np.int64)),
        "ranks": torch.from_numpy(evaluation.ranks.astype(np.int64)),
        "metrics": {name: float(value) for name, value in evaluation.metrics.items()},
        "seconds": evaluation.seconds,
    }


def unpack_evaluation(packed: dict[str, Any]) -> Evaluation:
    """Return the evaluation that `pack_evaluation` was given."""
    from hsft.evaluator.evaluator import Evaluation

    arrays = {name: packed[name].numpy() for name in ("users", "ranks")}
    return Evaluation(**{**packed, **arrays})


def plain(value: Any) -> Any:
    """Turn numpy and torch scalars into plain numbers, and non-finite ones into None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value

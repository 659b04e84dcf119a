"""The folder of one run: its name, whether it is continued, and what is written into it first."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsft.config import Config, load_config
from hsft.config.help import dump_config
from hsft.config.loader import flat_values
from hsft.report.result import CONFIG_FILE as CONFIG_FILE
from hsft.report.result import RESULT_FILE
from hsft.trainer.checkpoint import CHECKPOINTS_DIR
from hsft.utils.errors import InputError
from hsft.utils.files import clear_leftovers, remove, write_text
from hsft.utils.logs import log_to_file

LOG_FILE = "run.log"

# A run may be continued with other values of these: they do not enter its numbers, or, as the
# device, the threads and what only saves memory, no further than rounding.
MAY_CHANGE = frozenset(
    {
        "auto_resume",
        "checkpoint_dir",
        "checkpoint_every",
        "checkpoint_minutes",
        "device",
        "eval_batch_size",
        "gradient_checkpointing",
        "item_gradient_checkpointing",
        "keep_last",
        "log_mlflow",
        "log_wandb",
        "logits_budget_mb",
        "mlflow_experiment",
        "num_threads",
        "num_workers",
        "overwrite",
        "run_name",
        "show_progress",
        "wandb_project",
    }
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDir:
    """A run's folder.

    Attributes:
        path: the folder.
        resume: it is there and its run is continued; else it is made, replacing what is there.
    """

    path: Path
    resume: bool = False


def kind_of(config: Config) -> str:
    """Return `baseline`, `qlora`, `full`, or the reference model's name."""
    if config.model != "HLLM":
        return config.model
    if config.val_only:
        return "baseline"
    return "qlora" if config.use_qlora else "full"


def choose_run_dir(config: Config) -> RunDir:
    """Return the run's folder.

    Without `run_name` it is `<dataset>-<kind>`, with `-2`, `-3`, ... while that exists; with
    `auto_resume` it is the one with the highest number that is unfinished (has no result.json) and
    has the same configuration. With `run_name` it is that folder; `auto_resume` continues it, and
    `overwrite` replaces it when it is finished or is not to be continued.

    Raises:
        InputError: `run_name` names an existing run and neither `overwrite` nor `auto_resume`
            allows that, the run to be continued has another configuration, or the name is none
            that the disk takes.
    """
    try:
        return _choose(config, Path(config.checkpoint_dir))
    except OSError as error:
        raise InputError(
            f"the run folder in {config.checkpoint_dir} cannot be made: {error.strerror}; change "
            f"--run_name or --checkpoint_dir."
        ) from error


def _choose(config: Config, parent: Path) -> RunDir:
    if config.run_name is not None:
        return _named_run(config, parent)
    name = f"{config.dataset}-{kind_of(config)}"
    if config.auto_resume:
        unfinished = _unfinished(parent, name)
        for folder in unfinished:
            if changed_key(config, folder) is None:
                return RunDir(folder, resume=True)
        if unfinished:
            raise InputError(
                f"no unfinished run {name} in {parent} has this configuration: "
                f"{_refusal(config, unfinished[0])}, or start another run with --run_name NAME."
            )
        log.info("there is no unfinished run %s in %s: starting one.", name, parent)
    elif config.trains:
        unfinished = [folder for folder in _unfinished(parent, name) if has_checkpoint(folder)]
        if unfinished:
            log.warning(
                "%s is an unfinished run; this command starts another one. To continue it instead, add "
                "--run_name %s --auto_resume True.",
                unfinished[0],
                unfinished[0].name,
            )
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return RunDir(folder)


def _named_run(config: Config, parent: Path) -> RunDir:
    assert config.run_name is not None
    if Path(config.run_name).name != config.run_name or config.run_name in (".", ".."):
        raise InputError(f"run_name '{config.run_name}' must be a plain folder name.")
    folder = parent / config.run_name
    # A kill right after mkdir leaves a folder without anything in it.
    if not folder.exists() or (config.auto_resume and not any(folder.glob("[!.]*"))):
        return RunDir(folder)
    finished = (folder / RESULT_FILE).exists()
    unfinished = (folder / CONFIG_FILE).is_file() and not finished
    if config.auto_resume and unfinished:
        if changed_key(config, folder) is not None:
            raise InputError(f"the run cannot be continued: {_refusal(config, folder)}.")
        return RunDir(folder, resume=True)
    if not config.overwrite:
        if finished and config.auto_resume and not config.overwrite:
            raise InputError(
                f"the run {folder} is finished, so there is nothing to continue; leave "
                f"--auto_resume out and choose another --run_name for a new run."
            )
        state = "exists and is unfinished" if unfinished else "exists"
        also = ", continue it with --auto_resume True," if unfinished else ""
        raise InputError(
            f"the run {folder} {state}; choose another --run_name{also} or set --overwrite True."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is no run of this program and is not overwritten.")
    return RunDir(folder)


def _unfinished(parent: Path, name: str) -> list[Path]:
    """Return the unfinished runs `name`, `name-2`, ..., the latest first."""
    pattern = re.compile(rf"{re.escape(name)}(?:-([1-9][0-9]*))?$")
    numbered: list[tuple[int, Path]] = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        match = pattern.match(folder.name)
        if match and (folder / CONFIG_FILE).is_file() and not (folder / RESULT_FILE).exists():
            numbered.append((int(match.group(1) or 1), folder))
    return [folder for _, folder in sorted(numbered, reverse=True)]


def changed_key(config: Config, folder: Path) -> tuple[str, Any, Any] | None:
    """Return the first key that differs from a run's, its value there and here; None if none does.

    Raises:
        InputError: the run's config.yaml is not a configuration of this program.
    """
    before, _ = load_config([folder / CONFIG_FILE])
    # A run goes on with what it took, however much memory is free now.
    if config.qlora_quant_type == "auto":
        config = config.model_copy(update={"qlora_quant_type": before.qlora_quant_type})
    if config.chooses_batch_size:
        config = config.model_copy(update={"train_batch_size": before.train_batch_size})
    old, new = (
        flat_values(before.model_dump(mode="json")),
        flat_values(config.model_dump(mode="json")),
    )
    for key, value in new.items():
        if key.partition(".")[0] not in MAY_CHANGE and old[key] != value:
            return key, old[key], value
    return None


def _refusal(config: Config, folder: Path) -> str:
    difference = changed_key(config, folder)
    assert difference is not None
    key, old, new = difference
    return f"{folder} has {key} {old!r}, now it is {new!r}; give --{key} its old value"


def start_run_dir(config: Config, folder: Path, *, resume: bool) -> None:
    """Create the run's folder with its `config.yaml` and log into it from now on.

    With `resume` the folder is there, and leftovers of a killed process are removed from it.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        if resume:
            clear_leftovers(folder)
        elif folder.exists():
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            write_text(folder / CONFIG_FILE, dump_config(config))
        log_to_file(folder / LOG_FILE)
    except OSError as error:
        raise InputError(
            f"the run folder {folder} cannot be written: {error.strerror}; free some space or "
            f"change --checkpoint_dir."
        ) from error


def drop_empty_run(folder: Path) -> None:
    """Remove the folder of a run that failed before it produced a result or a checkpoint."""
    kept = [folder / RESULT_FILE, folder / "best", *(folder / CHECKPOINTS_DIR).glob("[0-9]*")]
    if folder.is_dir() and not any(path.exists() for path in kept):
        remove(folder)


def has_checkpoint(folder: Path) -> bool:
    """Say whether a run can be continued from something it saved."""
    return any((folder / CHECKPOINTS_DIR).glob("[!.]*"))

"""The folder of one run: its name, and what is written into it at the start."""

from __future__ import annotations

import logging
from pathlib import Path

from REC.config import Config
from REC.config.help import dump_config
from REC.report.result import RESULT_FILE
from REC.utils.errors import InputError
from REC.utils.files import remove, write_text
from REC.utils.logs import set_up_logging

CONFIG_FILE = "config.yaml"
LOG_FILE = "run.log"

log = logging.getLogger(__name__)


def kind_of(config: Config) -> str:
    """Return `baseline`, `qlora`, `full`, or the reference model's name."""
    if config.model != "HLLM":
        return config.model
    if config.val_only:
        return "baseline"
    return "qlora" if config.use_qlora else "full"


def choose_run_dir(config: Config) -> Path:
    """Return the run's folder, which does not exist yet or may be replaced.

    Without `run_name` it is `<dataset>-<kind>`, with `-2`, `-3`, ... while that exists.

    Raises:
        InputError: `run_name` names an existing run and `overwrite` is not set.
    """
    parent = Path(config.checkpoint_dir)
    if config.run_name is None:
        name = f"{config.dataset}-{kind_of(config)}"
        number = 1
        while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return folder
    if Path(config.run_name).name != config.run_name or config.run_name in (".", ".."):
        raise InputError(f"run_name '{config.run_name}' must be a plain folder name.")
    folder = parent / config.run_name
    if folder.exists() and not config.overwrite:
        raise InputError(
            f"the run {folder} exists; choose another --run_name or set --overwrite True."
        )
    if folder.exists() and not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is no run of this program and is not overwritten.")
    return folder


def start_run_dir(config: Config, folder: Path, quiet: bool = False) -> None:
    """Create the run's folder with its `config.yaml`, and log into it from now on.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        if folder.exists():
            remove(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"the run folder {folder} cannot be made: {error.strerror}; change --checkpoint_dir."
        ) from error
    write_text(folder / CONFIG_FILE, dump_config(config))
    set_up_logging(folder / LOG_FILE, quiet=quiet)


def drop_empty_run(folder: Path) -> None:
    """Remove the folder of a run that failed before it produced a result or a checkpoint."""
    produced = (RESULT_FILE, "best", "checkpoints")
    if folder.is_dir() and not any((folder / name).exists() for name in produced):
        remove(folder)

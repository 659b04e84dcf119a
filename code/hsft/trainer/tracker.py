"""What the experiment trackers have in common."""

from __future__ import annotations

import importlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from hsft.config import Config
from hsft.utils.errors import InputError, brief

log = logging.getLogger(__name__)


class Tracker(ABC):
    """A run at an experiment tracker. Before `open`, and after a failure, its methods do nothing.

    Leaving its `with` block ends the run there. What fails after `open` costs one warning, never
    the training.

    Trackers delete nothing: steps that a killed session did after its last checkpoint are there
    twice once they are done again, where TensorBoard hides the first ones.

    Attributes:
        service: the tracker's name, for messages.
    """

    service: ClassVar[str]

    def __init__(self) -> None:
        self._is_open = False

    def open(self, config: Config, folder: Path) -> None:
        """Begin the run, or go on with the one that an earlier session of this folder began.

        Args:
            config: shown beside the charts.
            folder: the run's folder; its name becomes the run's name.

        Raises:
            InputError: the tracker's package is not installed, or does not start (no login, no
                connection).
        """
        self._start(config, folder)
        self._is_open = True

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values of one optimizer step."""
        self._attempt(lambda: self._log(values, step))

    def summarise(self, values: Mapping[str, float]) -> None:
        """Log the run's final values."""
        self._attempt(lambda: self._log_summary(values))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._attempt(lambda: self._finish(kind))
        self._is_open = False

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._is_open:
            return
        try:
            action()
        except Exception as error:  # trackers' errors and those of their connections have no base
            self._is_open = False
            log.warning(
                "%s failed and gets no more values of this run: %s. TensorBoard's are complete.",
                self.service,
                brief(without_password(error)),
            )

    @abstractmethod
    def _start(self, config: Config, folder: Path) -> None:
        """As `open`."""

    @abstractmethod
    def _log(self, values: Mapping[str, float], step: int) -> None:
        """As `add_scalars`; may raise anything."""

    @abstractmethod
    def _log_summary(self, values: Mapping[str, float]) -> None:
        """As `summarise`; may raise anything."""

    @abstractmethod
    def _finish(self, kind: type[BaseException] | None) -> None:
        """End the run; may raise anything.

        Args:
            kind: class of the error that ended it, None where it is finished.
        """


def import_tracker(
    name: str, attribute: str, *, key: str, package: str, lookalike: str, install: str
) -> Any:
    """Import a tracker's package.

    Args:
        name: of the module.
        attribute: what the module has, and a folder of its name, which Python takes for a package,
            does not have.
        key: the configuration key that asks for it.
        package: that has to be installed.
        lookalike: words for such a folder.
        install: arguments of pip.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    remedy = f"install it with pip install {install}, or set --{key} False"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{key}: True needs the package {package} ({brief(error)}); {remedy}."
        ) from error
    if not hasattr(module, attribute):
        raise InputError(
            f"{key}: True needs the package {package}, and only {lookalike} was found; {remedy}."
        )
    return module


def read_run_id(path: Path, service: str) -> str:
    """Read the name that a tracker has for a run from a file in the run's folder.

    Raises:
        InputError: the file holds no such name.
    """
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise InputError(
            f"{path} holds no run id of {service}; remove it to begin a new run there."
        )
    return name


def without_password(text: object) -> str:
    """Return a text, for example an error's, without the user and password of its addresses."""
    return re.sub(r"(?<=://)[^\s/@]*@", "", str(text))

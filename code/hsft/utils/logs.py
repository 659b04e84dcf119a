"""Logging to the terminal and, for a run, to its folder."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

_NOISY = (
    "httpx",
    "httpx2",
    "huggingface_hub",
    "lightning",
    "lightning.fabric",
    "matplotlib",
    "urllib3",
)
_LIBRARIES = r"(bitsandbytes|deepspeed|lightning|peft|torch|transformers)(\.|$)"


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at the moment.

    A live display puts itself in its place, so that lines appear above the bar.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The stream to write to."""
        return sys.stderr


class _RunLog(logging.FileHandler):
    """A log file that gives up with one warning when it cannot be written, as on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop writing the file; the terminal keeps every line."""
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        logging.getLogger(__name__).warning(
            "%s is no longer written: %s.", self.baseFilename, error
        )


def set_up_logging(log_file: Path | None = None, *, quiet: bool = False) -> None:
    """Send log lines to standard error, and to `log_file` too when one is given.

    Args:
        log_file: appended to.
        quiet: errors only, for the processes after the first: they would repeat every line.
    """
    # What libraries have to say to each other's authors: nothing a run's user can mend.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    if quiet:
        warnings.simplefilter("ignore")
    handlers: list[logging.Handler] = [_Terminal()]
    if log_file is not None:
        handlers.append(_RunLog(log_file, encoding="utf-8"))
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR if quiet else logging.WARNING)
    # A filter, since DeepSpeed sets the level when it is imported. Without a GPU it says so on
    # standard output, whatever it is imported for.
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)
    # It warns on every CPU run that an optional faster kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")

"""Logging to the terminal and, for a run, to its folder."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_NOISY = (
    "faiss",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "lightning",
    "lightning.fabric",
    "matplotlib",
    "onnx_ir",
    "onnxscript",
    "urllib3",
)
_FORMAT, _TIME = "%(asctime)s %(message)s", "%H:%M:%S"
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


def set_up_logging(*, quiet: bool = False) -> None:
    """Send a program's log lines to standard error.

    Args:
        quiet: errors only, for the processes after the first: they would repeat every line.
    """
    _ignore_library_warnings()
    if quiet:
        warnings.simplefilter("ignore")
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.INFO,
        format=_FORMAT,
        datefmt=_TIME,
        handlers=[_Terminal()],
        force=True,
    )
    for name, level in _library_levels(quiet).items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)


def log_to_file(path: Path) -> None:
    """Append log lines to a file as well, and no longer to that of an earlier run.

    Raises:
        OSError: the file cannot be opened.
    """
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT, _TIME))
    stop_logging_to_file()
    logging.getLogger().addHandler(handler)


def stop_logging_to_file() -> None:
    """Close the file of `log_to_file`, if there is one."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _RunLog)]:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def show_log_lines() -> Iterator[None]:
    """Show the package's log lines during a call from Python, and leave logging as it was.

    Where the caller has set up logging, lines go where that sends them.
    """
    ours = logging.getLogger("hsft")
    libraries = {name: logging.getLogger(name) for name in _library_levels()}
    before = {logger: logger.level for logger in (ours, *libraries.values())}
    handler = _Terminal()
    handler.setFormatter(logging.Formatter(_FORMAT, _TIME))
    if not logging.getLogger().handlers:
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    for name, level in _library_levels().items():
        libraries[name].setLevel(level)
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)
    try:
        with warnings.catch_warnings():
            _ignore_library_warnings()
            yield
    finally:
        stop_logging_to_file()
        ours.removeHandler(handler)
        for logger, level in before.items():
            logger.setLevel(level)


def _ignore_library_warnings() -> None:
    # What libraries have to say to each other's authors; a user cannot act on it.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # tqdm's in a notebook without ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")


def _library_levels(quiet: bool = False) -> dict[str, int]:
    levels = dict.fromkeys(_NOISY, logging.ERROR if quiet else logging.WARNING)
    # It warns on every CPU run that an optional faster kernel is not installed.
    return {**levels, "bitsandbytes": logging.ERROR}


def _is_worth_saying(record: logging.LogRecord) -> bool:
    # A filter, since DeepSpeed sets its level when it is imported. Without a GPU it writes this to
    # standard output, whatever it is imported for.
    return not record.getMessage().startswith("Setting accelerator to CPU")

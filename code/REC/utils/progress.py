"""Live progress with rate and ETA: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from REC.utils.processes import global_rank

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


class Meter:
    """Counts finished units of one task and shows them.

    Args:
        task: what is being done.
        total: units in all.
        unit: what is counted, in the plural.
        enabled: False shows nothing. Under torchrun only process 0 shows anything.
    """

    def __init__(self, task: str, total: int, unit: str, enabled: bool = True) -> None:
        enabled = enabled and global_rank() == 0
        self.task, self.total, self.unit = task, total, unit
        self.done = 0
        self._began = self._last_line = time.perf_counter()
        self._skipped = 0
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._row = self._bar.add_task(task, total=total, rate="", note="")
            self._bar.start()
        self._lines = enabled and self._bar is None

    def skip(self, units: int) -> None:
        """Count units that were done before: they do not enter the rate."""
        self.done += units
        self._skipped += units

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units and show `note`, such as the loss, beside them."""
        self.done += units
        now = time.perf_counter()
        rate = (self.done - self._skipped) / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(
                self._row, completed=self.done, rate=f"{rate:,.1f} {self.unit}/s", note=note
            )
        elif self._lines and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            eta = (self.total - self.done) / max(rate, 1e-9)
            log.info(
                "%s: %d of %d %s, %.1f %s/s, ETA %s%s",
                self.task,
                self.done,
                self.total,
                self.unit,
                rate,
                self.unit,
                format_seconds(eta),
                f", {note}" if note else "",
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def meter(task: str, total: int, unit: str, enabled: bool = True) -> Iterator[Meter]:
    """Show a `Meter` for the length of a block."""
    shown = Meter(task, total, unit, enabled)
    try:
        yield shown
    finally:
        shown.close()


def format_seconds(seconds: float) -> str:
    """Write a duration as `3h04m`, `4m05s` or `12s`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"

"""Live progress in one look for all long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from hsft.utils.distributed import is_rank_zero
from hsft.utils.environment import current_memory, peak_memory

if TYPE_CHECKING:
    from hsft.utils.progress_bar import ProgressBar

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_FRAMES = 0.25


class Meter(ExitStack):
    """Counts finished units of one task and shows them, with rates, memory and the time left.

    Leaving its `with` block, or `close()`, removes the bar.

    Rates are means since the start. Counting is a few additions; text is made only when something
    is shown.

    Args:
        task: what is being done.
        total: units in all.
        unit: what is counted, in the plural.
        enabled: False shows nothing. Under torchrun only process 0 shows anything.
        device: whose memory is shown: the GPU's, else this process's; None shows none.
        tokens: tokens of all units that are not skipped, where known: units may be of very
            different length, and then the time left follows from the tokens.

    Attributes:
        done: units counted so far, skipped ones included.
        tokens_done: tokens counted so far.
        shown: whether anything is shown.
    """

    def __init__(
        self,
        task: str,
        total: int,
        unit: str,
        enabled: bool = True,
        *,
        device: torch.device | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.task, self.total, self.unit = task, total, unit
        self.device = device
        self.tokens = tokens
        self.done = self.tokens_done = self._skipped = 0
        self.shown = enabled and is_rank_zero()
        self._began = self._last = time.perf_counter()
        self._between = SECONDS_BETWEEN_LINES
        self._display: ProgressBar | None = None
        if self.shown and _can_animate():
            from hsft.utils.progress_bar import ProgressBar

            self._display = ProgressBar(task, total, unit, 1 / SECONDS_BETWEEN_FRAMES)
            self._display.start()
            self.callback(self._display.stop)
            self._between = SECONDS_BETWEEN_FRAMES

    def skip(self, units: int) -> None:
        """Count units that were done before: they do not enter the rate."""
        self.done += units
        self._skipped += units

    def advance(
        self, units: int = 1, tokens: int = 0, note: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Count finished units.

        Args:
            units: how many.
            tokens: the tokens in them, padding not counted.
            note: gives what else is to be shown, such as the loss; called only when it is.
        """
        self.done += units
        self.tokens_done += tokens
        if not self.shown:
            return
        now = time.perf_counter()
        if now - self._last < self._between:
            return
        self._last = now
        facts = [*note(), *self._rates(now), *self._memory()]
        left = format_seconds(self._seconds_left(now))
        if self._display is not None:
            self._display.show(self.done, left, ", ".join(facts))
        else:
            log.info(
                "%s: %s of %s %s, ETA %s, %s",
                self.task,
                f"{self.done:,}",
                f"{self.total:,}",
                self.unit,
                left,
                ", ".join(facts),
            )

    def _rates(self, now: float) -> Iterator[str]:
        seconds = max(now - self._began, 1e-9)
        yield f"{(self.done - self._skipped) / seconds:,.1f} {self.unit}/s"
        if self.tokens_done:
            yield f"{self.tokens_done / seconds:,.0f} tokens/s"

    def _seconds_left(self, now: float) -> float:
        done, left = self.done - self._skipped, self.total - self.done
        if self.tokens is not None:
            done, left = self.tokens_done, self.tokens - self.tokens_done
        return (now - self._began) * left / max(done, 1)

    def _memory(self) -> Iterator[str]:
        if self.device is None:
            return
        kind = "gpu_bytes" if self.device.type == "cuda" else "host_bytes"
        peak = peak_memory(self.device)[kind]
        now = current_memory(self.device)[kind]
        # Linux brings the peak up to date less often.
        yield f"memory {format_bytes(now)} (peak {format_bytes(max(now, peak))})"


def _can_animate() -> bool:
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


def format_seconds(seconds: float) -> str:
    """Write a duration as `3h04m`, `4m05s` or `12s`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def format_bytes(count: int) -> str:
    """Write a size in memory as `1.5 GiB` or `310 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

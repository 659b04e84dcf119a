"""Time and memory of a run, added up over the sessions that an interruption cut it into."""

from __future__ import annotations

import time
from typing import Any

import torch

from hsft.utils import environment


class Session:
    """Wall time by stage and peak memory: of this process, and of the run with what came before.

    What a killed session did after its last checkpoint is lost and done again; its time is not
    counted.

    Args:
        device: whose memory is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here: dict[str, float] = {}
        self._earlier: dict[str, Any] = {"timings_s": {}, "peak_memory": {}}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap under a stage."""
        now = time.perf_counter()
        self._here[stage] = self._here.get(stage, 0.0) + now - self._last
        self._last = now

    def continue_from(self, record: dict[str, Any]) -> None:
        """Count the earlier sessions in, as `record` returned them."""
        self._earlier = record

    def record(self, stage: str | None = None) -> dict[str, Any]:
        """Return the whole run's numbers so far.

        Args:
            stage: what is under way; the time since the last lap is booked there first.

        Returns:
            `timings_s`: stage -> seconds; `peak_memory`: kind -> bytes.
        """
        if stage is not None:
            self.lap(stage)
        seconds = dict(self._earlier["timings_s"])
        for name, value in self._here.items():
            seconds[name] = seconds.get(name, 0.0) + value
        peak = dict(self._earlier["peak_memory"])
        for name, size in environment.peak_memory(self.device).items():
            peak[name] = max(size, peak.get(name, 0))
        return {
            "timings_s": {name: round(value, 3) for name, value in seconds.items()},
            "peak_memory": peak,
        }

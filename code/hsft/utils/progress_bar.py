"""The bar that `progress.Meter` shows on a terminal; apart, because importing rich takes time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class ProgressBar(Progress):
    """A bar on standard error, with a line of rates and memory below it.

    Args:
        task: what is being done.
        total: units in all.
        unit: what is counted, in the plural.
        frames: drawn per second.
    """

    def __init__(self, task: str, total: int, unit: str, frames: float) -> None:
        self._facts = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[left]}"),
            console=Console(stderr=True),
            refresh_per_second=frames,
            transient=True,
            expand=True,
            # Results that are piped into a file must not end up on the terminal.
            redirect_stdout=False,
        )
        self._row = self.add_task(task, total=total, unit=unit, left="-")

    def show(self, done: int, left: str, facts: str) -> None:
        """Take new values; they appear with the next frame."""
        self._facts = facts
        self.update(self._row, completed=done, left=left)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Give the lines of a frame."""
        yield self.make_tasks_table(self.tasks)
        if self._facts:
            yield Text(f"  {self._facts}")

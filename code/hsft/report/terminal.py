"""Texts with tables of metrics: Markdown for files and pipes, drawn by rich on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class MetricCell:
    """A metric's value and its 95 % interval.

    Attributes:
        value: a number.
        low, high: the interval; None where there is none.
        mark: what stands behind the value, such as `*+`.
        best: the best value of its column.
    """

    value: float
    low: float | None = None
    high: float | None = None
    mark: str = ""
    best: bool = False

    @property
    def shown_value(self) -> str:
        """The value in four digits, with its mark; `n/a` for NaN."""
        return "n/a" if math.isnan(self.value) else f"{self.value:.4f}{self.mark}"

    @property
    def shown_interval(self) -> str:
        """The interval in brackets; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"[{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class MetricTable:
    """A table of metrics.

    Attributes:
        header: names of the columns, the first one that of the rows' names.
        rows: a name and a cell for each further column.
    """

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[MetricCell]]]


# Paragraphs, each without a line end at its end, and tables.
Blocks = Sequence[str | MetricTable]


def as_markdown(blocks: Blocks) -> str:
    """Write paragraphs and tables as Markdown, an empty line between them."""
    parts = [block if isinstance(block, str) else _markdown_table(block) for block in blocks]
    return "\n\n".join(parts) + "\n"


def write_blocks(blocks: Blocks, stream: TextIO | None = None) -> None:
    """Write paragraphs and tables to a stream, the tables fitted to the terminal where it is one.

    On a terminal a cell's interval stands below its value. In a pipe or a file everything is
    Markdown.

    Args:
        blocks: the text.
        stream: where to; standard output when None.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write(as_markdown(blocks))
        return
    for number, block in enumerate(blocks):
        if number:
            stream.write("\n")
        if isinstance(block, str):
            stream.write(f"{block}\n")
        else:
            _draw(block, stream)


def _markdown_table(table: MetricTable) -> str:
    lines = [
        "| " + " | ".join(map(_escaped, table.header)) + " |",
        "| --- |" + " ---: |" * (len(table.header) - 1),
    ]
    for name, cells in table.rows:
        shown = [f"{cell.shown_value} {cell.shown_interval}".rstrip() for cell in cells]
        lines.append(f"| {_escaped(name)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _draw(table: MetricTable, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    drawn.add_column(Text(table.header[0]), overflow="fold")
    for name, width in zip(table.header[1:], _widths(table, console.width), strict=True):
        drawn.add_column(Text(name), justify="right", width=width, overflow="fold")
    for name, cells in table.rows:
        drawn.add_row(
            Text(name),
            *(
                Text.assemble(
                    (cell.shown_value, "bold" if cell.best else ""),
                    f"\n{cell.shown_interval}" if cell.shown_interval else "",
                )
                for cell in cells
            ),
        )
    console.print(drawn)


def _widths(table: MetricTable, available: int) -> list[int]:
    """Return the widths of all columns but the first: whole intervals, or broken in two."""
    names = max(len(table.header[0]), *(len(name) for name, _ in table.rows))
    columns = list(zip(*(cells for _, cells in table.rows), strict=True))
    whole, narrow = [], []
    for header, cells in zip(table.header[1:], columns, strict=True):
        texts = [header, *(cell.shown_value for cell in cells)]
        intervals = [cell.shown_interval for cell in cells]
        whole.append(max(map(len, [*texts, *intervals])))
        narrow.append(max(len(word) for text in [*texts, *intervals] for word in text.split()))
    return whole if names + sum(whole) + len(whole) <= available else narrow

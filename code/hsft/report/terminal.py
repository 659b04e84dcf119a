"""Markdown with tables, written for people where standard output is a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TextIO

_ROW = re.compile(r"\| (.*) \|")
_RULE = re.compile(r"\|( :?-+:? \|)+")
# What stands between cells; a bar within one has a backslash before it.
_BETWEEN = re.compile(r"(?<!\\) \| ")


def write_markdown(text: str, stream: TextIO | None = None) -> None:
    """Write Markdown to a stream, its tables fitted to the terminal where the stream is one.

    On a terminal a cell's interval, `[LOW, HIGH]`, stands below its value. Everything else, and
    everything in a pipe or a file, is written as it is.

    Args:
        text: Markdown whose tables are written as `hsft.report.compare.markdown` does.
        stream: where to; standard output when None.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write(text)
        return
    table: list[str] = []
    for line in text.splitlines(keepends=True):
        if _ROW.fullmatch(line.rstrip("\n")) or _RULE.fullmatch(line.rstrip("\n")):
            table.append(line.rstrip("\n"))
            continue
        _draw(table, stream)
        table = []
        stream.write(line)
    _draw(table, stream)


def _draw(lines: Sequence[str], stream: TextIO) -> None:
    if not lines:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(line) for line in lines if not _RULE.fullmatch(line)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    table.add_column(Text(rows[0][0]), overflow="fold")
    console = Console(file=stream, highlight=False)
    for name, width in zip(rows[0][1:], _widths(rows, console.width), strict=True):
        table.add_column(Text(name), justify="right", width=width, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)


def _widths(rows: Sequence[Sequence[str]], available: int) -> list[int]:
    """Return the widths of all columns but the first: whole intervals, or broken in two."""
    columns = list(zip(*rows, strict=True))
    names = max(map(len, columns[0]))
    whole = [max(len(line) for cell in own for line in cell.splitlines()) for own in columns[1:]]
    if names + sum(whole) + len(whole) <= available:
        return whole
    return [max(len(word) for cell in own for word in cell.split()) for own in columns[1:]]


def _cells(line: str) -> list[str]:
    match = _ROW.fullmatch(line)
    assert match is not None
    name, *values = (cell.replace("\\|", "|") for cell in _BETWEEN.split(match[1]))
    return [name, *(value.replace(" [", "\n[", 1) for value in values)]

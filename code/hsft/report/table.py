"""The table at the end of a run: baseline against fine-tune with relative gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def gain_table(rows: Sequence[tuple[str, Mapping[str, float]]], decimals: int = 6) -> str:
    """Format metrics as text columns, with the last row's gain over the first one.

    Args:
        rows: (name, metrics) from baseline to fine-tune; one row gives no gain column.
        decimals: of the metrics.

    Returns:
        A table with a line a metric.
    """
    names = list(rows[0][1])
    header = ["metric", *(name for name, _ in rows)]
    with_gain = len(rows) > 1
    lines = [[*header, "gain"] if with_gain else header]
    for metric in names:
        values = [metrics[metric] for _, metrics in rows]
        cells = [metric, *(f"{value:.{decimals}f}" for value in values)]
        lines.append([*cells, relative_gain(values[0], values[-1])] if with_gain else cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells))
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text) + "\n"


def relative_gain(before: float, after: float) -> str:
    """Write (after - before) / before as a signed percentage; `n/a` when there is nothing before."""
    return f"{(after - before) / before:+.1%}" if before > 0 else "n/a"

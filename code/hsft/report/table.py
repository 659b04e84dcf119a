"""The table at the end of a run: baseline against fine-tune with relative gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def gain_table(rows: Sequence[tuple[str, Mapping[str, float]]], decimals: int = 6) -> str:
    """Format metrics as text columns, with the last row's gain over the first one.

    Args:
        rows: (name, metrics) from baseline to fine-tune; one row gives no gain column. A metric that a
            row lacks, such as those of lists without items, is `n/a` there.
        decimals: of the metrics.

    Returns:
        A table with a line a metric.
    """
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    header = ["metric", *(name for name, _ in rows)]
    with_gain = len(rows) > 1
    lines = [[*header, "gain"] if with_gain else header]
    for metric in names:
        values = [metrics.get(metric, math.nan) for _, metrics in rows]
        shown = ["n/a" if math.isnan(value) else f"{value:.{decimals}f}" for value in values]
        cells = [metric, *shown]
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
    """Write (after - before) / before as a signed percentage; `n/a` where that is no number."""
    gain = (after - before) / before if before > 0 else math.nan
    return "n/a" if math.isnan(gain) else f"{gain:+.1%}"

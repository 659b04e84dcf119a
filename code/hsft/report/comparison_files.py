"""A comparison as Markdown, CSV and a PNG chart."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from hsft.report.charts import Bars, Series, save_bar_charts
from hsft.report.compare import Comparison, Record, Test
from hsft.report.terminal import Blocks, MetricCell, MetricTable, as_markdown
from hsft.utils.files import write_text

INTERVALS = (
    "95 % intervals over users: bootstrap, or Wilson's where there are fewer than 40 users, 5 hits "
    "or 5 misses"
)


def blocks(comparison: Comparison) -> Blocks:
    """Write the comparison as paragraphs and a table of values with 95 % intervals."""
    header = ["run", *(f"{name}@{k}" for name, k in comparison.columns)]
    first_records = comparison.records[0]
    rows = [
        (
            row.name,
            [
                MetricCell(record.value, record.low, record.high, _mark(record, first), record.best)
                for record, first in zip(records, first_records, strict=True)
            ],
        )
        for row, records in zip(comparison.rows, comparison.records, strict=True)
    ]
    note = INTERVALS
    if len(comparison.rows) > 1:
        corrected = ""
        if len(comparison.rows) > 2:
            corrected = f", by Holm's correction for {len(comparison.rows) - 1} tests a metric"
        note += (
            f"; *+ higher, *- lower than {comparison.rows[0].name} (paired randomisation test, "
            f"p < 0.05{corrected})"
        )
    settings = [f"{row.name}: {row.settings}." for row in comparison.rows if row.settings]
    return [
        comparison.title,
        MetricTable(header, rows),
        f"{note}.",
        *_aggregates(comparison),
        *comparison.notes,
        *settings,
    ]


def _aggregates(comparison: Comparison) -> Blocks:
    """Write what is of all users together, without intervals."""
    written: list[str | MetricTable] = []
    for caption, names in comparison.aggregate_tables:
        rows = [
            (row.name, [MetricCell(row.metrics.get(name, math.nan)) for name in names])
            for row in comparison.rows
        ]
        written += [f"{caption}, all users together:", MetricTable(["run", *names], rows)]
    return written


def _mark(record: Record, first: Record) -> str:
    test = record.against_first
    if test is None or test.p_holm >= 0.05:
        return ""
    return "*+" if record.value > first.value else "*-"


def markdown(comparison: Comparison) -> str:
    """Format the comparison as a Markdown table with 95 % intervals."""
    return as_markdown(blocks(comparison))


def csv_lines(comparison: Comparison) -> list[list[dict[str, Any]]]:
    """Return the lines of a CSV file, column -> value: a list a row, in it a line a metric.

    Metrics of all users together have a value alone.
    """
    names = [name for _, names in comparison.aggregate_tables for name in names]
    lines = []
    for row, records in zip(comparison.rows, comparison.records, strict=True):
        tested = [csv_columns(record) for record in records]
        untested: dict[str, Any] = dict.fromkeys(tested[0])
        more = [
            {**untested, "run": row.name, "metric": name, "value": row.metrics[name]}
            for name in names
            if name in row.metrics
        ]
        lines.append([*tested, *more])
    return lines


def csv_columns(record: Record) -> dict[str, Any]:
    """Return one record as a line of CSV: column -> value."""

    def tested(test: Test | None) -> tuple[str | None, float | None, float | None]:
        return (None, None, None) if test is None else (test.gain, test.p_value, test.p_holm)

    gain, p_value, p_holm = tested(record.against_first)
    other = record.against_best_other
    gain_other, p_value_other, p_holm_other = tested(other)
    return {
        "run": record.run,
        "metric": record.metric,
        "value": record.value,
        "low": record.low,
        "high": record.high,
        "gain": gain,
        "p_value": p_value,
        "p_holm": p_holm,
        "best_other": None if other is None else other.other,
        "gain_over_best_other": gain_other,
        "p_value_best_other": p_value_other,
        "p_holm_best_other": p_holm_other,
    }


def csv_text(comparison: Comparison) -> str:
    """Format the comparison as CSV, one line a row and metric."""
    buffer = io.StringIO()
    lines = [line for lines in csv_lines(comparison) for line in lines]
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `comparison.md`, `.csv` and `.png` to a folder and return their paths."""
    paths = [folder / f"comparison.{ending}" for ending in ("md", "csv", "png")]
    write_text(paths[0], markdown(comparison))
    write_text(paths[1], csv_text(comparison))
    save_bar_charts(comparison.title, metric_bars(comparison), paths[2])
    return paths


def metric_bars(comparison: Comparison) -> list[Bars]:
    """Return the bars of every metric: a group a cut-off, in it a bar a row."""
    charts = []
    for name in dict.fromkeys(name for name, _ in comparison.columns):
        columns = [n for n, column in enumerate(comparison.columns) if column[0] == name]
        series = [
            Series(
                row.name,
                number,
                np.array([records[column].value for column in columns]),
                None,
                np.array([records[column].low for column in columns]),
                np.array([records[column].high for column in columns]),
            )
            for number, (row, records) in enumerate(
                zip(comparison.rows, comparison.records, strict=True)
            )
        ]
        charts.append(Bars(name, [comparison.columns[column][1] for column in columns], series))
    return charts

"""The report's sections on what was measured, from result.json and ranks alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsft.report.breakdown import Deciles, Estimate, Group, group_estimate, recall_curve
from hsft.report.charts import Series, bar_chart, group_chart, line_chart
from hsft.report.compare import TRAINED, Comparison, Record, Row
from hsft.report.comparison_files import INTERVALS, metric_bars
from hsft.report.page import Cell, Chart, Section, Table
from hsft.report.result import split_sentence
from hsft.report.run_tables import NOT_RECORDED, Results, as_time
from hsft.utils.errors import counted

_CURVE_TICKS = (1, 2, 5, 10, 20, 50, 100)
# What metrics of all users together say.
_MEANINGS = {
    "AUC": "share of a user's other candidates that rank below the held-out item",
    "GAUC": "the same as AUC, with one held-out item a user",
    "Coverage": "share of the catalogue that is in some list",
    "GiniIndex": "0 where all items are listed equally often, near 1 where a few fill all lists",
    "ShannonEntropy": "of the listed items, in nats; higher where more items share the lists",
    "AveragePopularity": "mean number of training interactions of a listed item",
    "TailPercentage": "share of the listed items that are tail items or never in training",
    "Novelty": "mean self-information of a listed item, in bits; higher where fewer users have it",
    "PopularityLift": "how much more popular the lists are than the users' histories; 0: equally",
    "IntraListSimilarity": "mean cosine of two items of a list, by the cached item embeddings",
}
_NO_USERS = "no users"
_NOT_SIGNIFICANT = 0.05


def facts(comparison: Comparison, results: Results) -> list[tuple[str, str]]:
    """Say what was measured, on whom, and when."""
    first = results[0][2]
    ended = sorted(str(result["finished"]) for _, _, result in results if result.get("finished"))
    return [
        ("Dataset", str(first["dataset"])),
        ("Held-out items", f"{first['phase']}, {split_sentence(first)}"),
        ("Users", f"{len(comparison.rows[0].users):,}"),
        ("Protocol", str(first["protocol"])),
        ("Runs", ", ".join(name for name, _, _ in results)),
        ("Seeds", ", ".join(dict.fromkeys(str(result.get("seed")) for _, _, result in results))),
        ("Last run finished", _last(ended, len(results))),
    ]


def _last(ended: Sequence[str], runs: int) -> str:
    """Say when the last run ended, as far as runs recorded it."""
    if not ended:
        return NOT_RECORDED
    some = "" if len(ended) == runs else f" ({len(ended)} of {runs} runs recorded it)"
    return f"{as_time(ended[-1])}{some}"


def headline(comparison: Comparison) -> str:
    """Say in one sentence which model is best by the most telling metric, and how sure that is.

    The metric is NDCG, where it was measured, at the cut-off that `middle_cut` chooses.
    """
    column = _headline_column(comparison)
    records = [row[column] for row in comparison.records]
    best = max(records, key=lambda record: record.value)
    users = f"{counted(len(comparison.rows[0].users), 'user')}"
    value = f"{best.metric} {best.value:.4f} [{best.low:.4f}, {best.high:.4f}]"
    test = best.against_best_other
    if test is None:
        return f"{best.run}: {value} over {users}."
    if best.value <= 0:
        return f"None of the {len(records)} models has a hit: {best.metric} is 0 over {users}."
    sure = "" if test.p_holm < _NOT_SIGNIFICANT else ", a difference that may be chance"
    gain = "" if test.gain == "n/a" else f"{test.gain} over "
    return (
        f"{best.run} is best of {len(records)} models: {value}, {gain or 'against '}the next best, "
        f"{test.other} ({_p_value(test.p_holm)}{sure}), over {users}."
    )


def _headline_column(comparison: Comparison) -> int:
    names = [name for name, _ in comparison.columns]
    name = "NDCG" if "NDCG" in names else names[0]
    cut = middle_cut([k for other, k in comparison.columns if other == name])
    return comparison.columns.index((name, cut))


def metric_charts(comparison: Comparison) -> list[Chart]:
    """Every metric of every row as bars."""
    return [
        Chart(
            bar_chart(
                bars,
                description=f"Bar chart of {bars.metric} at each cut-off for each model; the "
                f"numbers are in the table of metrics.",
            ),
            f"{bars.metric}@K over all users, with 95 % intervals.",
        )
        for bars in metric_bars(comparison)
    ]


def metric_section(comparison: Comparison) -> Section:
    """Every metric of every row, with interval, and against the best of the other rows."""
    names = [f"{name}@{k}" for name, k in comparison.columns]
    rows: list[list[str | Cell]] = [
        [row.name, *map(_metric_cell, records)]
        for row, records in zip(comparison.rows, comparison.records, strict=True)
    ]
    tables = [Table("Metrics over all users", ["model", *names], rows)]
    aggregates = comparison.aggregate_tables
    for caption, columns in aggregates:
        values: list[list[str | Cell]] = [
            [row.name, *(_number(row.metrics.get(name)) for name in columns)]
            for row in comparison.rows
        ]
        cuts = {name.partition("@")[2] for name in columns}
        # A caption names a single cut-off.
        shown = [name.partition("@")[0] for name in columns] if len(cuts) == 1 else columns
        tables.append(Table(f"{caption}, all users together", ["model", *shown], values))
    text = [f"In brackets: {INTERVALS}."]
    if len(comparison.rows) > 1:
        text = [
            f"In brackets: {INTERVALS}. Below them: the relative difference to the best of the other "
            f"models, which for the best one is the second best, and the p-value of a two-sided "
            f"paired randomisation test against it{_corrected(len(comparison.rows))}."
        ]
    measured = {name.partition("@")[0] for _, columns in aggregates for name in columns}
    meanings = [f"{name}: {said}" for name, said in _MEANINGS.items() if name in measured]
    if meanings:
        text.append(f"Of all users together, without intervals. {'; '.join(meanings)}.")
    text += [
        f"{row.name} is a fine-tuned UserLLM: it was exported from the run {row.exported_from}."
        for row in comparison.rows
        if row.exported_from
    ]
    return Section("Metrics", [*text, *comparison.notes], tables=tables)


def training_section(comparison: Comparison, results: Results) -> Section | None:
    """Loss and validation metric by epoch of the runs that trained; None when none did."""
    trained = [
        (number, row.name, training)
        for number, row in enumerate(comparison.rows)
        if (training := _training_of(row, results)) is not None
    ]
    if not trained:
        return None
    metric = " or ".join(dict.fromkeys(training.metric for _, _, training in trained))
    losses = [
        Series(name, number, training.loss, training.epochs) for number, name, training in trained
    ]
    charts = [
        Chart(
            line_chart(
                losses,
                "epoch",
                "training loss",
                description="Line chart of the training loss by epoch; the numbers are in the "
                "table below.",
            ),
            "Training loss, mean over each epoch.",
        ),
    ]
    valid = [training.validation_series(name, number) for number, name, training in trained]
    if any(len(series.values) for series in valid):
        charts.append(
            Chart(
                line_chart(
                    valid,
                    "epoch",
                    f"validation {metric}",
                    description=f"Line chart of validation {metric} by epoch; the numbers are in "
                    f"the table below.",
                ),
                f"{metric} on the validation items; the epoch that was kept is ringed.",
            )
        )
    text = ["Losses can be compared between runs with the same loss and negatives only."]
    header = ["model", "epoch", "loss", f"validation {metric}", "best"]
    rows = [row for _, name, training in trained for row in training.table_rows(name)]
    table = Table("Loss and validation by epoch", header, rows, folded=True)
    return Section("Training", text, charts, [table])


def recall_section(comparison: Comparison) -> Section:
    """Recall@K against K."""
    curves = [recall_curve(row.ranks) for row in comparison.rows]
    series = [
        Series(row.name, number, curve.values, curve.cuts, curve.low, curve.high)
        for number, (row, curve) in enumerate(zip(comparison.rows, curves, strict=True))
    ]
    chart = Chart(
        line_chart(
            series,
            "K",
            "Recall@K",
            description="Line chart of Recall@K against K; the numbers at some K are in the table "
            "below.",
            ticks=_CURVE_TICKS,
        ),
        "Recall@K for K from 1 to 100 (logarithmic axis); bands are 95 % intervals at each K by "
        "itself.",
    )
    rows: list[list[str | Cell]] = [
        [
            row.name,
            *(
                _estimate_cell(
                    Estimate(
                        *(float(part[k - 1]) for part in (curve.values, curve.low, curve.high))
                    )
                )
                for k in _CURVE_TICKS
            ),
        ]
        for row, curve in zip(comparison.rows, curves, strict=True)
    ]
    header = ["model", *(f"K = {k}" for k in _CURVE_TICKS)]
    return Section(
        "Recall@K against K", charts=[chart], tables=[Table("Recall@K", header, rows, folded=True)]
    )


def group_section(
    title: str, text: Sequence[str], groups: Sequence[Group], comparison: Comparison
) -> Section:
    """Metrics at one cut-off in each group of users, as charts and one table a metric."""
    k = middle_cut([cut for _, cut in comparison.columns])
    charts, tables = [], []
    filled = [group for group in groups if group.size]
    for name in dict.fromkeys(name for name, _ in comparison.columns):
        metric = f"{name}@{k}"
        by_row = [
            [group_estimate(group, name, row.ranks, k) for group in groups]
            for row in comparison.rows
        ]
        series = [
            Series(
                row.name,
                number,
                *_columns([one for one in estimates if one is not None]),
            )
            for number, (row, estimates) in enumerate(zip(comparison.rows, by_row, strict=True))
        ]
        labels = [f"{group.name}\nn = {group.size}" for group in filled]
        charts.append(
            Chart(
                group_chart(
                    labels,
                    series,
                    metric,
                    title=f"{metric}: {title[:1].lower()}{title[1:]}",
                    description=f"Chart of {metric} by group for each model; the numbers are in "
                    f"the table below.",
                ),
                f"{metric} with 95 % intervals; n: users.",
            )
        )
        rows: list[list[str | Cell]] = [
            [row.name, *(_NO_USERS if one is None else _estimate_cell(one) for one in estimates)]
            for row, estimates in zip(comparison.rows, by_row, strict=True)
        ]
        header: list[str | Cell] = ["model", *(_group_header(group) for group in groups)]
        tables.append(Table(f"{metric} by group", header, rows))
    return Section(title, text, charts, tables)


def popularity_section(
    title: str,
    groups: Sequence[Group],
    deciles: Deciles,
    comparison: Comparison,
) -> Section:
    """Metrics at one cut-off by how popular the held-out item is: head to tail, and by deciles."""
    text = [
        "Users grouped by how often their held-out item occurs in the training items. "
        "Head: the most popular items, which hold the first 20 % of the training "
        "interactions; tail: the least popular ones, which hold the last 20 %; middle: "
        "those between. Items that occur equally often stay together. Items never in training are "
        "a group of their own.",
        "Deciles: the users in ten parts of like size, from the least popular held-out items to the "
        "most popular ones. Users whose items are equally popular stay together, so that several "
        "deciles can have one value.",
    ]
    section = group_section(title, text, groups, comparison)
    k = middle_cut([cut for _, cut in comparison.columns])
    charts, tables = list(section.charts), list(section.tables)
    for name in dict.fromkeys(name for name, _ in comparison.columns):
        metric = f"{name}@{k}"
        by_row = [
            [
                estimate
                for group in deciles.groups
                if (estimate := group_estimate(group, name, row.ranks, k)) is not None
            ]
            for row in comparison.rows
        ]
        series = []
        for number, (row, estimates) in enumerate(zip(comparison.rows, by_row, strict=True)):
            values, _, low, high = _columns([estimates[group] for group in deciles.of_decile])
            at = np.arange(1, len(deciles.of_decile) + 1)
            series.append(Series(row.name, number, values, at, low, high))
        charts.append(
            Chart(
                line_chart(
                    series,
                    "popularity decile",
                    metric,
                    description=f"Line chart of {metric} by the popularity decile of the held-out item "
                    f"for each model; the numbers are in the folded table below.",
                ),
                f"{metric} by popularity decile of the held-out item, 10 the most popular; bands are "
                f"95 % intervals.",
            )
        )
        rows: list[list[str | Cell]] = [
            [row.name, *map(_estimate_cell, estimates)]
            for row, estimates in zip(comparison.rows, by_row, strict=True)
        ]
        header: list[str | Cell] = ["model", *map(_group_header, deciles.groups)]
        tables.append(Table(f"{metric} by popularity decile", header, rows, folded=True))
    return Section(title, text, charts, tables)


def cold_start_section(
    run: str, full_dataset: str, measured: Sequence[Mapping[str, Any]]
) -> Section:
    """How a run ranks items that its data never had.

    Args:
        run: the run's name.
        full_dataset: the data with those items.
        measured: rows of `hsft.finished.cold_start.cold_start`.
    """
    tables = []
    for kind in dict.fromkeys(row["candidates"] for row in measured):
        ranked = [row for row in measured if row["candidates"] == kind]
        rows: list[list[str | Cell]] = [
            [
                str(row["model"]),
                *(
                    Cell(_number(value["value"]), [f"[{value['low']:.4f}, {value['high']:.4f}]"])
                    for value in row["metrics"].values()
                ),
            ]
            for row in ranked
        ]
        caption = f"Ranked among {kind} ({ranked[0]['items']:,})"
        tables.append(Table(caption, ["model", *ranked[0]["metrics"]], rows))
    text = [
        f"{measured[0]['users']:,} users of {full_dataset} whose held-out item was left out of the "
        f"data of {run} altogether. The models of {run} know such an item by its text alone; pop, "
        f"which counts interactions, has none to count, and a model on item ids cannot score it. In "
        f"brackets: {INTERVALS}."
    ]
    return Section("Cold start", text, tables=tables)


@dataclass(frozen=True)
class _Training:
    """How a row was trained.

    Attributes:
        epochs: float64 [n].
        loss, valid: float64 [n], NaN where there is none.
        best: the epoch that was kept.
        metric: what was validated by.
    """

    epochs: np.ndarray
    loss: np.ndarray
    valid: np.ndarray
    best: int
    metric: str

    def validation_series(self, name: str, style: int) -> Series:
        """Return the epochs that were validated as a line."""
        measured = ~np.isnan(self.valid)
        epochs = self.epochs[measured]
        marked = np.flatnonzero(epochs == self.best).tolist()
        return Series(name, style, self.valid[measured], epochs, marked=marked)

    def table_rows(self, name: str) -> list[list[str]]:
        """Return a line an epoch."""
        return [
            [
                name,
                f"{epoch:.0f}",
                _number(loss),
                _number(value),
                "kept" if epoch == self.best else "",
            ]
            for epoch, loss, value in zip(self.epochs, self.loss, self.valid, strict=True)
        ]


def _training_of(row: Row, results: Results) -> _Training | None:
    """Return how a row was trained; None where it was not."""
    if row.model not in TRAINED:
        return None
    for _, folder, result in results:
        training = result.get("training")
        if folder != row.folder or not isinstance(training, dict) or not training.get("history"):
            continue
        history, metric = training["history"], str(result["config"].get("valid_metric"))
        return _Training(
            _column(record["epoch"] for record in history),
            _column(record.get("loss") for record in history),
            _column((record.get("valid") or {}).get(metric) for record in history),
            training.get("best_epoch", 0),
            metric,
        )
    return None


def _metric_cell(record: Record) -> Cell:
    small = [f"[{record.low:.4f}, {record.high:.4f}]"]
    test = record.against_best_other
    if test is not None:
        small.append(f"{test.gain}, {_p_value(test.p_holm)}")
    return Cell(f"{record.value:.4f}", small, best=record.best)


def _corrected(rows: int) -> str:
    """Say what the p-values of so many rows against the best other are corrected for."""
    return f", corrected by Holm's procedure for {rows - 1} tests a metric" if rows > 2 else ""


def _p_value(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _estimate_cell(estimate: Estimate) -> Cell:
    return Cell(f"{estimate.value:.4f}", [f"[{estimate.low:.4f}, {estimate.high:.4f}]"])


def _group_header(group: Group) -> Cell:
    return Cell(group.name, [counted(group.size, "user"), *group.notes])


def _columns(estimates: Sequence[Estimate]) -> Iterator[Any]:
    """Give the fields of `Series` after its style: values, no positions, low, high."""
    yield np.array([one.value for one in estimates])
    yield None
    yield np.array([one.low for one in estimates])
    yield np.array([one.high for one in estimates])


def _column(values: Iterable[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def middle_cut(cuts: Sequence[int]) -> int:
    """Return 10 where it is among the cut-offs, else the middle one."""
    known = sorted(set(cuts))
    return 10 if 10 in known else known[len(known) // 2]


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.4f}"

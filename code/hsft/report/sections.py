"""The report's sections that need only what runs left behind: result.json and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsft.config.loader import flat_values
from hsft.evaluator.metrics import PER_USER
from hsft.report.breakdown import Estimate, Group, counted, group_estimate, recall_curve
from hsft.report.charts import Series, group_chart, line_chart
from hsft.report.compare import TRAINED, Comparison, records
from hsft.report.page import Cell, Chart, Section, Table
from hsft.utils.progress import format_seconds

# Keys of a configuration that say where a run goes, not what it is.
_PLACES = frozenset({"run_name", "overwrite", "auto_resume", "show_progress"})
_CURVE_TICKS = (1, 2, 5, 10, 20, 50, 100)
_NONE, _NO_USERS, _NOT_RECORDED, _NOT_APPLICABLE = (
    "none",
    "no users",
    "not recorded",
    "does not apply",
)
# Rows of the environment that a run has only where it used the thing or did the work.
_WORK = ("time: ", "peak memory: ")
_OPTIONAL = ("item cache: ", "UserLLM: ", "users too short for ", *_WORK)

# (run's name, its folder, result.json)
Results = Sequence[tuple[str, Path, Mapping[str, Any]]]


def facts(comparison: Comparison, results: Results) -> list[tuple[str, str]]:
    """Say what was measured, on whom, and when."""
    first = results[0][2]
    ended = sorted(str(result["finished"]) for _, _, result in results if result.get("finished"))
    return [
        ("Dataset", str(first["dataset"])),
        ("Held-out items", f"{first['phase']}, leave-one-out by time"),
        ("Users", f"{len(comparison.rows[0].users):,}"),
        ("Protocol", str(first["protocol"])),
        ("Runs", ", ".join(name for name, _, _ in results)),
        ("Seeds", ", ".join(dict.fromkeys(str(result.get("seed")) for _, _, result in results))),
        ("Last run finished", _last(ended, len(results))),
    ]


def _last(ended: Sequence[str], runs: int) -> str:
    """Say when the last run ended, as far as runs recorded it."""
    if not ended:
        return _NOT_RECORDED
    some = "" if len(ended) == runs else f" ({len(ended)} of {runs} runs recorded it)"
    return f"{_time(ended[-1])}{some}"


def metric_section(comparison: Comparison) -> Section:
    """Every metric of every row, with interval, gain and p-value against the first row."""
    names = [f"{name}@{k}" for name, k in comparison.columns]
    entries = iter(records(comparison))
    rows: list[list[str | Cell]] = [
        [row.name, *(_metric_cell(next(entries)) for _ in names)] for row in comparison.rows
    ]
    tables = [Table("Metrics over all users", ["model", *names], rows)]
    extra = list(
        dict.fromkeys(
            name
            for row in comparison.rows
            for name in row.metrics
            if name.partition("@")[0] not in PER_USER
        )
    )
    if extra:
        others: list[list[str | Cell]] = [
            [row.name, *(_number(row.metrics.get(name)) for name in extra)]
            for row in comparison.rows
        ]
        tables.append(Table("Metrics over all users together", ["model", *extra], others))
    base = comparison.rows[0].name
    text = [
        "In brackets: 95 % percentile bootstrap interval over users (10,000 draws). "
        f"Below it: relative gain over the first row, {base}, and the p-value of a two-sided paired "
        "randomisation test against it, not corrected for the number of comparisons."
    ]
    if len(comparison.rows) < 2:
        text = ["In brackets: 95 % percentile bootstrap interval over users (10,000 draws)."]
    text += [
        f"{row.name} is a fine-tuned UserLLM: it was exported from the run {row.exported_from}."
        for row in comparison.rows
        if row.exported_from
    ]
    return Section("Metrics", [*text, *comparison.notes], tables=tables)


def training_section(comparison: Comparison, results: Results) -> Section | None:
    """Loss and validation metric by epoch of the runs that trained; None when none did."""
    losses, valid, rows = [], [], []
    metrics = []
    for number, row in enumerate(comparison.rows):
        training = _training(row.folder, row.model, results)
        if training is None:
            continue
        history, best, metric = training
        metrics.append(metric)
        epochs = np.array([record["epoch"] for record in history], dtype=np.float64)
        loss = _column(record.get("loss") for record in history)
        values = _column((record.get("valid") or {}).get(metric) for record in history)
        measured = ~np.isnan(values)
        losses.append(Series(row.name, number, loss, epochs))
        marked = np.flatnonzero(epochs[measured] == best).tolist()
        valid.append(Series(row.name, number, values[measured], epochs[measured], marked=marked))
        rows += [
            [
                row.name,
                f"{epoch:.0f}",
                _number(one),
                _number(two),
                "kept" if epoch == best else "",
            ]
            for epoch, one, two in zip(epochs, loss, values, strict=True)
        ]
    if not losses:
        return None
    kinds = list(dict.fromkeys(metrics))
    metric = " or ".join(kinds)
    charts = [
        Chart(
            line_chart(losses, "epoch", "training loss"),
            "Training loss, mean over each epoch.",
            "Line chart of the training loss by epoch; the numbers are in the table below.",
        ),
    ]
    if any(len(series.values) for series in valid):
        charts.append(
            Chart(
                line_chart(valid, "epoch", f"validation {metric}"),
                f"{metric} on the validation items; the epoch that was kept is ringed.",
                f"Line chart of validation {metric} by epoch; the numbers are in the table below.",
            )
        )
    text = ["Losses can be compared between runs with the same loss and negatives only."]
    header = ["model", "epoch", "loss", f"validation {metric}", "best"]
    return Section(
        "Training", text, charts, [Table("Loss and validation by epoch", header, rows, folded=True)]
    )


def recall_section(comparison: Comparison) -> Section:
    """Recall@K against K."""
    curves = [recall_curve(row.ranks) for row in comparison.rows]
    series = [
        Series(row.name, number, curve.values, curve.cuts, curve.low, curve.high)
        for number, (row, curve) in enumerate(zip(comparison.rows, curves, strict=True))
    ]
    chart = Chart(
        line_chart(series, "K", "Recall@K", ticks=_CURVE_TICKS),
        "Recall@K for K from 1 to 100 (logarithmic axis); bands are 95 % bootstrap intervals at "
        "each K by itself.",
        "Line chart of Recall@K against K; the numbers at some K are in the table below.",
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
    k = _middle_cut([cut for _, cut in comparison.columns])
    charts, tables = [], []
    filled = [group for group in groups if group.size]
    for name in dict.fromkeys(name for name, _ in comparison.columns):
        metric = f"{name}@{k}"
        found = [
            [group_estimate(group, name, row.ranks, k) for group in groups]
            for row in comparison.rows
        ]
        series = [
            Series(
                row.name,
                number,
                *_columns([one for one in estimates if one is not None]),
            )
            for number, (row, estimates) in enumerate(zip(comparison.rows, found, strict=True))
        ]
        labels = [f"{group.name}\nn = {group.size}" for group in filled]
        charts.append(
            Chart(
                group_chart(labels, series, metric),
                f"{metric} with 95 % bootstrap intervals; n: users.",
                f"Chart of {metric} by group for each model; the numbers are in the table below.",
            )
        )
        rows: list[list[str | Cell]] = [
            [row.name, *(_NO_USERS if one is None else _estimate_cell(one) for one in estimates)]
            for row, estimates in zip(comparison.rows, found, strict=True)
        ]
        header: list[str | Cell] = ["model", *(_group_header(group) for group in groups)]
        tables.append(Table(f"{metric} by group", header, rows))
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
        own = [row for row in measured if row["candidates"] == kind]
        rows: list[list[str | Cell]] = [
            [
                str(row["model"]),
                *(
                    Cell(_number(value["value"]), [f"[{value['low']:.4f}, {value['high']:.4f}]"])
                    for value in row["metrics"].values()
                ),
            ]
            for row in own
        ]
        caption = f"Ranked among {kind} ({own[0]['items']:,})"
        tables.append(Table(caption, ["model", *own[0]["metrics"]], rows))
    text = [
        f"{measured[0]['users']:,} users of {full_dataset} whose held-out item was left out of the "
        f"data of {run} altogether. The models of {run} know such an item by its text alone; pop, "
        f"which counts interactions, has none to count, and a model on item ids cannot score it. In "
        f"brackets: 95 % bootstrap interval over users."
    ]
    return Section("Cold start", text, tables=tables)


def config_section(results: Results) -> Section:
    """Where the runs' configurations differ, and all keys."""
    flat = [flat_values(result["config"]) for _, _, result in results]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    different = [
        key for key in keys if key not in _PLACES and len({_shown(one, key) for one in flat}) > 1
    ]
    text = []
    if len(results) < 2:
        text = ["There is one run, so there is nothing to compare its configuration with."]
    elif not different:
        text = ["The runs' configurations do not differ."]
    else:
        text = ["none: the key is empty, as null in YAML."]
    rows = {key: [_shown(one, key) for one in flat] for key in keys}
    return Section("Configuration", text, tables=_tables("keys", rows, results, True, _PLACES))


def _tables(
    what: str,
    rows: Mapping[str, Sequence[str]],
    results: Results,
    fold_one: bool,
    minor: frozenset[str] = frozenset(),
) -> list[Table]:
    """Show rows on which runs differ, and fold those on which they agree into one column.

    Args:
        what: what the rows are.
        rows: name -> a text for each run.
        results: the runs.
        fold_one: fold the rows where there is one run.
        minor: names whose differences are folded too.
    """
    names = [name for name, _, _ in results]
    if len(names) < 2:
        own = [[name, *texts] for name, texts in rows.items()]
        return [Table(f"All {what}", [what, *names], own, numeric=False, folded=fold_one)]
    alike = {name: _agreed(name, texts) for name, texts in rows.items()}
    differ = [name for name, text in alike.items() if text is None]
    same = [[name, text] for name, text in alike.items() if text is not None]

    def table(caption: str, chosen: Sequence[str], folded: bool) -> list[Table]:
        own = [[name, *rows[name]] for name in chosen]
        return [Table(caption, [what, *names], own, numeric=False, folded=folded)] if own else []

    shown = [name for name in differ if name not in minor]
    tables = table(f"Differing {what}", shown, False)
    if same:
        header = [what, f"all {len(names)} runs"]
        tables.append(Table(f"Same in all runs: {len(same)} {what}", header, same, False, True))
    hidden = [name for name in differ if name in minor]
    return [*tables, *table("Differing, where runs go and how they are shown", hidden, True)]


def _agreed(name: str, texts: Sequence[str]) -> str | None:
    """Return what all runs have that have it at all; None where they differ."""
    own = [text for text in texts if text != _NOT_APPLICABLE]
    if len(set(own)) > 1 or (len(own) < len(texts) and name.startswith(_WORK)):
        return None
    if len(own) == len(texts):
        return own[0]
    return f"{own[0]} ({len(own)} of {len(texts)} runs; it does not apply to the others)"


def environment_section(results: Results) -> Section:
    """Data, versions, hardware, time and memory of each run."""
    columns = [_environment(result) for _, _, result in results]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = {key: [column.get(key, _absent(key)) for column in columns] for key in keys}
    text = ["Data, software and hardware of the runs, their times and memory."]
    return Section("Environment", text, tables=_tables("facts", rows, results, False))


def _absent(key: str) -> str:
    return _NOT_APPLICABLE if key.startswith(_OPTIONAL) else _NOT_RECORDED


def _environment(result: Mapping[str, Any]) -> dict[str, str]:
    found, data = _mapping(result.get("environment")), _mapping(result.get("data"))
    cache, user_llm = _mapping(result.get("cache")), _mapping(result.get("user_llm"))
    short = _mapping(data.get("users_too_short"))
    shown = {
        "finished": _time(str(result["finished"])) if result.get("finished") else _NOT_RECORDED,
        **{name: data.get(name) for name in ("users", "items", "interactions")},
        "interactions dropped": data.get("dropped_interactions"),
        "users too short for " + ", ".join(short): ", ".join(map(str, short.values())),
        **{f"item cache: {key}": value for key, value in sorted(cache.items())},
        **{f"UserLLM: {key}": value for key, value in sorted(user_llm.items())},
        "git revision": found.get("git_revision"),
        "device": found.get("device"),
        "processor or GPU": found.get("device_name"),
        "platform": found.get("platform"),
        "threads": found.get("threads"),
        "processes": found.get("processes"),
        "precision": found.get("precision"),
        **_mapping(found.get("versions")),
        **{f"time: {key}": format_seconds(s) for key, s in (result.get("timings_s") or {}).items()},
        **{
            f"peak memory: {key.removesuffix('_bytes')}": f"{size / (1 << 30):.2f} GiB"
            for key, size in (result.get("peak_memory") or {}).items()
        },
    }
    return {key: str(value) for key, value in shown.items() if value not in (None, "")}


def _training(
    folder: Path, model: str, results: Results
) -> tuple[list[dict[str, Any]], int, str] | None:
    """Return a trained row's history, best epoch and validation metric."""
    if model not in TRAINED:
        return None
    for _, other, result in results:
        training = result.get("training")
        if other == folder and isinstance(training, dict) and training.get("history"):
            metric = str(result["config"].get("valid_metric"))
            return training["history"], training.get("best_epoch", 0), metric
    return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _metric_cell(entry: Mapping[str, Any]) -> Cell:
    small = [f"[{entry['low']:.4f}, {entry['high']:.4f}]"]
    if entry["p_value"] is not None:
        p = entry["p_value"]
        small.append(f"{entry['gain']}, {'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}")
    return Cell(f"{entry['value']:.4f}", small)


def _estimate_cell(one: Estimate) -> Cell:
    return Cell(f"{one.value:.4f}", [f"[{one.low:.4f}, {one.high:.4f}]"])


def _group_header(group: Group) -> Cell:
    return Cell(group.name, [counted(group.size, "user"), *group.notes])


def _columns(estimates: Sequence[Estimate]) -> Iterator[Any]:
    """Give the fields of `Series` after its style: values, no positions, low, high."""
    yield np.array([one.value for one in estimates])
    yield None
    yield np.array([one.low for one in estimates])
    yield np.array([one.high for one in estimates])


def _column(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _middle_cut(cuts: Sequence[int]) -> int:
    """Return 10 where it is among the cut-offs, else the middle one."""
    known = sorted(set(cuts))
    return 10 if 10 in known else known[len(known) // 2]


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.4f}"


def _time(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _shown(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, _NOT_RECORDED)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _NONE if value is None else str(value)

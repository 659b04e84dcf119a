"""Several runs in one table: values, bootstrap intervals, gain and paired test against the first."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsft.evaluator.intervals import bootstrap_interval, paired_p_value
from hsft.evaluator.metrics import PER_USER, per_user
from hsft.report.result import TUNED, UNTRAINED, read_ranks, read_result
from hsft.report.table import relative_gain
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import atomic_path, write_text

# Names that the recipes give to rows of trained models.
TRAINED = (TUNED, "sasrec")
# What every row of a comparison must share.
_SHARED = ("dataset", "phase", "protocol")


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes:
        name: run folder and, where a run has several rows, the row's name.
        users, ranks: int64 [E].
        settings: what decides the row, in one line; empty for a model without settings.
        folder: the run's folder.
        model: the row's name in the run.
        metrics: `NAME@K` -> value, as the run recorded them.
        exported_from: the run that trained an `untrained` row's UserLLM; empty where none did.
    """

    name: str
    users: np.ndarray
    ranks: np.ndarray
    settings: str = ""
    folder: Path = Path()
    model: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    exported_from: str = ""


@dataclass(frozen=True)
class Comparison:
    """Models scored on the same users with the same protocol.

    Attributes:
        title: dataset, phase, users and protocol.
        rows: the models; the first is what the others are compared with.
        columns: (metric, K).
        notes: sentences on rows that were left out.
    """

    title: str
    rows: list[Row]
    columns: list[tuple[str, int]]
    notes: Sequence[str] = ()


def load_comparison(run_dirs: Sequence[str | Path]) -> Comparison:
    """Read runs and check that they can be compared.

    A row that repeats an earlier one's ranks exactly under the same name, such as the untrained
    UserLLM of a baseline run and of a fine-tuning run, appears once, and a note says so.

    Raises:
        InputError: a folder is no finished run, or runs differ in data, protocol or users.
    """
    if not run_dirs:
        raise InputError("no run is named; give one or more run folders.")
    rows: list[Row] = []
    # (model, ranks) -> the row that has them.
    kinds: dict[tuple[str, bytes], str] = {}
    notes: list[str] = []
    first: dict[str, Any] | None = None
    for name, run_dir in zip(run_names(run_dirs), run_dirs, strict=True):
        result = read_result(run_dir)
        first = first or result
        for key in _SHARED:
            if result.get(key) != first.get(key):
                raise InputError(
                    f"{run_dir} cannot be compared with {run_dirs[0]}: its {key} is "
                    f"'{result.get(key)}', not '{first.get(key)}'; name runs of one kind."
                )
        for entry in result["rows"]:
            users, ranks = read_ranks(run_dir, entry["name"])
            if rows and not np.array_equal(users, rows[0].users):
                raise InputError(
                    f"{run_dir} scored other users than {run_dirs[0]}; name runs on one dataset."
                )
            alone = len(result["rows"]) == 1
            shown = name if alone else f"{name}: {entry['name']}"
            kind = (entry["name"], ranks.tobytes())
            if kind in kinds:
                notes.append(
                    f"{shown} is left out: every user's item has the same rank as in {kinds[kind]}."
                )
                continue
            kinds[kind] = shown
            settings = _settings(result, entry["name"])
            rows.append(
                Row(
                    shown,
                    users,
                    ranks,
                    settings,
                    Path(run_dir),
                    entry["name"],
                    entry.get("metrics", {}),
                    _exported_from(result) if entry["name"] == UNTRAINED else "",
                )
            )
    assert first is not None
    config = first["config"]
    columns = [(m, k) for m in config["metrics"] if m in list(PER_USER) for k in config["topk"]]
    title = f"{first['dataset']}, {first['phase']}, {len(rows[0].users)} users, {first['protocol']}"
    return Comparison(title, rows, columns, notes)


def run_names(run_dirs: Sequence[str | Path]) -> list[str]:
    """Name runs by their folders, or by the whole path where two folders have the same name."""
    names = [Path(run_dir).absolute().name for run_dir in run_dirs]
    return [
        name if names.count(name) == 1 else str(run_dir)
        for name, run_dir in zip(names, run_dirs, strict=True)
    ]


def _settings(result: dict[str, Any], row: str) -> str:
    """Name the settings that decide a row, as they stand in its run's configuration."""
    config = {**result["config"], "precision": result.get("environment", {}).get("precision")}
    if row == UNTRAINED:
        keys = ["user_pretrain_dir", "user_llm_layers", "MAX_ITEM_LIST_LENGTH"]
        keys += ["item_embedding_transform", "precision"]
        run = _exported_from(result)
        start = f"fine-tuned, exported from {run}, " if run else ""
        return start + _listed({key: config.get(key) for key in keys})
    if row not in TRAINED:
        return ""
    keys = ["epochs", "train_batch_size", "MAX_ITEM_LIST_LENGTH", "seed"]
    if config.get("model") == "HLLM":
        keys += ["user_llm_layers", "loss", "negatives", "num_negatives", "precision"]
        keys += ["item_embedding_transform", "item_adapter", "use_qlora"]
        if config.get("use_qlora"):
            keys += [key for key in config if key.startswith("qlora_")]
    else:
        keys += [str(config.get("model"))]
    return _listed({**{key: config.get(key) for key in keys}, **config.get("optim_args", {})})


def _exported_from(result: Mapping[str, Any]) -> str:
    """Return the run that the UserLLM was exported from; empty where it was not exported."""
    user_llm = result.get("user_llm")
    run = user_llm.get("exported_from") if isinstance(user_llm, dict) else None
    return one_line(run, 80) if run else ""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one record a row and metric: value, interval, gain and p-value against the first row."""
    found = []
    base = comparison.rows[0]
    for row in comparison.rows:
        for name, k in comparison.columns:
            value = float(per_user(name, row.ranks, k).mean())
            low, high = bootstrap_interval(name, row.ranks, k)
            before = float(per_user(name, base.ranks, k).mean())
            is_base = row is base
            found.append(
                {
                    "run": row.name,
                    "metric": f"{name}@{k}",
                    "value": value,
                    "low": low,
                    "high": high,
                    "gain": "" if is_base else relative_gain(before, value),
                    "p_value": None if is_base else paired_p_value(name, row.ranks, base.ranks, k),
                }
            )
    return found


def markdown(comparison: Comparison) -> str:
    """Format the comparison as a Markdown table with 95 % intervals."""
    names = [f"{name}@{k}" for name, k in comparison.columns]
    lines = [comparison.title, "", "| run | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    found = records(comparison)
    base = found[: len(names)]
    for number, row in enumerate(comparison.rows):
        own = found[number * len(names) : (number + 1) * len(names)]
        cells = [
            f"{entry['value']:.4f}{_mark(entry, first)} [{entry['low']:.4f}, {entry['high']:.4f}]"
            for entry, first in zip(own, base, strict=True)
        ]
        lines.append(f"| {_cell(row.name)} | " + " | ".join(cells) + " |")
    note = "95 % bootstrap intervals over users"
    if len(comparison.rows) > 1:
        note += (
            f"; *+ higher, *- lower than {comparison.rows[0].name} (paired randomisation test, "
            f"p < 0.05)"
        )
    lines += ["", f"{note}."]
    for sentence in comparison.notes:
        lines += ["", sentence]
    for row in comparison.rows:
        if row.settings:
            lines += ["", f"{row.name}: {row.settings}."]
    return "\n".join(lines) + "\n"


def _mark(entry: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if entry["p_value"] is None or entry["p_value"] >= 0.05:
        return ""
    return "*+" if entry["value"] > first["value"] else "*-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def csv_text(comparison: Comparison) -> str:
    """Format the comparison as CSV, one line a row and metric."""
    buffer = io.StringIO()
    entries = records(comparison)
    writer = csv.DictWriter(buffer, fieldnames=list(entries[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return buffer.getvalue()


def save_chart(comparison: Comparison, target: Path) -> None:
    """Draw every metric's bars with their intervals to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = records(comparison)
    kinds = list(dict.fromkeys(name for name, _ in comparison.columns))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False)
    width = 0.8 / len(comparison.rows)
    for axis, kind in zip(axes[0], kinds, strict=True):
        cuts = [k for name, k in comparison.columns if name == kind]
        for number, row in enumerate(comparison.rows):
            own = [
                e for e in entries if e["run"] == row.name and e["metric"].startswith(f"{kind}@")
            ]
            at = np.arange(len(cuts)) + (number - (len(comparison.rows) - 1) / 2) * width
            values = np.array([entry["value"] for entry in own])
            spread = [
                np.maximum(values - [entry["low"] for entry in own], 0),
                np.maximum([entry["high"] for entry in own] - values, 0),
            ]
            axis.bar(at, values, width, yerr=spread, capsize=2, label=row.name)
        axis.set_xticks(np.arange(len(cuts)), [f"@{k}" for k in cuts])
        axis.set_title(kind)
    legend = axes[0][0].legend(fontsize="small")
    figure.suptitle(comparison.title, fontsize="medium", parse_math=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.tight_layout()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `comparison.md`, `.csv` and `.png` to a folder and return their paths."""
    paths = [folder / f"comparison.{ending}" for ending in ("md", "csv", "png")]
    write_text(paths[0], markdown(comparison))
    write_text(paths[1], csv_text(comparison))
    save_chart(comparison, paths[2])
    return paths

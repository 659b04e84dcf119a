"""Several runs side by side: values, intervals, gains and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hsft.config.schema import ID_MODELS, USER_LLM_MODELS
from hsft.evaluator.fingerprint import differing_parts
from hsft.evaluator.intervals import holm, interval, paired_p_value
from hsft.evaluator.metrics import PER_USER, per_user
from hsft.hub.repository import run_folder, run_name
from hsft.report.result import TUNED, UNTRAINED, read_ranks, read_result
from hsft.report.table import relative_gain
from hsft.utils.errors import InputError, one_line

# Names of the rows of trained models.
TRAINED = (TUNED, *ID_MODELS)
# Keys of the UserLLM's training that are named where they are set.
_OPTIONS = (
    *("item_id_embedding", "item_id_dropout", "item_dropout", "negatives_logq", "temperature"),
    *("fix_temp", "use_timestamps", "residual_items", "train_item_llm", "item_pretrain_epochs"),
)
# What every run of a comparison must share, beside its fingerprint.
_SHARED = ("dataset", "phase", "protocol")
# The sizes that results without a fingerprint are compared by.
_SIZES = ("users", "items", "interactions")


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes:
        name: run folder and, where a run has several rows, the row's name.
        users, ranks: int64 [E].
        settings: what decides the row, in one line; empty for a model without settings.
        folder: the run's folder.
        model: the row's name in the run.
        metrics: name, with `@K` where it has a cut-off -> value, as the run recorded them.
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
class Test:
    """A row's metric against another row's.

    Attributes:
        other: the other row's name.
        gain: relative difference as a signed percentage, or `n/a`.
        p_value: of a two-sided paired randomisation test.
        p_holm: the same, corrected by Holm's procedure for the tests of this kind and metric in the
            comparison: those of all rows against the first, or all against the best other.
    """

    other: str
    gain: str
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class Record:
    """One metric of one row.

    Attributes:
        run: the row's name.
        metric: `NAME@K`.
        value: mean over users.
        low, high: 95 % interval.
        best: the value is the highest of all rows', and there are several rows.
        against_first: against the first row; None for that row itself.
        against_best_other: against the best of the other rows; None where there is no other.
    """

    run: str
    metric: str
    value: float
    low: float
    high: float
    best: bool
    against_first: Test | None
    against_best_other: Test | None


@dataclass(frozen=True)
class Comparison:
    """Models scored on the same users with the same protocol.

    Attributes:
        title: dataset, phase, users and protocol.
        rows: the models.
        columns: (metric, K).
        notes: sentences on rows that were left out, on what could not be compared, and on pretrained
            weights that may have seen the held-out items.
    """

    title: str
    rows: list[Row]
    columns: list[tuple[str, int]]
    notes: Sequence[str] = ()

    @cached_property
    def records(self) -> list[list[Record]]:
        """A list a row, in it a record a column; computed once."""
        by_column = [_records_of_column(self.rows, name, k) for name, k in self.columns]
        return [list(row) for row in zip(*by_column, strict=True)]

    @property
    def aggregate_tables(self) -> list[tuple[str, list[str]]]:
        """What is of all users together, as runs recorded it: captions and names of the metrics.

        Metrics of lists have a table a cut-off, or one in all where there is a single metric.
        """
        names = list(
            dict.fromkeys(
                name
                for row in self.rows
                for name in row.metrics
                if name.partition("@")[0] not in PER_USER
            )
        )
        whole = [name for name in names if "@" not in name]
        tables = [("Whole rankings", whole)] if whole else []
        of_lists = [name for name in names if "@" in name]
        cuts = dict.fromkeys(name.partition("@")[2] for name in of_lists)
        if len({name.partition("@")[0] for name in of_lists}) == 1 < len(cuts):
            return [*tables, ("Recommended lists", of_lists)]
        return [
            *tables,
            *(
                (f"Lists of {cut}", [name for name in of_lists if name.endswith(f"@{cut}")])
                for cut in cuts
            ),
        ]


def _records_of_column(rows: Sequence[Row], name: str, k: int) -> list[Record]:
    values = [float(per_user(name, row.ranks, k).mean()) for row in rows]
    # The test is the same either way round.
    p_values: dict[frozenset[int], float] = {}

    def tests(pairs: Sequence[tuple[int, int]]) -> dict[int, Test]:
        """Test a row against another, for each pair: the first one's number -> test."""
        family = list(dict.fromkeys(map(frozenset, pairs)))
        for pair in family:
            if pair not in p_values:
                one, two = (rows[number].ranks for number in pair)
                p_values[pair] = paired_p_value(name, one, two, k)
        adjusted = dict(zip(family, holm([p_values[pair] for pair in family]), strict=True))
        return {
            number: Test(
                rows[other].name,
                relative_gain(values[other], values[number]),
                p_values[frozenset((number, other))],
                adjusted[frozenset((number, other))],
            )
            for number, other in pairs
        }

    numbers = range(len(rows))
    against_first = tests([(number, 0) for number in numbers[1:]])
    against_best_other = tests(
        [
            (number, max((other for other in numbers if other != number), key=values.__getitem__))
            for number in numbers
            if len(rows) > 1
        ]
    )
    return [
        Record(
            row.name,
            f"{name}@{k}",
            values[number],
            *interval(name, row.ranks, k),
            best=len(rows) > 1 and values[number] == max(values) > 0,
            against_first=against_first.get(number),
            against_best_other=against_best_other.get(number),
        )
        for number, row in enumerate(rows)
    ]


def load_comparison(run_dirs: Sequence[str | Path]) -> Comparison:
    """Read runs and check that they can be compared.

    A row that repeats an earlier one's ranks exactly under the same name, such as the untrained
    UserLLM of a baseline run and of a fine-tuning run, appears once, and a note says so.

    Raises:
        InputError: a folder is no finished run, or runs were scored on other users, held-out items,
            catalogues or histories, or with other protocols.
    """
    if not run_dirs:
        raise InputError("no run is named; give one or more run folders.")
    run_dirs = [run_folder(run_dir) for run_dir in run_dirs]
    results = [read_result(run_dir) for run_dir in run_dirs]
    notes = refuse_unlike(run_dirs, results)
    rows: list[Row] = []
    # (model, ranks) -> the row that has them.
    earlier: dict[tuple[str, bytes], str] = {}
    for name, run_dir, result in zip(run_names(run_dirs), run_dirs, results, strict=True):
        for row in _rows_of_run(name, run_dir, result):
            if rows and not np.array_equal(row.users, rows[0].users):
                raise InputError(
                    f"{run_dir} scored other users than {run_dirs[0]}; name runs on one dataset."
                )
            kind = (row.model, row.ranks.tobytes())
            if kind in earlier:
                notes.append(
                    f"{row.name} is left out: every user's item has the same rank as in "
                    f"{earlier[kind]}."
                )
                continue
            earlier[kind] = row.name
            rows.append(row)
        if isinstance(overlap := result.get("pretraining_overlap"), str):
            notes.append(f"{name}: {one_line(overlap, 400)}")
    notes += _other_vectors(run_dirs, results)
    notes += _told_times(rows, dict(zip(map(Path, run_dirs), results, strict=True)))
    first, config = results[0], results[0]["config"]
    columns = [(m, k) for m in config["metrics"] if m in list(PER_USER) for k in config["topk"]]
    title = f"{first['dataset']}, {first['phase']}, {len(rows[0].users)} users, {first['protocol']}"
    return Comparison(title, rows, columns, notes)


def refuse_unlike(
    run_dirs: Sequence[str | Path], results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Refuse runs that were not scored on the same things in the same way.

    Returns:
        A sentence for each run whose result has no fingerprint, of which only sizes are compared.

    Raises:
        InputError: a run differs from the first one; the sentence names in what.
    """
    first = results[0]
    for run_dir, result in zip(run_dirs, results, strict=True):
        for key in _SHARED:
            if result.get(key) != first.get(key):
                raise InputError(
                    f"{run_dir} cannot be compared with {run_dirs[0]}: its {key} is "
                    f"'{one_line(result.get(key), 80)}', not '{one_line(first.get(key), 80)}'; name "
                    f"runs that were scored alike."
                )
        unlike = differing_parts(_fingerprint(first), _fingerprint(result))
        if not unlike:
            sizes, first_sizes = result.get("data", {}), first.get("data", {})
            unlike = [
                f"number of {size} ({first_sizes[size]} and {sizes[size]})"
                for size in _SIZES
                if size in sizes and size in first_sizes and sizes[size] != first_sizes[size]
            ]
        if unlike:
            same = "the same split" if "split" in unlike else "the same version of the data"
            raise InputError(
                f"{run_dir} cannot be compared with {run_dirs[0]}: they differ in {_and(unlike)}; "
                f"name runs on {same}."
            )
    without = [
        str(run_dir)
        for run_dir, result in zip(run_dirs, results, strict=True)
        if not _fingerprint(result)
    ]
    if not without or len(run_dirs) < 2:
        return []
    return [
        f"{_and(without)}: made before results recorded which items were held out, so that only "
        f"dataset, phase, protocol and the numbers of users, items and interactions were compared."
    ]


def _other_vectors(
    run_dirs: Sequence[str | Path], results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Name runs whose intra-list similarity is by other item embeddings than the first one's."""
    measured: list[tuple[str, Any]] = []
    for run_dir, result in zip(run_dirs, results, strict=True):
        recorded = result.get("list_metrics")
        if isinstance(recorded, dict) and recorded.get("vectors") is not None:
            measured.append((str(run_dir), recorded["vectors"]))
    others = [name for name, vectors in measured if vectors != measured[0][1]]
    if not others:
        return []
    return [
        f"{_and(others)}: IntraListSimilarity is by other item embeddings than that of "
        f"{measured[0][0]}, so that the two cannot be compared."
    ]


def _told_times(rows: Sequence[Row], results: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Name rows that are told when the held-out item comes, where others are not."""
    told = [row.name for row in rows if _is_told(results[row.folder]["config"], row.model)]
    if len(told) in (0, len(rows)):
        return []
    verb = "is" if len(told) == 1 else "are"
    return [
        f"{_and(told)} {verb} told the time of the held-out item (predict_at: target), and the others are "
        f"not: that is another task, so that the tests say nothing about which model is better."
    ]


def _is_told(config: Mapping[str, Any], model: str) -> bool:
    """Say whether a row's model reads the time for which it predicts."""
    timed = bool(config.get("use_timestamps")) and config.get("predict_at") == "target"
    return timed and model in TRAINED


def _fingerprint(result: Mapping[str, Any]) -> Mapping[str, str]:
    recorded = result.get("fingerprint")
    return recorded if isinstance(recorded, dict) else {}


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _rows_of_run(name: str, run_dir: str | Path, result: Mapping[str, Any]) -> list[Row]:
    rows = []
    for entry in result["rows"]:
        users, ranks = read_ranks(run_dir, entry["name"])
        rows.append(
            Row(
                name if len(result["rows"]) == 1 else f"{name}: {entry['name']}",
                users,
                ranks,
                _settings(result, entry["name"]),
                Path(run_dir),
                entry["name"],
                entry.get("metrics", {}),
                _exported_from(result) if entry["name"] == UNTRAINED else "",
            )
        )
    return rows


def run_names(run_dirs: Sequence[str | Path]) -> list[str]:
    """Name runs by their folders, or by the whole path where two folders have the same name."""
    names = [run_name(run_dir) for run_dir in run_dirs]
    return [
        name if names.count(name) == 1 else str(run_dir)
        for name, run_dir in zip(names, run_dirs, strict=True)
    ]


def _settings(result: Mapping[str, Any], row: str) -> str:
    """Name the settings that decide a row, as they stand in its run's configuration."""
    config = {**result["config"], "precision": result.get("environment", {}).get("precision")}
    if row == UNTRAINED:
        keys = ["user_pretrain_dir", "user_llm_layers", "MAX_ITEM_LIST_LENGTH"]
        keys += ["MAX_ITEM_LIST_LENGTH_TEST"]
        keys += ["item_embedding_transform", "precision"]
        run = _exported_from(result)
        start = f"fine-tuned, exported from {run}, " if run else ""
        return start + _listed({key: config.get(key) for key in keys})
    if row == "ensemble":
        return _members(result)
    if row not in TRAINED:
        return ""
    keys = ["epochs", "train_batch_size", "MAX_ITEM_LIST_LENGTH"]
    keys += ["MAX_ITEM_LIST_LENGTH_TEST", "seed"]
    if config.get("model") == "HLLM":
        keys += ["encoder", "user_llm_layers", "loss", "negatives", "num_negatives", "precision"]
        keys += ["item_embedding_transform", "item_adapter", "use_qlora"]
        keys += [key for key in _OPTIONS if config.get(key) not in (None, False, 0, "none")]
        keys += ["predict_at"] if config.get("use_timestamps") else []
        if config.get("use_qlora"):
            keys += [key for key in config if key.startswith("qlora_")]
    else:
        keys += [str(config.get("model")), "num_negatives"]
        if config.get("model") in USER_LLM_MODELS:
            keys += ["user_pretrain_dir", "user_llm_layers", "use_qlora"]
        optional = ("negatives_logq", "temperature", "fix_temp", "use_timestamps")
        keys += [key for key in optional if config.get(key)]
        keys += ["predict_at"] if config.get("use_timestamps") else []
    return _listed({**{key: config.get(key) for key in keys}, **config.get("optim_args", {})})


def _members(result: Mapping[str, Any]) -> str:
    """Name the runs of an ensemble with their weights."""
    recorded = result.get("ensemble")
    if not isinstance(recorded, dict):
        return ""
    runs, weights = recorded.get("runs"), recorded.get("weights")
    if not isinstance(runs, list) or not isinstance(weights, list):
        return ""
    return ", ".join(
        f"{weight} {one_line(run, 80)}" for run, weight in zip(runs, weights, strict=False)
    )


def _exported_from(result: Mapping[str, Any]) -> str:
    """Return the run that the UserLLM was exported from; empty where it was not exported."""
    user_llm = result.get("user_llm")
    run = user_llm.get("exported_from") if isinstance(user_llm, dict) else None
    return one_line(run, 80) if run else ""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)

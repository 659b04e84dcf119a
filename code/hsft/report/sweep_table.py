"""The trials of a sweep in one table, best first."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hsft.report.compare import Comparison, load_comparison, refuse_unlike
from hsft.report.comparison_files import blocks, csv_columns, csv_lines
from hsft.report.result import read_result
from hsft.report.terminal import Blocks, as_markdown
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.files import is_folder, write_text


@dataclass(frozen=True)
class Trial:
    """One trial that has ended.

    Attributes:
        name: its run folder's name.
        state: `complete`, `pruned` (its training was ended early) or `failed`.
        params: searched key -> value.
        value: the validation metric of its best epoch; None for a failed one.
        problem: why it failed.
    """

    name: str
    state: Literal["complete", "pruned", "failed"]
    params: Mapping[str, Any]
    value: float | None = None
    problem: str | None = None

    @property
    def settings(self) -> str:
        """The searched values in one line, numbers to four digits."""
        return in_one_line(self.params)


def in_one_line(params: Mapping[str, Any]) -> str:
    """Write searched values for people: `key value, ...`, numbers to four significant digits."""
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in params.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have a result: complete ones by value, then pruned ones by value."""
    scored = [trial for trial in trials if trial.value is not None]
    return sorted(scored, key=lambda trial: (trial.state != "complete", -(trial.value or 0.0)))


def compare_trials(trials: Sequence[Trial], runs: Path) -> Comparison:
    """Read the trials' runs, in `ranked`'s order.

    Args:
        trials: at least one of them with a result.
        runs: the folder that holds the trials' run folders.

    Raises:
        InputError: a run's files are missing or damaged, or trials were scored on other data.
    """
    folders = [runs / trial.name for trial in ranked(trials)]
    refuse_unlike(folders, [read_result(folder) for folder in folders])
    # One by one: trials with the same ranks each keep their row.
    alone = [load_comparison([folder]) for folder in folders]
    rows = []
    for trial, comparison in zip(ranked(trials), alone, strict=True):
        name = trial.name if trial.state == "complete" else f"{trial.name} ({trial.state})"
        rows.append(replace(comparison.rows[-1], name=name, settings=trial.settings))
    return replace(alone[0], rows=rows)


def save_sweep(
    trials: Sequence[Trial], runs: Path, folder: Path, metric: str, command: str
) -> Blocks:
    """Write `sweep.md` and `sweep.csv` to `folder` and return the former's paragraphs and table.

    Args:
        trials: at least one of them with a result.
        runs: the folder that holds the trials' run folders.
        folder: where to.
        metric: what decided between them.
        command: trains the best trial's settings and scores the test users.
    """
    comparison = compare_trials(trials, runs)
    written = _blocks(comparison, trials, metric, command, runs)
    write_text(folder / "sweep.md", as_markdown(written))
    write_text(folder / "sweep.csv", _csv(comparison, trials))
    return written


def _blocks(
    comparison: Comparison, trials: Sequence[Trial], metric: str, command: str, runs: Path
) -> Blocks:
    best = ranked(trials)[0]
    failed = [trial for trial in trials if trial.state == "failed"]
    lines = [f"{trial.name} failed: {trial.problem} ({trial.settings})" for trial in failed]
    counted = sum(trial.state == "complete" for trial in trials)
    end = (
        f"{best.name} has the best {metric} of {counted} complete trials. The validation users chose "
        f"it, so its values are flattered; score it once on the test users. This command trains "
        f"again with its values, since a run scores the users that it was started for:\n\n"
        f"    {command}"
    )
    weights = runs / best.name / BEST_DIR
    if is_folder(weights):
        end += (
            f"\n\nIts weights of this sweep are kept in {weights}: recommend.py and export.py take "
            f"--run {weights.parent}."
        )
    return [*blocks(comparison), *lines, end]


def _csv(comparison: Comparison, trials: Sequence[Trial]) -> str:
    """Return one line a trial and metric, with the searched values; a failed trial has one line."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    measured = list(csv_columns(comparison.records[0][0]))
    columns = ["run", "state", *keys, *measured[1:], "problem"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for trial, lines in zip(ranked(trials), csv_lines(comparison), strict=True):
        settings = {"run": trial.name, "state": trial.state, **trial.params}
        for line in lines:
            writer.writerow({**line, **settings})
    for trial in trials:
        if trial.state == "failed":
            writer.writerow(
                {"run": trial.name, "state": "failed", **trial.params, "problem": trial.problem}
            )
    return buffer.getvalue()

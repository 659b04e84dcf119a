"""`sweep.yaml`: which keys are searched, over what, and how."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hsft.config import Config, load_config
from hsft.config.loader import flat_fields, read_yaml_file
from hsft.config.schema import Int, PositiveInt, Text
from hsft.finished.sweep_search import MAX_POINTS, Choice, Range, read_axis
from hsft.utils.errors import InputError, one_line, refuse

# What a sweep decides itself: it validates only, each trial in a run folder of its own.
MANAGED = (
    *("auto_resume", "check", "checkpoint_dir", "dry_run", "eval_baseline", "eval_phase"),
    *("overwrite", "run_name", "valid_metric"),
)
# Trials with other values of these are scored on other users or in another way.
_NOT_COMPARABLE = (
    *("data_path", "dataset", "item_data", "missing_items", "tie_order", "topk", "metrics"),
    *("split", "split_time", "split_valid_time", "split_cold", "valid_users"),
    *("eval_protocol", "eval_neg_sample_num", "list_metrics", "predict_at"),
)
_MAX_CORNERS = 256


class _File(BaseModel):
    """The keys of `sweep.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_file: Annotated[list[Text], Field(min_length=1)] = Field(
        description="configuration files of every trial, as on main.py's command line"
    )
    fixed: dict[str, Any] = Field({}, description="main.py's keys that all trials share")
    search: Annotated[dict[str, Any], Field(min_length=1)] = Field(
        description="main.py's keys that are searched: a list of values, or {low: A, high: B} "
        "and log: True or step: C as needed"
    )
    metric: Text = Field("NDCG@10", description="validation metric; the highest is best")
    trials: PositiveInt = Field(20, description="trials in all; raise it and start again for more")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="tpe, random, or grid: every combination, in random order"
    )
    seed: Annotated[Int, Field(ge=0, le=2**31 - 1)] = Field(2020, description="of the sampler")
    pruner: Literal["none", "median"] = Field(
        "none", description="none, or median: end a training that is below the others' median"
    )
    dir: Text = Field(
        "runs/sweep", description="folder of study.db, trials/, sweep.md and sweep.csv"
    )
    keep_models: Literal["best", "all"] = Field(
        "best", description="whose weights are kept: best, the best trial's, or all"
    )


def keys_help() -> str:
    """Describe the keys of `sweep.yaml`, a paragraph each, for --help."""
    lines = ["keys of SWEEP.yaml:"]
    for name, info in _File.model_fields.items():
        default = "required" if info.is_required() else f"default: {info.default or 'none'}"
        text = f"{info.description} ({default})"
        lines += textwrap.wrap(
            text, 100, initial_indent=f"  {name:<13}", subsequent_indent=" " * 15
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, read and checked.

    Attributes:
        path: the file it is from.
        files: configuration files of every trial.
        fixed: `key` or `section.key` -> value of every trial.
        search: `key` or `section.key` -> what it is searched over.
        metric: validation metric that is maximised.
        trials: how many trials in all.
        sampler: `tpe`, `random` or `grid`.
        seed: of the sampler.
        pruner: `none` or `median`.
        folder: where trials and tables go.
        keep_models: `best` keeps the weights of the best trial only, `all` those of all.
        first: searched values that make a configuration, for checks.
        base: that configuration.
    """

    path: Path
    files: tuple[str, ...]
    fixed: dict[str, Any]
    search: dict[str, Choice | Range]
    metric: str
    trials: int
    sampler: str
    seed: int
    pruner: str
    folder: Path
    keep_models: str
    first: dict[str, Any]
    base: Config

    def config(self, params: Mapping[str, Any], run_name: str) -> Config:
        """Return the configuration of one trial.

        Raises:
            InputError: the values do not go together.
        """
        # DeepSpeed's runs cannot be resumed: one that was cut short is done again.
        again = self.base.strategy == "deepspeed"
        managed = {
            **_managed(self.metric, self.folder),
            "run_name": run_name,
            "auto_resume": not again,
            "overwrite": again,
        }
        return _load(self.path, self.files, {**self.fixed, **params, **managed})

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination, in an order drawn with `seed`.

        Optuna's GridSampler cannot go on after an interruption: a trial that is put back into the
        queue has no number in its grid.
        """
        axes = [axis.points() or () for axis in self.search.values()]
        points = [dict(zip(self.search, point, strict=True)) for point in itertools.product(*axes)]
        random.Random(self.seed).shuffle(points)
        return points

    def command(self, params: Mapping[str, Any]) -> str:
        """Return the command that trains with these values and scores the test users."""
        keys = {**self.fixed, **params, "valid_metric": self.metric, "eval_phase": "test"}
        words = ["python", "code/main.py", "--config_file", *self.files]
        for key, value in keys.items():
            words += [f"--{key}", _word(value)]
        return shlex.join(words)

    def identity(self) -> dict[str, Any]:
        """Return what every session of one sweep must share, as plain data."""
        return {
            "search": {key: axis.describe() for key, axis in self.search.items()},
            "metric": self.metric,
            "sampler": self.sampler,
            "seed": self.seed,
            "pruner": self.pruner,
            "config": self.base.model_dump(mode="json"),
        }


def read_plan(path: str | Path) -> SweepPlan:
    """Read `sweep.yaml` and check all that can be before a trial starts.

    Raises:
        InputError: the file is missing or no YAML, a key or value is unknown or out of range, or
            no combination of the values makes a configuration.
    """
    path = Path(path)
    given = read_yaml_file(path)
    if isinstance(given.get("config_file"), str):
        given["config_file"] = [given["config_file"]]
    try:
        file = _File.model_validate(given)
    except ValidationError as error:
        refuse([_sentence(path, item) for item in error.errors()])
        raise
    fixed = _flatten(file.fixed)
    search = {key: read_axis(path, key, spec) for key, spec in _flatten(file.search).items()}
    _refuse_keys(path, fixed, search)
    if file.sampler == "grid":
        _refuse_endless(path, search)
    first, base = _first_valid(path, tuple(file.config_file), fixed, search, file)
    if "seed" in search:
        _refuse_seeds(path, base)
    return SweepPlan(
        path=path,
        files=tuple(file.config_file),
        fixed=fixed,
        search=search,
        metric=file.metric,
        trials=file.trials,
        sampler=file.sampler,
        seed=file.seed,
        pruner=file.pruner,
        folder=Path(file.dir),
        keep_models=file.keep_models,
        first=first,
        base=base,
    )


def _sentence(path: Path, item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = ", ".join(_File.model_fields)
        return f"{path}: unknown key '{one_line(name, 40)}'; the keys of a sweep are {known}."
    if item["type"] == "missing":
        return f"{path} lacks the key '{name}'; see code/overall/sweep_example.yaml."
    given = one_line(repr(item["input"]), 60)
    return f"{path}: {name}: {item['msg'][:1].lower()}{item['msg'][1:]}, but it is {given}."


def _flatten(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Write sections as `section.key`; a mapping under a key of the configuration stays."""
    known, flat = flat_fields(), {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and name not in known and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _refuse_keys(path: Path, fixed: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    problems = [
        f"{path}: {key} is set by the sweep itself; take it out."
        for key in (*fixed, *search)
        if key in MANAGED
    ]
    problems += [
        f"{path}: {key} is under fixed and under search; keep one."
        for key in search
        if key in fixed
    ]
    problems += [
        f"{path}: trials that differ in {key} cannot be compared; move it from search to fixed."
        for key in search
        if key in _NOT_COMPARABLE
    ]
    refuse(problems)


def _refuse_seeds(path: Path, base: Config) -> None:
    """Refuse to search the seed where it decides what trials are scored on."""
    decided = {
        "the candidates of eval_protocol: sampled": base.eval_protocol == "sampled",
        "which users valid_users takes": base.valid_users is not None,
        "the held-out items of tie_order: shuffle": base.tie_order == "shuffle",
    }
    for what in (what for what, decides in decided.items() if decides):
        raise InputError(
            f"{path}: seed decides {what}, so trials could not be compared; take it out of search, or "
            f"drop that key."
        )


def _refuse_endless(path: Path, search: Mapping[str, Choice | Range]) -> None:
    points = {key: axis.points() for key, axis in search.items()}
    endless = [key for key, values in points.items() if values is None]
    if endless:
        raise InputError(
            f"{path}: sampler: grid cannot take every value of {endless[0]}; give a list or a step."
        )
    count = math.prod(len(values or ()) for values in points.values())
    if count > MAX_POINTS:
        raise InputError(f"{path}: the grid has {count} points; search fewer keys or values.")


def _first_valid(
    path: Path,
    files: Sequence[str],
    fixed: Mapping[str, Any],
    search: Mapping[str, Choice | Range],
    file: _File,
) -> tuple[dict[str, Any], Config]:
    """Return the first combination of the searched values that makes a configuration, and that.

    Values can exclude each other (loss: bce and negatives: catalogue), so not every one has to.
    """
    managed = _managed(file.metric, Path(file.dir))
    first: InputError | None = None
    corners = itertools.product(*(axis.corners() for axis in search.values()))
    for corner in itertools.islice(corners, _MAX_CORNERS):
        params = dict(zip(search, corner, strict=True))
        try:
            return params, _load(path, files, {**fixed, **params, **managed})
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


def _managed(metric: str, folder: Path) -> dict[str, Any]:
    return {
        "eval_phase": "valid",
        "eval_baseline": False,
        "valid_metric": metric,
        "checkpoint_dir": str(folder / "trials"),
        "check": False,
        "dry_run": False,
    }


def _load(path: Path, files: Sequence[str], overrides: Mapping[str, Any]) -> Config:
    return load_config(files, overrides, where=str(path))[0]


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | bool) else json.dumps(value)

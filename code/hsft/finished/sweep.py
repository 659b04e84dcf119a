"""Search configuration keys with Optuna: every trial is a run that is scored on the validation users."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsft.finished.sweep_plan import SweepPlan
from hsft.finished.sweep_search import Choice, Range
from hsft.report.result import RESULT_FILE, read_result
from hsft.report.sweep_table import Trial, in_one_line, ranked, save_sweep
from hsft.report.terminal import write_blocks
from hsft.run.check import quick_problems
from hsft.run.run_dir import MAY_CHANGE
from hsft.run.train_and_rank import train_and_rank
from hsft.trainer.checkpoint import BEST_DIR, CHECKPOINTS_DIR
from hsft.utils.distributed import world_size
from hsft.utils.errors import InputError, Interrupted, brief, problems_of, refuse
from hsft.utils.files import is_file, remove
from hsft.utils.gpu_memory import release_unused_memory
from hsft.utils.lock import locked
from hsft.utils.logs import set_up_logging
from hsft.utils.program import install_command
from hsft.utils.progress import format_seconds
from hsft.utils.signals import StopSignals

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

STUDY_FILE = "study.db"
RUNS_DIR = "trials"
# A sweep whose first trials all fail would fail to its end.
_FAILURES_AT_START = 5


def sweep(plan: SweepPlan) -> Path:
    """Run a plan's trials, or those that are left of them, and write `sweep.md` and `sweep.csv`.

    Every trial is a run of main.py in this process, in `<dir>/trials/`, with `eval_phase: valid`
    and `eval_baseline: False`. Optuna's study is `<dir>/study.db`. Started again, a sweep keeps the
    trials that ended and continues the one that was interrupted from its last checkpoint. A trial
    that fails is recorded with its sentence and the sweep goes on.

    Returns:
        The plan's folder.

    Raises:
        InputError: Optuna is not installed, the folder holds another sweep, something is missing
            that every trial needs, or no trial succeeded.
        Interrupted: SIGINT or SIGTERM came.
    """
    if world_size() > 1:
        raise InputError("a sweep runs in one process; start it without torchrun.")
    library = _optuna()
    refuse(quick_problems(plan.config(plan.first, "trial-0000-check")))
    try:
        with StopSignals(), locked(plan.folder, f"dir in {plan.path}"):
            study = _open_study(plan, library)
            # Memory is collected after each trial, which need not look at all that was imported.
            gc.freeze()
            _Sweep(plan, library, study).run_trials()
    except Interrupted as ending:
        what = str(ending).partition(";")[0]
        raise Interrupted(
            f"{what}; start the same command again to go on", ending.exit_code
        ) from None
    finally:
        gc.unfreeze()
    return plan.folder


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"a sweep needs optuna; install it with {install_command('optuna')}."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open_study(plan: SweepPlan, library: Any) -> optuna.Study:
    """Open the folder's study, or start one.

    Raises:
        InputError: it is of another sweep, or cannot be read.
    """
    path, runs = plan.folder / STUDY_FILE, plan.folder / RUNS_DIR
    if not is_file(path) and runs.is_dir() and any(runs.glob("trial-*")):
        raise InputError(
            f"{runs} holds trials of another sweep, whose {STUDY_FILE} is gone; remove them or "
            f"change dir in {plan.path}."
        )
    pruner = (
        library.pruners.NopPruner() if plan.pruner == "none" else library.pruners.MedianPruner()
    )
    try:
        import sqlalchemy

        url = sqlalchemy.URL.create("sqlite", database=str(path))
        study: optuna.Study = library.create_study(
            storage=url.render_as_string(hide_password=False),
            study_name="sweep",
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
        before = study.user_attrs.get("plan")
        if before is None:
            study.set_user_attr("plan", plan.identity())
    except (sqlalchemy.exc.SQLAlchemyError, library.exceptions.OptunaError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be used by optuna ({brief(error)}); change dir in {plan.path}."
        ) from error
    if before is not None:
        _refuse_other_plan(plan, before)
    return study


def _refuse_other_plan(plan: SweepPlan, before: Mapping[str, Any]) -> None:
    # As it reads back: tuples are lists there.
    now = json.loads(json.dumps(plan.identity()))
    for name, value in now.items():
        old = before.get(name)
        if name != "config" and old != value:
            raise InputError(_other_plan(plan, name, old, value))
    old_config, config = before.get("config") or {}, now["config"]
    for key, value in config.items():
        if key not in MAY_CHANGE and old_config.get(key, value) != value:
            raise InputError(_other_plan(plan, key, old_config[key], value))


def _other_plan(plan: SweepPlan, name: str, old: Any, new: Any) -> str:
    return (
        f"{plan.folder} holds a sweep with {name} {brief(old)}, now it is {brief(new)}; put it back "
        f"or change dir in {plan.path}."
    )


@dataclass
class _Sweep:
    """The work on one study.

    Attributes:
        plan: the plan.
        library: the module optuna.
        study: its study.
        seconds: how long each trial of this session took.
    """

    plan: SweepPlan
    library: Any
    study: optuna.Study
    seconds: list[float] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.plan.folder / RUNS_DIR

    def run_trials(self) -> None:
        """Run the trials that are left and write the tables.

        Raises:
            InputError: no trial succeeded.
        """
        plan = self.plan
        grid = plan.grid() if plan.sampler == "grid" else None
        total = plan.trials if grid is None else min(plan.trials, len(grid))
        self._requeue()
        done = len(self._ended())
        if done:
            log.info("%d of %d trials were done before.", done, total)
        while done < total:
            self._run_next(done, None if grid is None else grid[done])
            done += 1
            self._report(done, total)
        trials = self._trials()
        best = self._best(trials)
        if best is None:
            raise InputError(f"no trial of {plan.folder} succeeded; {self._last_problem()}")
        command = plan.command(best.params)
        written = save_sweep(trials, self.runs, plan.folder, plan.metric, command)
        sys.stdout.write("\n")
        write_blocks(written)
        sys.stdout.write(f"\nsaved: {plan.folder / 'sweep.md'}, {plan.folder / 'sweep.csv'}\n")

    def _requeue(self) -> None:
        """Put a trial that was under way when an earlier session ended before all others."""
        states = self.library.trial.TrialState
        waiting = {
            trial.user_attrs.get("run")
            for trial in self.study.get_trials(deepcopy=False, states=(states.WAITING,))
        }
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            name = trial.user_attrs.get("run")
            # Killed before its values were all drawn, it has done nothing yet.
            if name is not None and name not in waiting:
                reported = {str(step): value for step, value in trial.intermediate_values.items()}
                reported |= trial.user_attrs.get("reported", {})
                self.study.enqueue_trial(
                    trial.params, user_attrs={"run": name, "reported": reported}
                )
            self.study.tell(trial.number, state=states.FAIL)

    def _ask(self, number: int, point: Mapping[str, Any] | None) -> Any:
        """Return the next trial, its values drawn, or those of a point of the grid."""
        plan, samplers = self.plan, self.library.samplers
        # A seed for each trial: draws do not depend on how often the sweep was interrupted.
        kind = samplers.TPESampler if plan.sampler == "tpe" else samplers.RandomSampler
        self.study.sampler = kind(seed=plan.seed + number)
        states = (self.library.trial.TrialState.WAITING,)
        queued = self.study.get_trials(deepcopy=False, states=states)
        if point is not None and not queued:
            self.study.enqueue_trial({key: _label(value) for key, value in point.items()})
        trial = self.study.ask(fixed_distributions=self._distributions())
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", f"trial-{number:04d}")
        return trial

    def _run_next(self, number: int, point: Mapping[str, Any] | None) -> None:
        """Run one trial and tell the study how it ended."""
        trial = self._ask(number, point)
        name = trial.user_attrs["run"]
        twin = self._twin(trial.params)
        if twin is not None:
            log.info(
                "%s has the values of %s, whose result it takes.", name, twin.user_attrs["run"]
            )
            trial.set_user_attr("run", twin.user_attrs["run"])
            self.study.tell(trial, twin.value)
            return
        params = self._params(trial.params)
        log.info("%s: %s", name, in_one_line(params))
        began = time.monotonic()
        problem = None
        try:
            value, ended = self._train(trial, name, params)
        except (InputError, torch.OutOfMemoryError, MemoryError) as error:
            problem = _problem(error)
        finally:
            # The run's log file is closed.
            set_up_logging()
            release_unused_memory()
        self.seconds.append(time.monotonic() - began)
        if problem is not None:
            remove(self.runs / name / CHECKPOINTS_DIR)
            trial.set_user_attr("problem", problem)
            self.study.tell(trial, state=self.library.trial.TrialState.FAIL)
            log.warning("%s failed: %s", name, problem)
            self._end_if_all_fail()
            return
        trial.set_user_attr("value", value)
        if ended:
            self.study.tell(trial, state=self.library.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, value)
        self._drop_models()

    def _train(self, trial: Any, name: str, params: Mapping[str, Any]) -> tuple[float, bool]:
        """Run a trial; return its metric and whether it was ended early."""
        reported = {int(step) for step in trial.user_attrs.get("reported", {})}
        for step, value in trial.user_attrs.get("reported", {}).items():
            trial.report(value, int(step))
        ended = False

        def keep_going(epoch: int, metrics: Mapping[str, float]) -> bool:
            nonlocal ended
            # A continued run can do the epoch again that it was in.
            if epoch not in reported:
                trial.report(metrics[self.plan.metric], epoch)
            ended = self.plan.pruner != "none" and trial.should_prune()
            return not ended

        folder = self.runs / name
        # Killed after the run ended, and before the study was told.
        if not is_file(folder / RESULT_FILE):
            config = self.plan.config(params, name)
            if config.num_threads is not None:
                torch.set_num_threads(config.num_threads)
            train_and_rank(config, keep_going)
        row = read_result(folder)["rows"][-1]
        return float(row["metrics"][self.plan.metric]), ended

    def _distributions(self) -> dict[str, Any]:
        kinds = self.library.distributions
        return {key: self._distribution(kinds, axis) for key, axis in self.plan.search.items()}

    def _distribution(self, kinds: Any, axis: Choice | Range) -> Any:
        points = axis.points() if self.plan.sampler == "grid" else None
        if isinstance(axis, Choice) or points is not None:
            values = axis.values if isinstance(axis, Choice) else points or ()
            return kinds.CategoricalDistribution([_label(value) for value in values])
        if axis.whole:
            return kinds.IntDistribution(
                int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1)
            )
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)

    def _params(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration's values of what was drawn."""
        params = {}
        for key, axis in self.plan.search.items():
            value = drawn[key]
            if isinstance(axis, Choice):
                value = next(choice for choice in axis.values if _label(choice) == value)
            params[key] = value
        return params

    def _ended(self) -> list[Any]:
        """Return the study's trials that ended, without those that an interruption cut short."""
        states = self.library.trial.TrialState
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state in (states.COMPLETE, states.PRUNED)
            or (trial.state == states.FAIL and "problem" in trial.user_attrs)
        ]

    def _twin(self, params: Mapping[str, Any]) -> Any | None:
        """Return a complete trial with the same values: the same run would only be repeated."""
        complete = self.library.trial.TrialState.COMPLETE
        return next((t for t in self._ended() if t.state == complete and t.params == params), None)

    def _trials(self) -> list[Trial]:
        states = self.library.trial.TrialState
        names = {states.COMPLETE: "complete", states.PRUNED: "pruned", states.FAIL: "failed"}
        by_name: dict[str, Trial] = {}
        for trial in self._ended():
            name = trial.user_attrs["run"]
            value = trial.value if trial.state == states.COMPLETE else trial.user_attrs.get("value")
            problem = trial.user_attrs.get("problem")
            kind: Any = names[trial.state]
            by_name.setdefault(name, Trial(name, kind, self._params(trial.params), value, problem))
        return list(by_name.values())

    @staticmethod
    def _best(trials: list[Trial]) -> Trial | None:
        best = ranked(trials)[:1]
        return best[0] if best and best[0].state == "complete" else None

    def _drop_models(self) -> None:
        """Remove the weights of all trials but the best one."""
        if self.plan.keep_models == "all":
            return
        best = self._best(self._trials())
        for folder in self.runs.glob("trial-*"):
            if best is not None and folder.name != best.name:
                remove(folder / BEST_DIR)

    def _end_if_all_fail(self) -> None:
        ended = self._ended()
        failed = [trial for trial in ended if "problem" in trial.user_attrs]
        if len(failed) == len(ended) == _FAILURES_AT_START:
            raise InputError(f"all of the first {len(ended)} trials failed; {self._last_problem()}")

    def _last_problem(self) -> str:
        problems = [trial.user_attrs.get("problem") for trial in self._ended()]
        return f"the last one: {next((text for text in reversed(problems) if text), 'pruned.')}"

    def _report(self, done: int, total: int) -> None:
        best = self._best(self._trials())
        mean = sum(self.seconds) / max(1, len(self.seconds))
        log.info(
            "%d of %d trials, ETA %s%s",
            done,
            total,
            format_seconds(mean * (total - done)),
            "" if best is None else f"; best {self.plan.metric} {best.value:.4f} in {best.name}",
        )


def _label(value: Any) -> Any:
    """Return a value as Optuna can store it: lists as JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def _problem(error: BaseException) -> str:
    if isinstance(error, InputError):
        return " ".join(problems_of(error))
    return f"out of memory: {brief(error)}."

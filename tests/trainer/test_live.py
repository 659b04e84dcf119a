"""The live display, and the training's scalars at Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from hsft.trainer import loop
from hsft.trainer.sampler import SequenceBatches
from hsft.trainer.step import Learner
from hsft.trainer.wandb_log import ID_FILE
from hsft.utils import progress
from hsft.utils.environment import current_memory, peak_memory
from hsft.utils.logs import set_up_logging
from hsft.utils.progress import Meter, format_bytes
from hsft.utils.signals import StopSignals
from item_caching import main as caching
from tests.conftest import Project

CPU = torch.device("cpu")
SASREC = (
    *("--model", "sasrec", "--sasrec.hidden_size", "16", "--epochs", "2", "--run_name", "run"),
    *("--num_threads", "1"),
)
QLORA = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "1", "--run_name", "run"),
    *("--num_threads", "1"),
)
WANDB = ("--log_wandb", "True")

# Writes what it is given to a file, one JSON line a call, as separate sessions would.
FAKE = """
import json, os

def note(kind, **values):
    with open(os.environ["FAKE_WANDB"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **values}) + "\\n")
    if os.environ.get("FAKE_WANDB_FAILS_AT") == kind:
        raise RuntimeError("the server\\nis away.")

class Summary:
    def update(self, values):
        note("summary", values=values)

class Run:
    summary = Summary()
    def define_metric(self, name, step_metric=None):
        note("define_metric", name=name, step_metric=step_metric)
    def log(self, values):
        note("log", values=values)
    def finish(self, exit_code=None):
        note("finish", exit_code=exit_code)

def init(**settings):
    note("init", **settings)
    return Run()
"""

Calls = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put a small `wandb` first on sys.path; returns what it was called with, by kind."""
    package = tmp_path / "packages"
    package.mkdir()
    (package / "wandb.py").write_text(FAKE)
    record = tmp_path / "calls.jsonl"
    record.touch()
    monkeypatch.syspath_prepend(str(package))
    forget_wandb(monkeypatch)
    monkeypatch.setenv("FAKE_WANDB", str(record))

    def calls(kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in record.read_text().splitlines()]
        return [call for call in found if call["kind"] == kind]

    return calls


def forget_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have wandb imported anew, and what is imported gone again after the test."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")


class Clock:
    """Stands for time.perf_counter: it says what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made)
    return made


class Terminal(io.StringIO):
    """Standard error as a terminal of 100 columns."""

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """Return what was written, without control codes and line breaks."""
        return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()).split())


def take_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal. No fixture: pytest puts its own stderr back between phases."""
    made = Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_a_line_says_rates_and_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Meter("epoch 1 of 2", 1100, "sequences") as bar:
        bar.skip(100)
        clock.now = 14.9
        bar.advance(100, 5000, lambda: pytest.fail("text is made that nobody sees"))
        clock.now = 20.0
        bar.advance(100, 5000, lambda: ["step 3 of 9", "loss 0.5000"])
        clock.now = 34.0
        bar.advance(300)
        clock.now = 35.0
        bar.advance(200)
    # 200 sequences and 10,000 tokens in 20 s, 800 left; then 700 in 35 s, 300 left.
    assert caplog.messages == [
        "epoch 1 of 2: 300 of 1,100 sequences, ETA 1m20s, step 3 of 9, loss 0.5000, "
        "10.0 sequences/s, 500 tokens/s",
        "epoch 1 of 2: 800 of 1,100 sequences, ETA 15s, 20.0 sequences/s, 286 tokens/s",
    ]


def test_time_left_follows_from_tokens_where_they_are_known(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Meter("encoding items", 100, "items", tokens=1000) as bar:
        clock.now = 30.0
        bar.advance(10, 600)
    # The ten longest items had 600 of the 1000 tokens: 400 are left at 20 a second.
    assert caplog.messages == ["encoding items: 10 of 100 items, ETA 20s, 0.3 items/s, 20 tokens/s"]


def test_only_the_first_process_shows_anything(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    shown = [Meter("task", 10, "users"), Meter("task", 10, "users", enabled=False)]
    clock.now = 100.0
    for bar in shown:
        bar.advance(5)
        bar.close()
        assert not bar.shown
        assert bar.done == 5
    assert not caplog.messages


def test_a_terminal_gets_a_bar_and_log_lines_above_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = take_terminal(monkeypatch)
    set_up_logging()
    with Meter("evaluation", 2000, "users", device=CPU) as bar:
        clock.now = 2.0
        bar.advance(500, note=lambda: ["loss 0.2500"])
        assert bar._display is not None
        bar._display.refresh()
        logging.getLogger("hsft").warning("a line from the middle")
        before = terminal.text()
    assert "evaluation" in before
    assert "500/2,000 users" in before
    assert "ETA 6s" in before
    assert re.search(r"loss 0\.2500, 250\.0 users/s, (peak )?memory [\d.]+ [GM]iB", before)
    # Written through the display, which draws its bar anew below the line.
    after = before[before.index("a line from the middle") :]
    assert "500/2,000 users" in after
    assert sys.stderr is terminal


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with Meter("evaluation", 10, "users") as bar:
        assert bar._display is None
        assert bar.shown


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")
def test_memory_in_use_follows_an_allocation() -> None:
    before = current_memory(CPU)["host_bytes"]
    block = np.ones(96 << 20, dtype=np.uint8)
    after = current_memory(CPU)["host_bytes"]
    assert after - before > 80 << 20
    # The kernel counts pages a batch at a time for each thread.
    assert peak_memory(CPU)["host_bytes"] > after - (8 << 20)
    del block
    assert current_memory(CPU)["host_bytes"] < after - (80 << 20)


def test_sizes_are_written_with_their_unit() -> None:
    assert format_bytes(310 << 20) == "310 MiB"
    assert format_bytes(3 << 29) == "1.5 GiB"


@pytest.mark.parametrize(("count", "world"), [(30, 1), (32, 1), (30, 2), (31, 3), (49, 3), (5, 3)])
def test_sequences_of_the_first_batches(count: int, world: int) -> None:
    shares = [
        list(SequenceBatches(np.ones(count), 4, 0, rank=rank, world_size=world))
        for rank in range(world)
    ]
    batches = SequenceBatches(np.ones(count), 4, 0, world_size=world)
    sizes = [sum(map(len, batch)) for batch in zip(*shares, strict=True)]
    assert [batches.sequences(n) for n in range(len(batches) + 1)] == [
        0,
        *itertools.accumulate(sizes),
    ]
    assert batches.sequences(len(batches)) == count


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """Show a line at every step, and keep the meters."""
    found: list[Meter] = []
    close = Meter.close

    def closing(self: Meter) -> None:
        found.append(self)
        close(self)

    monkeypatch.setattr(Meter, "close", closing)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    return found


MEMORY = r"(memory [\d.]+ [GM]iB \(peak [\d.]+ [GM]iB\)|peak memory [\d.]+ [GM]iB)"


@pytest.mark.parametrize("positions", ["all", "random_split"])
def test_training_and_evaluation_show_what_they_do(
    project: Project, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    meters = spy(monkeypatch)
    more = ("--show_progress", "True", "--train_positions", positions, "--epochs", "2")
    code, _, err = project.run(*QLORA, *more, "--gradient_accumulation_steps", "3")
    assert code == 0, err
    # 30 sequences in 4 batches, 3 of them to a step.
    steps = [line[9:] for line in err.splitlines() if re.match(r"[\d:]{8} epoch \d of", line)]
    # A step's loss is known in the next one.
    first, later = r"step \d of 4, ", r"step \d of 4, loss [\d.]+, "
    rate, left = r"learning rate \d\.\d\de-\d\d, ", r"all epochs in at most \d+s, "
    facts = r"[\d,.]+ sequences/s, [\d,]+ tokens/s, " + MEMORY
    patterns = [
        rf"epoch 1 of 2: 24 of 30 sequences, ETA \d+s, {first}{rate}{left}{facts}",
        rf"epoch 1 of 2: 30 of 30 sequences, ETA 0s, {later}{rate}{left}{facts}",
        rf"epoch 2 of 2: 24 of 30 sequences, ETA \d+s, {first}{rate}{facts}",
        rf"epoch 2 of 2: 30 of 30 sequences, ETA 0s, {later}{rate}{facts}",
    ]
    assert len(steps) == len(patterns)
    for line, pattern in zip(steps, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert re.search(rf"evaluation: 30 of 30 users, ETA 0s, [\d,.]+ users/s, {MEMORY}\n", err)
    assert re.search(rf"validation: 30 of 30 users, ETA 0s, [\d,.]+ users/s, {MEMORY}\n", err)
    # Users have 12, 11 or 10 items, two of which are held out; the UserLLM reads at most 8 and
    # predicts from all but the last: no packing or padding changes that, nor what the loss counts.
    found = json.loads((project.root / "saved" / "run" / "result.json").read_text())
    real = found["training"]["transitions_per_epoch"]
    assert real == 10 * (8 + 8 + 7)
    epochs = [bar for bar in meters if bar.unit == "sequences"]
    assert [(bar.done, bar.tokens_done) for bar in epochs] == [(30, real)] * 2


def test_caching_shows_items_and_tokens(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    meters = spy(monkeypatch)
    argv = [
        *("--dataset", "tiny", "--item_pretrain_dir", str(project.llama)),
        *("--item_cache_path", "made.safetensors", "--precision", "32-true"),
        *("--item_batch_tokens", "64"),
    ]
    code, _, err = project.call(caching, argv)
    assert code == 0, err
    rows = [line[9:] for line in err.splitlines() if "encoding items:" in line]
    assert len(rows) > 1
    for line in rows:
        assert re.fullmatch(
            r"encoding items: \d+ of 20 items, ETA \d+s, [\d,.]+ items/s, [\d,]+ tokens/s, "
            + MEMORY,
            line,
        )
    (bar,) = (bar for bar in meters if bar.task == "encoding items")
    assert bar.tokens_done == bar.tokens
    assert bar.done == 20
    lengths = [len(f"title: item {n} tag: {n % 4} description: {n % 7}".split()) for n in range(20)]
    assert bar.tokens_done >= sum(lengths)


def scalars(project: Project) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(project.root / "saved" / "run" / "tensorboard")).Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }


def logged(calls: Calls) -> dict[tuple[str, int], float]:
    found = {}
    for call in calls("log"):
        step = call["values"].pop("optimizer_step")
        for tag, value in call["values"].items():
            assert (tag, step) not in found
            found[tag, step] = value
    return found


def test_wandb_gets_what_tensorboard_gets(project: Project, fake_wandb: Calls) -> None:
    code, _, err = project.run(*SASREC, *WANDB, "--wandb_project", "mine")
    assert code == 0, err
    (begun,) = fake_wandb("init")
    folder = project.root / "saved" / "run"
    assert begun["project"] == "mine"
    assert begun["name"] == "run"
    assert (project.root / begun["dir"]) == folder
    assert begun["id"] == (folder / ID_FILE).read_text().strip()
    assert begun["resume"] == "allow"
    found = json.loads((folder / "result.json").read_text())
    assert begun["config"] == found["config"]
    assert {(call["name"], call["step_metric"]) for call in fake_wandb("define_metric")} == {
        ("train/*", "optimizer_step"),
        ("valid/*", "optimizer_step"),
    }
    there, here = logged(fake_wandb), scalars(project)
    assert {("train/loss", 8), ("train/learning_rate", 1), ("valid/NDCG@10", 4)} <= there.keys()
    assert there == pytest.approx(here)
    (summary,) = fake_wandb("summary")
    assert summary["values"] == {
        f"test/{name}": value for name, value in found["rows"][-1]["metrics"].items()
    }
    assert [call["exit_code"] for call in fake_wandb("finish")] == [0]


def test_a_resumed_run_goes_on_at_wandb(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop.update

    def stopping(learner: Learner) -> Any:
        if learner.schedule.last_epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", stopping)
        assert project.run(*SASREC, *WANDB)[0] == 143
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 0, err
    first, second = fake_wandb("init")
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [call["exit_code"] for call in fake_wandb("finish")] == [1, 0]
    there = logged(fake_wandb)
    assert [step for tag, step in there if tag == "train/loss"] == list(range(1, 9))
    assert there == pytest.approx(scalars(project))


def interrupt(project: Project, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Do a run that is interrupted at the end of its first epoch."""

    def fail(self: StopSignals, done: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "raise_if_received", fail)
        assert project.run(*flags)[0] == 130


def test_wandb_may_be_asked_for_later(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(project, monkeypatch, *SASREC)
    assert not fake_wandb("init")
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 0, err
    assert [step for tag, step in logged(fake_wandb) if tag == "train/loss"] == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["log", "finish", "summary"])
def test_a_failure_of_wandb_does_not_stop_training(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", kind)
    code, _, err = project.run(*SASREC, *WANDB)
    assert code == 0, err
    assert err.count("Weights & Biases failed") == 1
    assert "no more values of this run: the server is away. TensorBoard's are complete." in err
    assert (project.root / "saved" / "run" / "result.json").is_file()
    assert len([tag for tag, _ in scalars(project) if tag == "train/loss"]) == 8
    assert len(fake_wandb(kind)) == 1


def test_wandb_that_does_not_start_is_said_before_the_work(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", "init")
    code, _, err = project.run(*QLORA, *WANDB)
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: Weights & Biases does not start: the server is away; log in with wandb login, set "
        "WANDB_MODE=offline in the environment, or set --log_wandb False."
    )
    assert not (project.root / "saved" / "run").exists()


def test_a_damaged_run_id_is_refused(
    project: Project, fake_wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(project, monkeypatch, *SASREC, *WANDB)
    (project.root / "saved" / "run" / ID_FILE).write_text("a/b\n")
    code, _, err = project.run(*SASREC, *WANDB, "--auto_resume", "True")
    assert code == 2
    assert f"{ID_FILE} holds no run id of W&B; remove it" in err.splitlines()[-1]
    assert (project.root / "saved" / "run" / "checkpoints").is_dir()


def test_a_missing_wandb_is_said_at_the_start(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail, whether or not the package is installed.
    monkeypatch.setitem(sys.modules, "wandb", None)
    for more in ((), ("--check", "True")):
        code, out, err = project.run(*SASREC, *WANDB, *more)
        assert code == 2
        assert not out
        (line,) = err.splitlines()
        assert line.startswith("error: log_wandb: True needs the package wandb")
        assert line.endswith("install it with pip install wandb, or set --log_wandb False.")
    assert not (project.root / "saved").exists()
    # What does not train has nothing to log.
    assert project.run("--model", "pop", *WANDB)[0] == 0


def test_a_folder_called_wandb_is_not_the_package(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_wandb(monkeypatch)
    (project.root / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(project.root)])
    code, _, err = project.run(*SASREC, *WANDB)
    assert code == 2
    assert "only a folder of that name was found" in err


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = project.run(*SASREC, *WANDB, "--wandb_project", "mine")
    assert code == 0, err
    assert "Weights & Biases failed" not in err
    folder = project.root / "saved" / "run"
    name = (folder / ID_FILE).read_text().strip()
    assert list(folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))


def test_libraries_deprecations_stay_off_the_terminal_and_ours_do_not() -> None:
    def warned(module: str) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            set_up_logging()
            warnings.warn_explicit("soon gone", FutureWarning, "file.py", 1, module)
        return len(caught)

    assert [warned("transformers.modeling_utils"), warned("torch")] == [0, 0]
    assert [warned("torchmetrics"), warned("hsft.data.cache")] == [1, 1]

"""Interruption, resumption, checkpoints, locks, full disks, lack of GPU memory, NaN."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from hsft.data.dataset import TrainBatch, TrainCollate
from hsft.evaluator.evaluator import Evaluator
from hsft.model.recommender import LossSettings, Recommender
from hsft.run import train_and_rank
from hsft.trainer import loop
from hsft.trainer.checkpoint import (
    Checkpoints,
    DamagedError,
    read_state,
    restore_rng,
    rng_state,
    verify,
    write_state,
)
from hsft.trainer.micro_batch import split_batch
from hsft.trainer.sampler import SequenceBatches
from hsft.trainer.scalars import open_scalars
from hsft.trainer.step import Learner
from hsft.trainer.wandb_log import WandbLog
from hsft.utils.errors import InputError, Interrupted
from hsft.utils.lock import LOCK_FILE
from tests.conftest import Project, last_wins
from tests.decoders import build
from tests.helpers import ROOT, make_llama

RUN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--qlora_dropout", "0.2"),
    *("--optim_args.learning_rate", "1e-2", "--epochs", "2", "--num_threads", "1"),
    *("--negatives", "catalogue", "--run_name", "run"),
)
STEPS = 8  # 30 sequences in batches of 8, two epochs
RESUME = ("--auto_resume", "True")


class Crash(BaseException):
    """Stands for a killed process: nothing in the program catches it."""


def at_step(number: int, action: Callable[[], object]) -> Callable[[Any], Any]:
    """Wrap the loop's `update` to act in the middle of optimizer step `number`, from 1."""
    update = loop.update

    def acting(learner: Learner) -> Any:
        if learner.schedule.last_epoch + 1 == number:
            action()
        return update(learner)

    return acting


def crash() -> None:
    raise Crash


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def folder(project: Project, run: str = "run") -> Path:
    return project.root / "saved" / run


def result(project: Project, run: str = "run") -> dict[str, Any]:
    return dict(json.loads((folder(project, run) / "result.json").read_text()))


def outcome(project: Project, run: str = "run") -> dict[str, Any]:
    found = result(project, run)
    adapter = folder(project, run) / "best/adapter/adapter_model.safetensors"
    return {
        "metrics": [row["metrics"] for row in found["rows"]],
        "history": found["training"]["history"],
        "adapter": adapter.read_bytes(),
    }


def steps_saved(project: Project) -> list[int]:
    saved = Checkpoints(folder(project) / "checkpoints", 2).list()
    return [int(path.name.rpartition("-")[2]) for path in saved]


@pytest.fixture
def undisturbed(project: Project) -> dict[str, Any]:
    """The outcome of `RUN` without interruption."""
    code, _, err = project.run(*RUN, "--run_name", "whole")
    assert code == 0, err
    assert not (folder(project, "whole") / "checkpoints").exists()
    assert result(project, "whole")["training"]["resumed_from"] == []
    return outcome(project, "whole")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_the_run_goes_on_from_there(
    project: Project,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    exit_code: int,
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(3, send(number)))
        code, out, err = project.run(*RUN)
    assert code == exit_code
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith(f"interrupted: stopped by {number.name} after optimizer step 3; ")
    assert "--run_name run --auto_resume True" in line
    assert "Traceback" not in err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert steps_saved(project) == [3]
    (saved,) = Checkpoints(folder(project) / "checkpoints", 2).list()
    before = read_state(saved)["record"]["timings_s"]
    code, _, err = project.run(*RUN)
    assert code == 2
    assert "unfinished" in err.splitlines()[-1]
    code, _, err = project.run(*RUN, *RESUME)
    assert code == 0, err
    assert outcome(project) == undisturbed
    found = result(project)
    assert found["training"]["resumed_from"] == [3]
    assert found["timings_s"]["baseline"] >= before["baseline"]
    assert found["timings_s"]["training"] > before["training"] > 0
    assert not (folder(project) / "checkpoints").exists()


def test_a_second_signal_stops_at_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    monkeypatch.setattr(loop, "update", at_step(3, twice))
    code, _, err = project.run(*RUN, "--checkpoint_every", "2")
    assert code == 130, err
    assert steps_saved(project) == [2]


def test_a_signal_in_an_evaluation_stops_at_once(
    project: Project, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Evaluations of a run: untrained, validation, validation, test.
    rank = Evaluator._rank

    def stopping_at(number: int) -> Callable[..., Any]:
        calls = count()

        def stopping(self: Evaluator, *args: Any) -> Any:
            if next(calls) == number:
                send(signal.SIGINT)()
            return rank(self, *args)

        return stopping

    for stop_at in (0, 1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "_rank", stopping_at(stop_at))
            code, _, err = project.run(*RUN, *RESUME)
        assert code == 130
        if stop_at == 0:
            assert "nothing was saved yet" in err.splitlines()[-1]
            assert not folder(project).exists()
    # The second session went on before the validation of epoch 1, the third before that of epoch
    # 2; in both the untrained model was not evaluated again.
    assert project.run(*RUN, *RESUME)[0] == 0
    assert outcome(project) == undisturbed
    assert result(project)["training"]["resumed_from"] == [4, 8]


def test_a_signal_while_data_is_read_leaves_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = train_and_rank.load_data

    def stopping(*args: Any, **kwargs: Any) -> Any:
        send(signal.SIGTERM)()
        return read(*args, **kwargs)

    monkeypatch.setattr(train_and_rank, "load_data", stopping)
    code, _, err = project.run(*RUN)
    assert code == 143, err
    assert not (project.root / "saved").exists()


def test_a_real_process_holds_the_lock_and_ends_in_order(project: Project) -> None:
    argv = last_wins([*project.arguments, *RUN, "--epochs", "100000"])
    command = [sys.executable, str(ROOT / "code" / "main.py"), *argv, "--stopping_step", "99999"]
    process = subprocess.Popen(command, cwd=project.root, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not steps_saved(project) and time.monotonic() < until:
            time.sleep(0.2)
        code, _, err = project.run("--model", "pop")
        assert code == 2
        assert f"another run (process {process.pid} on {socket.gethostname()})" in err
        assert "--checkpoint_dir" in err.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "stopped by SIGTERM" in err.splitlines()[-1]
    assert "--auto_resume True" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (project.root / "saved" / LOCK_FILE).exists()
    assert Checkpoints(folder(project) / "checkpoints", 2).newest() is not None


def test_a_finished_run_is_not_continued_nor_offered_for_replacement(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "done")[0] == 0
    kept = (project.root / "saved" / "done" / "result.json").read_bytes()
    code, _, err = project.run("--model", "pop", "--run_name", "done", *RESUME)
    assert code == 2
    assert "saved/done is finished, so there is nothing to continue" in err
    assert "overwrite" not in err
    assert (project.root / "saved" / "done" / "result.json").read_bytes() == kept


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    project: Project, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(7, crash))
        with pytest.raises(Crash):
            project.run(*RUN, "--checkpoint_every", "1", "--keep_last", "3")
    assert steps_saved(project) == [4, 5, 6]
    saved = Checkpoints(folder(project) / "checkpoints", 3).list()
    spoil(saved[2] / "weights.safetensors")
    (saved[1] / "state.pt").unlink()
    code, _, err = project.run(*RUN, *RESUME, "--show_progress", "True", "--num_workers", "1")
    assert code == 0, err
    assert f"{saved[2].relative_to(project.root)} is damaged (weights.safetensors" in err
    assert f"{saved[1].relative_to(project.root)} is damaged (state.pt" in err
    assert result(project)["training"]["resumed_from"] == [4]
    assert outcome(project) == undisturbed


@pytest.mark.parametrize("step", [None, 2], ids=["after the baseline", "in training"])
def test_another_user_llm_is_not_continued(
    project: Project, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    shutil.copytree(project.llama, "base")
    run = (*RUN, "--user_pretrain_dir", "base")

    def interrupt(*_: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        if step is None:
            patch.setattr(train_and_rank, "_train_and_evaluate", interrupt)
        else:
            patch.setattr(loop, "update", at_step(step, interrupt))
        assert project.run(*run, "--checkpoint_every", "1")[0] == 130
    make_llama(Path("other"), seed=1)
    shutil.copy("other/model.safetensors", "base")
    code, out, err = project.run(*run, *RESUME)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert "was made with another UserLLM" in line
    assert "in base have changed since" in line
    shutil.copy(project.llama / "model.safetensors", "base")
    assert project.run(*run, *RESUME)[0] == 0


def test_what_cannot_be_continued_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = [word for word in RUN if word not in ("--run_name", "run")]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(2, crash))
        for words in (RUN, unnamed):
            with pytest.raises(Crash):
                project.run(*words, "--checkpoint_every", "1")
    changed = ("--optim_args.learning_rate", "2e-2")
    for words, name in ((RUN, "run"), (unnamed, "tiny-qlora")):
        code, _, err = project.run(*words, *RESUME, *changed)
        assert code == 2
        line = err.splitlines()[-1]
        assert f"saved/{name} has optim_args.learning_rate 0.01, now it is 0.02" in line
    table = project.root / "dataset" / "tiny.csv"
    rows = table.read_text()
    first = rows.splitlines()[1]
    table.write_text(rows.replace(first, "i19" + first[first.index(",") :], 1))
    code, _, err = project.run(*RUN, *RESUME)
    assert code == 2
    assert "other data" in err.splitlines()[-1]
    assert steps_saved(project) == [1]
    table.write_text(rows)
    (path,) = Checkpoints(folder(project) / "checkpoints", 2).list()
    spoil(path / "state.pt")
    code, _, err = project.run(*RUN, *RESUME)
    assert code == 2
    assert "no checkpoint in" in err.splitlines()[-1]
    # The unnamed run is found by itself; a finished run is not continued.
    assert project.run(*unnamed, *RESUME)[0] == 0
    assert result(project, "tiny-qlora")["training"]["resumed_from"] == [1]
    code, _, err = project.run(*RUN, *RESUME, "--run_name", "tiny-qlora")
    assert code == 2
    assert "saved/tiny-qlora is finished" in err.splitlines()[-1]


def test_tensorboard_has_every_step_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, crash))
        with pytest.raises(Crash):
            project.run(*RUN, "--checkpoint_every", "3")
    # The crashed session wrote up to step 4, its last checkpoint; go back to step 3.
    saved = Checkpoints(folder(project) / "checkpoints", 2).list()
    spoil(saved[-1] / "state.pt")
    assert project.run(*RUN, *RESUME)[0] == 0
    events = EventAccumulator(str(folder(project) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("valid/NDCG@10")] == [4, 8]


def test_sessions_of_scalars_are_read_in_their_order(tmp_path: Path) -> None:
    for session in range(3):
        with open_scalars(tmp_path, WandbLog(), 1 if session else None) as scalars:
            scalars.log({"loss": float(session)}, 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_with_the_step_the_users_and_the_last_good_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    forward, collate = Recommender.forward, TrainCollate.__call__
    batches: list[list[str]] = []

    def watched(self: TrainCollate, indices: Any) -> TrainBatch:
        users = self.dataset.segments.users[list(indices)]
        batches.append([str(self.dataset.interactions.user_ids[user]) for user in users])
        return collate(self, indices)

    def poisoned(self: Recommender, batch: TrainBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if len(batches) != 6:
            return loss
        # The root's value at 0 is a number, its slope is none.
        return loss * torch.nan if kind == "loss" else loss + (self.logit_scale[0] * 0).sqrt()

    monkeypatch.setattr(TrainCollate, "__call__", watched)
    monkeypatch.setattr(Recommender, "forward", poisoned)
    code, out, err = project.run(*RUN, "--checkpoint_every", "1")
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert f"the {kind} became NaN or infinite in optimizer step 6 (epoch 2, batch 2, " in line
    assert f"users {', '.join(batches[5][:5])} and 3 more)" in line
    assert "--optim_args.learning_rate" in line
    assert "Traceback" not in err
    saved = Checkpoints(folder(project) / "checkpoints", 2)
    newest = saved.newest()
    assert newest is not None
    assert f"the last good checkpoint is {newest.relative_to(project.root)}" in line
    assert newest.name.endswith("-step-5")
    assert all(value.isfinite().all() for value in saved.load(newest).weights.values())


def out_of_memory_above(rows: int) -> Callable[[Recommender, TrainBatch], torch.Tensor]:
    forward = Recommender.forward

    def failing(self: Recommender, batch: TrainBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if len(batch.history) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    return failing


def test_out_of_memory_halves_the_batch_once_told(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without dropout both ways of computing a step are the same up to rounding.
    for name, rows in (("split", 2), ("plain", 99)):
        with monkeypatch.context() as patch:
            patch.setattr(Recommender, "forward", out_of_memory_above(rows))
            more = ("--run_name", name, "--qlora_dropout", "0")
            code, _, err = project.run(*RUN, *more)
        assert code == 0, err
        assert err.count("CUDA ran out of memory in optimizer step 1") == (2 if rows == 2 else 0)
    assert result(project, "split")["training"]["micro_batch"] == 2
    assert result(project, "plain")["training"]["micro_batch"] is None
    for one, other in zip(
        outcome(project, "split")["history"], outcome(project, "plain")["history"], strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_out_of_memory_with_one_sequence_is_one_clear_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "forward", out_of_memory_above(0))
        code, _, err = project.run(*RUN)
    assert code == 2
    assert "with a single sequence" in err.splitlines()[-1]
    assert not folder(project).exists()

    def failing(self: Evaluator, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Evaluator, "run", failing)
    code, _, err = project.run("--val_only", "True")
    assert code == 2
    assert "lower --eval_batch_size" in err.splitlines()[-1]


NCE = LossSettings("nce", "sampled", 0.99, 1 << 28, "cosine")


@pytest.mark.parametrize(
    "settings",
    [
        NCE,
        replace(NCE, negatives="catalogue"),
        replace(NCE, loss="bce", similarity="dot"),
    ],
    ids=["nce sampled", "nce catalogue", "bce sampled"],
)
def test_a_split_batch_has_the_whole_batch_s_gradient(llama: Path, settings: LossSettings) -> None:
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0], [3, 0, 0, 0], [2, 9, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0], [8, 9, 1, 0], [5, 0, 0, 0], [9, 3, 0, 0]])
    # Some are targets too: bce leaves those pairs out.
    negatives = torch.tensor([[8, 8], [4, 11], [12, 9], [13, 14], [15, 8]])
    batch = TrainBatch(history, history > 0, targets, history > 0, negatives)
    gradients = []
    for rows in (None, 2):
        model = build(llama, settings=settings, adapter="linear")
        for part in split_batch(batch, rows, settings):
            (model(part.batch) * part.weight).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-7)


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the options given; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no tmpfs can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(
    project: Project,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("size=80m")
    where = ("--checkpoint_dir", str(disk), "--checkpoint_every", "2")
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(1 << 16))
            except OSError:
                pass

    for step in (1, 3, 6):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "update", at_step(step, fill))
            code, out, err = project.run(*RUN, *where, *RESUME)
        assert code == 2, err
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith(f"error: cannot write {disk / 'run'}")
        assert "No space left on device" in line
        assert "Traceback" not in err
        filler.unlink()
        saved = Checkpoints(disk / "run" / "checkpoints", 2).list()
        assert bool(saved) == (step > 1)
        for path in saved:
            verify(path)
        assert not [p for p in disk.rglob(".*") if p.suffix == ".tmp"]
    # The very start of a run on a disk that is full already.
    fill()
    code, _, err = project.run(*RUN, *where, "--run_name", "other")
    assert code == 2
    assert "free some space" in err.splitlines()[-1]
    assert {path.name for path in disk.iterdir()} == {"filler", "run"}
    filler.unlink()
    code, _, err = project.run(*RUN, *where, *RESUME)
    assert code == 0, err
    found = json.loads((disk / "run" / "result.json").read_text())
    assert [row["metrics"] for row in found["rows"]] == undisturbed["metrics"]
    assert found["training"]["history"] == undisturbed["history"]


def test_a_read_only_folder_is_one_clear_line(
    project: Project, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("ro")
    for where in (disk, disk / "new"):
        code, out, err = project.run("--model", "pop", "--checkpoint_dir", str(where))
        assert code == 2
        assert out == ""
        line = err.splitlines()[-1]
        assert str(where) in line
        assert "not writable" in line
        assert "Traceback" not in err


def test_order_of_batches_is_taken_up_in_the_middle() -> None:
    import numpy as np

    lengths = np.arange(1, 24)
    for grouped in (False, True):
        batches = SequenceBatches(lengths, 4, 3, group_by_length=grouped)
        batches.epoch = 2
        whole = list(batches)
        assert [batches.samples(number) for number in range(len(batches))] == whole
        batches.start_batch = 4
        assert list(batches) == whole[4:]


def test_state_comes_back_with_its_types(tmp_path: Path) -> None:
    state = {
        "numbers": [1, 0.1, 1e-300, float("-inf"), True, None, "text"],
        "nested": {0: {"step": torch.tensor(3.0)}, 7: (torch.arange(3), (0.9, 0.999))},
    }
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert found["numbers"] == state["numbers"]
    assert [type(value) for value in found["numbers"]] == [type(v) for v in state["numbers"]]
    assert found["nested"].keys() == {0, 7}
    assert torch.equal(found["nested"][0]["step"], torch.tensor(3.0))
    numbers, betas = found["nested"][7]
    assert torch.equal(numbers, torch.arange(3))
    assert betas == (0.9, 0.999)
    write_state(tmp_path, {"model": Path("anything but plain data")})
    with pytest.raises(DamagedError, match="state is unreadable"):
        read_state(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 2)
    path = store.save(1, {"w": torch.ones(1)}, {"best": None})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(InputError, match=r"another version of HSFT \(format 1, this one reads 2\)"):
        store.newest()
    assert path.is_dir()


def test_every_generator_comes_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[Any]:
        normal = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), normal, torch.rand(3).tolist()]

    device = torch.device("cpu")
    draw()  # leaves half a pair of normal deviates in Python's and numpy's generators
    write_state(tmp_path, rng_state(device))
    wanted = draw()
    assert draw() != wanted
    restore_rng(read_state(tmp_path), device)
    assert draw() == wanted


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[torch.nn.Parameter, Any]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        make_optimizer = torch.optim.AdamW if kind == "adamw" else bnb.optim.AdamW8bit
        return weight, make_optimizer([weight], lr=1e-2)

    def steps(weight: torch.nn.Parameter, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(number))
            optimizer.step()

    weight, optimizer = make()
    steps(weight, optimizer, range(3))
    write_state(tmp_path, {"optimizer": optimizer.state_dict()})
    middle = weight.detach().clone()
    steps(weight, optimizer, range(3, 6))
    if kind == "adamw8bit":
        assert optimizer.state[weight]["state1"].dtype == torch.uint8
    other, fresh = make()
    fresh.load_state_dict(read_state(tmp_path)["optimizer"])
    with torch.no_grad():
        other.copy_(middle)
    steps(other, fresh, range(3, 6))
    assert torch.equal(other, weight)


def test_going_back_takes_the_model_that_was_best_then(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", 2)
    names = {}
    for step in (1, 2, 3, 4):
        if step in (1, 3, 4):
            text = f"best of {step}"

            def write(folder: Path, text: str = text) -> None:
                folder.mkdir()
                (folder / "model").write_text(text)

            best = store.save_best(step, write)
        names[step] = best
        store.save(step, {"w": torch.tensor([float(step)])}, {"best": best})
    assert [path.name for path in store.list()] == ["000003-step-3", "000004-step-4"]
    assert not store.best_path(names[1]).exists()
    spoil(store.best_path(names[4]) / "model")
    newest = store.newest()
    assert newest is not None
    assert newest.name == "000003-step-3"
    store.publish_best(store.load(newest).state["best"], tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "best of 3"
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model"]
    assert load_file(newest / "weights.safetensors")["w"] == 3

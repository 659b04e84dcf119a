"""Runs that are interrupted go on where they stopped, with the numbers of one that was not."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hsft.evaluator.evaluator import Evaluator
from hsft.run import train_and_rank
from hsft.trainer import loop
from hsft.trainer.checkpoint import (
    Checkpoints,
    read_state,
)
from hsft.utils.errors import Interrupted
from hsft.utils.lock import LOCK_FILE
from tests.conftest import Project, last_wins
from tests.helpers import ROOT, make_llama
from tests.training_runs import (
    RESUME,
    RUN,
    Crash,
    at_step,
    crash,
    folder,
    outcome,
    result,
    send,
    spoil,
    steps_saved,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


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
    actual = result(project)
    assert actual["training"]["resumed_from"] == [3]
    assert actual["timings_s"]["baseline"] >= before["baseline"]
    assert actual["timings_s"]["training"] > before["training"] > 0
    assert not (folder(project) / "checkpoints").exists()


def test_a_new_run_beside_an_unfinished_one_says_so(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = [word for word in RUN if word not in ("--run_name", "run")]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(3, send(signal.SIGTERM)))
        assert project.run(*unnamed)[0] == 143
        # The run is interrupted again, as its numbers are not looked at.
        patch.setattr(loop, "update", at_step(1, send(signal.SIGTERM)))
        code, _, err = project.run(*unnamed)
    assert code == 143
    assert "saved/tiny-qlora is an unfinished run; this command starts another one" in err
    assert "--run_name tiny-qlora --auto_resume True" in err
    assert "run folder: saved/tiny-qlora-2" in err


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
            patch.setattr(train_and_rank, "_train_and_evaluate_model", interrupt)
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

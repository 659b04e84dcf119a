"""The live display: rates, time left, a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
import torch

from hsft.utils import progress
from hsft.utils.logs import set_up_logging
from hsft.utils.progress import Meter, format_bytes

CPU = torch.device("cpu")


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
    # Written through the display, which draws its bar again below the line.
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


def test_sizes_are_written_with_their_unit() -> None:
    assert format_bytes(310 << 20) == "310 MiB"
    assert format_bytes(3 << 29) == "1.5 GiB"

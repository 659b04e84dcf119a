"""SIGINT and SIGTERM as an orderly end of a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from hsft.utils.distributed import all_gather
from hsft.utils.errors import EXIT_SIGINT, EXIT_SIGTERM, Interrupted

_EXIT_CODES = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


class StopSignals(ExitStack):
    """Turns SIGINT and SIGTERM into `Interrupted` for the length of a `with` block.

    Ordinarily the exception is raised where the program stands. Within `deferred()` the first
    signal is only noted in `received`, so that the work at hand can be finished and saved; a
    second one raises at once. Within `held_back()` all of them wait. Handlers are set in the main
    thread only and put back at the end.

    Attributes:
        received: number of the first signal, 0 when there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0
        self._deferring = False
        self._holding = False
        self._held = 0
        self._pid = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES:
                # None stands for a handler that was not set from Python.
                handler = signal.signal(number, self._handle) or signal.SIG_DFL
                self.callback(signal.signal, number, handler)
        return self

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal within this block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let all signals wait until the end of this block, which has to be short.

        One Ctrl-C under torchrun is several signals: the terminal's and those of the launcher.

        Raises:
            Interrupted: at the end of the block, when a signal came within it.
        """
        # Within another such block, the outer one raises.
        outer, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = outer
        if self._held and not outer:
            number, self._held = self._held, 0
            raise self.interruption(number)

    def interruption(self, number: int | None = None, done: str = "") -> Interrupted:
        """Make the exception for a signal, the one received when no number is given.

        Args:
            number: signal number.
            done: what to say after "stopped by SIGTERM".
        """
        name = signal.Signals(number or self.received)
        return Interrupted(f"stopped by {name.name}{done}", _EXIT_CODES[name])

    def raise_if_received(self, done: str = "") -> None:
        """End every process of the run if one of them has received a signal. Collective.

        Raises:
            Interrupted: `done` is what to say after "stopped by SIGTERM".
        """
        received = max(all_gather(self.received))
        if received:
            raise self.interruption(received, done)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker. Ctrl-C reaches the whole process group, but it is for the main
            # process to end its workers, which it does with SIGTERM.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._holding:
            self.received = self.received or number
            self._held = self._held or number
            return
        again = self.received != 0
        self.received = self.received or number
        if again or not self._deferring:
            raise self.interruption(number)

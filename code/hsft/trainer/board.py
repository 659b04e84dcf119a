"""TensorBoard's scalars, written by this process alone."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
    Event,
    SessionLog,
)
from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
    RecordWriter,
)
from torch.utils.tensorboard.summary import scalar

from hsft.utils.files import cannot_write

SECONDS_BETWEEN_FLUSHES = 60.0


class Board:
    """Appends scalars to a TensorBoard folder.

    torch's SummaryWriter writes from a thread of its own, which prints a traceback when the disk is
    full; here an error reaches the caller, as one line.

    Args:
        folder: the folder of event files; a new file is added.
        first_step: values of this step and later that earlier files hold are hidden by TensorBoard
            (a crashed session got further than its last checkpoint); None for a new run.
        enabled: False writes nothing, for the processes after the first.

    Raises:
        InputError: the file cannot be written (from every method).
    """

    def __init__(self, folder: Path, first_step: int | None, *, enabled: bool = True) -> None:
        self.folder = folder
        self._writer: RecordWriter | None = None
        if not enabled:
            return
        # TensorBoard reads files in the order of their names, which begin with the time in seconds.
        now = max(int(time.time()), 1 + _newest(folder))
        name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.0"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((folder / name).open("wb"))
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._flushed = time.monotonic()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=first_step, session_log=start))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Append one value."""
        if self._writer is None:
            return
        self._add(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the system."""
        if self._writer is None:
            return
        self._flushed = time.monotonic()
        try:
            self._writer.flush()
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as failure:
            # The first error is the one to tell.
            if error is None:
                raise cannot_write(self.folder, failure) from failure

    def _add(self, event: Event) -> None:
        assert self._writer is not None
        try:
            self._writer.write(event.SerializeToString())
        except OSError as error:
            raise cannot_write(self.folder, error) from error


def _newest(folder: Path) -> int:
    times = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*.*")]
    return max((int(text) for text in times if text.isdigit()), default=0)

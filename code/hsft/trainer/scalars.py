"""The training's scalars, in TensorBoard's files and at experiment trackers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from hsft.trainer.tracker import Tracker
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import InputError
from hsft.utils.files import cannot_write


class Scalars:
    """Takes the values of a training; in processes after the first it does nothing.

    Args:
        folder: of TensorBoard's event files, for errors.
        writer: writes these files; None in processes after the first.
        trackers: get the same values.
    """

    def __init__(
        self, folder: Path, writer: SummaryWriter | None, trackers: Sequence[Tracker]
    ) -> None:
        self._folder, self._writer, self._trackers = folder, writer, trackers

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of one optimizer step.

        Raises:
            InputError: TensorBoard's files cannot be written.
        """
        with self._reported():
            for tag, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(tag, value, step)
        for tracker in self._trackers:
            tracker.add_scalars(values, step)

    def flush(self) -> None:
        """Write TensorBoard's files up to the last value.

        Raises:
            InputError: they cannot be written.
        """
        with self._reported():
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        """Write and close TensorBoard's files.

        Raises:
            InputError: they cannot be written.
        """
        with self._reported():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._folder, error) from error


@contextmanager
def open_scalars(
    folder: Path, trackers: Sequence[Tracker], purge_step: int | None
) -> Iterator[Scalars]:
    """Open the scalars of one session of a run.

    Args:
        folder: of TensorBoard's event files; a new file is added.
        trackers: get the same values.
        purge_step: TensorBoard hides what earlier files hold for this step and later ones (a killed
            session got further than its last checkpoint); None for a new run.

    Raises:
        InputError: the file cannot be created.
    """
    if not is_rank_zero():
        yield Scalars(folder, None, trackers)
        return
    with _quiet_writer_thread():
        try:
            writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=60)
        except OSError as error:
            raise cannot_write(folder, error) from error
        scalars = Scalars(folder, writer, trackers)
        try:
            yield scalars
        except BaseException:
            # The first error is the one to report.
            with suppress(InputError):
                scalars.close()
            raise
        scalars.close()


@contextmanager
def _quiet_writer_thread() -> Iterator[None]:
    """Print no traceback when the writer's thread fails: the writer's next call raises the error."""
    plain = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            plain(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = plain

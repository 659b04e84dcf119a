"""The processes of one run under torchrun: which one this is, and what they tell each other."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from hsft.utils.errors import InputError
from hsft.utils.torchrun import world_size

T = TypeVar("T")

# How long a process waits for another one inside a collective operation. torchrun ends all
# processes as soon as one of them dies; this is for one that is alive and does not answer. It has
# to be longer than anything that one process does alone, such as writing a large model.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """The processes that have joined one process group; a single one without a group.

    Every method is collective: all processes call it, in the same order.

    Attributes:
        rank: this process's number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Return the processes of the group that this one is in."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the value that process `source` passed."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their numbers."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def agreed(self, make: Callable[[], T]) -> T:
        """Run `make` in every process and return its result.

        Raises:
            InputError: what the first process to fail raised, in every process.
        """
        value: T | None = None
        problem: str | None = None
        try:
            value = make()
        except InputError as error:
            problem = str(error)
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise InputError(problems[0])
        return value  # type: ignore[return-value]

    def on_first(self, make: Callable[[], T]) -> T:
        """Let process 0 alone run `make` and return its result in every process.

        Raises:
            InputError: what `make` raised, in every process.
        """
        if self.size == 1:
            return make()
        value: T | None = None
        problem: str | None = None
        if self.first:
            try:
                value = make()
            except InputError as error:
                problem = str(error)
        value, problem = self.broadcast((value, problem))
        if problem is not None:
            raise InputError(problem)
        return value  # type: ignore[return-value]


def join_processes(timeout: timedelta = TIMEOUT) -> Processes:
    """Join the processes that torchrun started, for messages between their CPUs (gloo).

    Without torchrun there is one process; a group that exists already is used as it is. The group
    lasts until the program ends, since torchrun's store cannot set up a second one.

    Args:
        timeout: how long one process waits for another.
    """
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
        atexit.register(_leave)
    return Processes.here()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error: BaseException) -> bool:
    """Say whether an exception means that another process of the group has gone or is silent."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    # gloo raises plain RuntimeErrors that name its source files.
    return isinstance(error, RuntimeError) and "gloo" in str(error)

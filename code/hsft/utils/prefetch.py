"""The next piece of work prepared while the device computes this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], ahead: int = 1) -> Generator[T]:
    """Yield what an iterable gives, in its order, taken from it in a thread.

    It pays where the caller waits for a GPU or launches kernels, and preparing is NumPy's and
    torch's work, during which they do not hold the interpreter. What the iterable raises is raised
    here, at its turn.

    Args:
        items: read by the thread alone.
        ahead: items taken before they are asked for.
    """
    iterator = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as worker:
        waiting = deque(worker.submit(next, iterator, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(worker.submit(next, iterator, end))
            yield item

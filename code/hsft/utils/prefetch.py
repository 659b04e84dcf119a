"""The next piece of work prepared while the device computes this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def prefetch(
    items: Iterable[T], device: torch.device | None = None, ahead: int = 1
) -> Generator[T]:
    """Yield what an iterable gives, in its order, taken from it in a thread.

    It pays where the caller waits for a GPU or launches kernels, and preparing is NumPy's and
    torch's work, during which they do not hold the interpreter. What the iterable raises is raised
    here, at its turn.

    Args:
        items: read by the thread alone.
        device: the thread's current GPU, where it is one: pinning memory would otherwise set up the
            first one in every process.
        ahead: items taken before they are asked for.
    """
    iterator = iter(items)
    end: Any = object()

    def choose() -> None:
        if device is not None and device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=choose) as worker:
        waiting = deque(worker.submit(next, iterator, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(worker.submit(next, iterator, end))
            yield item

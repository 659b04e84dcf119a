"""Compute requests that wait together: one call for all of them, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from hsft.utils.errors import InputError


class Unavailable(InputError):
    """The server cannot answer now; the same request can succeed later."""


Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Batcher(Generic[Asked, Answer]):
    """Collects requests while one batch is computed, and computes them as the next batch.

    A request that comes alone starts at once; none waits for others to come. Where a batch fails,
    its requests are computed one by one, so that one that cannot be computed fails alone.

    Args:
        compute: returns an answer for each of several requests.
        largest: requests in a batch at most.
        on_batch: called after each batch with the number of its requests and its seconds.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Asked]], Sequence[Answer]],
        largest: int,
        on_batch: Callable[[int, float], None] = lambda requests, seconds: None,
    ) -> None:
        self._compute, self._largest, self._on_batch = compute, largest, on_batch
        self._waiting: deque[tuple[Asked, Future[Answer]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def ask(self, request: Asked) -> Answer:
        """Return the answer to a request, after waiting for it.

        Raises:
            Unavailable: the server ends; or whatever `compute` raises for it.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._closed:
                raise _ending()
            self._waiting.append((request, future))
            self._changed.notify()
        return future.result()

    @property
    def waiting(self) -> int:
        """Number of requests that no batch has taken yet."""
        return len(self._waiting)

    def close(self, seconds: float) -> bool:
        """Refuse what waits and what comes, and wait for the batch that is computed.

        Returns:
            Whether it has ended; False after that many seconds.
        """
        with self._changed:
            self._closed = True
            refused = [future for _, future in self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for future in refused:
            future.set_exception(_ending())
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next():
            began = time.perf_counter()
            self._answer(batch)
            self._on_batch(len(batch), time.perf_counter() - began)

    def _next(self) -> list[tuple[Asked, Future[Answer]]]:
        """Wait for requests and take them; none once closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            count = min(self._largest, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _answer(self, batch: Sequence[tuple[Asked, Future[Answer]]]) -> None:
        try:
            answers = self._compute([request for request, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)


def _ending() -> Unavailable:
    return Unavailable("the server is ending; send the request again once it is back.")

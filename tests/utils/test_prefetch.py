"""Work prepared ahead in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hsft.utils.prefetch import prefetch


def test_items_come_in_order_and_one_ahead() -> None:
    taken: list[int] = []
    third = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(4):
            assert threading.current_thread() is not threading.main_thread()
            taken.append(number)
            if number == 1:
                third.set()
            yield number

    stream = prefetch(numbers())
    assert next(stream) == 0
    # The next one is taken while this one is used.
    assert third.wait(10)
    assert list(stream) == [1, 2, 3]
    assert taken == [0, 1, 2, 3]
    assert list(prefetch([])) == []


def test_what_is_raised_comes_at_its_turn() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("no second number")

    stream = prefetch(numbers())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="no second number"):
        next(stream)


def test_a_stream_that_is_closed_takes_no_more() -> None:
    numbers = iter(range(100))
    stream = prefetch(numbers)
    next(stream)
    stream.close()
    assert next(numbers) <= 2
    assert not any("prefetch" in thread.name for thread in threading.enumerate())

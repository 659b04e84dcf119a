"""Columns of numbers and texts that are read block by block: in memory, or in files where they are
too large."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from hsft.utils.files import cannot_write, free_bytes

log = logging.getLogger(__name__)

# Tables above this are not held in memory.
LARGE_BYTES = 512 << 20
# Bytes on disk for each byte of a CSV, at most: short ids take more as numbers.
_DISK_FACTOR = 2
# Texts that are in memory at a time.
TEXTS_AT_A_TIME = 4096
# Rows that are worked on at a time.
ROWS_AT_ONCE = 1 << 20
# Histories whose rows are.
SAMPLES_AT_ONCE = 1 << 16
# Bits by which numbers are told apart in a pass of `kth_smallest`.
_BITS_OF_A_PASS = 16


class Column:
    """Numbers in the order in which blocks of them were added.

    Args:
        dtype: their type.
        folder: where they are kept, in a file without a name that is gone with the last reference to
            it; None: in memory.

    Raises:
        InputError: the file cannot be written, as for all that follows.
    """

    def __init__(self, dtype: type | np.dtype, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._folder = folder
        self._shapes: list[tuple[int, ...]] = []
        self._parts: list[np.ndarray] = []
        with _writing(folder):
            self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._shapes)

    def append(self, block: np.ndarray) -> None:
        """Add a block, of any shape."""
        block = np.ascontiguousarray(block, dtype=self.dtype)
        self._shapes.append(block.shape)
        if self._file is None:
            self._parts.append(block)
        else:
            with _writing(self._folder):
                self._file.write(block.data)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the blocks as they were added."""
        if self._file is None:
            yield from self._parts
            return
        flat, begin = self.whole(), 0
        for shape in self._shapes:
            end = begin + int(np.prod(shape))
            yield flat[begin:end].reshape(shape)
            begin = end

    def whole(self) -> np.ndarray:
        """Return all numbers: [N], of a file mapped into memory."""
        if self._file is None:
            empty = np.empty(0, self.dtype)
            return np.concatenate([empty, *(part.reshape(-1) for part in self._parts)])
        with _writing(self._folder):
            self._file.flush()
        count = sum(int(np.prod(shape)) for shape in self._shapes)
        return _mapped(self._file, count, self.dtype)


class MappedTexts(Sequence[str]):
    """Texts in a file without a name, mapped into memory; each is decoded when it is asked for.

    Args:
        data: uint8 [bytes], the texts in UTF-8.
        begins: int64 [n], where each text begins in `data`.
        ends: int64 [n], where it ends; texts may share bytes.
    """

    def __init__(self, data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        self._data, self._begins, self._ends = data, begins, ends

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            return self._decode(int(self._begins[index]), int(self._ends[index]))
        bounds = zip(self._begins[index].tolist(), self._ends[index].tolist(), strict=True)
        return [self._decode(begin, end) for begin, end in bounds]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), TEXTS_AT_A_TIME):
            yield from self[start : start + TEXTS_AT_A_TIME]

    def take(self, rows: np.ndarray) -> MappedTexts:
        """Return the texts of some rows, copying none: int64 [m], -1 for an empty text."""
        begins, ends = (np.append(bounds, 0)[rows] for bounds in (self._begins, self._ends))
        return MappedTexts(self._data, begins, ends)

    def _decode(self, begin: int, end: int) -> str:
        return self._data[begin:end].tobytes().decode("utf-8", "surrogatepass")


def keep_texts(texts: Iterable[str], folder: Path | None) -> Sequence[str]:
    """Keep texts in memory, or in a file without a name.

    Args:
        texts: are asked for one by one.
        folder: of the file; None: a list is returned.

    Raises:
        InputError: the file cannot be written.
    """
    if folder is None:
        return list(texts)
    lengths = Column(np.int64)
    rest = iter(texts)
    data = Column(np.uint8, folder)
    while block := [
        text.encode("utf-8", "surrogatepass") for text in islice(rest, TEXTS_AT_A_TIME)
    ]:
        lengths.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
        data.append(np.frombuffer(b"".join(block), dtype=np.uint8))
    ends = np.cumsum(lengths.whole())
    return MappedTexts(data.whole(), ends - lengths.whole(), ends)


def empty_column(count: int, dtype: type | np.dtype | str, folder: Path | None) -> np.ndarray:
    """Return an array to be set: [count].

    Args:
        count: its length.
        dtype: type of its numbers, or of texts.
        folder: where it is kept, in a file without a name; None: in memory.

    Raises:
        InputError: the file cannot be written.
    """
    dtype = np.dtype(dtype)
    if folder is None:
        return np.empty(count, dtype)
    size = max(1, count * dtype.itemsize)
    with _writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        # A page that finds no room on the disk ends the process: the room is taken first.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        # The mapping keeps the file.
        return _mapped(file, count, dtype)


def offsets_of(counts: np.ndarray, folder: Path | None) -> np.ndarray:
    """Return where each one's rows begin, given how many it has: int64 [n] -> int64 [n + 1]."""
    offsets = empty_column(len(counts) + 1, np.int64, folder)
    offsets[0] = 0
    np.cumsum(counts, out=offsets[1:])
    return offsets


@contextmanager
def _writing(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = Path(tempfile.gettempdir()) if folder is None else folder
        raise cannot_write(where / "a temporary file", error) from error


def slices(count: int, size: int | None = None) -> Iterator[slice]:
    """Yield the slices of so many entries, `ROWS_AT_ONCE` or `size` at a time."""
    size = ROWS_AT_ONCE if size is None else size
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def user_ranges(offsets: np.ndarray) -> Iterator[slice]:
    """Yield ranges of users with up to `ROWS_AT_ONCE` rows, or of one user with more.

    Args:
        offsets: int64 [U + 1]; user u has rows `offsets[u]` to `offsets[u + 1]`.
    """
    begin, count = 0, len(offsets) - 1
    while begin < count:
        reached = int(np.searchsorted(offsets, offsets[begin] + ROWS_AT_ONCE, side="right"))
        end = min(max(reached - 1, begin + 1), count, begin + ROWS_AT_ONCE)
        yield slice(begin, end)
        begin = end


def texts_in_blocks(texts: np.ndarray | Sequence[str]) -> Iterator[list[str]]:
    """Yield texts as Python's, `TEXTS_AT_A_TIME` at a time."""
    for part in slices(len(texts), TEXTS_AT_A_TIME):
        block = texts[part]
        yield block.tolist() if isinstance(block, np.ndarray) else list(block)


def count_less(values: np.ndarray, bound: int) -> int:
    """Return how many values are below a bound; one that is not to be represented is no error."""
    return sum(int(np.count_nonzero(values[part] < bound)) for part in slices(len(values)))


def kth_smallest(values: np.ndarray, rank: int) -> int:
    """Return the value that `np.sort(values)` has at a rank, copying few of them.

    Values are counted by their highest bits, then those with the right ones by the next, until few
    are left.

    Args:
        values: int64 [N].
        rank: 0 to N - 1.
    """
    lowest = int(values.min())
    span, count = int(values.max()) - lowest, len(values)

    def within() -> Iterator[np.ndarray]:
        for part in slices(len(values)):
            # Differences of 64-bit integers wrap around to the right number without a sign.
            above = values[part].view(np.uint64) - np.uint64(lowest % (1 << 64))
            yield above[above <= np.uint64(span)]

    while count > ROWS_AT_ONCE and span:
        shift = max(0, span.bit_length() - _BITS_OF_A_PASS)
        counts = np.zeros((span >> shift) + 1, dtype=np.int64)
        for above in within():
            counts += np.bincount(
                (above >> np.uint64(shift)).astype(np.int64), minlength=len(counts)
            )
        ends = np.cumsum(counts)
        bin_of_rank = int(np.searchsorted(ends, rank, side="right"))
        count = int(counts[bin_of_rank])
        rank -= int(ends[bin_of_rank]) - count
        begin = bin_of_rank << shift
        lowest, span = lowest + begin, min(span - begin, (1 << shift) - 1)
    if not span:
        return lowest
    return lowest + int(np.partition(np.concatenate(list(within())), rank)[rank])


def _mapped(file: Any, count: int, dtype: np.dtype) -> np.ndarray:
    if not count:
        # Nothing can be mapped of an empty file.
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r+", shape=(count,)).view(np.ndarray)


def folder_for_blocks(path: Path, size: int | None = None) -> Path | None:
    """Return where the columns of a table are kept while it is read, None where memory holds them.

    Args:
        path: the table. A large one's columns are kept in its folder, or where temporary files are.
        size: bytes that it has as CSV; None: those of the file.
    """
    if size is None:
        size = path.stat().st_size
    if size < LARGE_BYTES:
        return None
    for folder in (path.absolute().parent, Path(tempfile.gettempdir())):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
            if free_bytes(folder) > _DISK_FACTOR * size:
                return folder
        except OSError:
            continue
    log.warning(
        "%s is read into memory: neither its folder nor that of temporary files has %.1f GiB free.",
        path,
        _DISK_FACTOR * size / 2**30,
    )
    return None


def order_rows(users: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Return the order of rows by user, then time, then position: int64 [N].

    Args:
        users: integers [N], not negative.
        timestamps: int64 [N].
    """
    first, last = int(timestamps.min()), int(timestamps.max())
    span = last - first + 1
    if span * (int(users.max()) + 1) >= 1 << 63:
        return np.lexsort((timestamps, users))
    # One integer a row, and torch's radix sort: six times as fast as lexsort.
    keys = users.astype(np.int64) * span + (timestamps - first)
    return torch.sort(torch.from_numpy(keys), stable=True).indices.numpy()


def sort_rows(
    users: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray,
    offsets: np.ndarray,
    folder: Path,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows by user, then time, then position, with few of them in memory.

    Rows are first brought to the range of users that they belong to, then each range is sorted. A
    range has about `ROWS_AT_ONCE` rows, if no user has more.

    Args:
        users: int32 [N].
        items: int32 [N].
        timestamps: int64 [N].
        offsets: int64 [U + 1]; user u gets rows `offsets[u]` to `offsets[u + 1]`.
        folder: where the result is kept.
        order: int64 [N], row numbers; equal users and times stay in this order. None: that of the rows.

    Returns:
        int32 [N] items and int64 [N] timestamps, sorted.
    """
    ends, count = offsets[1:], len(users)
    # The last user of a range is the one in which it reaches its size.
    last = np.searchsorted(ends, np.arange(ROWS_AT_ONCE, count + ROWS_AT_ONCE, ROWS_AT_ONCE))
    last = np.unique(np.minimum(last, len(ends) - 1))
    range_ends = ends[last]
    free = np.concatenate([[0], range_ends[:-1]])
    # Sorted by radix where there are few ranges.
    number_type = np.min_scalar_type(len(last))
    sorted_users, sorted_items = (empty_column(count, np.int32, folder) for _ in range(2))
    sorted_times = empty_column(count, np.int64, folder)
    for part in slices(count):
        rows = part if order is None else order[part]
        columns = [column[rows] for column in (users, items, timestamps)]
        range_of = np.searchsorted(last, columns[0]).astype(number_type)
        by_range = np.argsort(range_of, kind="stable")
        sizes = np.bincount(range_of, minlength=len(last))
        columns = [column[by_range] for column in columns]
        taken = 0
        for number in np.flatnonzero(sizes).tolist():
            to = slice(free[number], free[number] + sizes[number])
            piece = slice(taken, taken + sizes[number])
            for target, column in zip(
                (sorted_users, sorted_items, sorted_times), columns, strict=True
            ):
                target[to] = column[piece]
            taken += int(sizes[number])
        free += sizes
    begin = 0
    for end in range_ends.tolist():
        rows = slice(begin, end)
        times = np.array(sorted_times[rows])
        by_time = order_rows(sorted_users[rows], times)
        sorted_times[rows] = times[by_time]
        sorted_items[rows] = np.array(sorted_items[rows])[by_time]
        begin = end
    return sorted_items, sorted_times

"""Columns of numbers and texts that are read block by block: in memory, or in files where they are
too large."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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


class Column:
    """Numbers in the order in which blocks of them were added.

    Args:
        dtype: their type.
        folder: where they are kept, in a file without a name that is gone with the last reference to
            it; None: in memory.
    """

    def __init__(self, dtype: type | np.dtype, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._shapes: list[tuple[int, ...]] = []
        self._parts: list[np.ndarray] = []
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
            return np.concatenate([part.reshape(-1) for part in self._parts])
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
    try:
        data = Column(np.uint8, folder)
        while block := [
            text.encode("utf-8", "surrogatepass") for text in islice(rest, TEXTS_AT_A_TIME)
        ]:
            lengths.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
            data.append(np.frombuffer(b"".join(block), dtype=np.uint8))
        whole = data.whole()
    except OSError as error:
        raise cannot_write(folder / "a temporary file", error) from error
    ends = np.cumsum(lengths.whole())
    return MappedTexts(whole, ends - lengths.whole(), ends)


def empty_column(count: int, dtype: type, folder: Path) -> np.ndarray:
    """Return an array of numbers to be set, in a file without a name: [count]."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(max(1, count * np.dtype(dtype).itemsize))
        # The mapping keeps the file.
        return _mapped(file, count, np.dtype(dtype))


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
    counts: np.ndarray,
    folder: Path,
    rows_at_once: int = 1 << 22,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows by user, then time, then position, with few of them in memory.

    Rows are first brought to the range of users that they belong to, then each range is sorted.

    Args:
        users: int32 [N].
        items: int32 [N].
        timestamps: int64 [N].
        counts: int64 [U], rows of each user.
        folder: where the result is kept.
        rows_at_once: rows of a range, if no user has more.

    Returns:
        int32 [N] items and int64 [N] timestamps, sorted.
    """
    ends = np.cumsum(counts)
    # The last user of a range is the one in which it reaches its size.
    last = np.searchsorted(ends, np.arange(rows_at_once, ends[-1] + rows_at_once, rows_at_once))
    last = np.unique(np.minimum(last, len(counts) - 1))
    range_ends = ends[last]
    free = np.concatenate([[0], range_ends[:-1]])
    count = len(users)
    sorted_users, sorted_items = (empty_column(count, np.int32, folder) for _ in range(2))
    sorted_times = empty_column(count, np.int64, folder)
    for begin in range(0, count, rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        of = np.searchsorted(last, users[rows])
        order = np.argsort(of, kind="stable")
        sizes = np.bincount(of, minlength=len(last))
        columns = [column[rows][order] for column in (users, items, timestamps)]
        taken = 0
        for number in np.flatnonzero(sizes).tolist():
            to = slice(free[number], free[number] + sizes[number])
            part = slice(taken, taken + sizes[number])
            for target, column in zip(
                (sorted_users, sorted_items, sorted_times), columns, strict=True
            ):
                target[to] = column[part]
            taken += int(sizes[number])
        free += sizes
    begin = 0
    for end in range_ends.tolist():
        rows = slice(begin, end)
        times = np.array(sorted_times[rows])
        order = order_rows(sorted_users[rows], times)
        sorted_times[rows] = times[order]
        sorted_items[rows] = np.array(sorted_items[rows])[order]
        begin = end
    return sorted_items, sorted_times

"""Finished pieces of an encoding job on disk: what an interrupted or shared-out job goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsft.utils.errors import InputError
from hsft.utils.files import atomic_path, remove, write_json

log = logging.getLogger(__name__)

_STAMP = "job.json"

DeferSignals = Callable[[], AbstractContextManager[None]]


class Batches:
    """A catalogue's batches, in the one order in which every run of a job plans them.

    Args:
        batches: int64 [b] item numbers each; every item is in one of them.

    Attributes:
        all: the batches.
    """

    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self.all = list(batches)
        self._items = np.concatenate([np.empty(0, dtype=np.int64), *self.all])
        self._ends = np.cumsum([0, *map(len, self.all)])
        self._position_of = np.empty(len(self._items), dtype=np.int64)
        self._position_of[self._items] = np.arange(len(self._items))

    def __len__(self) -> int:
        return len(self.all)

    def rows(self, numbers: range) -> np.ndarray:
        """Return the items of consecutive batches: int64 [n]."""
        return self._items[self._ends[numbers.start] : self._ends[numbers.stop]]

    def numbers(self, rows: np.ndarray) -> range | None:
        """Return which consecutive batches hold exactly these items, None when none do.

        Args:
            rows: int64 [n], in the order of the batches.
        """
        if not len(rows) or not 0 <= rows[0] < len(self._items):
            return None
        start = int(self._position_of[rows[0]])
        ends = np.searchsorted(self._ends, [start, start + len(rows)])
        numbers = range(int(ends[0]), int(ends[1]))
        if numbers.stop >= len(self._ends) or not np.array_equal(self.rows(numbers), rows):
            return None
        return numbers


class Parts:
    """Finished batches of items, some in each safetensors file, with a checksum.

    A part holds consecutive batches, however many: which ones, its rows say.

    Args:
        folder: where the files are.
        dim, dtype: of the embeddings.
    """

    def __init__(self, folder: Path, dim: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dim, self.dtype = dim, dtype

    def claim(self, digest: str) -> None:
        """Keep the folder's files if they are of the job with this digest, else remove them.

        Raises:
            InputError: the folder cannot be written.
        """
        stamp = self.folder / _STAMP
        try:
            same = json.loads(stamp.read_text(encoding="utf-8")) == {"digest": digest}
        except (OSError, ValueError):
            same = False
        if not same:
            remove(self.folder)
            write_json(stamp, {"digest": digest})
            return
        for leftover in self.folder.glob(".*.tmp"):
            remove(leftover)
        if any(self.folder.glob("part-*.safetensors")):
            log.info("continuing the interrupted encoding in %s.", self.folder)

    def find(self, batches: Batches) -> dict[str, range]:
        """Return the whole parts by name, with the batches in them; others are removed.

        Args:
            batches: the job's.
        """
        finished = {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            read = self._read(path)
            numbers = None if read is None else batches.numbers(read[0])
            if numbers is not None:
                finished[path.name] = numbers
                continue
            if read is not None:
                log.warning("%s is of another job and is encoded again.", path)
            remove(path)
        return finished

    def read(self, name: str, rows: np.ndarray) -> Tensor | None:
        """Return a part's embeddings [n, D], or None when it is missing or damaged.

        Args:
            name: as `find` and `write` return it.
            rows: int64 [n], the items that belong in it.
        """
        read = self._read(self.folder / name)
        return read[1] if read is not None and np.array_equal(read[0], rows) else None

    def write(self, first: int, rows: np.ndarray, embeddings: Tensor) -> str:
        """Write a part, whole or not at all, and return its name.

        Args:
            first: number of its first batch.
            rows: int64 [n], its items.
            embeddings: [n, D].

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        path = self.folder / f"part-{first:08d}.safetensors"
        with atomic_path(path) as temporary:
            save_file(
                {"rows": torch.from_numpy(rows), "embeddings": embeddings},
                temporary,
                metadata={"sha256": _checksum(rows, embeddings)},
            )
        return path.name

    def _read(self, path: Path) -> tuple[np.ndarray, Tensor] | None:
        try:
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("sha256")
                rows, embeddings = file.get_tensor("rows").numpy(), file.get_tensor("embeddings")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s) and is encoded again.", path, error)
            return None
        whole = stated == _checksum(rows, embeddings)
        if not whole or embeddings.shape != (len(rows), self.dim) or embeddings.dtype != self.dtype:
            log.warning("%s is damaged or of another job and is encoded again.", path)
            return None
        return rows, embeddings


class PartWriter:
    """Collects encoded batches and writes them as parts.

    Within `writing_rest` a run that is stopped anywhere loses the current batch only, and one that
    is killed loses at most `seconds` of work.

    Args:
        parts: where they go.
        batches: the job's.
        defer_signals: makes the context in which a part is written; signals wait for its end.
        items: number of items at which a part is closed.
        seconds: age at which it is closed with fewer.
        clock: gives the time in seconds.

    Attributes:
        written: name of each part written, with the batches in it.
        items: number of items in these parts.
    """

    def __init__(
        self,
        parts: Parts,
        batches: Batches,
        defer_signals: DeferSignals = nullcontext,
        *,
        items: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.written: dict[str, range] = {}
        self.items = 0
        self._parts, self._batches, self._defer_signals = parts, batches, defer_signals
        self._most, self._seconds, self._clock = items, seconds, clock
        self._open = range(0)
        self._encoded: list[Tensor] = []
        self._began = clock()

    def add(self, number: int, embeddings: Tensor) -> None:
        """Take an encoded batch.

        Args:
            number: of the batch.
            embeddings: [b, D] in the cache's dtype.

        Raises:
            InputError: a part cannot be written.
        """
        if self._encoded and number != self._open.stop:
            self._close()
        start = self._open.start if self._encoded else number
        self._encoded.append(embeddings)
        self._open = range(start, number + 1)
        full = len(self._batches.rows(self._open)) >= self._most
        if full or self._clock() - self._began >= self._seconds:
            self._close()

    @contextmanager
    def writing_rest(self) -> Iterator[None]:
        """Write what is not yet in a part when the block ends, in whatever way.

        Not after an `InputError`: what the user has to change makes the parts useless, or is that
        they cannot be written.
        """
        try:
            yield
        except InputError:
            raise
        except BaseException:
            self._close()
            raise
        self._close()

    def _close(self) -> None:
        if not self._encoded:
            return
        with self._defer_signals():
            rows = self._batches.rows(self._open)
            name = self._parts.write(self._open.start, rows, torch.cat(self._encoded))
            self.written[name] = self._open
            self.items += len(rows)
            self._encoded = []
            self._began = self._clock()


def _checksum(rows: np.ndarray, embeddings: Tensor) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    digest.update(embeddings.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

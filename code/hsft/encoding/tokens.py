"""The token ids of a whole catalogue, one text after the other, in memory or in a mapped file."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hsft.utils.errors import InputError
from hsft.utils.files import read_json, write_json
from hsft.utils.progress import Meter

TEXTS_AT_A_TIME = 16384

Tokenize = Callable[[Sequence[str]], list[np.ndarray]]


class Tokens:
    """Token ids of n texts.

    Args:
        lengths: int [n], tokens of each text.
        flat: int32 [sum of lengths].
    """

    def __init__(self, lengths: np.ndarray, flat: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._flat = flat

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a text's token ids: int32 [its length]."""
        end = int(self._ends[index])
        return self._flat[end - int(self.lengths[index]) : end]

    def padded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return some texts' token ids in one array, padded with 0 on the right.

        Args:
            rows: int64 [B], numbers of the texts.

        Returns:
            int64 [B, T], T the longest of them, and int64 [B], the tokens of each.
        """
        lengths = self.lengths[rows].astype(np.int64)
        steps = np.arange(lengths.max(initial=0))
        filled = steps < lengths[:, None]
        if not filled.any():
            return np.zeros(filled.shape, dtype=np.int64), lengths
        starts = self._ends[rows] - lengths
        # Clipping keeps the padded places inside the array; the mask then makes them 0.
        ids = self._flat.take(starts[:, None] + steps, mode="clip")
        return np.multiply(ids, filled, dtype=np.int64), lengths

    def common_prefix(self) -> np.ndarray:
        """Return what all texts that are not empty begin with: int64 [0..shortest of them]."""
        rows = np.flatnonzero(self.lengths)
        if not len(rows):
            return np.empty(0, dtype=np.int64)
        starts = self._ends[rows] - self.lengths[rows]
        shared: list[int] = []
        for position in range(int(self.lengths[rows].min())):
            tokens = self._flat[starts + position]
            if (tokens != tokens[0]).any():
                break
            shared.append(int(tokens[0]))
        return np.array(shared, dtype=np.int64)


def tokenize_in_memory(tokenize: Tokenize, texts: Sequence[str]) -> Tokens:
    """Tokenise texts a chunk at a time: 4 bytes a token are all that is kept."""
    lengths, parts = [], [np.empty(0, dtype=np.int32)]
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        chunk = tokenize(texts[start : start + TEXTS_AT_A_TIME])
        lengths += [len(ids) for ids in chunk]
        parts.append(np.concatenate([*chunk, parts[0]]).astype(np.int32))
    return Tokens(np.array(lengths, dtype=np.int32), np.concatenate(parts))


def tokenize_to_folder(
    tokenize: Tokenize, texts: Sequence[str], folder: Path, show_progress: bool = True
) -> str:
    """Tokenise texts a chunk at a time into a folder that all processes of the run can read.

    Returns:
        A mark that is new each time; `open_tokens` refuses a folder with another one.

    Raises:
        InputError: the folder cannot be written.
    """
    lengths = np.zeros(len(texts), dtype=np.int32)
    empty = np.empty(0, dtype=np.int32)
    mark = folder / "tokens.json"
    mark.unlink(missing_ok=True)
    try:
        with (
            (folder / "tokens.bin").open("wb") as file,
            Meter("tokenising", len(texts), "items", show_progress) as bar,
        ):
            for start in range(0, len(texts), TEXTS_AT_A_TIME):
                chunk = tokenize(texts[start : start + TEXTS_AT_A_TIME])
                lengths[start : start + len(chunk)] = [len(ids) for ids in chunk]
                np.concatenate([*chunk, empty]).astype(np.int32).tofile(file)
                bar.advance(len(chunk))
        np.save(folder / "lengths.npy", lengths)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another "
            f"--item_cache_path."
        ) from error
    name = uuid.uuid4().hex
    write_json(mark, {"name": name})
    return name


def open_tokens(folder: Path, name: str) -> Tokens:
    """Map the tokens that `tokenize_to_folder` wrote in this run, in whichever process.

    Raises:
        InputError: this process sees another folder, or none, under that path.
    """
    try:
        same = read_json(folder / "tokens.json") == {"name": name}
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"the folder {folder.absolute()} that the first process writes is not the one that "
            f"every process sees; put --item_cache_path on a disk that all machines share, under "
            f"the same path."
        )
    lengths = np.load(folder / "lengths.npy", allow_pickle=False)
    if not lengths.sum():
        return Tokens(lengths, np.empty(0, dtype=np.int32))
    return Tokens(lengths, np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r"))

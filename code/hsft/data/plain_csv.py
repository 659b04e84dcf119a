"""A fast reader for plain interaction files: no quotes, ASCII, one length of row.

pandas makes one Python string a cell when ids have to stay text (its categorical columns turn `01`
into the number 1). Here a file's bytes are cut at commas and newlines in whole-array steps, ids of up
to 8 bytes are compared as one integer, and only the distinct ones become strings. Any file that is
not plain, and any row that is not as it should be, is left to pandas, which also words the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hsft.data.blocks import Column, empty_column, slices, texts_in_blocks

_BOM = b"\xef\xbb\xbf"
_NEWLINE, _COMMA = ord("\n"), ord(",")
# Bytes of an id that is numbered in blocks.
LONGEST_ID = 64
_LONGEST_NUMBER = 16
# So many numbers are sorted before pandas, which hashes them, would have been imported.
_MOST_SORTED = 1_000_000
# _KEEP[n] keeps the first n of 8 bytes; the first byte of a field is the lowest of its word.
_KEEP = np.array([(1 << (8 * n)) - 1 for n in range(9)], dtype=np.uint64)


@dataclass(frozen=True)
class PlainColumns:
    """Two id columns and one number column of N rows.

    Attributes:
        codes: per id column int64 or int32 [N], ids numbered by first appearance.
        ids: per id column str [n], the distinct ids by number; of a large file in an array of numpy's
            texts, else of Python's.
        numbers: int64 [N].
        folder: where the columns of a large file are kept, mapped into memory; None: in memory.
    """

    codes: tuple[np.ndarray, np.ndarray]
    ids: tuple[np.ndarray, np.ndarray]
    numbers: np.ndarray
    folder: Path | None = None


def read_plain(
    path: Path,
    ids: tuple[str, str],
    number: str,
    chunk_bytes: int = 1 << 23,
    folder: Path | None = None,
) -> PlainColumns | None:
    """Read two columns of ids and one of whole numbers without a sign.

    Args:
        path: CSV file with a header line.
        ids: names of the id columns.
        number: name of the number column.
        chunk_bytes: bytes worked on at a time.
        folder: where columns are kept that are too large for memory.

    Returns:
        The columns, or None when the file is not plain or has a row that needs a second look: a
        quote, a carriage return within a line, a zero byte, a byte above 127, a blank line, more or
        fewer cells than the header, a blank or very long id, a number of other than 1 to 16 digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        header = stream.readline(1 << 16).removeprefix(_BOM)
        names = header.replace(b"\r\n", b"\n").rstrip(b"\n").split(b",")
        columns = [name.encode() for name in (*ids, number)]
        if any(names.count(name) != 1 for name in columns) or not header.endswith(b"\n"):
            return None
        positions = [names.index(name) for name in columns]
        words = (Column(np.uint64, folder), Column(np.uint64, folder))
        numbers = Column(np.int64, folder)
        for lines in _whole_lines(stream, chunk_bytes):
            # Windows ends lines with a carriage return as well.
            lines = lines.replace(b"\r\n", b"\n") if b"\r" in lines else lines
            if not _add_rows(lines, len(names), positions, words, numbers):
                return None
    if not numbers:
        return None
    if folder is None:
        numbered = [_number_ids(list(column.blocks())) for column in words]
    else:
        numbered = [number_blocks(column, folder) for column in words]
    # A blank id is an error that names its row: pandas finds that row.
    if any("" in map(str.strip, block) for _, ids in numbered for block in texts_in_blocks(ids)):
        return None
    return PlainColumns(
        (numbered[0][0], numbered[1][0]),
        (numbered[0][1], numbered[1][1]),
        numbers.whole(),
        folder,
    )


def _whole_lines(stream: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """Yield the stream in blocks that end with a newline, added at the end where it is missing."""
    rest = b""
    while block := stream.read(chunk_bytes):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
    if rest:
        yield rest + b"\n"


def _add_rows(
    block: bytes,
    width: int,
    positions: list[int],
    words: tuple[Column, Column],
    numbers: Column,
) -> bool:
    """Append the cells of whole lines to `words` and `numbers`; False when they are not plain."""
    text = np.frombuffer(block + bytes(8), dtype=np.uint8)
    body = text[: len(block)]
    if not block.isascii() or any(byte in block for byte in (b'"', b"\r", b"\0")):
        return False
    newline = body == _NEWLINE
    cuts = np.flatnonzero(newline | (body == _COMMA))
    rows = np.count_nonzero(newline)
    if len(cuts) != rows * width:
        return False
    ends = cuts.reshape(rows, width)
    # As many newlines as rows, all of them in the last column: every row has `width` cells.
    if not newline[ends[:, -1]].all():
        return False
    # All 8-byte words of the text, at every byte: a gather of them reads whole cells.
    at = np.ndarray((len(text) - 7,), dtype="<u8", buffer=text, strides=(1,))

    def cells(position: int) -> tuple[np.ndarray, np.ndarray]:
        before = ends[:, position - 1] if position else np.concatenate([[-1], ends[:-1, -1]])
        return before + 1, ends[:, position] - before - 1

    for position, parts in zip(positions, words, strict=False):
        starts, lengths = cells(position)
        longest = int(lengths.max())
        if not lengths.min() or longest > LONGEST_ID:
            return False
        columns = []
        for begin in range(0, longest, 8):
            held = np.clip(lengths - begin, 0, 8)
            columns.append(at[np.minimum(starts + begin, len(at) - 1)] & _KEEP[held])
        parts.append(np.stack(columns, axis=1))
    starts, lengths = cells(positions[-1])
    if not lengths.min() or lengths.max() > _LONGEST_NUMBER:
        return False
    low = np.minimum(lengths, 8)
    tail, good = _parse_digits(at[ends[:, positions[-1]] - low], low)
    if lengths.max() > 8:
        head, also = _parse_digits(at[starts], lengths - low)
        tail, good = head * 10**8 + tail, good & also
    if not good.all():
        return False
    numbers.append(tail)
    return True


def _parse_digits(words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the first `lengths` (0..8) bytes of each word as a decimal number.

    The digits of a word are added up pairwise: bytes to pairs, pairs to fours, fours to eight.

    Returns:
        int64 [n], and bool [n], False where a byte was no digit.
    """
    zeros = np.uint64(0x3030303030303030)
    gap = (8 * (8 - lengths)).astype(np.uint64)
    # Leading zeros fill the gap. A shift by 64 bits is undefined, hence two steps.
    half = gap >> np.uint64(1)
    shifted = words << half << (gap - half)
    text = shifted | (zeros & _KEEP[8 - lengths])
    above, below = text + np.uint64(0x4646464646464646), text - zeros
    good = ((above | below) & np.uint64(0x8080808080808080)) == 0
    value = (text & np.uint64(0x0F0F0F0F0F0F0F0F)) * np.uint64(2561) >> np.uint64(8)
    value = (value & np.uint64(0x00FF00FF00FF00FF)) * np.uint64(6553601) >> np.uint64(16)
    value = (value & np.uint64(0x0000FFFF0000FFFF)) * np.uint64(42949672960001) >> np.uint64(32)
    return value.astype(np.int64), good


def distinct(values: np.ndarray) -> np.ndarray:
    """Return the distinct values [N], ascending."""
    # Sorting and dropping repeats by hand: ten times as fast as np.unique, which hashes.
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def _factorize(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Number values by first appearance: int64 codes [N], and how many distinct ones there are."""
    if len(values) > _MOST_SORTED:
        import pandas as pd

        codes, distinct = pd.factorize(values)
        return codes, len(distinct)
    _, first, places = np.unique(values, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[places], len(first)


def _number_ids(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Number ids by first appearance: int64 codes [N] and str ids [n].

    Args:
        parts: uint64 [rows, w] each, a cell's bytes in w words, zero bytes after its end.
    """
    width = max(part.shape[1] for part in parts)
    codes: np.ndarray | None = None
    columns = []
    for word in range(width):
        column = np.concatenate(
            [
                part[:, word] if word < part.shape[1] else np.zeros(len(part), dtype=np.uint64)
                for part in parts
            ]
        )
        columns.append(column)
        here, distinct = _factorize(column)
        codes = here if codes is None else _factorize(codes * distinct + here)[0]
    assert codes is not None
    reached = np.maximum.accumulate(codes)
    first = np.flatnonzero(np.diff(reached, prepend=-1))
    names = np.stack([column[first] for column in columns], axis=1).astype("<u8")
    texts = names.view(f"S{8 * width}").reshape(-1).astype(str)
    return codes.astype(np.int64), texts.astype(object)


def number_blocks(words: Column, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Number ids by first appearance, a block at a time, with nothing in memory that grows with them.

    Args:
        words: uint64 [rows, w] a block, as for `_number_ids`; ids may be any UTF-8 without zero bytes.
        folder: where codes and ids are kept.

    Returns:
        int32 codes [N] and `<U` ids [n], both mapped into memory.
    """
    width = max(block.shape[1] for block in words.blocks())
    dtype = np.dtype("<u8" if width == 1 else f"S{8 * width}")

    def keys(block: np.ndarray) -> np.ndarray:
        if width == 1:
            return block[:, 0]
        padded = np.zeros((len(block), width), dtype="<u8")
        padded[:, : block.shape[1]] = block
        return padded.view(dtype).reshape(-1)

    # Ascending. Blocks are merged when there are as many new ids as old ones.
    known = empty_column(0, dtype, folder)
    waiting, added = Column(dtype, folder), 0
    for block in words.blocks():
        ids = distinct(keys(block))
        waiting.append(ids)
        added += len(ids)
        if added > max(len(known), _MOST_SORTED):
            known = _merge(known, waiting.whole(), folder)
            waiting, added = Column(dtype, folder), 0
    known = _merge(known, waiting.whole(), folder)
    numbers = empty_column(len(known), np.int32, folder)
    numbers[:] = -1
    by_number = empty_column(len(known), dtype, folder)
    count = 0
    codes = Column(np.int32, folder)
    for block in words.blocks():
        ids, first, inverse = np.unique(keys(block), return_index=True, return_inverse=True)
        at = np.searchsorted(known, ids)
        new = np.flatnonzero(numbers[at] < 0)
        new = at[new[np.argsort(first[new])]]
        numbers[new] = np.arange(count, count + len(new))
        by_number[count : count + len(new)] = known[new]
        count += len(new)
        codes.append(numbers[at][inverse])
    return codes.whole(), _decoded(by_number.view("S8") if width == 1 else by_number, folder)


def _merge(known: np.ndarray, more: np.ndarray, folder: Path) -> np.ndarray:
    """Return the distinct ones of two arrays of ids, ascending, mapped into memory."""
    merged = empty_column(len(known) + len(more), known.dtype, folder)
    merged[: len(known)], merged[len(known) :] = known, more
    merged.sort()
    count, previous = 0, merged[:0]
    for part in slices(len(merged)):
        block = merged[part]
        new = np.concatenate(
            [[not len(previous) or previous[0] != block[0]], block[1:] != block[:-1]]
        )
        previous = block[-1:].copy()
        ids = block[new]
        merged[count : count + len(ids)] = ids
        count += len(ids)
    return merged[:count]


def _decoded(texts: np.ndarray, folder: Path) -> np.ndarray:
    """Decode UTF-8 texts, S [n], to an array of texts that is mapped into memory."""

    def decode(block: np.ndarray) -> np.ndarray:
        ascii_only = block.view(np.uint8).max() < 128
        return block.astype(str) if ascii_only else np.strings.decode(block, "utf-8")

    parts = list(slices(len(texts), 1 << 16))
    longest = max(int(np.strings.str_len(decode(texts[part])).max()) for part in parts)
    decoded = empty_column(len(texts), f"<U{max(1, longest)}", folder)
    for part in parts:
        decoded[part] = decode(texts[part])
    return decoded

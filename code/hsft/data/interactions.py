"""Interaction files: `item_id,user_id,timestamp` rows turned into one integer matrix by user."""

from __future__ import annotations

import re
import warnings as python_warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hsft.config import Config
from hsft.data.blocks import (
    ROWS_AT_ONCE,
    Column,
    empty_column,
    folder_for_blocks,
    offsets_of,
    order_rows,
    slices,
    sort_rows,
    user_ranges,
)
from hsft.data.column_checks import check_ids, sentences
from hsft.data.csv_rows import (
    all_ids_sound,
    check_bytes,
    csv_rows,
    explain,
    id_problem,
    line_of_row,
    read_header,
)
from hsft.data.files import dataset_file
from hsft.data.parquet_rows import count_parquet_rows, is_parquet, parquet_columns
from hsft.data.plain_csv import LONGEST_ID, PlainColumns, number_blocks, read_plain
from hsft.data.time_checks import Ties, check_time_texts, check_times, count_ties
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import require_file

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("item_id", "user_id", "timestamp")
PAD = 0
# Of a row of Pixel8M, for instance.
_CSV_ROW_BYTES = 28

_WHOLE = re.compile(r"[ \t]*[+-]?[0-9]{1,40}[ \t]*")
_DECIMAL = re.compile(r"[ \t]*[+-]?[0-9]{1,20}(?:\.[0-9]{0,20})?(?:[eE][+-]?[0-9]{1,2})?[ \t]*")


@dataclass(frozen=True)
class Interactions:
    """All users' histories in compressed rows, each sorted by time.

    Attributes:
        user_ids: str [U], in order of first appearance in the file; of a large file an array of numpy's
            texts, mapped into memory, else of Python's.
        item_ids: str [I + 1]; entry 0 is the padding item and the others are in order of first
            appearance in the file, so item number i is `item_ids[i]`.
        items: int32 [N], item numbers 1..I of all users, one user after the other.
        timestamps: int64 [N], as in the file, beside `items`.
        offsets: int64 [U + 1]; user u owns `items[offsets[u]:offsets[u + 1]]`.
        dropped: interactions left out because their item has no embedding.
        warnings: one sentence for each thing in the file that may be wrong, see `column_checks` and
            `time_checks`.
        ties: how many of the file's interactions share user and timestamp.
        folder: where arrays of a large file are kept, mapped into memory; None: in memory.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    dropped: int = 0
    warnings: tuple[str, ...] = ()
    ties: Ties | None = None
    folder: Path | None = None

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return len(self.item_ids) - 1

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [U]: interactions of each user."""
        return np.subtract(self.offsets[1:], self.offsets[:-1], out=self.per_user())

    def per_user(self, dtype: type = np.int64) -> np.ndarray:
        """Return an array to be set, [U], kept where the others are."""
        return empty_column(self.num_users, dtype, self.folder)

    def ids_of(self, users: np.ndarray) -> np.ndarray:
        """Return the ids of some users, int [n]: str [n], kept where all of them are."""
        dtype = self.user_ids.dtype
        ids = empty_column(len(users), dtype, None if dtype.hasobject else self.folder)
        for part in slices(len(users)):
            ids[part] = self.user_ids[users[part]]
        return ids


def read_interactions(
    path: str | Path, tie_order: Literal["file", "shuffle"] = "file", seed: int = 0
) -> Interactions:
    """Read an interaction CSV and sort every user's rows by time.

    Ids are text: `1` and `01` are two users. Columns may stand in any order, others are ignored.
    Rows are kept as they are, repeated ones too. Rows in errors are lines of the file.

    Args:
        path: CSV file with the columns `item_id,user_id,timestamp`; timestamps are whole numbers
            of any unit, the same unit throughout.
        tie_order: order of a user's rows with one timestamp: `file` keeps that of the file,
            `shuffle` draws one.
        seed: of that draw, which is the same for the same file.

    Raises:
        InputError: the file is missing, empty, not UTF-8 CSV, lacks a column, has rows with too
            many or too few fields, an id that is empty or has blanks around it, or a timestamp
            that is not a whole number, or a column as a whole cannot be right (see
            `column_checks` and `time_checks`): units of time are mixed, or ids or times have lost digits;
            `InputErrors` with a sentence for each kind when there are several.
    """
    path = Path(path)
    columns, row_of = _read_columns(path)
    warnings = _check_columns(path, columns, row_of)
    (item_codes, user_codes), (item_ids, user_ids) = columns.codes, columns.ids
    timestamps, folder = columns.numbers, columns.folder
    offsets = offsets_of(_count_rows(user_codes, len(user_ids), folder), folder)
    rng = np.random.default_rng(seed) if tie_order == "shuffle" else None
    if folder is not None:
        order = None if rng is None else _permutation(len(timestamps), rng, folder)
        items, timestamps = sort_rows(user_codes, item_codes, timestamps, offsets, folder, order)
        for rows in slices(len(items)):
            items[rows] += 1
    else:
        order = _by_user_and_time(user_codes, timestamps, rng)
        items = (item_codes[order] + 1).astype(np.int32)
        timestamps = timestamps[order]
    item_ids = np.concatenate([np.array(["[PAD]"], dtype=object), item_ids.astype(object)])
    ties = count_ties(items, timestamps, offsets, item_ids)
    if tie_order == "file":
        warnings += sentences(path, ties.findings())
    return Interactions(
        user_ids=user_ids,
        item_ids=item_ids,
        items=items,
        timestamps=timestamps,
        offsets=offsets,
        warnings=tuple(warnings),
        ties=ties,
        folder=folder,
    )


def load_interactions(config: Config) -> Interactions:
    """Read the interactions of a configuration, with the catalogue of its `item_data`.

    Raises:
        InputError: as `read_interactions`, or there is no such file.
    """
    path = dataset_file(config.data_path, config.dataset)
    interactions = read_interactions(path, config.tie_order, config.seed)
    if config.item_data is None:
        return interactions
    item_ids, warnings = read_item_ids(
        dataset_file(config.data_path, config.item_data, "item_data")
    )
    interactions = replace(interactions, warnings=(*interactions.warnings, *warnings))
    return with_catalogue(interactions, item_ids)


def read_item_ids(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read the distinct items of a CSV with an `item_id` column, and warnings.

    Returns:
        str [n], by first appearance; and a sentence for each thing that may be wrong with them.

    Raises:
        InputError: the file is missing, no UTF-8 CSV, lacks the column or has an unusable id.
    """
    check_bytes(path, "change --item_data")
    header = read_header(path, ["item_id"], "change the first line")
    if set(COLUMNS) <= set(header):
        columns, row_of = _read_columns(path)
        codes, item_ids = columns.codes[0], columns.ids[0]
    elif is_parquet(path):
        row_of = partial(line_of_row, path)
        position = header.index("item_id")
        known: dict[str, int] = {}
        rows = islice(csv_rows(path), 1, None)
        numbers = [known.setdefault(cells[position], len(known)) for _, cells in rows]
        codes, item_ids = np.array(numbers, dtype=np.int64), np.array(list(known), dtype=object)
    else:
        row_of = partial(line_of_row, path)
        try:
            cells = _parse(path, header)
        except ValueError as error:
            explain(path, {"item_id": id_problem}, str(error))
        codes, item_ids = _factorize(cells["item_id"])
    if not len(item_ids):
        raise InputError(f"{path} has no items below its header line.")
    if not all_ids_sound(item_ids):
        explain(path, {"item_id": id_problem}, "an id is not usable")
    return item_ids, sentences(path, check_ids("item_id", item_ids, codes), row_of)


def with_catalogue(interactions: Interactions, item_ids: np.ndarray) -> Interactions:
    """Return the interactions with a larger catalogue: these items, then others of their own.

    Args:
        interactions: what to renumber.
        item_ids: str [n], none repeated.
    """
    padding, *present = interactions.item_ids
    known = set(item_ids)
    more = [item for item in present if item not in known]
    return renumber(interactions, np.array([padding, *item_ids, *more], dtype=object))


def drop_items(interactions: Interactions, keep: np.ndarray) -> Interactions:
    """Return the interactions without the items whose `keep` entry is False.

    Args:
        interactions: what to thin out.
        keep: bool [I + 1]; entry 0 (padding) is ignored.

    Raises:
        InputError: nothing would be left.
    """
    folder, offsets = interactions.folder, interactions.offsets
    counts = interactions.per_user()
    for users in user_ranges(offsets):
        first = offsets[users.start]
        kept = keep[interactions.items[first : offsets[users.stop]]]
        counts[users] = np.add.reduceat(kept, offsets[users] - first, dtype=np.int64)
    left = int(counts.sum())
    if not left:
        raise InputError(
            "no interaction is left after dropping items that are not in the item cache; "
            "the cache belongs to another dataset: run item_caching.py for this one."
        )
    keep = keep.copy()
    keep[PAD] = True
    numbers = (np.cumsum(keep) - 1).astype(np.int32)
    items, timestamps = Column(np.int32, folder), Column(np.int64, folder)
    for rows in slices(len(interactions)):
        some = interactions.items[rows]
        kept = keep[some]
        items.append(numbers[some[kept]])
        timestamps.append(interactions.timestamps[rows][kept])
    dtype = interactions.user_ids.dtype
    user_ids = Column(dtype, None if dtype.hasobject else folder)
    lengths = Column(np.int64, folder)
    for users in slices(interactions.num_users):
        kept = counts[users] > 0
        user_ids.append(interactions.user_ids[users][kept])
        lengths.append(counts[users][kept])
    return replace(
        interactions,
        user_ids=user_ids.whole(),
        item_ids=interactions.item_ids[keep],
        items=items.whole(),
        timestamps=timestamps.whole(),
        offsets=offsets_of(lengths.whole(), folder),
        dropped=len(interactions) - left,
    )


def count_numbers(numbers: np.ndarray, size: int) -> np.ndarray:
    """Count how often each number from 0 to `size` - 1 occurs: int64 [size].

    numpy's bincount widens its argument as a whole, which here is done a block at a time.

    Args:
        numbers: integers [N].
        size: more than the largest of them.
    """
    counts = np.zeros(size, dtype=np.int64)
    for rows in slices(len(numbers)):
        counts += np.bincount(numbers[rows], minlength=size)
    return counts


def _count_rows(users: np.ndarray, size: int, folder: Path | None) -> np.ndarray:
    """Count the rows of each user: int64 [size], without a copy of that size in memory."""
    if size <= ROWS_AT_ONCE:
        return count_numbers(users, size)
    counts = empty_column(size, np.int64, folder)
    counts[:] = 0
    for rows in slices(len(users)):
        present, times = np.unique(users[rows], return_counts=True)
        counts[present] += times
    return counts


def renumber(interactions: Interactions, item_ids: np.ndarray) -> Interactions:
    """Return the same interactions with another catalogue's item numbers.

    Args:
        interactions: what to renumber.
        item_ids: str [J + 1], entry 0 the padding item; has every item of the interactions.
    """
    number_of = {item: number for number, item in enumerate(item_ids[1:], start=1)}
    renumbered = (number_of[item] for item in interactions.item_ids[1:])
    numbers = np.fromiter((PAD, *renumbered), dtype=np.int32)
    items = empty_column(len(interactions), np.int32, interactions.folder)
    for rows in slices(len(items)):
        items[rows] = numbers[interactions.items[rows]]
    return replace(interactions, item_ids=item_ids, items=items)


def _permutation(count: int, rng: np.random.Generator, folder: Path) -> np.ndarray:
    """Return what `rng.permutation(count)` does, mapped into memory: int64 [count]."""
    order = empty_column(count, np.int64, folder)
    for rows in slices(count):
        order[rows] = np.arange(rows.start, rows.stop)
    rng.shuffle(order)
    return order


def _by_user_and_time(
    users: np.ndarray, timestamps: np.ndarray, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return the order of rows by user, then time, then row: int64 [N].

    Args:
        users: int64 [N].
        timestamps: int64 [N].
        rng: draws the order of rows of one user and time, which is that of the rows without it.
    """
    if rng is not None:
        shuffled = rng.permutation(len(users))
        return shuffled[_by_user_and_time(users[shuffled], timestamps[shuffled])]
    return order_rows(users, timestamps)


def _check_columns(path: Path, columns: PlainColumns, row_of: Callable[[int], int]) -> list[str]:
    """Return warnings of what the columns hold.

    Raises:
        InputError: an id is not usable, or a column as a whole cannot be right.
    """
    (item_codes, user_codes), (item_ids, user_ids) = columns.codes, columns.ids
    if not (all_ids_sound(item_ids) and all_ids_sound(user_ids)):
        explain(path, _CHECKS, "an id is not usable")
    findings = [
        *check_ids("item_id", item_ids, item_codes, columns.folder),
        *check_ids("user_id", user_ids, user_codes, columns.folder),
        *check_times(columns.numbers),
    ]
    return sentences(path, findings, row_of)


def _read_columns(path: Path) -> tuple[PlainColumns, Callable[[int], int]]:
    """Read the columns, and return them with what gives the line of a row by its position."""
    remedy = "change --dataset or --data_path"
    require_file(path, str(path), remedy)
    try:
        if is_parquet(path):
            return _read_parquet(path), partial(line_of_row, path)
        folder = folder_for_blocks(path)
        plain = read_plain(path, ("item_id", "user_id"), "timestamp", folder=folder)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {remedy}.") from error
    if plain is not None:
        # A plain file has a line for every row, below the header's.
        return plain, lambda position: position + 2
    check_bytes(path, remedy)
    header = read_header(path, COLUMNS, "change the first line")
    return _read_with_pandas(path, header), partial(line_of_row, path)


def _read_parquet(path: Path) -> PlainColumns:
    """Read a parquet file, or say which rows of it are wrong."""
    read_header(path, COLUMNS, "write it with these columns")
    folder = folder_for_blocks(path, count_parquet_rows(path) * _CSV_ROW_BYTES)
    columns = None if folder is None else _read_parquet_in_blocks(path, folder)
    if columns is not None:
        return columns
    codes = (Column(np.int32, folder), Column(np.int32, folder))
    numbers = Column(np.int64, folder)
    known: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for texts_of, block in _parquet_blocks(path):
        for column, numbered, (places, texts) in zip(codes, known, texts_of, strict=True):
            here = [numbered.setdefault(text, len(numbered)) for text in texts]
            column.append(np.array(here, dtype=np.int32)[places])
        numbers.append(block)
    if not known[0]:
        raise InputError(f"{path} has no interactions below its header line.")
    ids = [np.array(list(numbered), dtype=object) for numbered in known]
    return PlainColumns(
        (codes[0].whole(), codes[1].whole()), (ids[0], ids[1]), numbers.whole(), folder
    )


def _read_parquet_in_blocks(path: Path, folder: Path) -> PlainColumns | None:
    """Read a large parquet file; None where an id is too long or holds a zero byte."""
    words = (Column(np.uint64, folder), Column(np.uint64, folder))
    numbers = Column(np.int64, folder)
    for texts_of, block in _parquet_blocks(path):
        for column, (places, texts) in zip(words, texts_of, strict=True):
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            longest = max(map(len, encoded))
            if longest > LONGEST_ID or any(b"\0" in text for text in encoded):
                return None
            width = max(1, -(-longest // 8))
            ids = np.array(encoded, dtype=f"S{8 * width}").view("<u8").reshape(-1, width)
            column.append(ids[places])
        numbers.append(block)
    if not numbers:
        return None
    items, users = (number_blocks(column, folder) for column in words)
    return PlainColumns((items[0], users[0]), (items[1], users[1]), numbers.whole(), folder)


def _parquet_blocks(
    path: Path,
) -> Iterator[tuple[list[tuple[np.ndarray, list[str]]], np.ndarray]]:
    """Yield blocks as `parquet_columns`, or say which rows are wrong."""
    for block in parquet_columns(path, ("item_id", "user_id"), "timestamp"):
        if block is None:
            explain(path, _CHECKS, "a cell is missing or a timestamp is not a whole number")
        if len(block[1]):
            yield block


def _read_with_pandas(path: Path, header: list[str]) -> PlainColumns:
    """Read any CSV, or say which rows of it are wrong."""
    try:
        frame = _parse(path, header)
    except (ValueError, OverflowError) as error:
        explain(path, _CHECKS, str(error))
    if frame.empty:
        raise InputError(f"{path} has no interactions below its header line.")
    items, users = (_factorize(frame[column]) for column in ("item_id", "user_id"))
    return PlainColumns(
        (items[0], users[0]), (items[1], users[1]), _whole_numbers(frame["timestamp"], path)
    )


def _parse(path: Path, header: list[str]) -> pd.DataFrame:
    """Read any CSV as it is.

    Raises:
        ValueError: pandas cannot read it, or warns of it.
    """
    # Ids are read as text. pandas' `category` would be quicker, but turns ids that all look like
    # numbers into numbers: `1`, `01` and `1.0` would be one user. All columns are read, since with
    # `usecols` pandas says nothing of a row with too many fields and shifts them.
    import pandas as pd

    texts = dict.fromkeys((name for name in header if name != "timestamp"), "object")
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(
                path,
                dtype=texts,
                encoding="utf-8-sig",
                keep_default_na=False,
                na_filter=False,
                skipinitialspace=False,
                index_col=False,
                low_memory=False,
            )
        except pd.errors.ParserWarning as warning:
            raise ValueError(str(warning)) from warning


def _whole_numbers(column: pd.Series, path: Path) -> np.ndarray:
    """Return timestamps as int64 [N].

    pandas is left to infer their type: asked for int64, some of its versions wrap numbers around.
    """
    values = column.to_numpy()
    if values.dtype == np.int64:
        return values
    # Every whole number up to 2**53 is a double.
    whole = (
        values.dtype == np.float64
        and ((np.abs(values) < 1 << 53) & (values == np.floor(values))).all()
    )
    if not whole:
        explain(
            path, _CHECKS, "timestamps of more than 15 digits stand among ones with a decimal point"
        )
    import pandas as pd

    # The numbers no longer tell whether their last digits were written.
    texts = pd.read_csv(path, usecols=["timestamp"], dtype=str, encoding="utf-8-sig")["timestamp"]
    rounded = check_time_texts(texts)
    if rounded is not None:
        sentences(path, [rounded], partial(line_of_row, path))
    return values.astype(np.int64)


def _factorize(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Number a column's values by first appearance: int64 codes [N] and str ids [n]."""
    import pandas as pd

    codes, ids = pd.factorize(column.to_numpy(dtype=object))
    return codes, np.asarray(ids, dtype=object)


def timestamp_problem(text: str) -> str | None:
    """Say what is wrong with a timestamp, or None.

    Whole numbers in the range of int64 are right, also when written as `881250949.0`.
    """
    if _WHOLE.fullmatch(text):
        digits = text.strip().lstrip("+-").lstrip("0")
        if len(digits) <= 19 and -(1 << 63) <= int(text) < 1 << 63:
            return None
    elif _DECIMAL.fullmatch(text) and float(text).is_integer() and abs(float(text)) < 1 << 53:
        return None
    shown = one_line(text, 40)
    return f"'{shown}' is not a whole number within 64 bits; write Unix time as an integer"


_CHECKS = {"item_id": id_problem, "user_id": id_problem, "timestamp": timestamp_problem}

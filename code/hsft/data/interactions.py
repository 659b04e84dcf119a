"""Interaction files: `item_id,user_id,timestamp` rows turned into one integer matrix by user."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hsft.data.csv_rows import (
    all_ids_sound,
    check_bytes,
    empty_cell_ids,
    explain,
    id_problem,
    read_header,
    written_for_empty_cells,
)
from hsft.data.plain_csv import PlainColumns, read_plain
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_file, is_folder, require_file

COLUMNS = ("item_id", "user_id", "timestamp")
PAD = 0

_WHOLE = re.compile(r"[ \t]*[+-]?[0-9]{1,40}[ \t]*")
_DECIMAL = re.compile(r"[ \t]*[+-]?[0-9]{1,20}(?:\.[0-9]{0,20})?(?:[eE][+-]?[0-9]{1,2})?[ \t]*")
_PARSER_ERRORS = (pd.errors.ParserError, pd.errors.ParserWarning)
# Unix time of the year's beginning, in seconds, and how many of each unit are in a second.
_YEAR_2000, _YEAR_2100 = 946_684_800, 4_102_444_800
_UNITS = {
    "seconds": 1,
    "milliseconds": 1000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
}


@dataclass(frozen=True)
class Interactions:
    """All users' histories in compressed rows, each sorted by time.

    Attributes:
        user_ids: str [U], in order of first appearance in the file.
        item_ids: str [I + 1]; entry 0 is the padding item and the others are in order of first
            appearance in the file, so item number i is `item_ids[i]`.
        items: int32 [N], item numbers 1..I of all users, one user after the other.
        timestamps: int64 [N], as in the file, beside `items`.
        offsets: int64 [U + 1]; user u owns `items[offsets[u]:offsets[u + 1]]`.
        dropped: interactions left out because their item has no embedding.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    offsets: np.ndarray
    dropped: int = 0

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
        return np.diff(self.offsets)


def dataset_file(data_path: str, dataset: str | None) -> Path:
    """Return the path of a dataset's interaction file.

    Raises:
        InputError: no dataset is named or there is no such file; existing ones are listed.
    """
    if not dataset:
        raise InputError("no dataset is named; give --dataset NAME, for example Pixel200K.")
    folder = Path(data_path)
    path = folder / f"{dataset}.csv"
    if is_file(path):
        return path
    known = sorted(file.stem for file in folder.glob("*.csv")) if is_folder(folder) else []
    hint = f"there is no folder {folder.absolute()}"
    if is_folder(folder):
        hint = f"{folder.absolute()} holds no CSV file"
    if known:
        hint = f"datasets found there: {', '.join(known[:8])}"
    raise InputError(
        f"unknown dataset '{dataset}': {path} does not exist ({hint}); "
        f"put the interactions there or change --dataset or --data_path."
    )


def read_interactions(path: str | Path) -> Interactions:
    """Read an interaction CSV and sort every user's rows by time; ties keep file order.

    Ids are text: `1` and `01` are two users. Columns may stand in any order, others are ignored.
    Rows are kept as they are, repeated ones too. Rows in errors are lines of the file.

    Args:
        path: CSV file with the columns `item_id,user_id,timestamp`; timestamps are whole numbers
            of any unit, the same unit throughout.

    Raises:
        InputError: the file is missing, empty, not UTF-8 CSV, lacks a column, mixes units of
            time, or has rows with too many or too few fields, an id that is empty or has blanks
            around it, or a timestamp that is not a whole number; `InputErrors` with a sentence for
            each kind when there are several.
    """
    path = Path(path)
    columns = _read_columns(path)
    (item_codes, user_codes), (item_ids, user_ids) = columns.codes, columns.ids
    if not (all_ids_sound(item_ids) and all_ids_sound(user_ids)):
        explain(path, _CHECKS, "an id is not usable")
    timestamps = columns.numbers
    refuse_mixed_units(timestamps, path)
    order = _by_user_and_time(user_codes, timestamps)
    counts = np.bincount(user_codes, minlength=len(user_ids))
    return Interactions(
        user_ids=user_ids,
        item_ids=np.concatenate([np.array(["[PAD]"], dtype=object), item_ids]),
        items=(item_codes[order] + 1).astype(np.int32),
        timestamps=timestamps[order],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def suspicious_ids(interactions: Interactions, path: str | Path) -> str | None:
    """Return a sentence on ids that an export may have written for empty cells, None without any.

    Args:
        interactions: all of a file.
        path: the file, to be named.
    """
    rows = [
        ("user_id", interactions.user_ids[place], interactions.lengths[place])
        for place in empty_cell_ids(interactions.user_ids)
    ]
    rows += [
        ("item_id", interactions.item_ids[place], (interactions.items == place).sum())
        for place in empty_cell_ids(interactions.item_ids)
    ]
    found = [
        f"{column} '{text}' ({count} {'row' if count == 1 else 'rows'})"
        for column, text, count in rows
    ]
    return written_for_empty_cells(path, found) if found else None


def drop_items(interactions: Interactions, keep: np.ndarray) -> Interactions:
    """Return the interactions without the items whose `keep` entry is False.

    Args:
        interactions: what to thin out.
        keep: bool [I + 1]; entry 0 (padding) is ignored.

    Raises:
        InputError: nothing would be left.
    """
    kept_rows = keep[interactions.items]
    if not kept_rows.any():
        raise InputError(
            "no interaction is left after dropping items that are not in the item cache; "
            "the cache belongs to another dataset: run item_caching.py for this one."
        )
    keep = keep.copy()
    keep[PAD] = True
    renumber = np.cumsum(keep) - 1
    owners = np.repeat(np.arange(interactions.num_users), interactions.lengths)[kept_rows]
    counts = np.bincount(owners, minlength=interactions.num_users)
    users = counts > 0
    return Interactions(
        user_ids=interactions.user_ids[users],
        item_ids=interactions.item_ids[keep],
        items=renumber[interactions.items[kept_rows]].astype(np.int32),
        timestamps=interactions.timestamps[kept_rows],
        offsets=np.concatenate([[0], np.cumsum(counts[users])]).astype(np.int64),
        dropped=int((~kept_rows).sum()),
    )


def renumber(interactions: Interactions, item_ids: np.ndarray) -> Interactions:
    """Return the same interactions with another catalogue's item numbers.

    Args:
        interactions: what to renumber.
        item_ids: str [J + 1], entry 0 the padding item; has every item of the interactions.
    """
    numbers = pd.Index(item_ids[1:]).get_indexer(pd.Index(interactions.item_ids[1:])) + 1
    assert (numbers > PAD).all()
    numbers = np.concatenate([[PAD], numbers]).astype(np.int32)
    return replace(interactions, item_ids=item_ids, items=numbers[interactions.items])


def _by_user_and_time(users: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Return the order of rows by user, then time, then row: int64 [N]."""
    first, last = int(timestamps.min()), int(timestamps.max())
    span = last - first + 1
    if span * (int(users.max()) + 1) >= 1 << 63:
        return np.lexsort((timestamps, users))
    # One integer a row, and torch's radix sort: six times as fast as lexsort.
    keys = users * span + (timestamps - first)
    return torch.sort(torch.from_numpy(keys), stable=True).indices.numpy()


def _read_columns(path: Path) -> PlainColumns:
    remedy = "change --dataset or --data_path"
    require_file(path, str(path), remedy)
    try:
        plain = read_plain(path, ("item_id", "user_id"), "timestamp")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {remedy}.") from error
    if plain is not None:
        return plain
    check_bytes(path, remedy)
    return _read_with_pandas(path, read_header(path, COLUMNS, "mend the first line"))


def _read_with_pandas(path: Path, header: list[str]) -> PlainColumns:
    """Read any CSV, or say which rows of it are wrong."""
    try:
        frame = _parse(path, header)
    except (ValueError, OverflowError, *_PARSER_ERRORS) as error:
        explain(path, _CHECKS, str(error))
    if frame.empty:
        raise InputError(f"{path} has no interactions below its header line.")
    items, users = (_factorize(frame[column]) for column in ("item_id", "user_id"))
    return PlainColumns(
        (items[0], users[0]), (items[1], users[1]), _whole_numbers(frame["timestamp"], path)
    )


def _parse(path: Path, header: list[str]) -> pd.DataFrame:
    # Ids are read as text. pandas' `category` would be quicker, but turns ids that all look like
    # numbers into numbers: `1`, `01` and `1.0` would be one user. All columns are read, since with
    # `usecols` pandas says nothing of a row with too many fields and shifts them.
    texts = dict.fromkeys((name for name in header if name != "timestamp"), "object")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(
            path,
            dtype=texts,
            encoding="utf-8-sig",
            keep_default_na=False,
            na_filter=False,
            skipinitialspace=False,
            index_col=False,
            low_memory=False,
        )
    return frame[list(COLUMNS)]


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
    return values.astype(np.int64)


def _factorize(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Number a column's values by first appearance: int64 codes [N] and str ids [n]."""
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


def refuse_mixed_units(timestamps: np.ndarray, path: Path) -> None:
    """Refuse a file in which some rows are in seconds and others in milliseconds, or the like.

    Such rows would be sorted by unit, not by time, and leave-one-out would hold out the wrong
    items. A unit is recognised by its numbers for the years 2000 to 2099; numbers outside of all
    those ranges, such as counters, say nothing.
    """
    if timestamps.max() < 1000 * _YEAR_2000:
        return
    units = {
        name: (timestamps >= _YEAR_2000 * scale) & (timestamps < _YEAR_2100 * scale)
        for name, scale in _UNITS.items()
    }
    counts = {name: int(rows.sum()) for name, rows in units.items()}
    present = sorted((name for name in counts if counts[name]), key=lambda name: counts[name])
    if len(present) > 1:
        rare, usual = present[0], present[-1]
        row = int(np.flatnonzero(units[rare])[0])
        raise InputError(
            f"{path}: timestamps mix units: {counts[usual]} rows are in {usual} and "
            f"{counts[rare]} in {rare}, first at interaction {row + 1} ({timestamps[row]}); "
            f"convert the file to one unit."
        )

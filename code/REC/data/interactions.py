"""Interaction files: `item_id,user_id,timestamp` rows turned into one integer matrix by user."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from REC.data.plain_csv import PlainColumns, read_plain
from REC.utils.errors import InputError

COLUMNS = ("item_id", "user_id", "timestamp")
PAD = 0


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
    if path.is_file():
        return path
    known = sorted(file.stem for file in folder.glob("*.csv")) if folder.is_dir() else []
    hint = f"datasets found there: {', '.join(known[:8])}" if known else "it holds no CSV file"
    raise InputError(
        f"unknown dataset '{dataset}': {path} does not exist ({hint}); "
        f"put the interactions there or change --dataset or --data_path."
    )


def read_interactions(path: str | Path) -> Interactions:
    """Read an interaction CSV and sort every user's rows by time; ties keep file order.

    Ids are text: `1` and `01` are two users. Columns may stand in any order, others are ignored.

    Args:
        path: CSV file with the columns `item_id,user_id,timestamp`; timestamps are whole numbers
            of any unit, the same unit throughout.

    Raises:
        InputError: the file is missing, empty, not UTF-8 CSV, lacks a column, or a row has an
            empty id or a timestamp that is not a whole number (the row is named).
    """
    path = Path(path)
    columns = _read_columns(path)
    (item_codes, user_codes), (item_ids, user_ids) = columns.codes, columns.ids
    timestamps = columns.numbers
    order = _by_user_and_time(user_codes, timestamps)
    counts = np.bincount(user_codes, minlength=len(user_ids))
    return Interactions(
        user_ids=user_ids,
        item_ids=np.concatenate([np.array(["[PAD]"], dtype=object), item_ids]),
        items=(item_codes[order] + 1).astype(np.int32),
        timestamps=timestamps[order],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


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
    header = _read_header(path)
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise InputError(
            f"{path} lacks the column {missing[0]}: its first line is '{','.join(header)[:120]}', "
            f"it must name {','.join(COLUMNS)}."
        )
    repeated = [column for column in COLUMNS if header.count(column) > 1]
    if repeated:
        raise InputError(f"{path} names the column {repeated[0]} twice; remove one of them.")
    plain = read_plain(path, ("item_id", "user_id"), "timestamp")
    return _read_with_pandas(path) if plain is None else plain


def _read_with_pandas(path: Path) -> PlainColumns:
    """Read any CSV, or say which row of it is wrong."""
    try:
        frame = _parse(path, {"item_id": "object", "user_id": "object", "timestamp": "int64"})
    except (ValueError, OverflowError, pd.errors.ParserError):
        frame = _parse_slowly(path)
    if frame.empty:
        raise InputError(f"{path} has no interactions below its header line.")
    for column in ("item_id", "user_id"):
        _refuse_empty_ids(frame[column], path, column)
    items, users = (_factorize(frame[column]) for column in ("item_id", "user_id"))
    return PlainColumns(
        (items[0], users[0]), (items[1], users[1]), frame["timestamp"].to_numpy(dtype=np.int64)
    )


def _read_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            line = stream.readline(1 << 16)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if not line.strip():
        raise InputError(f"{path} is empty; it must begin with the line {','.join(COLUMNS)}.")
    return [cell.strip().strip('"') for cell in line.strip().split(",")]


def _parse(path: Path, dtypes: dict[str, str]) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path,
            usecols=list(COLUMNS),
            dtype=dtypes,
            encoding="utf-8-sig",
            keep_default_na=False,
            na_filter=False,
            skipinitialspace=False,
            index_col=False,
            low_memory=False,
        )


def _parse_slowly(path: Path) -> pd.DataFrame:
    """Read everything as text to find the row that the fast reader stumbled over."""
    try:
        frame = _parse(path, dict.fromkeys(COLUMNS, "object"))
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split()).replace("Error tokenizing data. C error: ", "")
        raise InputError(f"{path} is not a well-formed CSV file: {reason}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}.") from error
    text = frame["timestamp"].astype(str)
    bad = np.flatnonzero(~text.str.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*").to_numpy(dtype=bool))
    if len(bad):
        # +2: one for the header line, one because people count rows from 1.
        raise InputError(
            f"{path}, row {bad[0] + 2}: timestamp {text.iloc[bad[0]]!r} is not a whole number of at "
            f"most 18 digits ({len(bad)} such rows); write Unix time as an integer."
        )
    frame["timestamp"] = text.astype("int64")
    return frame


def _refuse_empty_ids(column: pd.Series, path: Path, name: str) -> None:
    bad = np.flatnonzero((column.astype(str).str.strip() == "").to_numpy())
    if len(bad):
        raise InputError(
            f"{path}, row {bad[0] + 2}: {name} is empty ({len(bad)} such rows); "
            f"fill it in or remove the row."
        )


def _factorize(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Number a column's values by first appearance: int64 codes [N] and str ids [n]."""
    codes, ids = pd.factorize(column.to_numpy(dtype=object))
    return codes, np.asarray([str(value) for value in ids], dtype=object)

"""Item information files and the text that the ItemLLM reads."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from REC.utils.errors import InputError


@dataclass(frozen=True)
class ItemTexts:
    """The items of an information file and their texts.

    Attributes:
        item_ids: item ids in file order.
        texts: prompt and text of each item; empty where no key has a value.
        fingerprint: SHA-256 over ids and texts: the same for the same content, whatever the file.
    """

    item_ids: list[str]
    texts: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.item_ids)


def information_file(text_path: str, dataset: str | None) -> Path:
    """Return the item information file: `text_path` itself, or `<text_path>/<dataset>.csv`."""
    path = Path(text_path)
    if path.is_file():
        return path
    if not dataset:
        raise InputError("no dataset is named; give --dataset NAME, for example Pixel200K.")
    path = path / f"{dataset}.csv"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; put the item information there or change --text_path."
        )
    return path


def read_item_texts(path: str | Path, text_keys: Sequence[str], item_prompt: str) -> ItemTexts:
    """Read an information CSV and write each item's text as HLLM does.

    The text is `item_prompt` followed by `key: value` for each of `text_keys`, with no separator;
    empty fields are left out. An item without any value has an empty text, without the prompt.

    Raises:
        InputError: the file is missing, not UTF-8 CSV, lacks a column, or repeats an item id.
    """
    path = Path(path)
    frame = _read(path, ["item_id", *text_keys])
    ids = frame["item_id"].tolist()
    _refuse_bad_ids(ids, path)
    columns = []
    for key in text_keys:
        values = frame[key]
        present = (values != "") & (values.str.lower() != "nan")
        columns.append((f"{key}: " + values).where(present, ""))
    bodies = columns[0]
    for column in columns[1:]:
        bodies = bodies + column
    texts = (item_prompt + bodies).where(bodies != "", "").tolist()
    return ItemTexts(ids, texts, _fingerprint(ids, texts))


def with_items(items: ItemTexts, item_ids: Sequence[str] | np.ndarray) -> ItemTexts:
    """Return the items with those of `item_ids` added, without text, that are not among them."""
    known = set(items.item_ids)
    extra = [str(item) for item in item_ids if item not in known]
    if not extra:
        return items
    ids, texts = items.item_ids + extra, items.texts + [""] * len(extra)
    return ItemTexts(ids, texts, _fingerprint(ids, texts))


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                dtype=str,
                encoding="utf-8-sig",
                keep_default_na=False,
                na_filter=False,
                index_col=False,
            )
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check --text_path.") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty; it must begin with a line of column names.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split()).replace("Error tokenizing data. C error: ", "")
        raise InputError(f"{path} is not a well-formed CSV file: {reason}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}.") from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(
            f"{path} lacks the column {missing[0]}; its columns are "
            f"{', '.join(map(str, frame.columns[:20]))}: change the file or --text_keys."
        )
    if frame.empty:
        raise InputError(f"{path} has no items below its header line.")
    return frame[columns]


def _refuse_bad_ids(ids: list[str], path: Path) -> None:
    blank = next((row for row, item in enumerate(ids) if not item.strip()), None)
    if blank is not None:
        raise InputError(
            f"{path}, row {blank + 2}: item_id is empty; fill it in or remove the row."
        )
    if len(set(ids)) == len(ids):
        return
    duplicated = pd.Series(ids).duplicated().to_numpy()
    row = int(np.flatnonzero(duplicated)[0])
    raise InputError(
        f"{path}, row {row + 2}: item '{ids[row]}' is described a second time "
        f"({int(duplicated.sum())} such rows); keep one row an item."
    )


def _fingerprint(ids: list[str], texts: list[str]) -> str:
    digest = hashlib.sha256()
    for item, text in zip(ids, texts, strict=True):
        for part in (item, text):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()

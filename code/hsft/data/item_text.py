"""Item information files and the text that the ItemLLM reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hsft.data.column_checks import check_ids, find_twins, sentences, spelling_problem
from hsft.data.csv_rows import (
    RowProblems,
    check_bytes,
    check_row,
    csv_rows,
    id_problem,
    line_of_row,
    read_header,
)
from hsft.utils.errors import InputError, one_line, refuse
from hsft.utils.files import is_file

_REMEDIES = ("check --text_path", "change the file or --text_keys")


@dataclass(frozen=True)
class ItemTexts:
    """The items of an information file and their texts.

    Attributes:
        item_ids: item ids in file order.
        texts: prompt and text of each item; empty where no key has a value.
        fingerprint: SHA-256 over ids and texts: the same for the same content, whatever the file.
        warnings: one sentence for each thing in the ids that may be wrong, see `column_checks`.
    """

    item_ids: list[str]
    texts: list[str]
    fingerprint: str
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.item_ids)


def information_file(text_path: str, dataset: str | None) -> Path:
    """Return the item information file: `text_path` itself, or `<text_path>/<dataset>.csv`."""
    path = Path(text_path)
    if is_file(path):
        return path
    if not dataset:
        raise InputError("no dataset is named; give --dataset NAME, for example Pixel200K.")
    path = path / f"{dataset}.csv"
    if not is_file(path):
        raise InputError(
            f"{path} does not exist; put the item information there or change --text_path."
        )
    return path


def read_item_texts(
    path: str | Path,
    text_keys: Sequence[str],
    item_prompt: str,
    remedies: tuple[str, str] = _REMEDIES,
) -> ItemTexts:
    """Read an information CSV and write each item's text as HLLM does.

    The text is `item_prompt` followed by `key: value` for each of `text_keys`, with no separator;
    empty fields are left out. An item without any value has an empty text, without the prompt.

    Args:
        path: the file.
        text_keys: columns that are written, in this order.
        item_prompt: what every text begins with.
        remedies: what to do about a file that is missing, and about one that lacks columns.

    Raises:
        InputError: the file is missing, not UTF-8 CSV, lacks a column, has rows with too many or
            too few fields, or repeats an item id; `InputErrors` when there are several kinds.
    """
    path = Path(path)
    table = _read(path, list(dict.fromkeys(["item_id", *text_keys])), remedies)
    ids = table["item_id"]
    cells = zip(*(table[key] for key in text_keys), strict=True)
    bodies = (
        "".join(
            f"{key}: {value}"
            for key, value in zip(text_keys, row, strict=True)
            if _has_value(value)
        )
        for row in cells
    )
    texts = [item_prompt + body if body else "" for body in bodies]
    found = check_ids("item_id", np.array(ids, dtype=object))
    warnings = sentences(path, found, partial(line_of_row, path))
    return ItemTexts(ids, texts, _fingerprint(ids, texts), tuple(warnings))


def read_item_titles(path: str | Path, key: str) -> dict[str, str]:
    """Read one column of an information CSV: item id -> its text, for people to read.

    Raises:
        InputError: as `read_item_texts`.
    """
    table = _read(Path(path), list(dict.fromkeys(["item_id", key])))
    return dict(zip(table["item_id"], table[key], strict=True))


def unfit_texts(
    items: ItemTexts,
    path: str | Path,
    keys: Sequence[str],
    catalogue: Sequence[str] | np.ndarray,
    interactions: str | Path,
) -> list[str]:
    """Return why a catalogue cannot be encoded with these texts: a sentence for each problem.

    Args:
        items: what the information file holds.
        path: that file.
        keys: `text_keys`.
        catalogue: ids of the interactions' items; empty when there are no interactions.
        interactions: their file.
    """
    twins = find_twins(np.asarray(catalogue, dtype=object), items.item_ids)
    spelling = spelling_problem(twins, len(catalogue), interactions, path)
    if spelling:
        return [spelling]
    having = {item for item, text in zip(items.item_ids, items.texts, strict=True) if text}
    if having and (not len(catalogue) or any(item in having for item in catalogue)):
        return []
    count = len(catalogue) or len(items)
    others = ""
    if having:
        known = set(catalogue)
        other = next(item for item in items.item_ids if item in having and item not in known)
        others = f": it describes others, for example '{one_line(other, 40)}'"
    return [
        f"none of the {count} items of the catalogue has text in {path} under the text_keys "
        f"{', '.join(keys)}{others}; put their rows there or change --text_path or --text_keys."
    ]


def read_plain_texts(path: str | Path, text_keys: Sequence[str]) -> dict[str, str]:
    """Read the values of some columns as sentences: item id -> values, joined by ". ".

    Empty fields are left out; an item without any value has an empty text.

    Raises:
        InputError: as `read_item_texts`.
    """
    table = _read(Path(path), list(dict.fromkeys(["item_id", *text_keys])))
    cells = zip(*(table[key] for key in text_keys), strict=True)
    texts = (". ".join(value for value in row if _has_value(value)) for row in cells)
    return dict(zip(table["item_id"], texts, strict=True))


def _has_value(cell: str) -> bool:
    # An empty cell that went through pandas is written as `nan`.
    return bool(cell) and cell.lower() != "nan"


def with_items(items: ItemTexts, item_ids: Sequence[str] | np.ndarray) -> ItemTexts:
    """Return the items with those of `item_ids` added, without text, that are not among them."""
    known = set(items.item_ids)
    extra = [str(item) for item in item_ids if item not in known]
    if not extra:
        return items
    ids, texts = items.item_ids + extra, items.texts + [""] * len(extra)
    return ItemTexts(ids, texts, _fingerprint(ids, texts), items.warnings)


def _read(
    path: Path, columns: Sequence[str], remedies: tuple[str, str] = _REMEDIES
) -> dict[str, list[str]]:
    """Read some columns of an information file: column name -> its cells, in file order."""
    check_bytes(path, remedies[0])
    header = read_header(path, columns, remedies[1])
    wanted = {name: header.index(name) for name in columns}
    table: dict[str, list[str]] = {name: [] for name in columns}
    ids = table["item_id"]
    checks = {wanted["item_id"]: id_problem}
    found = RowProblems(path)
    seen: set[str] = set()
    broken: list[str] = []
    rows = csv_rows(path)
    next(rows)
    try:
        for row, cells in rows:
            if not check_row(found, row, cells, header, checks):
                continue
            for name, position in wanted.items():
                table[name].append(cells[position])
            if ids[-1] in seen:
                found.add(
                    "twice",
                    row,
                    f"item '{one_line(ids[-1], 40)}' is described a second time; keep one row an item",
                )
            seen.add(ids[-1])
    except InputError as error:
        broken.append(str(error))
    refuse([*found.sentences(), *broken])
    if not ids:
        raise InputError(f"{path} has no items below its header line.")
    return table


def _fingerprint(ids: list[str], texts: list[str]) -> str:
    digest = hashlib.sha256()
    for item, text in zip(ids, texts, strict=True):
        for part in (item, text):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()

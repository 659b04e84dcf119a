"""Item information files and the text that the ItemLLM reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hsft.data.blocks import TEXTS_AT_A_TIME, MappedTexts, folder_for_blocks, keep_texts
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
from hsft.data.parquet_rows import count_parquet_bytes, is_parquet
from hsft.utils.errors import InputError, one_line, refuse
from hsft.utils.files import is_file

TextFormat = Literal["plain", "hllm", "sentences"]

_REMEDIES = ("check --text_path", "change the file or --text_keys")


@dataclass(frozen=True)
class ItemTexts:
    """The items of an information file and their texts.

    Attributes:
        item_ids: item ids in file order.
        texts: prompt and text of each item; empty where no key has a value, but for the prompt
            under `text_format: hllm`. A list, or `MappedTexts` of a large file.
        fingerprint: SHA-256 over ids and texts: the same for the same content, whatever the file.
        warnings: one sentence for each thing in the ids that may be wrong, see `column_checks`.
        prompt: what texts begin with.
    """

    item_ids: list[str]
    texts: Sequence[str]
    fingerprint: str
    warnings: tuple[str, ...] = ()
    prompt: str = ""

    def has_text(self) -> list[bool]:
        """Say of each item whether it has a text beside the prompt."""
        return [text not in ("", self.prompt) for text in self.texts]

    def __len__(self) -> int:
        return len(self.item_ids)


def read_item_texts(
    path: str | Path,
    text_keys: Sequence[str],
    item_prompt: str,
    text_format: TextFormat = "plain",
    remedies: tuple[str, str] = _REMEDIES,
) -> ItemTexts:
    """Read an information CSV and write each item's text.

    The text is `item_prompt` followed by `key: value` for each of `text_keys`, with no separator.

    Args:
        path: the file.
        text_keys: columns that are written, in this order.
        item_prompt: what every text begins with.
        text_format: which cells have a value and how it is written. `plain`: cells as they are in
            the file; empty ones and `nan` are left out, and an item without any value has an empty
            text, without the prompt. `hllm`: as HLLM's public code, which reads the file with
            pandas' defaults: cells such as `NA`, `None` and `null` are left out, numbers are
            written as pandas has them (`1990.0` where a cell of the column is blank), the number 0
            is left out, and an item without any value has the prompt alone. `sentences`: as
            `plain`, but the values alone, joined by ". ", without the names of their columns.
        remedies: what to do about a file that is missing, and about one that lacks columns.

    Raises:
        InputError: the file is missing, not UTF-8 CSV, lacks a column, has rows with too many or
            too few fields, repeats an item id, or has ids that cannot be right (see
            `column_checks`); `InputErrors` when there are several kinds.
    """
    path = Path(path)
    ids: list[str] = []

    def cells() -> Iterator[list[str]]:
        for item, *values in _item_rows(path, text_keys, remedies):
            ids.append(item)
            yield values

    if text_format == "hllm":
        count = sum(1 for _ in cells())
        texts = (item_prompt + body for body in _hllm_bodies(path, text_keys, count))
    elif text_format == "sentences":
        texts = (item_prompt + body if body else "" for body in map(_sentence, cells()))
    else:
        bodies = (_body(text_keys, values, _has_value) for values in cells())
        texts = (item_prompt + body if body else "" for body in bodies)
    kept = keep_texts(texts, _folder_for_texts(path))
    findings = check_ids("item_id", np.array(ids, dtype=object))
    warnings = sentences(path, findings, partial(line_of_row, path))
    return ItemTexts(ids, kept, _fingerprint(ids, kept), tuple(warnings), item_prompt)


def _folder_for_texts(path: Path) -> Path | None:
    """Return where the texts of a large file are kept while it is used, None for memory."""
    if not is_file(path):
        return None  # The reader says so.
    return folder_for_blocks(path, count_parquet_bytes(path) if is_parquet(path) else None)


def _hllm_bodies(path: Path, text_keys: Sequence[str], count: int) -> Iterator[str]:
    """Yield the texts without the prompt as HLLM's code makes them of pandas' values.

    Args:
        path: a file that `_item_rows` has read.
        text_keys: its columns.
        count: its rows.
    """
    if is_parquet(path):
        raise InputError(
            f"{path}: text_format: hllm writes what pandas makes of a CSV file; use text_format: plain, "
            f"or a CSV file."
        )
    keys = list(dict.fromkeys(text_keys))
    # What pandas makes of the whole file: a piece has its own types, and the column one for all of them.
    pieces: dict[tuple[str, ...], Any] = {}
    rows = 0
    for piece in _pandas_pieces(path, keys):
        rows += len(piece)
        pieces.setdefault(tuple(map(str, piece[keys].dtypes)), piece[keys].iloc[:1].copy())
        # Not kept while the next one is read.
        del piece
    if rows != count:
        raise InputError(
            f"{path}: pandas reads {rows} rows of its {count}, so text_format: hllm cannot be "
            f"had; use text_format: plain."
        )
    types = {key: _common_type([piece[key] for piece in pieces.values()]) for key in keys}
    for piece in _pandas_pieces(path, keys):
        for start in range(0, len(piece), TEXTS_AT_A_TIME):
            few = piece[keys].iloc[start : start + TEXTS_AT_A_TIME].astype(types)
            # As one array, like the frame that HLLM transposes: whole numbers beside decimals become
            # decimals.
            for row in few[list(text_keys)].to_numpy():
                yield _body(text_keys, row, lambda value: value and str(value) != "nan")
        del piece, few


def _pandas_pieces(path: Path, keys: list[str]) -> Iterator[Any]:
    """Yield some columns of a CSV file as pandas reads it, in the pieces in which it decides on types.

    `read_csv` guesses the type of each column anew for every so many rows, a power of two below 2^20
    divided by the number of columns (`low_memory`, its default).
    """
    import pandas as pd

    most = 2**20 // len(read_header(path, [], _REMEDIES[1]))
    rows = 1
    while 2 * rows < most:
        rows *= 2
    # Other columns are counted, not kept.
    with pd.read_csv(path, dtype={"item_id": str}, chunksize=rows, usecols=keys) as reader:
        yield from reader


def _common_type(parts: Sequence[Any]) -> Any:
    """Return the type of the column that pandas makes of some pieces of it."""
    import pandas as pd

    return parts[0].dtype if len(parts) == 1 else pd.concat(parts).dtype


def _body(keys: Sequence[str], values: Iterable[Any], has_value: Callable[[Any], Any]) -> str:
    return "".join(
        f"{key}: {value}" for key, value in zip(keys, values, strict=True) if has_value(value)
    )


def read_item_titles(path: str | Path, key: str) -> dict[str, str]:
    """Read one column of an information CSV: item id -> its text, for people to read.

    Raises:
        InputError: as `read_item_texts`.
    """
    return {item: cells[0] for item, *cells in _item_rows(Path(path), [key])}


def title_column(path: str | Path, text_keys: Sequence[str]) -> str | None:
    """Return the column that stands for an item's title, for people to read.

    The first of `text_keys` that the file has, or else its first column beside `item_id`, as for a
    run of a model that reads no texts; None where there is no other column.

    Raises:
        InputError: the file has no first line, another separator or no column `item_id`.
    """
    header = read_header(Path(path), ["item_id"], "change the first line")
    columns = [column for column in header if column not in ("item_id", "")]
    return next((key for key in [*text_keys, *columns] if key in columns), None)


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
    having = {item for item, has in zip(items.item_ids, items.has_text(), strict=True) if has}
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
    return {item: _sentence(cells) for item, *cells in _item_rows(Path(path), text_keys)}


def _sentence(cells: Iterable[str]) -> str:
    """Join the cells that have a value by ". "."""
    return ". ".join(cell for cell in cells if _has_value(cell))


def _has_value(cell: str) -> bool:
    # An empty cell that went through pandas is written as `nan`.
    return bool(cell) and cell.lower() != "nan"


def with_items(items: ItemTexts, item_ids: Sequence[str] | np.ndarray) -> ItemTexts:
    """Return the items with those of `item_ids` added, without text, that are not among them."""
    known = set(items.item_ids)
    extra = [str(item) for item in item_ids if item not in known]
    if not extra:
        return items
    return _taken(items, items.item_ids + extra, [*range(len(items)), *[-1] * len(extra)])


def select_items(items: ItemTexts, item_ids: Sequence[str] | np.ndarray) -> ItemTexts:
    """Return the items of `item_ids` in this order, without text where there is none."""
    row_of = {item: row for row, item in enumerate(items.item_ids)}
    ids = [str(item) for item in item_ids]
    return _taken(items, ids, [row_of.get(item, -1) for item in ids])


def _taken(items: ItemTexts, ids: list[str], rows: list[int]) -> ItemTexts:
    """Return items of these ids with the texts of some rows, none where the row is -1."""
    texts: Sequence[str]
    if isinstance(items.texts, MappedTexts):
        texts = items.texts.take(np.array(rows, dtype=np.int64))
    else:
        texts = [items.texts[row] if row >= 0 else "" for row in rows]
    return replace(items, item_ids=ids, texts=texts, fingerprint=_fingerprint(ids, texts))


def _item_rows(
    path: Path, keys: Sequence[str], remedies: tuple[str, str] = _REMEDIES
) -> Iterator[list[str]]:
    """Yield each item's id and its cells of some columns, in file order.

    Raises:
        InputError: as `read_item_texts`, for what is wrong with rows after the last of them.
    """
    check_bytes(path, remedies[0])
    header = read_header(path, list(dict.fromkeys(["item_id", *keys])), remedies[1])
    positions = [header.index(name) for name in ("item_id", *keys)]
    checks = {positions[0]: id_problem}
    problems = RowProblems(path)
    seen: set[str] = set()
    broken: list[str] = []
    rows = csv_rows(path)
    next(rows)
    try:
        for row, cells in rows:
            if not check_row(problems, row, cells, header, checks):
                continue
            item = cells[positions[0]]
            if item in seen:
                problems.add(
                    "twice",
                    row,
                    f"item '{one_line(item, 40)}' is described a second time; keep one row an item",
                )
            seen.add(item)
            yield [cells[position] for position in positions]
    except InputError as error:
        broken.append(str(error))
    refuse([*problems.sentences(), *broken])
    if not seen:
        raise InputError(f"{path} has no items below its header line.")


def _fingerprint(ids: Sequence[str], texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for item, text in zip(ids, texts, strict=True):
        for part in (item, text):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()

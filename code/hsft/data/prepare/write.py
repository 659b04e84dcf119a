"""Writing a data set's two files, both or neither."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from hsft.data.column_checks import number_of
from hsft.data.interactions import COLUMNS
from hsft.data.prepare.rows import Item
from hsft.data.prepare.table import Table
from hsft.utils.errors import InputError
from hsft.utils.files import atomic_path
from hsft.utils.progress import Meter
from hsft.utils.signals import StopSignals

TEXT_COLUMNS = ("item_id", "title", "tag", "description")
_ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Target:
    """Where a data set's files go."""

    data: Path
    text: Path


def target_files(
    name: str, data_path: str, text_path: str, overwrite: bool, inputs: Sequence[Path]
) -> Target:
    """Return a data set's two paths.

    Raises:
        InputError: the name is no file name, a file is there already, or one is to be read.
    """
    if not name.strip() or name.startswith(".") or set(name) & set("/\\\0"):
        raise InputError(f"--name '{name}' is no name for a file; give one such as Pixel200K.")
    target = Target(Path(data_path) / f"{name}.csv", Path(text_path) / f"{name}.csv")
    if target.data.resolve() == target.text.resolve():
        raise InputError(
            "--data_path and --text_path are one folder, but both files have the same name; "
            "give two folders."
        )
    read = {path.resolve() for path in inputs}
    for path in (target.data, target.text):
        if path.resolve() in read:
            raise InputError(
                f"{path} is to be read and written; give another --name, --data_path or --text_path."
            )
        if path.exists() and not overwrite:
            raise InputError(
                f"{path} is there already; add --overwrite, or give another --name or folder."
            )
    return target


@contextmanager
def both_files(target: Target) -> Iterator[Target]:
    """Give two temporary paths and rename both when the block succeeds; a signal does not part them.

    Raises:
        InputError: a folder cannot be written.
        Interrupted: SIGINT or SIGTERM came before the end of the block; nothing is left.
    """
    made = [path.parent for path in (target.data, target.text) if not path.parent.exists()]
    try:
        with StopSignals() as signals, ExitStack() as files:
            yield Target(
                files.enter_context(atomic_path(target.data)),
                files.enter_context(atomic_path(target.text)),
            )
            with signals.deferred():
                files.close()
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_interactions(path: Path, table: Table) -> None:
    """Write `item_id,user_id,timestamp` rows in the table's order, a block at a time."""
    item_ids, user_ids = (np.array(ids, dtype=object) for ids in (table.item_ids, table.user_ids))
    with (
        path.open("w", encoding="utf-8", newline="") as stream,
        Meter("writing interactions", len(table), "rows") as bar,
    ):
        for begin in range(0, len(table), _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            values = (item_ids[table.items[rows]], user_ids[table.users[rows]])
            frame = pd.DataFrame(dict(zip(COLUMNS, (*values, table.timestamps[rows]), strict=True)))
            frame.to_csv(stream, index=False, header=begin == 0, lineterminator="\n")
            bar.advance(len(frame))


@dataclass
class Described:
    """What became of the item information's rows.

    Attributes:
        described: items that have a row.
        with_text: items that have a text.
        without_row: items without a row; they are written with empty texts.
        unused: rows of items without interactions, left out.
        repeated: rows of items described before, left out.
        twins: items without a row, and the spelling of their number that an unused row has.
    """

    described: int = 0
    with_text: int = 0
    without_row: int = 0
    unused: int = 0
    repeated: int = 0
    twins: list[tuple[str, str]] = field(default_factory=list)


def write_items(path: Path, items: Iterator[Item], lacking: set[str]) -> Described:
    """Write the items' rows in their order; those without a row come last, without text.

    Args:
        path: file to write.
        items: described items, read as a stream; the first row of an item counts.
        lacking: ids of the items to write; those described are taken out.
    """
    result = Described()
    written: set[str] = set()
    numbers = {number: item for item in lacking if (number := number_of(item)) is not None}
    other_spelling: dict[str, str] = {}
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(TEXT_COLUMNS)
        for _, item, *texts in items:
            item = item.strip()
            if item in lacking:
                lacking.remove(item)
                written.add(item)
                result.described += 1
                result.with_text += any(texts)
                writer.writerow((item, *texts))
            elif item in written:
                result.repeated += 1
            else:
                result.unused += 1
                same = numbers.get(number_of(item) or "")
                if same is not None:
                    other_spelling[same] = item
        result.without_row = len(lacking)
        result.twins = [
            (item, other_spelling[item]) for item in sorted(lacking) if item in other_spelling
        ]
        writer.writerows((item, "", "", "") for item in sorted(lacking))
    return result

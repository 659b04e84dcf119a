"""Writing a data set's two files, both or neither."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from hsft.data.column_checks import number_of
from hsft.data.interactions import COLUMNS
from hsft.data.parquet_rows import SUFFIX, require_pyarrow, write_parquet
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
    """Where a data set's files go.

    Attributes:
        data: the interactions.
        text: the item information.
        parquet: whether they are written as parquet, or as CSV.
    """

    data: Path
    text: Path
    parquet: bool = False


def target_files(
    name: str,
    data_path: str,
    text_path: str,
    overwrite: bool,
    inputs: Sequence[Path],
    parquet: bool = False,
) -> Target:
    """Return a data set's two paths.

    Raises:
        InputError: the name is no file name, a file is there already, as CSV or parquet, or one is to be
            read; or parquet files cannot be written.
    """
    if not name.strip() or name.startswith(".") or set(name) & set("/\\\0"):
        raise InputError(f"--name '{name}' is no name for a file; give one such as Pixel200K.")
    ending, other = (SUFFIX, ".csv") if parquet else (".csv", SUFFIX)
    target = Target(
        Path(data_path) / f"{name}{ending}", Path(text_path) / f"{name}{ending}", parquet
    )
    if parquet:
        require_pyarrow(target.data)
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
        twin = path.with_name(f"{name}{other}")
        if twin.exists():
            raise InputError(
                f"{twin} is there, which would be a second file of this data set beside {path}; remove "
                f"it, or give another --name or folder."
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
                target.parquet,
            )
            with signals.deferred():
                files.close()
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_interactions(target: Target, table: Table) -> None:
    """Write `item_id,user_id,timestamp` rows in the table's order, a block at a time."""
    item_ids, user_ids = (np.array(ids, dtype=object) for ids in (table.item_ids, table.user_ids))

    def blocks() -> Iterator[tuple[np.ndarray, ...]]:
        with Meter("writing interactions", len(table), "rows") as bar:
            for begin in range(0, len(table), _ROWS_AT_ONCE):
                rows = slice(begin, begin + _ROWS_AT_ONCE)
                times = table.timestamps[rows]
                yield item_ids[table.items[rows]], user_ids[table.users[rows]], times
                bar.advance(len(times))

    if target.parquet:
        write_parquet(target.data, COLUMNS, blocks(), numbers=("timestamp",))
        return
    with target.data.open("w", encoding="utf-8", newline="") as stream:
        for number, columns in enumerate(blocks()):
            frame = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
            frame.to_csv(stream, index=False, header=number == 0, lineterminator="\n")


def write_rows(target: Target, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write item information: rows of texts below the names of their columns.

    Args:
        target: where to, and in which format.
        header: names of the columns.
        rows: read as a stream.
    """
    if target.parquet:
        stream = iter(rows)
        blocks = iter(lambda: list(islice(stream, _ROWS_AT_ONCE)), [])
        columns = (list(zip(*block, strict=True)) for block in blocks)
        write_parquet(target.text, header, columns)
        return
    with target.text.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


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


def write_items(target: Target, items: Iterator[Item], lacking: set[str]) -> Described:
    """Write the items' rows in their order; those without a row come last, without text.

    Args:
        target: where to.
        items: described items, read as a stream; the first row of an item counts.
        lacking: ids of the items to write; those described are taken out.
    """
    result = Described()
    write_rows(target, TEXT_COLUMNS, _item_rows(items, lacking, result))
    return result


def _item_rows(
    items: Iterator[Item], lacking: set[str], result: Described
) -> Iterator[Sequence[str]]:
    """Yield the rows of `write_items`, and count them in `result`."""
    written: set[str] = set()
    numbers = {number: item for item in lacking if (number := number_of(item)) is not None}
    other_spelling: dict[str, str] = {}
    for _, item, *texts in items:
        item = item.strip()
        if item in lacking:
            lacking.remove(item)
            written.add(item)
            result.described += 1
            result.with_text += any(texts)
            yield item, *texts
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
    yield from ((item, "", "", "") for item in sorted(lacking))

"""Parquet files in the place of CSV files: their cells as the texts that a CSV would have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.files import require_file

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
# Rows that are in memory at a time.
_BATCH = 1 << 17
# Columns whose numbers tell things apart, so that none may be rounded.
_EXACT = ("item_id", "user_id", "timestamp")
# Whole numbers up to here are exact in floating-point numbers of so many bits.
_LARGEST_EXACT = {16: 1 << 11, 32: 1 << 24, 64: 1 << 53}


def is_parquet(path: str | Path) -> bool:
    """Say whether a file is parquet by its name."""
    return Path(path).suffix.lower() == SUFFIX


def require_pyarrow(path: str | Path) -> None:
    """Refuse to work on a parquet file without the package that does.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path} is a parquet file, which needs the package pyarrow; install it with pip install "
            f"'hsft[parquet]', or use CSV."
        ) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the names of the columns as row 0, then the cells of every row with its number from 1.

    Raises:
        InputError: the file is missing or damaged, or a column holds no texts, numbers or times.
    """
    with_names, batches = _open(path, None)
    yield 0, with_names
    row = 1
    for batch in batches:
        columns = [
            ["" if cell is None else cell for cell in _texts(path, name, column).to_pylist()]
            for name, column in zip(with_names, batch.columns, strict=True)
        ]
        for cells in zip(*columns, strict=True):
            yield row, list(cells)
            row += 1


def parquet_columns(
    path: Path, ids: Sequence[str], number: str
) -> Iterator[tuple[list[tuple[np.ndarray, list[str]]], np.ndarray] | None]:
    """Read columns of ids and one of whole numbers, a block of rows at a time.

    Args:
        path: the file, whose columns are there.
        ids: names of the id columns.
        number: name of the number column; times are taken as numbers of their own unit.

    Yields:
        For each id column int32 [n], codes of this block's ids, and these ids; and int64 [n]. None in
        place of a block that has a missing cell or a number that is not whole.

    Raises:
        InputError: as `parquet_rows`.
    """
    _, batches = _open(path, [*ids, number])
    import pyarrow as pa

    for batch in batches:
        columns = [_texts(path, name, batch.column(name)).dictionary_encode() for name in ids]
        _check_exact(path, number, batch.column(number))
        try:
            numbers = batch.column(number).cast(pa.int64())
        except pa.ArrowException:
            yield None
            return
        if numbers.null_count or any(column.null_count for column in columns):
            yield None
            return
        yield (
            [(column.indices.to_numpy(), column.dictionary.to_pylist()) for column in columns],
            numbers.to_numpy(),
        )


def count_parquet_rows(path: Path) -> int:
    """Return the number of rows of a parquet file that is sound."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def count_parquet_bytes(path: Path) -> int:
    """Return the bytes of a parquet file's columns before compression, 0 of an unreadable file."""
    require_pyarrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return 0
    groups = range(metadata.num_row_groups)
    return sum(int(metadata.row_group(group).total_byte_size) for group in groups)


def write_parquet(
    path: Path,
    columns: Sequence[str],
    blocks: Iterable[Sequence[Sequence[Any] | np.ndarray]],
    numbers: Sequence[str] = (),
) -> None:
    """Write blocks of rows to a parquet file, each a row group.

    Args:
        path: the file.
        columns: their names.
        blocks: the columns of each block.
        numbers: names of columns of whole numbers; the others are texts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [(name, pa.int64() if name in numbers else pa.string()) for name in columns]
    schema = pa.schema(kinds)
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            arrays = [
                pa.array(column, kind) for column, (_, kind) in zip(block, kinds, strict=True)
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _open(path: Path, columns: Sequence[str] | None) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    require_file(path, str(path), "check the path")
    require_pyarrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches(file: Any) -> Iterator[Any]:
        try:
            yield from file.iter_batches(_BATCH, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from error
        finally:
            file.close()

    try:
        file = pq.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    return names, batches(file)


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is no readable parquet file ({brief(error)}); write it again.")


def _texts(path: Path, name: str, column: pa.Array) -> pa.Array:
    """Return the cells as texts, missing ones as null; times as numbers of their own unit.

    Raises:
        InputError: cells are lists, bytes or the like.
    """
    import pyarrow as pa

    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column, kind = column.dictionary_decode(), kind.value_type
        if name in _EXACT:
            _check_exact(path, name, column)
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.int64())
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise pa.ArrowInvalid("bytes")
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: the column {one_line(name, 40)} is of type {one_line(kind, 40)}, where texts, "
            f"numbers or times are read; write it as text."
        ) from error


def _check_exact(path: Path, name: str, column: pa.Array) -> None:
    """Refuse a column of ids or times whose type cannot tell its numbers apart.

    Raises:
        InputError: numbers are too large for their floating-point type, or times are True or False.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_boolean(kind) and name == "timestamp":
        raise InputError(f"{path}: timestamp is of type bool; write whole numbers or times.")
    if not pa.types.is_floating(kind):
        return
    limit = _LARGEST_EXACT[kind.bit_width]
    largest = pc.max(pc.abs(column.cast(pa.float64()))).as_py()
    if largest is not None and largest > limit:
        raise InputError(
            f"{path}: {name} is of type {kind}, which rounds numbers above {limit:,}, and has "
            f"{largest:,.0f}; write it as text or whole numbers before it is rounded."
        )

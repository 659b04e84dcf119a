"""CSV files row by row: what is wrong with a file is said once, with the rows it concerns."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np

from hsft.data.blocks import texts_in_blocks
from hsft.data.parquet_rows import is_parquet, parquet_rows
from hsft.utils.errors import InputError, one_line, refuse
from hsft.utils.files import require_file

# Named rows of one kind of problem; the others are only counted.
SHOWN_ROWS = 5
# A field longer than this is an unclosed quote or a hostile file. It is a setting of the module
# csv, whose default of 128 KiB is less than an item description may have.
MAX_FIELD = 16 << 20
csv.field_size_limit(MAX_FIELD)

_SEPARATORS = {";": "';'", "\t": "a tab", "|": "'|'"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UTF16_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)

# Says what is wrong with a cell and how to fix it, or None.
CellCheck = Callable[[str], str | None]


def check_bytes(path: Path, remedy: str) -> None:
    """Refuse what no CSV parser reads as meant: not a file, UTF-16, NUL bytes.

    Raises:
        InputError: says which.
    """
    require_file(path, str(path), remedy)
    if is_parquet(path):
        return
    line = 1
    try:
        with path.open("rb") as stream:
            chunk = stream.read(1 << 20)
            if chunk.startswith(_UTF16_32):
                raise InputError(f"{path} is UTF-16 or UTF-32 text; save it as UTF-8.")
            while chunk:
                position = chunk.find(b"\0")
                if position >= 0:
                    line += chunk.count(b"\n", 0, position)
                    raise InputError(
                        f"{path}, row {line}: holds a NUL byte, so it is UTF-16 text or damaged; "
                        f"save it as UTF-8 or export it again."
                    )
                line += chunk.count(b"\n")
                chunk = stream.read(1 << 20)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {remedy}.") from error


def read_header(path: Path, columns: Sequence[str], remedy: str) -> list[str]:
    """Read the first line's column names and check that they hold `columns`, once each.

    Raises:
        InputError: there is no such line, it has another separator, or it lacks or repeats a
            column.
    """
    for _, cells in csv_rows(path):
        header = cells
        break
    else:
        raise InputError(f"{path} is empty; it must begin with the line {','.join(columns)}.")
    shown = one_line(",".join(header), 120)
    missing = [column for column in columns if column not in header]
    if missing:
        for column in missing:
            refuse_other_separator(path, ",".join(header), column)
        spaced = set(missing) & {cell.strip() for cell in header}
        raise InputError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: its first "
            f"line is '{shown}', it must name {','.join(columns)}"
            f"{' without spaces' if spaced else ''}; {remedy}."
        )
    for column in columns:
        if header.count(column) > 1:
            raise InputError(f"{path} names the column {column} twice; remove one of them.")
    return header


def refuse_other_separator(path: Path, first: str, column: str, usable: str = ",") -> None:
    """Refuse a first line that names a column between semicolons, tabs or bars.

    Args:
        path: the file, for the sentence.
        first: the line.
        column: a name that it lacks.
        usable: separators that the file may have.

    Raises:
        InputError: says which separator the file has.
    """
    for separator, name in _SEPARATORS.items():
        cells = [cell.strip().strip('"').lower() for cell in first.split(separator)]
        if separator not in usable and len(cells) > 1 and column in cells:
            raise InputError(
                f"{path}: the separator is {name} where ',' is expected, its first line is "
                f"'{one_line(first, 120)}'; save it with commas."
            )


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of every row with the number of the line it begins on; blank lines are left out.

    A parquet file is read as the CSV that it stands for, its rows numbered from 1 below the header.

    Raises:
        InputError: the file is not UTF-8, or a quote is not closed.
    """
    if is_parquet(path):
        yield from parquet_rows(path)
        return
    begin = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            for cells in reader:
                if cells:
                    yield begin, cells
                begin = reader.line_num + 1
    except UnicodeDecodeError as error:
        # Text is decoded in blocks, so the line is looked for in the bytes.
        raise InputError(
            f"{path}{_undecodable(path)} is not UTF-8 text; save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise InputError(
            f"{path}, row {begin}: not well-formed CSV ({error}); look for a quote that is not "
            f"closed or not doubled."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _undecodable(path: Path) -> str:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f", row {number}:"
    return ""


def id_problem(text: str) -> str | None:
    """Say what is wrong with an id, or None.

    Ids are compared character by character: `1` is not `01`, `a` is not `A`. Blanks around an id
    are nearly always an accident that makes two of one, so they are refused rather than kept.
    """
    if not text.strip():
        return "is empty; fill it in or remove the row"
    if _CONTROL.search(text):
        shown = one_line(text, 40)
        return f"'{shown}' holds a line break or control character; look for an unclosed quote"
    if text != text.strip():
        return f"'{one_line(text, 40)}' begins or ends with a blank; remove it"
    return None


def all_ids_sound(ids: Sequence[str] | np.ndarray) -> bool:
    """Say whether `id_problem` has nothing against any of these ids; quick for many of them."""
    return all(
        all(text and text == text.strip() for text in block) and not _CONTROL.search("".join(block))
        for block in texts_in_blocks(ids)
    )


def line_of_row(path: Path, position: int) -> int:
    """Return the line on which a row begins.

    Args:
        path: the file.
        position: of the row, 0 for the first below the header; blank lines do not count.
    """
    return next(islice(csv_rows(path), position + 1, None))[0]


class RowProblems:
    """Counts a file's bad rows by kind, and keeps the first few of each.

    Args:
        path: the file, for the sentences.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kinds: dict[str, tuple[str, list[int], int]] = {}

    def add(self, kind: str, row: int, text: str) -> None:
        """Book one problem; `text` is kept for the first row of its kind."""
        first, rows, count = self._kinds.get(kind, (text, [], 0))
        if len(rows) < SHOWN_ROWS:
            rows.append(row)
        self._kinds[kind] = (first, rows, count + 1)

    def sentences(self) -> list[str]:
        """Return one sentence a kind of problem."""
        return [
            f"{self.path}, row {rows[0]}: {text}{self._others(rows, count)}."
            for text, rows, count in self._kinds.values()
        ]

    def _others(self, rows: list[int], count: int) -> str:
        if count == 1:
            return ""
        named = ", ".join(map(str, rows)) + (", ..." if count > len(rows) else "")
        return f" ({count} such rows: {named})"


def check_row(
    problems: RowProblems,
    row: int,
    cells: Sequence[str],
    header: Sequence[str],
    checks: Mapping[int, CellCheck],
) -> bool:
    """Check one row's cells.

    Args:
        problems: where problems go.
        row: number of the line that the row begins on.
        cells: the row.
        header: the column names.
        checks: position of a column -> its check.

    Returns:
        Whether the row is good.
    """
    if len(cells) != len(header):
        more = len(cells) > len(header)
        kind, remedy = (
            ("more", "quote the field that holds a comma") if more else ("fewer", "complete it")
        )
        problems.add(
            kind,
            row,
            f"has {len(cells)} field{'s' * (len(cells) > 1)}, {kind} than the header's "
            f"{len(header)}; {remedy}",
        )
        return False
    good = True
    for position, check in checks.items():
        problem = check(cells[position])
        if problem is not None:
            # The sentence of the first row shows its value; the kind is what follows the value.
            problems.add(
                f"{position}{problem.rpartition(chr(39))[2]}", row, f"{header[position]} {problem}"
            )
            good = False
    return good


def explain(path: Path, columns: Mapping[str, CellCheck], reason: str) -> NoReturn:
    """Go through a file that a faster reader refused and raise all that is wrong with its rows.

    Args:
        path: the file.
        columns: column name -> its check.
        reason: the faster reader's own words, for a file in which no row is wrong.

    Raises:
        InputError: always.
    """
    header = read_header(path, list(columns), "change the first line")
    checks = {header.index(name): check for name, check in columns.items()}
    problems = RowProblems(path)
    broken: list[str] = []
    rows = csv_rows(path)
    next(rows)
    try:
        for row, cells in rows:
            check_row(problems, row, cells, header, checks)
    except InputError as error:
        broken.append(str(error))
    refuse([*problems.sentences(), *broken])
    raise InputError(f"{path} cannot be read as CSV: {one_line(reason, 160)}; correct the file.")

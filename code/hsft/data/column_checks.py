"""Ids that are well formed and wrong, as spreadsheets and exports leave them.

A spreadsheet writes a long id as `1.05514E+16`, drops the zeros of `0000000003` and turns `MAR1` into
`1-Mar`; a floating-point column writes `7.0`. Every cell of such a file passes on its own. Here a
column is looked at as a whole: what cannot be right is refused, what may be right is a warning.
`time_checks` does the same for timestamps.

Checks run on the distinct ids, and on the shape's characteristic characters first, so that they cost
little beside reading a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsft.data.blocks import empty_column, slices, texts_in_blocks
from hsft.utils.errors import counted, one_line, refuse

# All doubles up to here are exact for whole numbers.
_EXACT_DOUBLE = 1 << 53
_FEWEST_LONG_IDS = 20
_SHOWN = 3

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_NUMBER_ID = re.compile(r"0*([0-9]+)(?:\.0+)?")
_DECORATED = re.compile(r"^(?:0[0-9]+(?:\.0+)?|[0-9]+\.0+)$", re.MULTILINE)
_LONG_NUMBER = re.compile(r"[1-9][0-9]{15,18}")


@dataclass(frozen=True)
class Finding:
    """One thing that a column as a whole tells.

    Attributes:
        text: what it is, how many cells have it and an example.
        remedy: what to do about it.
        certain: the values cannot be right; else they may be.
        index: position of the first row that has it, 0 for the first below the header; None where
            it is the whole column.
    """

    text: str
    remedy: str
    certain: bool = False
    index: int | None = None


@dataclass(frozen=True)
class _Shape:
    """Ids of one shape.

    Attributes:
        needle: texts of which one is part of every such id: looked for first, since that is quick.
        pattern: matches such an id.
        text, remedy, certain: of the finding.
    """

    needle: tuple[str, ...]
    pattern: re.Pattern[str]
    text: str
    remedy: str
    certain: bool = False


_SHAPES = (
    _Shape(
        ("#",),
        re.compile(r"#(?:N/A|REF!|NAME\?|VALUE!|DIV/0!|NUM!|NULL!|#+)"),
        "the error value of a spreadsheet",
        "fill in the ids or remove the rows",
        certain=True,
    ),
    _Shape(
        (".", "E+", "e+"),
        re.compile(r"[0-9]\.[0-9]+[eE]\+?[0-9]{1,3}|[0-9][eE]\+[0-9]{1,3}"),
        "exponent notation, in which long ids lose their last digits and several become one",
        "export the ids as text",
        certain=True,
    ),
    _Shape(
        (".0",),
        re.compile(r"[0-9]{16,}\.0+"),
        "a floating-point number of more than 15 digits, which is rounded",
        "export the ids as text",
        certain=True,
    ),
    _Shape(
        ("-",),
        re.compile(rf"[0-9]{{1,2}}-{_MONTH}(?:-[0-9]{{2,4}})?|{_MONTH}-[0-9]{{2}}"),
        "a date, as a spreadsheet makes of ids such as MAR1",
        "export the ids as text if so",
    ),
    _Shape(
        (",",),
        re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+"),
        "a number with thousands separators",
        "write the ids as in the other files",
    ),
    _Shape(
        ("'", '"'),
        re.compile(r"'[^']*|=?\"[^\"]*\""),
        "a spreadsheet's mark for text, which is taken as a part of the id",
        "remove the marks if they are none",
    ),
    _Shape(
        ("nan", "NaN", "NAN", "None", "null", "NULL", "<NA>"),
        re.compile(r"nan|NaN|NAN|None|null|NULL|<NA>"),
        "what exports write for empty cells",
        "fill them in or remove the rows if so",
    ),
)


@dataclass
class _Column:
    """A column of ids, and what a first look at all of them finds.

    Attributes:
        name: its name.
        ids: str [n], the distinct ids.
        folder: where an array of the column's size is kept; None: in memory.
        longest: characters of the longest id.
        decorated: an id is a number with zeros in front or behind a decimal point.
        with_point: `.0` is part of an id.
    """

    name: str
    ids: np.ndarray
    folder: Path | None
    longest: int = 0
    decorated: bool = False
    with_point: bool = False

    def texts(self) -> Iterator[str]:
        """Yield all ids."""
        for block in texts_in_blocks(self.ids):
            yield from block


def check_ids(
    column: str,
    ids: np.ndarray,
    codes: np.ndarray | None = None,
    folder: Path | None = None,
) -> list[Finding]:
    """Look at a column of ids as a whole.

    Args:
        column: its name.
        ids: str [n], the distinct ids, each sound on its own (`csv_rows.id_problem`).
        codes: int [N], the position in `ids` of every row's id; None where row i has `ids[i]`.
        folder: where an array of n numbers is kept, should one be needed; None: in memory.
    """
    looked_at = _Column(column, ids, folder)
    # bool [n] of each shape that occurs, True where it does.
    of_shape: dict[int, np.ndarray] = {}
    begin = 0
    for block in texts_in_blocks(ids):
        joined = "\n".join(block)
        looked_at.longest = max(looked_at.longest, max(map(len, block)))
        looked_at.decorated = looked_at.decorated or bool(_DECORATED.search(joined))
        looked_at.with_point = looked_at.with_point or ".0" in joined
        for number, shape in enumerate(_SHAPES):
            if any(needle in joined for needle in shape.needle):
                has_it = [shape.pattern.fullmatch(text) is not None for text in block]
                if any(has_it):
                    marked = of_shape.setdefault(number, np.zeros(len(ids), dtype=bool))
                    marked[begin : begin + len(block)] = has_it
        begin += len(block)
    findings = [
        _shape_finding(column, ids, codes, of_shape[number], shape)
        for number, shape in enumerate(_SHAPES)
        if number in of_shape
    ]
    checks = (_rounded_ids, _two_spellings, _mixed_floats, _shortened_ids)
    findings += [finding for check in checks if (finding := check(looked_at)) is not None]
    return findings


def find_twins(ids: np.ndarray, others: Sequence[str]) -> list[tuple[str, str]]:
    """Find ids that another file has in another spelling: `0000000003` as `3`, `7` as `7.0`.

    Args:
        ids: str [n].
        others: the other file's ids.

    Returns:
        (id, the other file's spelling of it), where neither file has the other's spelling.
    """
    there, here = set(others), set(ids)
    return _same_numbers(
        [text for text in ids if text not in there], [text for text in others if text not in here]
    )


def find_spellings(ids: np.ndarray, more: Sequence[str]) -> list[tuple[str, str]]:
    """Find ids that a larger list has in a second spelling as well.

    Args:
        ids: str [n].
        more: these ids and others.

    Returns:
        (id, its second spelling, which is none of `ids`).
    """
    here = set(ids)
    return _same_numbers(list(ids), [text for text in more if text not in here])


def _same_numbers(ids: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pair ids that are one number in two spellings."""
    if not (_DECORATED.search("\n".join(ids)) or _DECORATED.search("\n".join(others))):
        return []
    spelled = {number: text for text in others if (number := number_of(text)) is not None}
    return [
        (text, spelled[number])
        for text in ids
        if (number := number_of(text)) is not None and number in spelled
    ]


def spelling_problem(
    twins: Sequence[tuple[str, str]], total: int, interactions: object, other: object
) -> str | None:
    """Return a sentence on ids that two files spell differently, None without any.

    Args:
        twins: as `find_twins` returns.
        total: items in the interactions.
        interactions, other: the files, to be named.
    """
    if not twins:
        return None
    shown = ", ".join(f"'{one_line(a, 40)}' as '{one_line(b, 40)}'" for a, b in twins[:_SHOWN])
    return (
        f"{len(twins):,} of {total:,} items of {interactions} are in {other} under another spelling "
        f"only, {shown}: an export changed the leading zeros or the type of the ids of one file; "
        f"write them alike, as text."
    )


def number_of(text: str) -> str | None:
    """Return the digits of an id that is a whole number, without leading zeros and `.0`."""
    match = _NUMBER_ID.fullmatch(text)
    return match[1] if match else None


def sentences(
    path: Path | str,
    findings: Iterable[Finding],
    row_of: Callable[[int], int] | None = None,
) -> list[str]:
    """Write findings as sentences and refuse the certain ones.

    Args:
        path: the file.
        findings: of its columns.
        row_of: position of a row -> number of its line; without it rows are not named.

    Returns:
        The warnings.

    Raises:
        InputError: something cannot be right; `InputErrors` for several kinds.
    """
    certain: list[str] = []
    warnings: list[str] = []
    for finding in findings:
        known = finding.index is not None and row_of is not None
        where = f", row {row_of(finding.index)}" if known else ""  # type: ignore[misc, arg-type]
        sentence = f"{path}{where}: {finding.text}; {finding.remedy}."
        (certain if finding.certain else warnings).append(sentence)
    refuse(certain)
    return warnings


def _shape_finding(
    column: str, ids: np.ndarray, codes: np.ndarray | None, marked: np.ndarray, shape: _Shape
) -> Finding:
    count, first = int(np.count_nonzero(marked)), int(np.argmax(marked))
    positions = [first]
    while len(positions) < min(count, _SHOWN):
        after = positions[-1] + 1
        positions.append(after + int(np.argmax(marked[after:])))
    shown = ", ".join(f"'{one_line(ids[at], 40)}'" for at in positions)
    more = ", ..." if count > _SHOWN else ""
    rows, index = count, first
    if codes is not None:
        parts = list(slices(len(codes)))
        rows = sum(int(np.count_nonzero(marked[codes[part]])) for part in parts)
        index = next(
            part.start + int(np.argmax(codes[part] == first))
            for part in parts
            if (codes[part] == first).any()
        )
    looks = "is" if shape.certain else "may be"
    return Finding(
        f"{column} {shown}{more} ({counted(rows, 'row')}) {looks} {shape.text}",
        shape.remedy,
        shape.certain,
        index,
    )


def _rounded_ids(column: _Column) -> Finding | None:
    """Find long numbers that all are what a double, or a spreadsheet's 15 digits, can hold."""
    if column.longest < 16:
        return None
    example, count, large = "", 0, 0
    all_zeros = all_exact = True
    for text in column.texts():
        if not _LONG_NUMBER.fullmatch(text):
            continue
        example, count = example or text, count + 1
        all_zeros = all_zeros and not text[15:].strip("0")
        value = int(text)
        if value > _EXACT_DOUBLE:
            large += 1
            all_exact = all_exact and int(float(value)) == value
        if not (all_zeros or all_exact):
            return None
    if count < _FEWEST_LONG_IDS:
        return None
    if all_zeros:
        how = "have only zeros after the 15th digit, as a spreadsheet rounds them"
    elif large >= _FEWEST_LONG_IDS:
        how = "are numbers that a floating-point column can hold, as if it had rounded them"
    else:
        return None
    return Finding(
        f"all {count:,} values of {column.name} with 16 or more digits, for example '{example}', {how}",
        "export the ids as text if several may have become one",
    )


def _two_spellings(column: _Column) -> Finding | None:
    """Find ids that are one number: `1`, `01` and `1.0`."""
    if not column.decorated:
        return None
    repeated = _repeated_hashes(column)
    if not repeated:
        return None
    spelled: dict[str, str] = {}
    pairs, count = [], 0
    for text in column.texts():
        if _spelling_hash(column, text) not in repeated:
            continue
        number = number_of(text)
        if number is not None and spelled.setdefault(number, text) != text:
            count += 1
            if count <= _SHOWN:
                pairs.append((spelled[number], text))
    if not count:
        return None
    shown = ", ".join(f"'{a}' and '{b}'" for a, b in pairs)
    return Finding(
        f"{count:,} values of {column.name} are a second spelling of a number ({shown}) and count as "
        f"others",
        "write them alike if they are one",
    )


def _spelling_hash(column: _Column, text: str) -> int:
    """Return a number that is the same for spellings of one number, and seldom for other ids."""
    # Quick, and enough for most files: zeros in front of numbers of one length.
    number = number_of(text) if column.with_point else text.lstrip("0")
    return hash(text if number is None else number)


def _repeated_hashes(column: _Column) -> set[int]:
    """Return the numbers of `_spelling_hash` that several ids have."""
    hashes = empty_column(len(column.ids), np.int64, column.folder)
    begin = 0
    for block in texts_in_blocks(column.ids):
        hashes[begin : begin + len(block)] = [_spelling_hash(column, text) for text in block]
        begin += len(block)
    hashes.sort()
    repeated: set[int] = set()
    for part in slices(len(hashes) - 1):
        after = hashes[part.start + 1 : part.stop + 1]
        repeated.update(after[hashes[part] == after].tolist())
    return repeated


def _mixed_floats(column: _Column) -> Finding | None:
    """Find numbers of which some, and not all, end in `.0`."""
    if not column.with_point:
        return None
    example, floats, whole = "", 0, 0
    for text in column.texts():
        if re.fullmatch(r"[0-9]+\.0+", text):
            example, floats = example or text, floats + 1
        elif text.isascii() and text.isdecimal():
            whole += 1
    if not floats or not whole:
        return None
    return Finding(
        f"{floats:,} values of {column.name} end in .0, for example '{example}', and {whole:,} "
        f"numbers do not",
        "write them alike if a floating-point column made the difference",
    )


def _shortened_ids(column: _Column) -> Finding | None:
    """Find numbers that are shorter than all other ids, which have letters and one length."""
    width, total = column.longest, len(column.ids)
    if width < 5:
        return None
    example, short, with_letters = "", 0, 0
    for text in column.texts():
        if len(text) == width:
            with_letters += not text.isdecimal()
        elif text.startswith("0") or not (text.isascii() and text.isdecimal()):
            return None
        else:
            example, short = example or text, short + 1
    if not short or 2 * short > total or 2 * with_letters < total - short:
        return None
    return Finding(
        f"{short:,} values of {column.name}, for example '{example}', are numbers shorter than "
        f"the {width} characters of the {total - short:,} others, and may have lost leading zeros",
        "export the ids as text if so",
    )

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsft.utils.errors import one_line, refuse

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


def check_ids(column: str, ids: np.ndarray, codes: np.ndarray | None = None) -> list[Finding]:
    """Look at a column of ids as a whole.

    Args:
        column: its name.
        ids: str [n], the distinct ids, each sound on its own (`csv_rows.id_problem`).
        codes: int [N], the position in `ids` of every row's id; None where row i has `ids[i]`.
    """
    joined = "\n".join(ids)
    findings = []
    for shape in _SHAPES:
        if any(needle in joined for needle in shape.needle):
            positions = [at for at, text in enumerate(ids) if shape.pattern.fullmatch(text)]
            if positions:
                findings.append(_shape_finding(column, ids, codes, positions, shape))
    checks = (_rounded_ids, _two_spellings, _mixed_floats, _shortened_ids)
    findings += [finding for check in checks if (finding := check(column, ids, joined)) is not None]
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


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _shape_finding(
    column: str, ids: np.ndarray, codes: np.ndarray | None, positions: list[int], shape: _Shape
) -> Finding:
    shown = ", ".join(f"'{one_line(ids[at], 40)}'" for at in positions[:_SHOWN])
    more = ", ..." if len(positions) > _SHOWN else ""
    if codes is None:
        rows, index = len(positions), positions[0]
    else:
        rows = int(np.bincount(codes, minlength=len(ids))[positions].sum())
        index = int(np.argmax(codes == positions[0]))
    looks = "is" if shape.certain else "may be"
    return Finding(
        f"{column} {shown}{more} ({_rows(rows)}) {looks} {shape.text}",
        shape.remedy,
        shape.certain,
        index,
    )


def _rounded_ids(column: str, ids: np.ndarray, joined: str) -> Finding | None:
    """Find long numbers that all are what a double, or a spreadsheet's 15 digits, can hold."""
    if len(max(ids, key=len)) < 16:
        return None
    texts = [text for text in ids if _LONG_NUMBER.fullmatch(text)]
    if len(texts) < _FEWEST_LONG_IDS:
        return None
    if all(not text[15:].strip("0") for text in texts):
        how = "have only zeros after the 15th digit, as a spreadsheet rounds them"
    else:
        large = [value for value in map(int, texts) if value > _EXACT_DOUBLE]
        if len(large) < _FEWEST_LONG_IDS or any(int(float(value)) != value for value in large):
            return None
        how = "are numbers that a floating-point column can hold, as if it had rounded them"
    return Finding(
        f"all {len(texts):,} values of {column} with 16 or more digits, for example '{texts[0]}', {how}",
        "export the ids as text if several may have become one",
    )


def _two_spellings(column: str, ids: np.ndarray, joined: str) -> Finding | None:
    """Find ids that are one number: `1`, `01` and `1.0`."""
    if not _DECORATED.search(joined):
        return None
    # Quick, and enough for most files: zeros in front of numbers of one length.
    if ".0" not in joined and len({text.lstrip("0") for text in ids}) == len(ids):
        return None
    spelled: dict[str, str] = {}
    pairs = []
    for text in ids:
        number = number_of(text)
        if number is not None and spelled.setdefault(number, text) != text:
            pairs.append((spelled[number], text))
    if not pairs:
        return None
    shown = ", ".join(f"'{a}' and '{b}'" for a, b in pairs[:_SHOWN])
    return Finding(
        f"{len(pairs):,} values of {column} are a second spelling of a number ({shown}) and count as "
        f"others",
        "write them alike if they are one",
    )


def _mixed_floats(column: str, ids: np.ndarray, joined: str) -> Finding | None:
    """Find numbers of which some, and not all, end in `.0`."""
    if ".0" not in joined:
        return None
    floats = [text for text in ids if re.fullmatch(r"[0-9]+\.0+", text)]
    whole = sum(1 for text in ids if text.isascii() and text.isdecimal())
    if not floats or not whole:
        return None
    return Finding(
        f"{len(floats):,} values of {column} end in .0, for example '{floats[0]}', and {whole:,} "
        f"numbers do not",
        "write them alike if a floating-point column made the difference",
    )


def _shortened_ids(column: str, ids: np.ndarray, joined: str) -> Finding | None:
    """Find numbers that are shorter than all other ids, which have letters and one length."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    width = int(lengths.max())
    short = np.flatnonzero(lengths < width)
    if width < 5 or not len(short) or 2 * len(short) > len(ids):
        return None
    if not all(ids[at].isascii() and ids[at].isdecimal() for at in short.tolist()):
        return None
    if any(ids[at].startswith("0") for at in short.tolist()):
        return None
    full = [text for text, length in zip(ids, lengths.tolist(), strict=True) if length == width]
    if 2 * sum(1 for text in full if not text.isdecimal()) < len(full):
        return None
    return Finding(
        f"{len(short):,} values of {column}, for example '{ids[short[0]]}', are numbers shorter than "
        f"the {width} characters of the {len(full):,} others, and may have lost leading zeros",
        "export the ids as text if so",
    )

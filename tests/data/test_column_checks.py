"""Ids that are well formed and wrong."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsft.data.cache import open_cache, save_cache
from hsft.data.column_checks import Finding, check_ids, find_spellings, find_twins, sentences
from hsft.utils.errors import InputErrors
from item_caching import main as cache_main
from tests.bad_input import CACHE, CSV, INFORMATION, expect_refusal
from tests.conftest import Project

CHECK = ("--check", "True")


def findings(ids: Sequence[str]) -> list[Finding]:
    actual = check_ids("item_id", np.array(ids, dtype=object))
    with pytest.MonkeyPatch.context() as patch:
        # Of a large file few ids are looked at at a time.
        patch.setattr("hsft.data.blocks.TEXTS_AT_A_TIME", 2)
        patch.setattr("hsft.data.blocks.ROWS_AT_ONCE", 3)
        assert check_ids("item_id", np.array(ids)) == actual
    return actual


CERTAIN = {
    "a spreadsheet's exponent": (["a", "1.05514E+16", "b"], "exponent notation"),
    "pandas' exponent": (["1.055144e+16"], "exponent notation"),
    "Java's exponent": (["1.055144E16"], "exponent notation"),
    "one digit": (["1E+16"], "exponent notation"),
    "an error value": (["a", "#N/A"], "error value"),
    "another error value": (["#REF!"], "error value"),
    "too narrow a column": (["########"], "error value"),
    "a float of a long number": (["10551438040000017.0"], "rounded"),
}

POSSIBLE = {
    "a date": (["MAR2", "1-Mar"], "'1-Mar' (1 row) may be a date"),
    "a month": (["Sep-02", "x"], "'Sep-02' (1 row) may be a date"),
    "thousands": (["1,234", "7"], "'1,234' (1 row) may be a number with thousands"),
    "a mark for text": (["'007", "x"], "mark for text"),
    "a formula for text": (['="007"', "x"], "mark for text"),
    "an empty cell": (["NaN", "x"], "empty cells"),
    "zeros in front": (["1", "x", "01"], "1 values of item_id are a second spelling"),
    "floats": (["1", "1.0"], "'1' and '1.0'"),
    "some floats": (
        ["12", "7.0", "x"],
        "1 values of item_id end in .0, for example '7.0', and 1 n",
    ),
    "lost zeros": (["B00000000A", "B00000000C", "7"], "may have lost leading zeros"),
    "15 digits": ([f"{10**14 + 7 * n}00" for n in range(20)], "only zeros after the 15th digit"),
}

SOUND = {
    "words": ["i1", "v20", "blue-sky", "2-1-Mar", "MAR1", "nano", "#1"],
    "hexadecimal": ["12e45678", "1e5", "0e12", "12E4"],
    "versions": ["1.2.3", "1.5"],
    "padded": [f"{n:07d}" for n in range(30)],
    "counted": [str(n) for n in range(1, 130)],
    "counted letters": [f"i{n}" for n in range(130)],
    "long": [str(10**17 + 7919 * n * n + 1) for n in range(40)],
    "books and others": [f"B{n:09d}" for n in range(20)] + [f"{n:010d}" for n in range(20)],
    "a few long ones": [str(2**60 + 256 * n) for n in range(5)],
}


@pytest.mark.parametrize("case", CERTAIN)
def test_ids_that_cannot_be_right(case: str) -> None:
    ids, words = CERTAIN[case]
    assert [(words in actual.text, actual.certain) for actual in findings(ids)][:1] == [
        (True, True)
    ]


@pytest.mark.parametrize("case", POSSIBLE)
def test_ids_that_may_be_wrong(case: str) -> None:
    ids, words = POSSIBLE[case]
    texts = [actual.text for actual in findings(ids) if not actual.certain]
    assert any(words in text for text in texts), texts
    assert len(texts) == len(findings(ids))


@pytest.mark.parametrize("case", SOUND)
def test_ids_that_nothing_is_said_of(case: str) -> None:
    assert findings(SOUND[case]) == []


def test_ids_that_went_through_a_float_column() -> None:
    exact = np.random.default_rng(0).integers(2**60, 2**62, 50)
    assert findings([str(value) for value in exact]) == []
    rounded = pd.Series(exact).astype(float).astype("int64").astype(str)
    (actual,) = findings(list(rounded))
    assert not actual.certain
    assert "all 50 values of item_id with 16 or more digits" in actual.text
    assert "floating-point column can hold" in actual.text


def test_rows_are_counted_and_the_first_is_named() -> None:
    ids = np.array(["a", "nan", "b", "null"], dtype=object)
    (actual,) = check_ids("user_id", ids, np.array([0, 2, 1, 0, 3, 1]))
    assert (actual.index, actual.certain) == (2, False)
    assert actual.text.startswith("user_id 'nan', 'null' (3 rows) may be")
    assert sentences("x.csv", [actual], lambda index: index + 2)[0].startswith(
        "x.csv, row 4: user_id"
    )


def test_several_certain_findings_are_a_sentence_each() -> None:
    with pytest.raises(InputErrors) as caught:
        sentences("x.csv", findings(["1E+16", "#N/A", "nan"]))
    assert len(caught.value.problems) == 2


def test_twins_have_another_spelling_in_the_other_file_only() -> None:
    ids = np.array(["0000000003", "x", "7", "0012", "12", "5"], dtype=object)
    others = ["3", "x", "7.0", "12", "6"]
    # 0012 is no twin: the other file's 12 is the interactions' own 12.
    assert find_twins(ids, others) == [("0000000003", "3"), ("7", "7.0")]
    assert find_twins(ids, [*others, "0000000003"]) == [("7", "7.0")]
    assert find_twins(np.array(["3", "4"], dtype=object), ["30", "40"]) == []
    assert find_spellings(ids[:2], ["0000000003", "x", "3", "y"]) == [("0000000003", "3")]
    assert find_spellings(ids[:2], ["0000000003", "x"]) == []


def spoil_ids(project: Project) -> None:
    """Give items ids of 10 digits or letters, and drop the information's leading zeros."""

    def asin(item: str) -> str:
        number = int(item[1:])
        return f"{number + 1:010d}" if number % 3 == 0 else f"B{number:09d}"

    for name, strip in ((CSV, False), (INFORMATION, True)):
        header, *rows = csv.reader((project.root / name).open())
        ids = [asin(row[0]).lstrip("0" if strip else "") for row in rows]
        with (project.root / name).open("w", newline="") as stream:
            csv.writer(stream).writerows(
                [header, *([item, *row[1:]] for item, row in zip(ids, rows, strict=True))]
            )


@pytest.mark.parametrize("check", [False, True])
def test_lost_zeros_in_the_information_are_refused(project: Project, check: bool) -> None:
    spoil_ids(project)
    more = CHECK if check else ()
    sentence = (
        f"error: 7 of 20 items of {CSV} are in {INFORMATION} under another spelling only, '00000000"
    )
    model = ("--item_pretrain_dir", str(project.llama), "--item_cache_path", "new.safetensors")
    line = expect_refusal(
        project,
        lambda: project.call(cache_main, [*project.arguments, *model, *more]),
        ["write them alike, as text"],
    )
    assert line.startswith(sentence)
    encode = ("--use_item_cache", "False", "--val_only", "True")
    line = expect_refusal(project, lambda: project.run(*encode, *model, *more), [])
    assert line.startswith(sentence)


def recode(path: Path, *more: str) -> None:
    """Write a cache with 7 in place of i7, and with the items `more`."""
    cache = open_cache(path)
    ids = [*("7" if item == "i7" else item for item in cache.item_ids), *more]
    save_cache(path, ids, cache.embeddings[[n % 20 for n in range(len(ids))]], cache.metadata)


@pytest.mark.parametrize("check", [(), CHECK])
def test_a_cache_in_another_spelling_is_refused(project: Project, check: tuple[str, ...]) -> None:
    (project.root / CSV).write_text((project.root / CSV).read_text().replace("i7,", "0007,"))
    recode(project.root / CACHE)
    expect_refusal(
        project,
        lambda: project.run("--model", "item_knn", *check),
        ["1 of 20 items of tiny are in", CACHE, "'0007' as '7'"],
    )


def test_a_cache_with_both_spellings_is_a_warning(project: Project) -> None:
    (project.root / CSV).write_text((project.root / CSV).read_text().replace("i7,", "0007,"))
    recode(project.root / CACHE, "0007")
    code, _, err = project.run("--model", "item_knn", "--run_name", "run")
    assert code == 0, err
    sentence = f"the item cache {CACHE} has 1 items of tiny in two spellings, '0007' and '7'"
    assert sentence in err
    code, out, err = project.run("--model", "item_knn", *CHECK)
    assert code == 0, err
    assert f"warning: {sentence}" in out


@pytest.mark.parametrize("check", [(), CHECK])
def test_rounded_ids_end_a_run(project: Project, check: tuple[str, ...]) -> None:
    content = (project.root / CSV).read_text()
    rows = [line.split(",") for line in content.splitlines()[1:]]
    long = [f"{10551438040000000 + 17 * int(item[1:]):.5E},{u},{t}" for item, u, t in rows]
    (project.root / CSV).write_text("\n".join([content.splitlines()[0], *long, ""]))
    expect_refusal(
        project,
        lambda: project.run("--model", "pop", *check),
        [f"{CSV}, row 2: item_id '1.05514E+16' (330 rows) is exponent notation", "as text"],
    )

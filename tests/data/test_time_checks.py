"""Timestamps that are well formed and wrong, and ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsft.data.interactions import Interactions, read_interactions
from hsft.data.time_checks import Ties, check_time_texts, check_times, count_ties, date_of
from hsft.utils.errors import InputError
from tests.bad_input import CSV, expect_refusal
from tests.conftest import Project

YEAR_1998, YEAR_2020 = 883_612_800, 1_577_836_800


def texts(timestamps: list[int]) -> list[tuple[str, bool, int | None]]:
    actual = check_times(np.array(timestamps, dtype=np.int64))
    with pytest.MonkeyPatch.context() as patch:
        # Of a large file few rows are looked at at a time.
        patch.setattr("hsft.data.blocks.ROWS_AT_ONCE", 3)
        assert check_times(np.array(timestamps, dtype=np.int64)) == actual
    return [(finding.text, finding.certain, finding.index) for finding in actual]


@pytest.mark.parametrize("start", [300_000_000, 600_000_000, YEAR_1998, YEAR_2020])
@pytest.mark.parametrize("factor", [10**3, 10**6, 10**9])
def test_units_are_told_apart_by_their_gap(start: int, factor: int) -> None:
    seconds = [start + 1000 * n for n in range(9)]
    assert texts(seconds) == []
    assert texts([factor * time for time in seconds]) == []
    mixed = [time * (factor if n in (4, 7) else 1) for n, time in enumerate(seconds)]
    ((text, certain, index),) = texts(mixed)
    assert text.startswith("timestamps mix units: 7 rows are")
    assert (certain, index) == (True, 4)
    assert str(mixed[4]) in text


@pytest.mark.parametrize(
    "timestamps",
    [
        [1, 2, 5000, 40],  # counters
        [1, 10_000_000],  # a wide range of counters
        [0, 86_400, 10**9],  # seconds since some start
        [10_000_000, 900_000_000, 200_000_000],  # 1970 to 1998
        [YEAR_1998, YEAR_2020],
        [-(2**63), -5, 7],
        [5 * 10**18, 2**63 - 1],
    ],
)
def test_ranges_that_are_one_unit(timestamps: list[int]) -> None:
    assert not any(certain for _, certain, _ in texts(timestamps))


def test_years_that_are_unlikely_among_others_are_a_warning() -> None:
    # The lowest timestamp of the year 1, as in Amazon's reviews of 2023.
    milliseconds = [1000 * (YEAR_2020 + n) for n in range(9)]
    ((text, certain, index),) = texts([*milliseconds, -62_135_596_800_000, 0])
    assert not certain
    assert index == 9
    assert text == (
        "2 of 11 timestamps lie before 1990 or after 2099, read as milliseconds like the others, 1 of "
        "them negative and so before 1970, for example -62135596800000 (0001-01-01 UTC)"
    )
    ((text, certain, _),) = texts([YEAR_2020, YEAR_2020 + 1, 5_000_000_000])
    assert "1 of 3 timestamps" in text
    assert "5000000000 (2128-06-11 UTC)" in text
    assert not certain


def test_times_that_went_through_a_32_bit_column() -> None:
    exact = YEAR_2020 + 61 * np.arange(1500)
    assert check_times(exact) == []
    rounded = pd.Series(exact).astype("float32").astype("int64").to_numpy()
    (actual,) = check_times(rounded)
    assert "32-bit" in actual.text
    assert not actual.certain
    assert check_times(exact // 86_400 * 86_400) == []


def test_exponents_that_lack_the_last_digit_are_refused() -> None:
    actual = check_time_texts(["1600000000.0", "1.59E+09", "1.6e9"])
    assert actual is not None
    assert actual.certain
    assert actual.index == 1
    assert "2 timestamps in exponent notation, the first '1.59E+09', lack" in actual.text
    # Java writes whole numbers of more than 7 digits so; one that ends in zeros is among them.
    assert check_time_texts(["1.5886877289E12", "1.588687728923E12"]) is None
    assert check_time_texts(["1588687728923.0", "7"]) is None


def test_a_date_has_four_digits_of_year_or_none() -> None:
    assert date_of(0, 1) == "1970-01-01 UTC"
    assert date_of(-62_135_596_800, 1) == "0001-01-01 UTC"
    assert date_of(2**62, 1) == "no date of the years 1 to 9999"


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["item_id,user_id,timestamp", *rows, ""]))
    return path


def test_a_file_with_rounded_times_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ["a,x,1600000000", "", "b,x,1.60E+09"])
    with pytest.raises(InputError, match="row 4: 1 timestamps in exponent notation"):
        read_interactions(path)


def test_warnings_name_the_line(tmp_path: Path) -> None:
    rows = [f"i{n},x,{YEAR_2020 + n}" for n in range(5)]
    plain = read_interactions(write(tmp_path / "x.csv", [*rows, "i9,x,-3"]))
    assert len(plain.warnings) == 1
    assert plain.warnings[0].startswith(f"{tmp_path}/x.csv, row 7: 1 of 6 timestamps lie before")
    blank = read_interactions(write(tmp_path / "y.csv", ["", "", '"i9",x,-3', *rows]))
    assert blank.warnings[0].startswith(f"{tmp_path}/y.csv, row 4: 1 of 6 timestamps lie before")


def ties_of(rows: list[tuple[str, str, int]]) -> Ties:
    item_ids = list(dict.fromkeys(item for item, _, _ in rows))
    by_user: dict[str, list[tuple[str, int]]] = {}
    for item, user, time in rows:
        by_user.setdefault(user, []).append((item, time))
    histories = [sorted(history, key=lambda pair: pair[1]) for history in by_user.values()]
    return count_ties(
        np.array([item_ids.index(item) + 1 for one in histories for item, _ in one]),
        np.array([time for one in histories for _, time in one]),
        np.concatenate([[0], np.cumsum([len(one) for one in histories])]),
        np.array(["[PAD]", *item_ids], dtype=object),
    )


def test_ties_are_counted() -> None:
    rows = [
        # The test item is decided by a tie; three interactions at 5.
        *(("a", "u", 1), ("b", "u", 5), ("c", "u", 5), ("d", "u", 5)),
        # The validation item alone.
        *(("b", "v", 2), ("a", "v", 2), ("c", "v", 3)),
        # One item twice: the order does not matter. And another user at the same time.
        *(("a", "w", 3), ("a", "w", 3)),
        ("a", "x", 3),
    ]
    ties = ties_of(rows)
    assert (ties.interactions, ties.total, ties.users) == (7, 10, 3)
    assert (ties.test, ties.valid) == (1, 2)
    # b-c and c-d ascend, b-a does not.
    assert (ties.pairs, ties.ascending) == (3, 2)
    assert ties.summary().startswith("7 of 10 interactions share user and timestamp")


def day_rows(sort: bool) -> list[str]:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for day in range(3):
            items = rng.choice(30, size=4, replace=False)
            items = np.sort(items) if sort else items
            rows += [f"v{n},u{user},{YEAR_2020 + 86_400 * day}" for n in items]
    return rows


def test_a_file_that_is_sorted_by_item_is_a_warning(tmp_path: Path) -> None:
    shuffled = read_interactions(write(tmp_path / "x.csv", day_rows(sort=False)))
    (warning,) = shuffled.warnings
    assert "timestamps are whole days" in warning
    assert "the test item of 40 and the validation item of 40 of 40 users" in warning
    ordered = read_interactions(write(tmp_path / "y.csv", day_rows(sort=True)))
    assert len(ordered.warnings) == 2
    assert "item ids ascend in 360 of 360 pairs" in ordered.warnings[1]
    assert "--tie_order shuffle" in ordered.warnings[1]


def test_shuffled_ties_are_drawn_with_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", day_rows(sort=True))

    def items(read: Interactions) -> list[list[str]]:
        return [
            list(read.item_ids[read.items[start : start + 4]]) for start in range(0, len(read), 4)
        ]

    kept = read_interactions(path)
    drawn = read_interactions(path, "shuffle", 1)
    assert drawn.warnings == ()
    assert drawn.timestamps.tolist() == kept.timestamps.tolist()
    assert drawn.user_ids.tolist() == kept.user_ids.tolist()
    assert items(drawn) != items(kept)
    assert list(map(sorted, items(drawn))) == list(map(sorted, items(kept)))
    assert items(read_interactions(path, "shuffle", 1)) == items(drawn)
    assert items(read_interactions(path, "shuffle", 2)) != items(drawn)
    # Every place of an item among four is as likely as the others: 480 draws.
    places = [sorted(group, key=lambda v: int(v[1:])).index(group[0]) for group in items(drawn)]
    assert min(np.bincount(places, minlength=4)) > 10
    # Without ties nothing changes.
    path = write(tmp_path / "y.csv", [f"i{n},u{n % 3},{YEAR_2020 - n}" for n in range(30)])
    assert (
        read_interactions(path, "shuffle", 5).items.tolist()
        == read_interactions(path).items.tolist()
    )


def test_a_run_and_its_check_say_the_same_of_ties(project: Project) -> None:
    write(project.root / CSV, day_rows(sort=True))
    code, out, err = project.run("--model", "pop", "--check", "True")
    assert code == 0, err
    warnings = [
        line.partition(": ")[2] for line in out.splitlines() if line.startswith("warning: ")
    ]
    assert len(warnings) == 2
    code, _, err = project.run("--model", "pop", "--run_name", "file")
    assert code == 0, err
    for warning in warnings:
        assert f" {warning}\n" in err
    code, _, err = project.run("--model", "pop", "--run_name", "drawn", "--tie_order", "shuffle")
    assert code == 0, err
    assert "tied" not in err
    config = (project.root / "saved/drawn/config.yaml").read_text()
    assert "tie_order: shuffle" in config


@pytest.mark.parametrize("check", [(), ("--check", "True")])
def test_mixed_units_before_2000_end_a_run(project: Project, check: tuple[str, ...]) -> None:
    rows = day_rows(sort=False)
    spoiled = [
        f"{item},{user},{(int(time) - 700_000_000) * (1000 if n % 3 == 2 else 1)}"
        for n, (item, user, time) in enumerate(row.split(",") for row in rows)
    ]
    write(project.root / CSV, spoiled)
    expect_refusal(
        project,
        lambda: project.run("--model", "pop", *check),
        [f"{CSV}, row 4: timestamps mix units: 320 rows are", "160 at least"],
    )

"""prepare_data.py: small files of the published formats, with statistics worked out by hand."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsft.data.csv_rows import RowProblems
from hsft.data.interactions import read_interactions
from hsft.data.item_text import read_item_texts, read_item_titles
from hsft.data.prepare.options import parse_options
from hsft.data.prepare.pixelrec import pixelrec
from hsft.data.prepare.rows import Event, plain_text
from hsft.data.prepare.table import (
    Table,
    core_rows,
    first_of_repeats,
    once_filtered_rows,
    read_events,
)
from hsft.inputs.prepare_data import prepare
from hsft.utils.errors import InputError
from hsft.utils.program import run_program
from prepare_data import main
from tests.helpers import ROOT

KEYS = ("title", "tag", "description")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(name: str) -> list[str]:
    return Path(f"dataset/{name}.csv").read_text(encoding="utf-8").splitlines()[1:]


def texts_of(name: str) -> dict[str, str]:
    items = read_item_texts(f"information/{name}.csv", KEYS, "")
    return dict(zip(items.item_ids, items.texts, strict=True))


def printed(out: str) -> dict[str, str]:
    """The table's rows: name -> value."""
    pairs = [line.strip().split("  ") for line in out.splitlines() if line.startswith("  ")]
    return {pair[0]: pair[-1].strip() for pair in pairs}


def run(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert run_program(main, argv) == 0, capsys.readouterr().err
    return printed(capsys.readouterr().out)


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert run_program(main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    return err


PIXEL = ("pixelrec", "--interactions", "Pixel200K.csv", "--items", "info.csv")
INFO = (
    "item_id,view_number,comment_number,thumbup_number,share_number,coin_number,favorite_number,"
    "barrage_number,title,tag,description\n"
)


def write_pixel(interactions: str = "item_id,user_id,timestamp\n") -> None:
    Path("Pixel200K.csv").write_text(
        interactions + "i1,u1,1600000000\ni2,u1,1600086400\ni1,u2,1600000005\n"
        "i1,u2,1600000005\ni3,u1,1600000001\n"
    )
    Path("info.csv").write_text(
        INFO + 'i1,9,1,1,1,1,1,1,"A, B",food,"two\nlines"\ni9,9,1,1,1,1,1,1,unused,x,y\n'
        "i3,1,1,1,1,1,1,1,,,\ni1,9,1,1,1,1,1,1,again,,\n"
    )


def test_pixelrec_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    table = run(PIXEL, capsys)
    assert rows_of("Pixel200K") == [
        "i1,u1,1600000000", "i2,u1,1600086400", "i1,u2,1600000005", "i3,u1,1600000001",
    ]  # fmt: skip
    # Two users, three items, four interactions: density 4 / 6, lengths 3 and 1.
    assert table == {
        "users": "2", "items": "3", "interactions": "4", "density": "66.6667%",
        "history length, mean": "2.00", "history length, median": "2", "same item again": "0",
        "items with text": "1 of 3", "first interaction": "2020-09-13 UTC",
        "last interaction": "2020-09-14 UTC", "items without a row, kept without text": "1",
        "interactions that repeat user, item and timestamp": "1",
        "rows of items without interactions, which are not in the catalogue": "1",
        "rows of items described before": "1",
        "users too short to train on (fewer than 4)": "2",
        "users too short for a validation target (fewer than 3)": "1",
        "users too short for a test target (fewer than 2)": "1",
    }  # fmt: skip
    texts = texts_of("Pixel200K")
    assert texts == {
        "i1": "title: A, Btag: fooddescription: two lines", "i3": "", "i2": "",
    }  # fmt: skip
    read = read_interactions("dataset/Pixel200K.csv")
    assert read.item_ids[read.items[:3]].tolist() == ["i1", "i3", "i2"]


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ("\ufeffitem_id,user_id,timestamp", (0, 1, 2)),
        ("Unnamed: 0,user,item,timestamp", (3, 1, 0, 2)),
        (",User_ID,item_id,timestamp", (3, 1, 0, 2)),
        ("userID\tvideoID\ttimestamp", (1, 0, 2)),
        ("ts;uid;IID", (2, 1, 0)),
    ],
)
def test_pixelrec_columns_in_other_orders(header: str, order: tuple[int, ...]) -> None:
    write_pixel()
    plain = [line.split(",") for line in Path("Pixel200K.csv").read_text().splitlines()[1:]]
    comma = next((one for one in "\t;" if one in header), ",")
    lines = [header, *(comma.join([*row, "7"][at] for at in order) for row in plain)]
    Path("Pixel200K.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    prepare(parse_options(PIXEL))
    assert rows_of("Pixel200K") == [
        "i1,u1,1600000000", "i2,u1,1600086400", "i1,u2,1600000005", "i3,u1,1600000001",
    ]  # fmt: skip


def test_pixelrec_ordered_lists(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    Path("Pixel200K.csv").write_text("7\t3 1 2\n8\t1\n")
    Path("info.csv").write_text("item_id,title\n1,one\n")
    table = run(PIXEL, capsys)
    assert rows_of("Pixel200K") == ["3,7,1", "1,7,2", "2,7,3", "1,8,1"]
    assert table["first interaction"] == "1"


REVIEW_2014 = {
    "reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J.", "helpful": [2, 3],
    "reviewText": "Fine.", "overall": 5.0, "summary": "s", "unixReviewTime": 1252800000,
    "reviewTime": "09 13, 2009",
}  # fmt: skip
META_2014 = (
    "{'asin': '0000013714', 'title': 'It\\'s \"new\"', 'price': 3.17, 'imUrl': 'http://x/y.jpg', "
    "'related': {'also_bought': ['B00JHONN1S']}, 'salesRank': {'Books': 1}, "
    "'categories': [['Books', 'Music'], ['Books', 'Hymns']], 'description': 'Old \\d hymns'}\n"
    '{"asin": "B00JHONN1S", "categories": [["Books"]]}\n'
)
RATINGS_2014 = (
    "A2SUAM1J3GNN3B,0000013714,5.0,1252800000\n"
    "A2SUAM1J3GNN3B,B00JHONN1S,2.0,1252886400\n"
    "AH2L9G3DQHHAJ,B00JHONN1S,4.0,1252886400\n"
)


def write_2014() -> None:
    with gzip.open("meta_Books.json.gz", "wt", encoding="utf-8") as stream:
        stream.write(META_2014)


def test_amazon_2014_ratings(capsys: pytest.CaptureFixture[str]) -> None:
    write_2014()
    Path("ratings_Books.csv").write_text(RATINGS_2014)
    command = ("amazon2014", "--reviews", "ratings_Books.csv", "--meta", "meta_Books.json.gz")
    table = run(command, capsys)
    assert rows_of("amazon2014_Books")[0] == "0000013714,A2SUAM1J3GNN3B,1252800000"
    assert (table["users"], table["items"], table["interactions"]) == ("2", "2", "3")
    assert (table["density"], table["items with text"]) == ("75.0000%", "2 of 2")
    assert (table["first interaction"], table["last interaction"]) == (
        "2009-09-13 UTC", "2009-09-14 UTC",
    )  # fmt: skip
    assert texts_of("amazon2014_Books") == {
        "0000013714": 'title: It\'s "new"tag: Books, Music, Hymnsdescription: Old \\d hymns',
        "B00JHONN1S": "tag: Books",
    }
    table = run((*command, "--min_rating", "4", "--overwrite"), capsys)
    assert table["interactions rated below 4"] == "1"
    assert table["interactions"] == "2"


def test_amazon_2014_reviews_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    write_2014()
    lines = [
        json.dumps(REVIEW_2014),
        json.dumps({**REVIEW_2014, "asin": "B00JHONN1S"}),
        repr(REVIEW_2014),
    ]
    with gzip.open("reviews_Books_5.json.gz", "wt") as stream:
        stream.write("\n".join(lines) + "\n")
    command = ("amazon2014", "--reviews", "reviews_Books_5.json.gz", "--meta", "meta_Books.json.gz")
    table = run((*command, "--keep_repeats"), capsys)
    assert rows_of("amazon2014_Books") == [
        "0000013714,A2SUAM1J3GNN3B,1252800000", "B00JHONN1S,A2SUAM1J3GNN3B,1252800000",
        "0000013714,A2SUAM1J3GNN3B,1252800000",
    ]  # fmt: skip
    assert table["same item again"] == "1"


def test_ratings_of_2018_are_not_taken_for_those_of_2014(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_2014()
    swapped = [line.split(",") for line in RATINGS_2014.splitlines()]
    Path("r.csv").write_text("".join(f"{b},{a},{c},{d}\n" for a, b, c, d in swapped))
    command = ("amazon2014", "--reviews", "r.csv", "--meta", "meta_Books.json.gz", "--name", "b")
    assert "add --item_first" in refused(command, capsys)
    run((*command, "--item_first"), capsys)
    assert rows_of("b")[0] == "0000013714,A2SUAM1J3GNN3B,1252800000"


@pytest.mark.parametrize(
    ("meta", "more", "words"),
    [
        # Users of ten characters, so that the columns' lengths do not tell which is which.
        (
            META_2014,
            (),
            "the 2 items of r.csv is in meta.json; are the columns item,user: add --it",
        ),
        (META_2014, ("--item_first",), "are the columns user,item: leave out --item_first?"),
        ("", (), "meta.json describes no item at all"),
    ],
)
def test_items_of_which_none_is_described(
    meta: str, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("meta.json").write_text(meta)
    first, second = ("0000013714", "B00JHONN1S"), ("A2SUAM1J3G", "AH2L9G3DQH")
    if more:
        first, second = second, first
    Path("r.csv").write_text(f"{first[0]},{second[0]},5,1\n{first[1]},{second[1]},5,2\n")
    command = ("amazon2014", "--reviews", "r.csv", "--meta", "meta.json", *more)
    assert words in refused(command, capsys)


def test_other_information_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    Path("info.csv").write_text("item_id,title\nx,other\n")
    err = refused(PIXEL, capsys)
    assert "none of the 3 items of Pixel200K.csv is in info.csv; check that the two" in err
    Path("info.csv").write_text("item_id,title\n")
    assert "info.csv describes no item at all" in refused(PIXEL, capsys)
    Path("info.csv").write_text("")
    assert "info.csv is empty" in refused(PIXEL, capsys)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("user_id,parent_asin,rating,timestamp", "prepare_data.py amazon2023"),
        ("user,item,rating,timestamp", "remove the line"),
    ],
)
def test_ratings_of_2014_with_a_header(
    header: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_2014()
    Path("r.csv").write_text(f"{header}\n{RATINGS_2014}")
    err = refused(("amazon2014", "--reviews", "r.csv", "--meta", "meta_Books.json.gz"), capsys)
    assert "r.csv, row 1: looks like a header line" in err
    assert words in err


def test_the_model_to_be_fetched_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    assert run_program(main, PIXEL) == 0
    out = capsys.readouterr().out
    assert out.index("python download_itemllm.py\n") < out.index("next: python item_caching.py")
    (folder / "model_checkpoints/ItemLLM_complete").mkdir(parents=True)
    assert run_program(main, (*PIXEL, "--overwrite")) == 0
    assert "download_itemllm" not in capsys.readouterr().out
    assert run_program(main, ("hold-out", "--dataset", "Pixel200K", "--share", "0.3")) == 0
    out = capsys.readouterr().out
    assert out.index("python download_userllm.py\n") < out.index("python code/main.py")


def test_help_names_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pixelrec", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("iid, video_id", "uid", "timestamp (or time, ts)", "the user, a tab, and the"):
        assert words in shown
    with pytest.raises(SystemExit):
        main(["hold-out", "--help"])
    assert "(default: NAME-warm)" in " ".join(capsys.readouterr().out.split())


META_2023 = {
    "main_category": "All Beauty", "title": "Spray\u200b \ud83d", "average_rating": 4.8,
    "rating_number": 10, "features": ["Soft", "Small"], "description": ["A spray.", "New."],
    "price": None, "images": [], "videos": [], "store": "H", "categories": ["Hair", "All Beauty"],
    "details": {}, "parent_asin": "B00YQ6X8EO", "bought_together": None,
}  # fmt: skip
REVIEW_2023 = {
    "rating": 5.0, "title": "t", "text": "x", "images": [], "asin": "B00VARIANT",
    "parent_asin": "B00YQ6X8EO", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_amazon_2023(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("meta_All_Beauty.jsonl").write_text(json.dumps(META_2023) + "\n")
    if kind.startswith("jsonl"):
        body = json.dumps(REVIEW_2023) + "\n"
    else:
        body = (
            "user_id,parent_asin,rating,timestamp\n"
            "AGKHLEW2SOWHNMFQIJGBECAF7INQ,B00YQ6X8EO,5.0,1588687728923\n"
        )
    name = f"All_Beauty.{kind}"
    data = body.encode()
    Path(name).write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    table = run(("amazon2023", "--reviews", name, "--meta", "meta_All_Beauty.jsonl"), capsys)
    assert rows_of("amazon2023_All_Beauty") == [
        "B00YQ6X8EO,AGKHLEW2SOWHNMFQIJGBECAF7INQ,1588687728923"
    ]
    assert table["first interaction"] == "2020-05-05 UTC"
    assert texts_of("amazon2023_All_Beauty") == {
        "B00YQ6X8EO": "title: Spray\u200b ?tag: All Beauty, Hairdescription: A spray. New. Soft Small"
    }


FLAGS = "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
FILMS = {
    "ml-100k": {
        "u.data": "196\t1\t3\t881250949\n186\t2\t3\t891717742\n196\t2\t4\t881250949\n",
        "u.item": f"1|Toy Story (1995)|01-Jan-1995||http://x|{FLAGS}\n"
        f"2|Misérables, Les (1995)|01-Jan-1995||http://y|1{FLAGS.replace('1', '0')[1:]}\n",
    },
    "ml-1m": {
        "ratings.dat": "196::1::3::881250949\n186::2::3::891717742\n196::2::4::881250949\n",
        "movies.dat": "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1995)::\n",
    },
    "ml-25m": {
        "ratings.csv": "userId,movieId,rating,timestamp\n196,1,3.0,881250949\n186,2,3.5,891717742\n"
        "196,2,4.0,881250949\n",
        "movies.csv": "movieId,title,genres\n1,Toy Story (1995),Animation|Children's|Comedy\n"
        '2,"Misérables, Les (1995)",(no genres listed)\n',
    },
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILMS)
def test_movielens(name: str, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    encoding = "utf-8" if name == "ml-25m" else "latin-1"
    files = {f"{name}/{file}": text.encode(encoding) for file, text in FILMS[name].items()}
    if zipped:
        with zipfile.ZipFile(f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in files.items():
                archive.writestr(file, data)
    else:
        Path(name).mkdir()
        for file, data in files.items():
            Path(file).write_bytes(data)
    table = run(("movielens", "--folder", f"{name}.zip" if zipped else name), capsys)
    assert rows_of(name) == ["1,196,881250949", "2,186,891717742", "2,196,881250949"]
    assert texts_of(name) == {
        "1": "title: Toy Story (1995)tag: Animation, Children's, Comedy",
        "2": "title: Misérables, Les (1995)",
    }
    assert table["history length, mean"] == "1.50"
    assert (table["first interaction"], table["last interaction"]) == (
        "1997-12-04 UTC", "1998-04-04 UTC",
    )  # fmt: skip


def table_of(pairs: Sequence[tuple[int, int]], times: Sequence[int] | None = None) -> Table:
    users, items = (np.array(column, dtype=np.int32) for column in zip(*pairs, strict=True))
    stamps = np.array(times if times is not None else range(len(pairs)), dtype=np.int64)
    names = [[f"{kind}{n}" for n in range(max(c) + 1)] for kind, c in (("i", items), ("u", users))]
    return Table(names[0], names[1], items, users, stamps)


def write_times(*times: str) -> None:
    rows = [f"i{n},u,{time}" for n, time in enumerate(times)]
    Path("Pixel200K.csv").write_text("\n".join(["item_id,user_id,timestamp", *rows, ""]))
    info = [f"i{n},{'0,' * 7}title {n},," for n in range(len(times))]
    Path("info.csv").write_text(INFO + "\n".join([*info, ""]))


# 2022-09-01 12:03:11 UTC is 1662033791 (date -u -d).
DATES = {
    "2022-09-01 12:03:11": 1662033791,
    "2022-09-01T12:03:11": 1662033791,
    "2022-09-01T12:03:11Z": 1662033791,
    "2022-09-01 12:03:11 UTC": 1662033791,
    "2022-09-01 12:03:11+00:00": 1662033791,
    "2022-09-01T14:03:11+02:00": 1662033791,
    "2022-09-01T04:03:11-0800": 1662033791,
    "2022-09-01": 1661990400,
    "2022-09-01 12:03": 1662033780,
    "1969-12-31 23:59:59": -1,
}


def test_dates_are_unix_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    write_times(*DATES)
    assert run_program(main, PIXEL) == 0
    assert [int(row.split(",")[2]) for row in rows_of("Pixel200K")] == list(DATES.values())
    said = "timestamps are dates and are written as Unix time in seconds; 5 of 10 name no time zone"
    assert f"Pixel200K.csv: {said} and are read as UTC." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "written", "unit"),
    [
        (["2022-09-01T12:03:11Z", "2022-09-01T12:03:11.250Z"], [0, 250], "milliseconds"),
        (["2022-09-01T12:03:11.000001Z", "2022-09-01T12:03:12Z"], [1, 10**6], "microseconds"),
    ],
)
def test_fractions_of_a_second_choose_the_unit(
    times: list[str], written: list[int], unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_times(*times)
    assert run_program(main, PIXEL) == 0
    scale = {"milliseconds": 1000, "microseconds": 10**6}[unit]
    actual = [int(row.split(",")[2]) - 1662033791 * scale for row in rows_of("Pixel200K")]
    assert actual == written
    err = capsys.readouterr().err
    assert f"written as Unix time in {unit}." in err


def test_java_s_exponents_are_read_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    write_times("1.588687728923E12", "1.5886877289E12", "1588687728924.0")
    run(PIXEL, capsys)
    actual = [row.split(",")[2] for row in rows_of("Pixel200K")]
    assert actual == ["1588687728923", "1588687728900", "1588687728924"]


def test_times_of_before_the_shop_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    milliseconds = [1000 * (1662033791 + n) for n in range(5)]
    write_times("-62135596800000", *map(str, milliseconds))
    assert run_program(main, PIXEL) == 0
    out, err = capsys.readouterr()
    assert printed(out)["first interaction"] == "0001-01-01 UTC"
    assert "1 of 6 timestamps lie before 1990 or after 2099, read as milliseconds" in err
    assert "--since DATE" in err
    assert run_program(main, (*PIXEL, "--overwrite", "--since", "1995-07-01")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert printed(out)["interactions before 1995-07-01 UTC"] == "1"
    assert printed(out)["first interaction"] == "2022-09-01 UTC"
    assert [int(row.split(",")[2]) for row in rows_of("Pixel200K")] == milliseconds
    assert "no interaction is left with --since 2030-01-01" in refused(
        (*PIXEL, "--overwrite", "--since", "2030-01-01"), capsys
    )
    write_times("1", "2", "3")
    err = refused((*PIXEL, "--overwrite", "--since", "1995-07-01"), capsys)
    assert "leave out --since" in err


def test_ids_that_lost_zeros_in_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    Path("Pixel200K.csv").write_text("item_id,user_id,timestamp\n007,u,1\ni2,u,2\n3,u,3\n")
    Path("info.csv").write_text(INFO + "7,1,1,1,1,1,1,1,a,,\ni2,1,1,1,1,1,1,1,b,,\n")
    err = refused(PIXEL, capsys)
    assert "1 of 3 items of Pixel200K.csv are in info.csv under another spelling only" in err
    assert "'007' as '7'" in err
    # Both spellings described: two items.
    Path("info.csv").write_text(INFO + "7,1,1,1,1,1,1,1,a,,\n007,1,1,1,1,1,1,1,b,,\n")
    assert run(PIXEL, capsys)["items with text"] == "1 of 3"


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
RECBOLE = ("recbole", "--inter", "ml.inter", "--item", "ml.item")


def write_recbole(inter: str = INTER, item: str = ITEM) -> None:
    Path("ml.inter").write_text(
        inter + "196\t242\t3\t881250949\n186\t302\t4\t891717742.0\n196\t302\t1\t881250948\n"
    )
    Path("ml.item").write_text(
        item + '302\tThe "Big" One\t1997\tComedy Drama\n242\t"Say ""A"", B"\t1995\t\n'
    )


def test_recbole(capsys: pytest.CaptureFixture[str]) -> None:
    write_recbole()
    assert run_program(main, RECBOLE) == 0
    out, err = capsys.readouterr()
    table = printed(out)
    assert (table["users"], table["items"], table["interactions"]) == ("2", "2", "3")
    assert (table["first interaction"], table["items with text"]) == ("1997-12-04 UTC", "2 of 2")
    assert "ml.item: title from movie_title, tag from class; not used: release_year." in err
    assert rows_of("ml") == ["242,196,881250949", "302,186,891717742", "302,196,881250948"]
    assert texts_of("ml") == {
        "302": 'title: The "Big" Onetag: Comedy Drama', "242": 'title: Say "A", B',
    }  # fmt: skip
    table = run((*RECBOLE, "--overwrite", "--min_rating", "3"), capsys)
    assert table["interactions rated below 3"] == "1"
    run((*RECBOLE, "--overwrite", "--tag", "release_year", "--description", "class"), capsys)
    assert texts_of("ml")["302"] == 'title: The "Big" Onetag: 1997description: Comedy Drama'


@pytest.mark.parametrize(
    ("inter", "item", "more", "words"),
    [
        ("user_id\titem_id\trating\ttimestamp\n", ITEM, (), "must name columns as name:type"),
        (INTER.replace("\t", ","), ITEM, (), "separated by tabs"),
        (INTER.replace("timestamp", "when"), ITEM, (), "ml.inter lacks the column timestamp"),
        (INTER.replace("rating:float", "uid:token"), ITEM, (), "names the column user_id twice"),
        (INTER, ITEM.replace("class:token_seq", "class:text"), (), "ml.item: its first line"),
        (
            INTER,
            ITEM.replace("movie_title", "t").replace("class", "c"),
            (),
            "name one with --title",
        ),
        (INTER, ITEM, ("--tag", "genre"), "ml.item lacks the column genre of --tag"),
        (INTER + "1\t2\t3\n", ITEM, (), "row 2: has 3 fields where 4 are expected"),
        (INTER, ITEM + "1\t2\n", (), "row 2: has 2 fields where 4 are expected"),
    ],
)
def test_bad_atomic_files(
    inter: str, item: str, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recbole(inter, item)
    assert words in refused((*RECBOLE, *more), capsys)


def test_core_is_taken_in_turns() -> None:
    # Item 2 goes (one row), then user 2 has one row left and goes; then all have two.
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2)]
    assert core_rows(table_of(pairs), 2, 2).tolist() == [True] * 4 + [False] * 2
    assert core_rows(table_of(pairs), 2, 0).all()
    assert not core_rows(table_of(pairs), 4, 4).any()


def test_repeats_keep_the_first_row() -> None:
    pairs = [(1, 1), (0, 0), (1, 1), (1, 1), (0, 0)]
    keep = first_of_repeats(table_of(pairs, [5, 5, 5, 6, 5]))
    assert keep.tolist() == [True, True, False, True, False]


def test_hllm_s_filter_counts_once() -> None:
    # HLLM's steps, in pandas: both counts on all rows, then the users that keep enough rows.
    generator = np.random.default_rng(0)
    rows = pd.DataFrame(
        {"user": generator.zipf(1.5, 400) % 60, "item": generator.zipf(1.5, 400) % 50}
    )
    counted = rows[
        (rows.groupby("user")["item"].transform("size") >= 5)
        & (rows.groupby("item")["user"].transform("size") >= 5)
    ]
    expected = counted[counted.groupby("user")["item"].transform("size") >= 5].index
    items, users = (rows[name].to_numpy(dtype=np.int32) for name in ("item", "user"))
    ids = [str(number) for number in range(60)]
    table = Table(ids[:50], ids, items, users, np.arange(400))
    kept = once_filtered_rows(table, 5)
    assert np.flatnonzero(kept).tolist() == expected.tolist()
    # Neither filter nor core would leave the same rows.
    assert 0 < kept.sum() < len(counted)
    assert kept.sum() > core_rows(table, 5, 5).sum()


def test_hllm_books(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"A{user},000001371{item},5.0,1252800{user}{item}0"
        for user in range(5)
        for item in range(5)
    ]
    # A row that repeats another stays; a user with four rows does not, nor does the item only they have.
    lines += [
        lines[0],
        *(f"B,000001371{item},1.0,1252800000" for item in (1, 2, 3)),
        "B,0000013719,1,1",
    ]
    Path("ratings_Books.csv").write_text("".join(f"{line}\n" for line in lines))
    meta = [
        {
            "asin": f"000001371{item}",
            "title": f"T{item}",
            "description": "D",
            "categories": [["Books"]],
        }
        for item in range(5)
    ]
    Path("meta_Books.json").write_text("".join(f"{record}\n" for record in meta))
    command = ("hllm-books", "--reviews", "ratings_Books.csv", "--meta", "meta_Books.json")
    table = run(command, capsys)
    assert (table["users"], table["items"], table["interactions"]) == ("5", "5", "26")
    assert table["interactions: fewer than 5 interactions"] == "4"
    assert texts_of("amazon_books")["0000013711"] == "title: T1description: D"
    assert "--k_core" in refused((*command, "--k_core", "5", "--overwrite"), capsys)
    Path("ratings_Books.csv").write_text("".join(f"{line}\n" for line in lines[-4:]))
    assert "no user is left with 5 interactions" in refused((*command, "--name", "few"), capsys)


def test_filters_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    table = run((*PIXEL, "--min_history", "2"), capsys)
    assert table["interactions: --min_history 2"] == "1"
    assert table["users: --min_history 2"] == "1"
    assert table["users"] == "1"
    assert "smaller ones" in refused((*PIXEL, "--k_core", "9", "--overwrite"), capsys)


def test_text_becomes_one_line_of_valid_unicode() -> None:
    assert plain_text(" a\n\tb\x85c\x00\x07 \ud83d é ") == "a b c ? é"


HELD = "a,u1,1 b,u1,2 c,u1,3 a,u2,1 c,u2,2 b,u3,1 a,u3,2 c,u4,1"


def test_hold_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dataset", "information"):
        Path(name).mkdir()
    rows = HELD.split()
    Path("dataset/d.csv").write_text("item_id,user_id,timestamp\n" + "\n".join(rows) + "\n")
    Path("information/d.csv").write_text(
        'item_id,title,year\na,"A, a",1\nb,,2\nc,C,\nother,no interactions,3\n'
    )
    taken = set()
    for seed in range(6):
        command = ("hold-out", "--dataset", "d", "--share", "0.34", "--seed", str(seed))
        table = run((*command, "--overwrite"), capsys)
        kept = rows_of("d-warm")
        (item,) = {"a", "b", "c"} - {row[0] for row in kept}
        assert sorted(kept) == sorted(row for row in rows if row[0] != item)
        # Test targets are c (u1), c (u2) and a (u3); u4 has a single item and no target.
        targets = {"a": "1 of 3 (33.3%)", "b": "0 of 3 (0.0%)", "c": "2 of 3 (66.7%)"}
        assert table["test targets that are such items"] == targets[item]
        share = {"a": "3 of 8 (37.5%)", "b": "2 of 8 (25.0%)", "c": "3 of 8 (37.5%)"}
        assert table["interactions with them"] == share[item]
        assert table["users without any other item"] == ("1" if item == "c" else "0")
        titles = read_item_titles("information/d-warm.csv", "title")
        assert titles == {k: v for k, v in {"a": "A, a", "b": "", "c": "C"}.items() if k != item}
        taken.add(item)
        again = Path("dataset/d-warm.csv").read_bytes()
        run((*command, "--name", "twice", "--overwrite"), capsys)
        assert Path("dataset/twice.csv").read_bytes() == again
    assert len(taken) > 1
    assert "between 0 and 1" in refused(
        ("hold-out", "--dataset", "d", "--share", "1", "--overwrite"), capsys
    )


def test_hold_out_ignores_the_order_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dataset", "information"):
        Path(name).mkdir()
    rows = [f"i{n % 17},u{n % 5},{n}" for n in range(60)]
    for name, lines in (("x", rows), ("y", rows[::-1])):
        Path(f"dataset/{name}.csv").write_text(
            "item_id,user_id,timestamp\n" + "\n".join(lines) + "\n"
        )
        Path(f"information/{name}.csv").write_text(
            "item_id,title\n" + "".join(f"i{n},t\n" for n in range(17))
        )
        run(("hold-out", "--dataset", name, "--share", "0.3"), capsys)
    assert set(rows_of("x-warm")) == set(rows_of("y-warm"))
    assert len({row.split(",")[0] for row in rows_of("x-warm")}) == 12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Pixel200K.csv is empty"),
        ("\n\n", "Pixel200K.csv is empty"),
        ("item_id|user_id|timestamp\n", "the separator is '|' where ',' is expected"),
        ("item,person,timestamp\n", "lacks the column user_id"),
        ("item_id,user_id,timestamp\n", "has no interactions"),
        (
            "item_id,user_id,timestamp\ni,u,1\ni,u\n",
            "row 3: has 2 fields where 3 are expected; complete",
        ),
        ("item_id,user_id,timestamp\ni\n", "has 1 field where 3 are expected; check the separator"),
        ("item_id,user_id,timestamp\ni,u,v,1\n", "look for a separator inside a field"),
        ("item_id,user_id,timestamp\ni,u,soon\ni,u,1.5\n", "(2 such rows: 2, 3)"),
        ("item_id,user_id,timestamp\ni,,1\n", "row 2: user id is empty"),
        (
            "item_id,user_id,timestamp\n" + "i,u,1\n" * 20_000 + "i, ,1\n" * 20_000,
            "row 20002: user id is empty; fill it in or remove the row (20000 such rows: 20002, ",
        ),
        ('item_id,user_id,timestamp\n"i,u,1\n', "row 2: not well-formed CSV"),
        ("item_id,user_id,timestamp\ni\0,u,1\n", "row 2: holds a NUL byte"),
        (
            "item_id,user_id,timestamp\ni,u,1600000000\ni,v,1600000000000\ni,w,1600000001000\n",
            "mix units: 2 rows are in milliseconds and 1 in seconds, the first 1600000000",
        ),
        ("item_id,user_id,timestamp\ni,u,99999999999999999999\n", "within 64 bits"),
        (
            "item_id,user_id,timestamp\ni,u,880000000\ni,v,880000000000\ni,w,881000000\n",
            "mix units: 2 rows are at most 881000000 and 1 at least 880000000000",
        ),
        ("item_id,user_id,timestamp\n1.05514E+16,u,1\n", "is exponent notation"),
        ("item_id,user_id,timestamp\ni,#REF!,1\n", "the error value of a spreadsheet"),
        ("item_id,user_id,timestamp\ni,u,1.6E+09\ni,v,1.59E+09\n", "2 timestamps in exponent"),
        ("item_id,user_id,timestamp\ni,u,2022-09-31\n", "row 2: timestamp '2022-09-31' is no date"),
        (
            "item_id,user_id,timestamp\ni,u,2022-09-30\ni,u,1\ni,u,2\n",
            "row 3: timestamp '1' is a number among dates; write all alike (2 such rows: 3, 4)",
        ),
        (
            "item_id,user_id,timestamp\ni,u,7\ni,u,2022-09-30\n",
            "row 3: timestamp '2022-09-30' is a date among numbers",
        ),
        ("item_id,user_id,timestamp\ni,u,2022-09-30\ni,u,soon\n", "row 3: timestamp 'soon'"),
        ("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n", "prepare_data.py recbole"),
    ],
)
def test_bad_interactions(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    Path("Pixel200K.csv").write_text(text)
    err = refused(PIXEL, capsys)
    assert words in err
    assert "Pixel200K.csv" in err


def test_bad_files(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    assert "does not exist" in refused((*PIXEL[:2], "none.csv", *PIXEL[3:]), capsys)
    Path("info.csv").write_text("item_id,price\n")
    assert "none of the columns title, tag, description" in refused(PIXEL, capsys)
    Path("info.csv").write_bytes(b"item_id,title\ni1,caf\xe9\n")
    assert "info.csv, row 2: is not UTF-8 text" in refused(PIXEL, capsys)
    command = ("amazon2023", "--reviews", "r.jsonl.gz", "--meta", "m.jsonl")
    Path("r.jsonl.gz").write_bytes(gzip.compress(json.dumps(REVIEW_2023).encode() * 99)[:-20])
    assert "r.jsonl.gz is damaged or incomplete" in refused(command, capsys)
    Path("r.jsonl.gz").write_text('{"user_id": "u", "parent_asin": ["a"], "timestamp": 1}\n{oops\n')
    err = refused(command, capsys)
    assert "row 1: lacks the field parent_asin" in err
    assert "row 2: '{oops' is not a complete JSON object" in err
    Path("ml.zip").write_bytes(b"no archive")
    assert "no readable zip" in refused(("movielens", "--folder", "ml.zip"), capsys)
    assert "holds none of u.data" in refused(("movielens", "--folder", "."), capsys)


def test_metadata_are_data_not_code(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ratings_X.csv").write_text(RATINGS_2014)
    Path("meta_X.json").write_text(
        "__import__('pathlib').Path('canary').touch()\n" + "[" * 9999 + "\n"
    )
    command = ("amazon2014", "--reviews", "ratings_X.csv", "--meta", "meta_X.json")
    assert "is not a complete JSON object" in refused(command, capsys)
    assert not Path("canary").exists()


def test_what_is_there_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    write_pixel()
    run(PIXEL, capsys)
    assert "is there already; add --overwrite" in refused(PIXEL, capsys)
    assert "to be read and written" in refused((*PIXEL, "--data_path", "."), capsys)
    assert "no name for a file" in refused((*PIXEL, "--name", "../x"), capsys)
    assert "are one folder" in refused((*PIXEL, "--text_path", "dataset"), capsys)
    run((*PIXEL, "--overwrite"), capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "FORMAT"),
        (("netflix",), "netflix"),
        (("movielens",), "--folder"),
        ((*PIXEL, "--k_core", "-1"), "-1"),
        ((*PIXEL, "--min_rating", "3"), "--min_rating"),
        (("movielens", "--folder", "x", "--min_rating", "nan"), "'nan' is not a number"),
        (("movielens", "--folder", "x", "--since", "1/2/2003"), "'1/2/2003' is no date such as"),
    ],
)
def test_bad_options(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(argv, capsys)
    assert words in err
    assert "--help" in err


def test_memory_holds_numbers_not_rows() -> None:
    rows = 80_000
    events = (
        Event(n, f"item{n % 500}", f"user{n % 900}", str(1_600_000_000 + n), "")
        for n in range(rows)
    )
    tracemalloc.start()
    try:
        table, _ = read_events(events, RowProblems(Path("x")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table) == rows
    # 16 bytes a row and one batch; the rows as text would take five times as much.
    assert peak < 20 << 20


def test_a_file_is_read_as_a_stream() -> None:
    lines = (f"i{n % 100},u{n % 1000},{n}\n" for n in range(40_000))
    Path("p.csv").write_text("item_id,user_id,timestamp\n" + "".join(lines))
    Path("info.csv").write_text("item_id,title\n")
    download = pixelrec(Path("p.csv"), Path("info.csv"))
    actual = RowProblems(Path("p.csv"))
    tracemalloc.start()
    try:
        count = sum(1 for _ in download.events(download.interactions, actual))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert peak < 400_000 < Path("p.csv").stat().st_size


def test_a_signal_leaves_nothing(folder: Path) -> None:
    write_pixel()
    # A long file, which is being read when the signal comes.
    row = "".join(f"i{n},u{n % 7},{n}\n" for n in range(20_000))
    Path("Pixel200K.csv").write_text("item_id,user_id,timestamp\n" + row * 40)
    Path("info.csv").write_text("item_id,title\n")
    program = subprocess.Popen(
        [sys.executable, f"{ROOT}/prepare_data.py", *PIXEL], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    # The folder of the outputs is made when the handlers are in place and reading begins.
    while not (folder / "information").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.rglob("*")) == ["Pixel200K.csv", "info.csv"]


def test_input_errors_of_the_recipe_are_input_errors() -> None:
    with pytest.raises(InputError, match="does not exist"):
        prepare(parse_options(["movielens", "--folder", "none"]))

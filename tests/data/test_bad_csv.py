"""Interaction and information files as they come from strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsft.data.interactions import read_interactions
from hsft.data.item_text import read_item_texts
from item_caching import main as cache_main
from tests.bad_input import CSV, HEADER, INFORMATION, expect_refusal, to_device, to_folder, to_pipe
from tests.conftest import Project

POP = ("--model", "pop")
# Two users with enough items for every phase, so that a run has somebody to score.
MORE = b"a,p,1\nb,p,2\nc,p,3\nd,p,4\na,q,1\nb,q,2\nc,q,3\nd,q,4\n"
SEC, MS = 1_600_000_000, 1_600_000_000_000


def text(*rows: str, header: bytes = HEADER) -> bytes:
    return header + "".join(f"{row}\n" for row in rows).encode()


# name -> (file, what user x's history is: (item, timestamp) in order)
GOOD: dict[str, tuple[bytes, list[tuple[str, int]]]] = {
    "plain": (text("i1,x,2", "i2,x,1") + MORE, [("i2", 1), ("i1", 2)]),
    "bom": (b"\xef\xbb\xbf" + text("i1,x,1", "i2,x,2") + MORE, [("i1", 1), ("i2", 2)]),
    "crlf": (
        (text("i1,x,1", "i2,x,2") + MORE).replace(b"\n", b"\r\n"),
        [("i1", 1), ("i2", 2)],
    ),
    "cr": ((text("i1,x,1", "i2,x,2") + MORE).replace(b"\n", b"\r"), [("i1", 1), ("i2", 2)]),
    "no newline at the end": (MORE.join([HEADER, b"i1,x,1\ni2,x,2"]), [("i1", 1), ("i2", 2)]),
    "blank lines": (text("", "i1,x,1", "", "i2,x,2", "") + MORE, [("i1", 1), ("i2", 2)]),
    "quoted": (text('"i1","x","1"', '"i2",x,2') + MORE, [("i1", 1), ("i2", 2)]),
    "quoted comma": (text('"i,1",x,1', "i2,x,2") + MORE, [("i,1", 1), ("i2", 2)]),
    "quoted quote": (text('"i""1",x,1', "i2,x,2") + MORE, [('i"1', 1), ("i2", 2)]),
    "blank inside an id": (text("i 1,x,1", "i2,x,2") + MORE, [("i 1", 1), ("i2", 2)]),
    "1 is not 01": (text("1,x,1", "01,x,2", "1.0,x,3") + MORE, [("1", 1), ("01", 2), ("1.0", 3)]),
    "all ids are numbers": (
        text("1,x,1", "01,x,2", "2,y,1", "02,y,2", "001,z,1", "1,z,2"),
        [("1", 1), ("01", 2)],
    ),
    "case counts": (text("a,x,1", "A,x,2") + MORE, [("a", 1), ("A", 2)]),
    "unicode forms differ": (
        text("é,x,1", "é,x,2") + MORE,
        [("é", 1), ("é", 2)],
    ),
    "other scripts": (text("電影,x,1", "🎬,x,2") + MORE, [("電影", 1), ("🎬", 2)]),
    "words for nothing": (
        text("NA,x,1", "nan,x,2", "null,x,3", "None,x,4") + MORE,
        [("NA", 1), ("nan", 2), ("null", 3), ("None", 4)],
    ),
    "padding's name": (text("[PAD],x,1", "i2,x,2") + MORE, [("[PAD]", 1), ("i2", 2)]),
    "long id": (text(f"{'i' * 200_000},x,1", "i2,x,2") + MORE, [("i" * 200_000, 1), ("i2", 2)]),
    "repeated row": (text("i1,x,1", "i1,x,1") + MORE, [("i1", 1), ("i1", 1)]),
    "ties keep file order": (
        text("i3,x,7", "i1,x,7", "i2,x,7") + MORE,
        [("i3", 7), ("i1", 7), ("i2", 7)],
    ),
    "negative timestamp": (text("i1,x,5", "i2,x,-5") + MORE, [("i2", -5), ("i1", 5)]),
    "largest timestamps": (
        text(f"i1,x,{2**63 - 1}", f"i2,x,{-(2**63)}") + MORE,
        [("i2", -(2**63)), ("i1", 2**63 - 1)],
    ),
    "decimal of a whole number": (text("i1,x,2.0", "i2,x,1.0") + MORE, [("i2", 1), ("i1", 2)]),
    "milliseconds throughout": (
        text(f"i1,x,{MS}", f"i2,x,{MS + 1}"),
        [("i1", MS), ("i2", MS + 1)],
    ),
    "seconds with a zero": (text("i1,x,0", f"i2,x,{SEC}"), [("i1", 0), ("i2", SEC)]),
    "columns in another order": (
        text("1,extra,x,i1", "2,,x,i2", header=b"timestamp,other,user_id,item_id\n"),
        [("i1", 1), ("i2", 2)],
    ),
    "trailing comma throughout": (
        text("i1,x,1,", "i2,x,2,", header=HEADER.replace(b"\n", b",\n")),
        [("i1", 1), ("i2", 2)],
    ),
    "one-item user": (text("i1,x,1") + MORE, [("i1", 1)]),
    "item only in test": (text("i1,x,1", "z,x,9") + MORE, [("i1", 1), ("z", 9)]),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_interactions_mean_what_they_say(project: Project, case: str) -> None:
    content, expected = GOOD[case]
    (project.root / CSV).write_bytes(content)
    read = read_interactions(CSV)
    user = list(read.user_ids).index("x")
    owned = slice(read.offsets[user], read.offsets[user + 1])
    items = [read.item_ids[number] for number in read.items[owned]]
    assert list(zip(items, read.timestamps[owned].tolist(), strict=True)) == expected
    code, _, err = project.run(*POP, "--run_name", "run")
    assert code == 0, err
    actual = json.loads((project.root / "saved/run/result.json").read_text())
    assert actual["data"]["interactions"] == len(read)


def test_ids_that_stand_for_empty_cells_give_a_warning_a_column(project: Project) -> None:
    rows = text("nan,x,1", "None,x,2", "nan,null,3", "Nan,nan0,4", "none-such,y,5")
    (project.root / CSV).write_bytes(rows + MORE)
    code, _, err = project.run(*POP, "--run_name", "run")
    assert code == 0, err
    lines = [line.partition(" ")[2] for line in err.splitlines() if "empty cells" in line]
    assert lines == [
        f"{CSV}, row 2: item_id 'nan', 'None' (3 rows) may be what exports write for empty cells; "
        "fill them in or remove the rows if so.",
        f"{CSV}, row 4: user_id 'null' (1 row) may be what exports write for empty cells; fill them "
        "in or remove the rows if so.",
    ]
    code, out, err = project.run(*POP, "--check", "True")
    assert code == 0, err
    for line in lines:
        assert f"warning: {line}\n" in out
    assert out.splitlines()[-1] == "no problem found; 2 warnings above"
    information = project.root / INFORMATION
    information.write_text(information.read_text() + "NaN,a title,,\nNone such,a title,,\na,b,,\n")
    more = ("--item_pretrain_dir", str(project.llama), "--item_cache_path", "new.safetensors")
    code, _, err = project.call(cache_main, [*project.arguments, *more])
    assert code == 0, err
    lines = [line for line in err.splitlines() if "empty cells" in line]
    assert len(lines) == 3
    assert f"{INFORMATION}, row 22: item_id 'NaN' (1 row) may be what" in lines[0]


BAD: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (b"", ["is empty", "item_id,user_id,timestamp"]),
    "only blanks": (b"\n\n", ["is empty"]),
    "header only": (HEADER, ["no interactions"]),
    "utf-16": ((HEADER + MORE).decode().encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "utf-16 without mark": ((HEADER + MORE).decode().encode("utf-16-le"), ["row 1", "NUL"]),
    "utf-32": ((HEADER + MORE).decode().encode("utf-32"), ["UTF-32"]),
    "latin-1": (HEADER + MORE + "é,x,1\n".encode("latin-1"), ["row 10", "not UTF-8"]),
    "half a character": (HEADER + b"i\xed\xa0\x80,x,1\n" + MORE, ["row 2", "not UTF-8"]),
    "NUL in an id": (text("i1\0z,x,1") + MORE, ["row 2", "NUL"]),
    "NUL in a timestamp": (MORE.join([HEADER, b"i1,x,1\0\n"]), ["row 10", "NUL"]),
    "binary": (bytes(range(256)) * 9, ["NUL"]),
    "another format": (b"PK\x03\x04" + b"\xff" * 90, ["not UTF-8"]),
    "semicolons": (
        b"item_id;user_id;timestamp\na;b;1\n",
        ["the separator is ';' where ',' is", ";user_id"],
    ),
    "tabs": (b"item_id\tuser_id\ttimestamp\na\tb\t1\n", ["the separator is a tab where ',' is"]),
    "bars": (b"item_id|user_id|timestamp\na|b|1\n", ["the separator is '|' where ',' is"]),
    "no header": (MORE, ["lacks the columns item_id", "a,p,1"]),
    "other names": (b"item,user,time\n" + MORE, ["lacks the columns item_id"]),
    "names in capitals": (b"ITEM_ID,USER_ID,TIMESTAMP\n" + MORE, ["lacks the columns item_id"]),
    "blanks in the header": (
        b"item_id, user_id, timestamp\n" + MORE,
        ["user_id", "without spaces"],
    ),
    "no timestamps": (b"item_id,user_id\na,x\n", ["lacks the column timestamp"]),
    "a column twice": (b"item_id,item_id,user_id,timestamp\na,b,x,1\n", ["item_id twice"]),
    "comma in an id": (text("i1,x,y,1") + MORE, ["row 2", "4 fields", "quote the field"]),
    "comma in a later id": (HEADER + MORE + b"i1,x,y,1\n", ["row 10", "4 fields"]),
    "trailing comma once": (HEADER + MORE + b"i1,x,1,\n", ["row 10", "4 fields"]),
    "too many with an extra column": (
        text("a,x,1,e", "b,x,2,e,f", header=b"item_id,user_id,timestamp,other\n"),
        ["row 3", "5 fields"],
    ),
    "too few": (text("i1,x") + MORE, ["row 2", "2 fields", "complete it"]),
    "cut off": (HEADER + MORE + b"a,x,1\nb", ["row 11", "1 field"]),
    "unclosed quote": (text('"i1,x,1') + MORE, ["row 2", "quote"]),
    "unclosed quote later closed": (text('"i1,x,1', 'i2",x,2') + MORE, ["row 2", "unclosed quote"]),
    "empty item": (text(",x,1") + MORE, ["row 2", "item_id is empty"]),
    "empty user": (text("i1,,1") + MORE, ["row 2", "user_id is empty"]),
    "blank user": (text("i1,  ,1") + MORE, ["row 2", "user_id is empty"]),
    "leading blank": (text(" i1,x,1") + MORE, ["row 2", "item_id ' i1'", "blank"]),
    "trailing blank": (text("i1,x ,1") + MORE, ["row 2", "user_id 'x '", "blank"]),
    "no-break space": (text("i1,x\u00a0,1") + MORE, ["row 2", "blank"]),
    "tab in an id": (text("i\t1,x,1") + MORE, ["row 2", "control character", "\\t"]),
    "escape code in an id": (text("i\x1b[2J,x,1") + MORE, ["row 2", "\\x1b[2J"]),
    "no timestamp": (text("i1,x,") + MORE, ["row 2", "timestamp ''"]),
    "date": (text("i1,x,2020-01-01") + MORE, ["row 2", "2020-01-01", "Unix time"]),
    "fraction": (text("i1,x,1.5") + MORE, ["row 2", "1.5", "whole number"]),
    "hexadecimal": (text("i1,x,0x10") + MORE, ["row 2", "0x10"]),
    "underscore": (text("i1,x,1_000") + MORE, ["row 2", "1_000"]),
    "true": (text("i1,x,True") + MORE, ["row 2", "True"]),
    "nan": (text("i1,x,nan") + MORE, ["row 2", "'nan'"]),
    "infinity": (text("i1,x,inf") + MORE, ["row 2", "'inf'"]),
    "other digits": (text("i1,x,٣") + MORE, ["row 2", "٣"]),
    "beyond 64 bits": (text(f"i1,x,{2**63}") + MORE, ["row 2", str(2**63)]),
    "beyond 64 bits with an exponent": (text("i1,x,1e30") + MORE, ["row 2", "1e30"]),
    "beyond any number": (text("i1,x,1e999") + MORE, ["row 2", "1e999"]),
    "below 64 bits": (text(f"i1,x,{-(2**63) - 1}") + MORE, ["row 2", str(-(2**63) - 1)]),
    "64 bits unsigned throughout": (
        text(f"i1,x,{2**63}", f"i2,x,{2**64 - 1}"),
        ["row 2", "2 such"],
    ),
    "true throughout": (text("i1,x,True", "i2,x,False"), ["row 2", "True"]),
    "long ones among decimals": (
        text(f"i1,x,{2**60 + 1}", "i2,x,1.0"),
        ["more than 15 digits", "decimal point"],
    ),
    "a thousand digits": (text(f"i1,x,{'9' * 1000}") + MORE, ["row 2", "9 ..."]),
    "the header again": (HEADER + MORE + HEADER + MORE, ["row 10", "timestamp 'timestamp'"]),
    "rows are counted": (text(*["i1,x,noon"] * 9) + MORE, ["row 2", "9 such rows: 2, 3, 4, 5, 6,"]),
    "rows after blank lines": (HEADER + b"\n\n" + MORE + b"\ni1,x,noon\n", ["row 13"]),
    "rows after a long one": (text('"i\n1",x,1', "i2,x,2") + MORE, ["row 2"]),
    "seconds and milliseconds": (
        text(*[f"i{n},x,{SEC + n}" for n in range(5)], f"i9,x,{MS}"),
        ["mix units", "5 rows are in seconds", "1 in milliseconds", str(MS)],
    ),
    "seconds and microseconds": (
        text(f"i1,x,{SEC}", f"i2,x,{SEC * 1_000_000}"),
        ["mix units", "microseconds"],
    ),
    "milliseconds and nanoseconds": (
        text(f"i1,x,{MS}", f"i2,x,{MS * 1_000_000}"),
        ["mix units", "nanoseconds"],
    ),
    "one-item users only": (text("i1,x,1", "i2,y,1"), ["no user has a history"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_interactions_are_one_line(project: Project, case: str) -> None:
    content, words = BAD[case]
    (project.root / CSV).write_bytes(content)
    where = [] if case == "one-item users only" else [CSV]
    expect_refusal(project, lambda: project.run(*POP), [*words, *where])


def test_several_kinds_of_bad_rows_are_a_line_each(project: Project) -> None:
    (project.root / CSV).write_bytes(text("i1,x,noon", ",x,1", " i1,x,2", "i1,x", "i2,x,3") + MORE)
    code, out, err = project.run(*POP)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1].split(", ")[1] for line in lines] == [
        f"row {n}" for n in (2, 3, 4, 5)
    ]


def test_users_who_have_every_item_leave_no_negatives_to_draw(project: Project) -> None:
    rows = "".join(f"i{n % 4},u{user},{n}\n" for user in range(3) for n in range(8))
    (project.root / CSV).write_bytes(HEADER + rows.encode())
    more = ("--use_qlora", "True", "--num_negatives", "16", "--eval_baseline", "False")
    expect_refusal(project, lambda: project.run(*more), ["3 users", "'u0'", "all 4 items"])


def _to_unreadable(path: Path) -> None:
    # A regular file whose first byte cannot be read, by root neither.
    path.unlink()
    path.symlink_to("/proc/self/mem")


def _to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


ODD_FILES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "folder": (to_folder, ["unknown dataset 'tiny'"]),
    "pipe": (to_pipe, ["unknown dataset 'tiny'"]),
    "device": (to_device, ["unknown dataset 'tiny'"]),
    "loop of links": (_to_loop, ["unknown dataset 'tiny'"]),
    "unreadable": (_to_unreadable, ["cannot be read"]),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_interactions_that_are_no_file(project: Project, case: str) -> None:
    spoil, words = ODD_FILES[case]
    spoil(project.root / CSV)
    expect_refusal(project, lambda: project.run(*POP), words)


INFO = b"item_id,title,tag,description\n"

# name -> (file, the texts of its items under the prompt "P ")
GOOD_INFORMATION: dict[str, tuple[bytes, dict[str, str]]] = {
    "plain": (text("i1,T,a,D", header=INFO), {"i1": "P title: Ttag: adescription: D"}),
    "bom and crlf": (
        b"\xef\xbb\xbf" + text("i1,T,,D", header=INFO).replace(b"\n", b"\r\n"),
        {"i1": "P title: Tdescription: D"},
    ),
    "line break in a text": (
        text('i1,"T\nU",,', "i2,V,,", header=INFO),
        {"i1": "P title: T\nU", "i2": "P title: V"},
    ),
    "quotes in a text": (text('i1,"a ""b"", c",,', header=INFO), {"i1": 'P title: a "b", c'}),
    "empty texts": (text("i1,,,", "i2,nan,NaN,", header=INFO), {"i1": "", "i2": ""}),
    "1 is not 01": (
        text("1,T,,", "01,U,,", header=INFO),
        {"1": "P title: T", "01": "P title: U"},
    ),
    "long text": (
        text(f"i1,{'w ' * 100_000}x,,", header=INFO),
        {"i1": f"P title: {'w ' * 100_000}x"},
    ),
    "other columns": (
        text("D,9,i1,a,T", header=b"description,price,item_id,tag,title\n"),
        {"i1": "P title: Ttag: adescription: D"},
    ),
}


@pytest.mark.parametrize("case", GOOD_INFORMATION)
def test_good_information_gives_its_texts(project: Project, case: str) -> None:
    content, expected = GOOD_INFORMATION[case]
    (project.root / INFORMATION).write_bytes(content)
    read = read_item_texts(INFORMATION, ["title", "tag", "description"], "P ")
    assert dict(zip(read.item_ids, read.texts, strict=True)) == expected


BAD_INFORMATION: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (b"", ["is empty"]),
    "header only": (INFO, ["no items"]),
    "utf-16": (text("i1,T,a,D", header=INFO).decode().encode("utf-16"), ["UTF-16"]),
    "latin-1": (INFO + "i1,é,a,D\n".encode("latin-1"), ["row 2", "not UTF-8"]),
    "NUL": (text("i1,T\0,a,D", header=INFO), ["row 2", "NUL"]),
    "lacks a text column": (
        b"item_id,title\ni1,T\n",
        ["lacks the columns tag, description", "text_keys"],
    ),
    "semicolons": (
        b"item_id;title;tag;description\ni1;T;a;D\n",
        ["the separator is ';' where ',' is expected"],
    ),
    "lacks ids": (b"id,title,tag,description\ni1,T,a,D\n", ["lacks the column item_id"]),
    "a column twice": (b"item_id,title,title,tag,description\ni1,a,b,c,d\n", ["title twice"]),
    "an item twice": (
        text("i1,T,,", "i2,T,,", "i1,U,,", header=INFO),
        ["row 4", "'i1'", "second time"],
    ),
    "the same row twice": (text("i1,T,,", "i1,T,,", header=INFO), ["row 3", "second time"]),
    "comma in a text": (text("i1,T, and U,,", header=INFO), ["row 2", "5 fields"]),
    "too few": (text("i1,T", header=INFO), ["row 2", "2 fields"]),
    "empty id": (text("i1,T,,", ",T,,", header=INFO), ["row 3", "item_id is empty"]),
    "blank before an id": (text(" i1,T,,", header=INFO), ["row 2", "blank"]),
    "unclosed quote": (text('i1,"T,,', "i2,U,,", header=INFO), ["row 2", "quote"]),
    "text after a quote": (text('i1,"T"U,,', header=INFO), ["row 2", "quote"]),
    "second file's header": (
        text("i1,T,,", header=INFO) + INFO + text("item_id,T,,", header=b""),
        ["row 4", "'item_id'", "second time"],
    ),
}


@pytest.mark.parametrize("case", BAD_INFORMATION)
def test_bad_information_is_one_line(project: Project, case: str) -> None:
    content, words = BAD_INFORMATION[case]
    (project.root / INFORMATION).write_bytes(content)
    more = ["--item_pretrain_dir", str(project.llama), "--item_cache_path", "new.safetensors"]
    expect_refusal(
        project,
        lambda: project.call(cache_main, [*project.arguments, *more]),
        [*words, INFORMATION],
    )


@pytest.mark.parametrize("case", ["pipe", "device", "folder"])
def test_information_that_is_no_file(project: Project, case: str) -> None:
    ODD_FILES[case][0](project.root / INFORMATION)
    more = ["--item_pretrain_dir", str(project.llama), "--item_cache_path", "new.safetensors"]
    expect_refusal(
        project,
        lambda: project.call(cache_main, [*project.arguments, *more]),
        [INFORMATION, "does not exist"],
    )

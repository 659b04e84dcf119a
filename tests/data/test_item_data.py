"""`item_data`: a catalogue larger than the interactions' items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsft.config import Config
from hsft.data.cache import open_cache
from hsft.data.interactions import load_interactions
from hsft.report.result import read_ranks
from item_caching import main as cache_main
from tests.bad_input import CSV, INFORMATION, expect_refusal
from tests.conftest import Project

HEADER = "item_id,user_id,timestamp"


def write(path: Path, *rows: str) -> None:
    path.write_text("\n".join([*rows, ""]))


def small(project: Project) -> None:
    """Interactions with 5 of the 20 items: each user has i1, i2, i3, i0 and one of i3 and i4."""
    rows = [
        f"i{item},u{user},{1000 + time}"
        for user in range(4)
        for time, item in enumerate([1, 2, 3 + user % 2, 0])
    ]
    write(project.root / CSV, HEADER, *rows)


@pytest.mark.parametrize("header", [HEADER, "item_id,title", "title,item_id"])
def test_the_catalogue_is_item_data_s_then_the_interactions_other_items(
    project: Project, header: str
) -> None:
    small(project)
    others = ["i7", "i2", "i7", "i19"]
    columns = header.split(",")
    cells = [{"item_id": item, "user_id": "z", "timestamp": "7", "title": "T"} for item in others]
    rows = [",".join(row[name] for name in columns) for row in cells]
    write(project.root / "dataset/all.csv", header, *rows)
    plain = load_interactions(Config(dataset="tiny"))
    data = load_interactions(Config(dataset="tiny", item_data="all"))
    # As HLLM numbers items: item_data's by first appearance, then the others.
    assert data.item_ids.tolist() == ["[PAD]", "i7", "i2", "i19", "i1", "i3", "i0", "i4"]
    assert data.num_items == 7
    assert data.user_ids.tolist() == plain.user_ids.tolist()
    assert data.item_ids[data.items].tolist() == plain.item_ids[plain.items].tolist()


def test_items_of_the_catalogue_are_ranked(project: Project) -> None:
    small(project)
    write(project.root / "dataset/all.csv", "item_id", *(f"i{n}" for n in range(20)))
    ranks, items = {}, {}
    for name, more in (("own", ()), ("all", ("--item_data", "all"))):
        code, _, err = project.run("--model", "pop", "--run_name", name, *more)
        assert code == 0, err
        ranks[name] = read_ranks(f"saved/{name}", "pop")[1].tolist()
        actual = json.loads((project.root / f"saved/{name}/result.json").read_text())
        items[name] = actual["data"]["items"]
    assert items == {"own": 5, "all": 20}
    # i0 is the target, three items are seen, and no candidate has a training interaction: all are
    # level, against the model.
    assert ranks == {"own": [2] * 4, "all": [17] * 4}
    code, out, err = project.run("--check", "True", "--item_data", "all", "--val_only", "True")
    assert code == 0, err
    assert "4 users, 20 items, 16 interactions" in out
    code, out, err = project.run(
        "--dry_run", "True", "--item_data", "all", "--item_cache_path", "no"
    )
    assert code == 0, err


def test_a_cache_covers_the_catalogue(project: Project) -> None:
    small(project)
    write(project.root / INFORMATION, "item_id,title,tag,description", "i1,item 1,,")
    write(project.root / "dataset/all.csv", "item_id", "i9", "i1")
    where = ("--item_pretrain_dir", str(project.llama), "--item_cache_path", "new.safetensors")
    argv = [*project.arguments, *where, "--item_data", "all"]
    code, _, err = project.call(cache_main, argv)
    assert code == 0, err
    assert sorted(open_cache("new.safetensors").item_ids) == ["i0", "i1", "i2", "i3", "i4", "i9"]
    # A cache of the interactions' items alone lacks i9.
    code, _, err = project.call(cache_main, [*project.arguments, *where])
    assert code == 0, err
    expect_refusal(
        project,
        lambda: project.run("--model", "item_knn", *where, "--item_data", "all"),
        ["1 of 6 items in tiny are not in the item cache", "i9"],
    )


BAD = {
    "missing": (None, ["unknown item_data 'all'", "change --item_data or --data_path"]),
    "no ids": (["title", "T"], ["all.csv lacks the column item_id"]),
    "empty": (["item_id"], ["all.csv has no items"]),
    "blank": (["item_id", " i1"], ["all.csv, row 2", "begins or ends with a blank"]),
    "spoiled": (["item_id", "1.05514E+16"], ["all.csv, row 2", "exponent notation"]),
    "too many": (["item_id,title", "i1,a", "i2,a,b"], ["all.csv, row 3: has 3 fields"]),
}


@pytest.mark.parametrize("check", [(), ("--check", "True")])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_catalogue_is_one_line(project: Project, case: str, check: tuple[str, ...]) -> None:
    rows, words = BAD[case]
    if rows is not None:
        write(project.root / "dataset/all.csv", *rows)
    expect_refusal(
        project, lambda: project.run("--model", "pop", "--item_data", "all", *check), words
    )

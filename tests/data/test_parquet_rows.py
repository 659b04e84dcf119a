"""Interactions and item information as parquet: read as the CSV that they stand for, and written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsft.config import Config
from hsft.data import blocks
from hsft.data.files import dataset_file, information_file
from hsft.data.interactions import load_interactions, read_interactions
from hsft.data.item_text import read_item_texts
from hsft.utils.errors import InputError, problems_of
from prepare_data import main as prepare_main
from tests.conftest import Project

pa: Any = pytest.importorskip("pyarrow", reason="pyarrow is not installed (hsft[parquet])")
pq: Any = pytest.importorskip("pyarrow.parquet")

FILES = ("dataset/tiny", "information/tiny")


def to_parquet(path: Path, **types: Any) -> Path:
    """Write a CSV file as parquet beside it, columns of texts unless `types` says otherwise."""
    import pandas as pd

    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = {
        name: pa.array(frame[name], pa.string()).cast(types.get(str(name), pa.string()))
        for name in frame
    }
    target = path.with_suffix(".parquet")
    pq.write_table(pa.table(columns), target, row_group_size=7)
    return target


@pytest.mark.parametrize("large", [False, True])
def test_interactions_are_those_of_the_csv(
    project: Project, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    path = project.root / "dataset/tiny.csv"
    expected = read_interactions(path)
    if large:
        monkeypatch.setattr(blocks, "LARGE_BYTES", 1000)
    monkeypatch.setattr("hsft.data.parquet_rows._BATCH", 50)
    words = pa.dictionary(pa.int16(), pa.string())
    actual = read_interactions(to_parquet(path, timestamp=pa.int32(), user_id=words))
    for name in ("user_ids", "item_ids", "items", "timestamps", "offsets"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    assert (actual.ties, actual.warnings) == (expected.ties, expected.warnings)


def test_numbers_and_times_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = np.array(["2024-01-02", "2024-01-01", "2024-01-03"], dtype="datetime64[ms]")
    table = {"item_id": [7, 8, 7], "user_id": [1, 1, 1], "timestamp": times}
    pq.write_table(pa.table(table), path)
    actual = read_interactions(path)
    assert actual.item_ids.tolist() == ["[PAD]", "7", "8"]
    assert actual.items.tolist() == [2, 1, 1]
    assert actual.timestamps.tolist() == [1704067200000, 1704153600000, 1704240000000]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("item_id", np.array([16_777_216, 7, 8], dtype=np.float32), None),
        ("item_id", np.array([16_777_218, 7, 8], dtype=np.float32), "above 16,777,216, and has 16,777,218"),
        ("timestamp", np.array([1.7e9, 1.7e9, 1.7e9], dtype=np.float32), "timestamp is of type float, which"),
        ("user_id", np.array([1e16, 1, 1]), "user_id is of type double, which rounds"),
        ("timestamp", np.array([True, False, True]), "timestamp is of type bool"),
    ],
)  # fmt: skip
def test_types_that_round_ids_or_times_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    large: bool,
    column: str,
    values: np.ndarray,
    sentence: str | None,
) -> None:
    if large:
        monkeypatch.setattr(blocks, "LARGE_BYTES", 1)
    path = tmp_path / "a.parquet"
    price = np.array([1e9, 1, 2], dtype=np.float32)
    table = {"item_id": [7, 8, 7], "user_id": [1, 1, 1], "timestamp": [3, 1, 2], "price": price}
    pq.write_table(pa.table({**table, column: values}), path)
    if sentence is None:
        assert read_interactions(path).num_items == 3
        return
    with pytest.raises(InputError, match=sentence):
        read_interactions(path)


def test_a_run_reads_parquet(project: Project) -> None:
    csv = project.run("--val_only", "True", "--run_name", "csv")
    assert csv[0] == 0, csv[2]
    texts = read_item_texts("information/tiny.csv", ["title", "tag"], "p")
    for name in FILES:
        path = Path(f"{name}.csv")
        to_parquet(path, **({"timestamp": pa.int64()} if "dataset" in name else {"tag": pa.int8()}))
        path.unlink()
    assert read_item_texts(information_file("information", "tiny"), ["title", "tag"], "p") == texts
    code, out, err = project.run("--val_only", "True", "--run_name", "parquet")
    assert code == 0, err
    assert out.partition("result:")[0] == csv[1].partition("result:")[0]
    assert project.run("--val_only", "True", "--check", "True")[0] == 0


def test_a_data_set_is_written_as_parquet(project: Project) -> None:
    argv = ["hold-out", "--dataset", "tiny", "--share", "0.1"]
    assert project.call(prepare_main, argv)[0] == 0
    code, out, err = project.call(prepare_main, [*argv, "--name", "other", "--files", "parquet"])
    assert code == 0, err
    assert "dataset/other.parquet and information/other.parquet" in out
    paths = [dataset_file("dataset", name) for name in ("tiny-warm", "other")]
    csv, parquet = map(read_interactions, paths)
    assert np.array_equal(csv.items, parquet.items)
    assert csv.item_ids.tolist() == parquet.item_ids.tolist()
    keys = ["title", "tag", "description"]
    texts = [
        read_item_texts(information_file("information", name), keys, "")
        for name in ("tiny-warm", "other")
    ]
    assert texts[0] == texts[1]
    schema = pq.read_schema("dataset/other.parquet")
    assert [str(field.type) for field in schema] == ["string", "string", "int64"]
    code, _, err = project.call(prepare_main, [*argv, "--name", "other", "--overwrite", "True"])
    assert code == 2
    assert "dataset/other.parquet is there, which would be a second file" in err


def refusal_of(table: dict[str, Any], path: Path) -> str:
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError) as refusal:
        read_interactions(path)
    return "\n".join(problems_of(refusal.value))


def test_bad_cells_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    good = {"item_id": ["a", "b"], "user_id": ["u", "v"], "timestamp": [1, 2]}
    text = refusal_of({**good, "item_id": ["a", None]}, path)
    assert text == f"{path}, row 2: item_id is empty; fill it in or remove the row."
    text = refusal_of({**good, "timestamp": [1, 2.5]}, path)
    assert f"{path}, row 2: timestamp '2.5' is not a whole number" in text
    text = refusal_of({**good, "user_id": [["u"], ["v"]]}, path)
    assert "the column user_id is of type list<item: string>" in text.replace("element", "item")
    text = refusal_of({"item_id": ["a"], "user_id": ["u"]}, path)
    assert f"{path} lacks the column timestamp" in text
    text = refusal_of({name: pa.array([], pa.string()) for name in good}, path)
    assert "has no interactions" in text
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is no readable parquet file"):
        read_interactions(path)


def test_a_catalogue_is_read(project: Project) -> None:
    path = project.root / "dataset/catalogue.parquet"
    pq.write_table(pa.table({"tag": [1, 2, 3], "item_id": ["new", "i3", "i4"]}), path)
    interactions = load_interactions(Config(dataset="tiny", item_data="catalogue"))
    assert interactions.item_ids[:4].tolist() == ["[PAD]", "new", "i3", "i4"]
    assert interactions.num_items == 21
    pq.write_table(pa.table({"item_id": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2: item_id is empty"):
        load_interactions(Config(dataset="tiny", item_data="catalogue"))


def test_two_files_of_one_data_set_are_refused(project: Project) -> None:
    to_parquet(project.root / "dataset/tiny.csv")
    with pytest.raises(InputError, match=r"tiny\.csv and .*tiny\.parquet are both there"):
        load_interactions(Config(dataset="tiny"))


def test_without_pyarrow_it_says_what_is_lacking(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = to_parquet(project.root / "dataset/tiny.csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="needs the package pyarrow"):
        read_interactions(path)

"""Large tables are read with their columns in files, to the same interactions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from hsft.config import Config
from hsft.data import blocks, plain_csv
from hsft.data.blocks import Column, kth_smallest, sort_rows, user_ranges
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.interactions import Interactions, drop_items, read_interactions, renumber
from hsft.data.negatives import NegativeSampler
from hsft.data.split import make_split, train_item_counts
from hsft.evaluator.evaluator import EvalProtocol
from hsft.evaluator.fingerprint import evaluation_fingerprint
from hsft.run.setup import Data
from hsft.utils.errors import InputError
from tests.conftest import Project


def write(path: Path, rows: int, users: int, letters: str = "iu") -> Path:
    """Write random interactions, times with many ties."""
    rng = np.random.default_rng(1)
    columns = (
        rng.integers(50, size=rows),
        rng.integers(users, size=rows),
        rng.integers(9, size=rows),
    )
    lines = [f"{letters[0]}{i},{letters[1]}{u},{t}" for i, u, t in zip(*columns, strict=True)]
    path.write_text("\n".join(["item_id,user_id,timestamp", *lines]) + "\n")
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what lets every file from then on count as large, and few rows be in memory at a time."""

    def set_all() -> None:
        read = partial(plain_csv.read_plain, chunk_bytes=500)
        monkeypatch.setattr("hsft.data.interactions.read_plain", read)
        monkeypatch.setattr("hsft.data.parquet_rows._BATCH", 50)
        monkeypatch.setattr(plain_csv, "_MOST_SORTED", 20)
        monkeypatch.setattr(blocks, "LARGE_BYTES", 1000)
        monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 100)
        monkeypatch.setattr(blocks, "TEXTS_AT_A_TIME", 7)
        for module in ("split", "dataset.testset", "dataset.trainset"):
            monkeypatch.setattr(f"hsft.data.{module}.SAMPLES_AT_ONCE", 13)
        monkeypatch.setattr("hsft.data.blocks.SAMPLES_AT_ONCE", 13)

    return set_all


def is_mapped(array: np.ndarray) -> bool:
    part: Any = array
    while isinstance(part, np.ndarray) and not isinstance(part, np.memmap):
        part = part.base
    return isinstance(part, np.memmap)


def assert_same_but_mapped(actual: Interactions, expected: Interactions) -> None:
    for name in ("user_ids", "item_ids", "items", "timestamps", "offsets", "lengths"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
        assert is_mapped(getattr(actual, name)) == (name != "item_ids"), name
        assert not is_mapped(getattr(expected, name)), name
    assert actual.user_ids.dtype.kind == "U"
    assert all(type(text) is str for text in actual.user_ids.tolist())
    assert actual.items.dtype == np.int32
    assert actual.timestamps.dtype == np.int64
    assert (actual.ties, actual.warnings) == (expected.ties, expected.warnings)
    assert actual.dropped == expected.dropped


ORDERS: tuple[Literal["file", "shuffle"], ...] = ("file", "shuffle")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "letters",
    ["iu", ("B0000000", "reviewer-of-books-"), ("i", "0")],
    ids=["short", "long", "zeros"],
)
def test_a_large_file_is_read_to_the_same(
    tmp_path: Path,
    large: Callable[[], None],
    letters: str,
    order: Literal["file", "shuffle"],
) -> None:
    path = write(tmp_path / "a.csv", 3000, 170, letters)
    expected = read_interactions(path, order, seed=3)
    large()
    assert_same_but_mapped(read_interactions(path, order, seed=3), expected)
    # The files have no names.
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split": "global_time"},
        {"split": "global_time", "split_cold": "rank", "split_time": "0.8"},
        {"split": "global_time", "split_time": "7", "split_valid_time": "2", "data_split": False},
    ],
    ids=["leave_one_out", "global_time", "rank", "times"],
)
def test_a_large_file_is_split_to_the_same(
    tmp_path: Path, large: Callable[[], None], settings: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.csv", 800, 170)
    with path.open("a") as stream:
        stream.write("new,u5,8\nnew,u6,8\n")
    protocol = EvalProtocol("full", (5,), ("Recall",))

    def arrays() -> tuple[dict[str, np.ndarray], list[Any]]:
        split = make_split(Config(dataset="a", **settings), read_interactions(path))
        train = CachedEmbeddingTrainDataset(split, 3)
        test = CachedEmbeddingEvalDataset(split, "test", 4)
        sampler = NegativeSampler(split.interactions, split.held_out, items=split.train_items)
        some = split.interactions.ids_of(test.segments.users)
        return {
            **{
                name: getattr(split.interactions, name) for name in ("user_ids", "items", "offsets")
            },
            **{f"train {name}": array for name, array in vars(train.segments).items()},
            **{f"test {name}": array for name, array in vars(test.segments).items()},
            **{f"targets {name}": array for name, array in split.targets.items()},
            **{"train_ends": split.train_ends, "held_out": split.held_out, "scored": some},
            **{"lengths": train.lengths, "test lengths": test.lengths, "targets": test.targets},
            **{"seen": test.count_seen_items(), "available": sampler.available},
        }, [
            *(split.time, split.too_short, split.train_items, test.count_seen_targets()),
            *(train.num_transitions, train.target_shares(random_split=False).tolist()),
            *(train_item_counts(split).tolist(), evaluation_fingerprint(test, protocol)),
            *(Data(split, None).fingerprint, sampler.shares(train.segments.users)),
        ]

    expected, counts = arrays()
    large()
    actual, actual_counts = arrays()
    for name, array in expected.items():
        assert np.array_equal(actual[name], array), name
        assert len(array), name
        assert is_mapped(actual[name]), name
        assert not is_mapped(array), name
    *actual_counts, actual_shares = actual_counts
    assert actual_counts == counts[:-1]
    assert actual_shares == pytest.approx(counts[-1])


def test_items_are_dropped_from_a_large_file(tmp_path: Path, large: Callable[[], None]) -> None:
    path = write(tmp_path / "a.csv", 800, 300)
    keep = np.arange(51) % 3 > 0
    expected = drop_items(read_interactions(path), keep)
    assert expected.num_users < read_interactions(path).num_users
    large()
    actual = drop_items(read_interactions(path), keep)
    assert_same_but_mapped(actual, expected)
    again = renumber(actual, np.array([*actual.item_ids, "more"], dtype=object))
    assert np.array_equal(again.items, expected.items)
    assert is_mapped(again.items)


def test_a_large_file_trains_the_same_run(project: Project, large: Callable[[], None]) -> None:
    argv = ("--split", "global_time", "--tie_order", "shuffle", "--num_negatives", "2")
    code, expected, err = project.run(*argv, "--run_name", "small")
    assert code == 0, err
    large()
    code, actual, err = project.run(*argv, "--run_name", "large")
    assert code == 0, err
    assert actual.partition("result:")[0] == expected.partition("result:")[0]
    small, mapped = (
        json.loads((project.root / f"saved/{name}/result.json").read_text())
        for name in ("small", "large")
    )
    assert small["fingerprint"] == mapped["fingerprint"]
    assert small["data"] == mapped["data"]


@pytest.mark.parametrize("longest", ["", "an id of more than eight bytes", "x" * 65])
def test_ids_of_large_parquet_files_are_any_text(
    tmp_path: Path, large: Callable[[], None], longest: str
) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (hsft[parquet])")
    pq = pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(2)
    users = np.array(["é", "用户一", "用户二二", "u\U0001f600", "a", longest or "b"], dtype=object)
    columns: dict[str, Any] = {
        "item_id": [f"物品{n}" for n in rng.integers(30, size=400)],
        "user_id": users[rng.integers(6, size=400)],
        "timestamp": rng.integers(9, size=400),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    expected = read_interactions(path)
    assert set(expected.user_ids) == set(users)
    large()
    actual = read_interactions(path)
    if len(longest) > 64:
        # One long id would make all of them long.
        assert actual.user_ids.dtype == object
        assert np.array_equal(actual.user_ids, expected.user_ids)
        assert np.array_equal(actual.items, expected.items)
        assert drop_items(actual, np.arange(31) > 4).num_users == 6
    else:
        assert_same_but_mapped(actual, expected)
    pq.write_table(pa.table({**columns, "user_id": ["a\0", *columns["user_id"][1:]]}), path)
    with pytest.raises(InputError, match="control character"):
        read_interactions(path)
    pq.write_table(pa.table({**columns, "user_id": [""] * 400}), path)
    with pytest.raises(InputError, match="user_id is empty"):
        read_interactions(path)


@pytest.mark.parametrize(
    ("low", "high"), [(-5, 5), (0, 1), (-(2**63), 2**63 - 1), (10**9, 10**9 + 70_000_000)]
)
def test_a_value_is_selected_by_its_rank(
    monkeypatch: pytest.MonkeyPatch, low: int, high: int
) -> None:
    values = np.random.default_rng(0).integers(low, high, size=500, endpoint=True)
    values[:200] = values[0]
    values[-2:] = low, high
    ordered = np.sort(values).tolist()
    for rows_at_once in (7, 1000):
        monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
        for rank in (0, 1, 77, 250, 498, 499):
            assert kth_smallest(values, rank) == ordered[rank]


def test_users_are_taken_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 4)
    offsets = np.cumsum([0, 1, 3, 1, 9, 2, 2, 2])
    ranges = [(users.start, users.stop) for users in user_ranges(offsets)]
    assert ranges == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]


def test_a_disk_that_fills_up_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: Callable[[], None]
) -> None:
    path = write(tmp_path / "a.csv", 300, 10)
    large()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="No space left on device; free some"):
        read_interactions(path)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 100])
def test_rows_are_sorted_by_ranges_of_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
    users = np.array([2, 0, 2, 1, 0, 2, 2, 0], dtype=np.int32)
    items = np.arange(8, dtype=np.int32)
    times = np.array([5, 3, 4, 1, 3, 5, 0, 2], dtype=np.int64)
    offsets = np.array([0, 3, 4, 8])
    actual = sort_rows(users, items, times, offsets, tmp_path)
    assert actual[0].tolist() == [7, 1, 4, 3, 6, 2, 0, 5]
    assert actual[1].tolist() == [2, 3, 3, 1, 0, 4, 5, 5]
    # Of two rows of one user and time, the later one comes first in this order.
    order = np.arange(8)[::-1]
    actual = sort_rows(users, items, times, offsets, tmp_path, order)
    assert actual[0].tolist() == [7, 4, 1, 3, 6, 2, 5, 0]


def test_columns_keep_their_blocks(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        column = Column(np.int32, folder)
        column.append(np.array([[1, 2], [3, 4]]))
        column.append(np.array([5]))
        assert [block.tolist() for block in column.blocks()] == [[[1, 2], [3, 4]], [5]]
        assert column.whole().tolist() == [1, 2, 3, 4, 5]
        assert len(column) == 2


def test_a_full_disk_leaves_a_large_file_to_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.csv", 300, 10)
    monkeypatch.setattr(blocks, "LARGE_BYTES", 1000)
    monkeypatch.setattr(blocks, "free_bytes", lambda _: 1000)
    assert len(read_interactions(path)) == 300
    assert "is read into memory" in caplog.text

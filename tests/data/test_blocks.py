"""Large tables are read with their columns in files, to the same interactions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hsft.data import blocks, plain_csv
from hsft.data.blocks import Column, sort_rows
from hsft.data.interactions import read_interactions


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


@pytest.mark.parametrize(
    "letters", ["iu", ("B0000000", "reviewer-of-books-")], ids=["short", "long"]
)
def test_a_large_file_is_read_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letters: str
) -> None:
    path = write(tmp_path / "a.csv", 3000, 170, letters)
    expected = read_interactions(path)
    # Small blocks and merges, so that there are many.
    read = partial(plain_csv.read_plain, chunk_bytes=500)
    monkeypatch.setattr("hsft.data.interactions.read_plain", read)
    monkeypatch.setattr(plain_csv, "_MOST_SORTED", 20)
    monkeypatch.setattr(blocks, "LARGE_BYTES", 1000)
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 100)
    actual = read_interactions(path)
    for name in ("user_ids", "item_ids", "items", "timestamps", "offsets"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.items.dtype == np.int32
    assert actual.timestamps.dtype == np.int64
    assert (actual.ties, actual.warnings) == (expected.ties, expected.warnings)
    assert isinstance(actual.items.base, np.memmap)
    assert not isinstance(expected.items.base, np.memmap)
    # The files have no names.
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


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

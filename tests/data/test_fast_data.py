"""Fast ways in the data path and the evaluator give what the simple ways give."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsft.data import interactions as reading
from hsft.data import plain_csv
from hsft.data.cache import ItemCache, open_cache, save_cache
from hsft.data.dataset import (
    CachedEmbeddingEvalDataset,
    CachedEmbeddingTrainDataset,
    EvalCollate,
    TrainCollate,
)
from hsft.data.interactions import Interactions, read_interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.plain_csv import read_plain
from hsft.data.split import leave_one_out
from hsft.evaluator import ranking
from hsft.evaluator.evaluator import EvalProtocol, Evaluator
from hsft.evaluator.metrics import UNRANKED
from hsft.utils.errors import InputError

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Cells as files have them and as they should not: signs, spaces, quotes, blanks, other alphabets.
CELL = st.text(st.sampled_from("0019avZ-_.# "), max_size=20)
NUMBER = st.one_of(
    st.integers(0, 10**16 - 1).map(str),
    st.sampled_from(["", "+5", "-5", " 7", "1.0", "1e3", "00012", "9" * 17, "9" * 18, "noon"]),
)
ODD = st.sampled_from(['"a"', '"a,b"', "é", "a\r", "\0"])


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def same(actual: Interactions, expected: Interactions) -> None:
    assert actual.user_ids.tolist() == expected.user_ids.tolist()
    assert actual.item_ids.tolist() == expected.item_ids.tolist()
    np.testing.assert_array_equal(actual.items, expected.items)
    np.testing.assert_array_equal(actual.timestamps, expected.timestamps)
    np.testing.assert_array_equal(actual.offsets, expected.offsets)


def outcome(path: Path) -> Interactions | str:
    try:
        return read_interactions(path)
    except InputError as error:
        return str(error)


@quick
@given(
    rows=st.lists(
        st.tuples(CELL, CELL, NUMBER) | st.tuples(CELL, ODD, NUMBER), min_size=1, max_size=12
    ),
    tail=st.sampled_from(["", "\n", "\n\n", "\n1,2\n", "\n1,2,3,4\n", "\n ,  ,\n"]),
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=13, max_size=13),
    chunk=st.integers(1, 64),
)
def test_plain_reader_and_pandas_agree_on_any_file(
    tmp_path: Path, rows: list[tuple[str, str, str]], tail: str, ends: list[str], chunk: int
) -> None:
    lines = ["item_id,user_id,timestamp", *map(",".join, rows)]
    text = "".join(line + end for line, end in zip(lines, ends, strict=False)).removesuffix("\n")
    path = write(tmp_path / "rows.csv", text + tail)
    with patch.object(reading, "read_plain", lambda *_, **__: None):
        expected = outcome(path)
    in_pieces = partial(read_plain, chunk_bytes=chunk)
    with patch.object(reading, "read_plain", in_pieces):
        actual = outcome(path)
    if isinstance(expected, str):
        assert actual == expected
    else:
        assert isinstance(actual, Interactions)
        same(actual, expected)


@quick
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.sampled_from("0123456789abv"), min_size=1, max_size=30),
            st.text(st.sampled_from("01"), min_size=1, max_size=3),
            st.integers(0, 10**16 - 1),
        ),
        min_size=1,
        max_size=30,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(1, 200),
)
def test_plain_reader_reads_plain_files_itself(
    tmp_path: Path, rows: list[tuple[str, str, int]], end: str, chunk: int
) -> None:
    lines = [f"x,{number},{user},{item}" for item, user, number in rows]
    path = write(tmp_path / "plain.csv", end.join(["note,timestamp,user_id,item_id", *lines]))
    for folder in (None, tmp_path):
        actual = read_plain(path, ("item_id", "user_id"), "timestamp", chunk, folder)
        assert actual is not None
        for column in (0, 1):
            values = [row[column] for row in rows]
            assert actual.ids[column].tolist() == list(dict.fromkeys(values))
            assert [actual.ids[column][code] for code in actual.codes[column]] == values
        assert actual.numbers.tolist() == [row[2] for row in rows]


def test_ids_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "item_id,user_id,timestamp\n1,1,1\n01,1.0,2\n+1,1,3\n")
    actual = read_interactions(path)
    assert actual.item_ids.tolist() == ["[PAD]", "1", "01", "+1"]
    assert actual.user_ids.tolist() == ["1", "1.0"]


def test_a_byte_order_mark_is_not_part_of_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "\ufeffitem_id,user_id,timestamp\na,b,1\n")
    assert read_plain(path, ("item_id", "user_id"), "timestamp") is not None
    assert read_interactions(path).item_ids.tolist() == ["[PAD]", "a"]


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), min_size=1, max_size=40),
    far=st.booleans(),
)
def test_rows_are_ordered_as_by_lexsort(rows: list[tuple[int, int]], far: bool) -> None:
    users = np.array([user for user, _ in rows], dtype=np.int64)
    # Far apart, user and time do not fit into one integer.
    times = np.array([time for _, time in rows], dtype=np.int64) * (10**17 if far else 1)
    expected = np.lexsort((times, users))
    np.testing.assert_array_equal(reading._by_user_and_time(users, times), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), None])
def test_opening_a_cache_finds_any_bad_value(
    tmp_path: Path, dtype: torch.dtype, bad: float | None
) -> None:
    # More rows than are searched at a time for the bad one.
    values = torch.randn(5000, 7).to(dtype)
    limits = torch.finfo(dtype)
    values[3, :4] = torch.tensor([limits.max, limits.min, limits.tiny, -0.0]).to(dtype)
    if bad is not None:
        values[4500, 6] = bad
    path = tmp_path / "cache.safetensors"
    save_cache(path, [f"i{n}" for n in range(5000)], values, {})
    if bad is None:
        assert torch.equal(open_cache(path).embeddings, values)
    else:
        with pytest.raises(InputError, match="'i4500' holds NaN or infinity"):
            open_cache(path)


def test_nan_with_its_sign_bit_set_is_found(tmp_path: Path) -> None:
    values = torch.zeros(4, 2, dtype=torch.float16)
    values.view(torch.int16)[2, 1] = -1  # all bits set: a negative NaN
    save_cache(tmp_path / "c.safetensors", list("abcd"), values, {})
    with pytest.raises(InputError, match="item 'c'"):
        open_cache(tmp_path / "c.safetensors")


@st.composite
def histories(draw: st.DrawFn, longest: int = 12) -> Interactions:
    lists = draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=longest), min_size=1))
    items = np.array([item for one in lists for item in one], dtype=np.int32)
    return Interactions(
        user_ids=np.arange(len(lists)).astype(str).astype(object),
        item_ids=np.array(["[PAD]", *map(str, range(1, 31))], dtype=object),
        items=items,
        timestamps=np.arange(len(items)),
        offsets=np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64),
    )


def items_of(data: Interactions, user: int) -> list[int]:
    return data.items[data.offsets[user] : data.offsets[user + 1]].tolist()


@quick
@given(
    data=histories(),
    held_out=st.integers(0, 2),
    distinct=st.booleans(),
    seed=st.integers(0, 99),
)
def test_draws_are_those_of_a_loop_over_users(
    data: Interactions, held_out: int, distinct: bool, seed: int
) -> None:
    sampler = NegativeSampler(data, held_out)
    rng = np.random.default_rng(seed)
    users = rng.integers(0, data.num_users, size=5)
    seen = [items_of(data, user) for user in users]
    training_items = [set(items[: len(items) - held_out]) for items in seen]
    assert sampler.available[users].tolist() == [30 - len(items) for items in training_items]
    actual = sampler.draw(users, 6, np.random.default_rng(seed), distinct)
    # The simple way, with the same stream: draw all, then draw the bad ones again until none is.
    rng = np.random.default_rng(seed)
    expected = rng.integers(1, 31, size=(5, 6))
    while True:
        bad = [
            (row, column)
            for row in range(5)
            for column in range(6)
            if expected[row, column] in training_items[row]
            or (distinct and expected[row, column] in expected[row, :column])
        ]
        if not bad:
            break
        again = rng.integers(1, 31, size=len(bad))
        for (row, column), item in zip(bad, again, strict=True):
            expected[row, column] = item
    np.testing.assert_array_equal(actual, expected)
    every = np.broadcast_to(np.arange(1, 31), (5, 30))
    owned = sampler.owns(np.broadcast_to(users[:, None], (5, 30)), every)
    assert [set(every[row][owned[row]].tolist()) for row in range(5)] == training_items


@quick
@given(data=histories(), length=st.integers(1, 5), seed=st.integers(0, 99))
def test_batches_are_those_of_a_loop_over_samples(
    data: Interactions, length: int, seed: int
) -> None:
    split = leave_one_out(data)
    train = CachedEmbeddingTrainDataset(split, length)
    if len(train):
        rows = np.random.default_rng(seed).integers(0, len(train), size=4)
        batch = TrainCollate(train)(rows)
        width = max(len(train[row]) - 1 for row in rows)
        assert batch.history.shape == batch.targets.shape == (4, width)
        for at, row in enumerate(rows):
            items = train[row].tolist()
            padding = [0] * (width - len(items) + 1)
            assert batch.history[at].tolist() == items[:-1] + padding
            assert batch.targets[at].tolist() == items[1:] + padding
            assert batch.attention_mask[at].tolist() == [
                *[True] * (len(items) - 1),
                *[False] * len(padding),
            ]
        assert torch.equal(batch.loss_mask, batch.attention_mask)
        assert all(part.is_contiguous() for part in batch)
    test = CachedEmbeddingEvalDataset(split, "test", length)
    if len(test):
        rows = np.random.default_rng(seed).integers(0, len(test), size=4)
        actual = EvalCollate(test)(rows)
        width = int(actual.lengths.max())
        for at, row in enumerate(rows):
            items = test[row].tolist()
            recent = items[:-1][-length:]
            assert actual.history[at].tolist() == recent + [0] * (width - len(recent))
            assert int(actual.lengths[at]) == len(recent)
            assert int(actual.targets[at]) == items[-1]
            assert actual.seen_items[actual.seen_rows == at].tolist() == items[:-1]


class Vectors:
    """A scorer with a vector an item; a user is the mean of the history."""

    def __init__(self, items: int, dim: int) -> None:
        self.table = torch.randn(items + 1, dim, generator=torch.Generator().manual_seed(0)).round()
        self.largest = 0

    @property
    def num_items(self) -> int:
        return len(self.table) - 1

    def user_vectors(self, history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        # Whole numbers: sums are exact whatever their order, so ties are ties in any grouping.
        return (self.table[history] * (history != 0).unsqueeze(-1)).sum(dim=1)

    def item_slice(self, start: int, end: int) -> torch.Tensor:
        self.largest = max(self.largest, end - start)
        return self.table[start:end]

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return self.table[items]


@quick
@given(
    data=histories(),
    budget=st.sampled_from([1, 400, 1000, 1 << 20]),
    batch_size=st.integers(1, 9),
)
def test_ranks_are_those_of_a_loop_over_users_whatever_the_groups(
    data: Interactions, budget: int, batch_size: int
) -> None:
    dataset = CachedEmbeddingEvalDataset(leave_one_out(data), "test", 5)
    if not len(dataset):
        return
    scorer = Vectors(30, 4)
    protocol = EvalProtocol("full", (5,), ("Recall", "Coverage"), budget_bytes=budget)
    encoded: list[int] = []
    actual = Evaluator(dataset, protocol, batch_size=batch_size).run(
        scorer, torch.device("cpu"), on_batch=encoded.append
    )
    assert sum(encoded) == len(dataset)
    assert scorer.largest <= max(1, budget // (16 * 4))
    listed = set()
    for row, rank in enumerate(actual.ranks):
        *seen, target = dataset[row].tolist()
        user = scorer.table[seen[-5:]].sum(dim=0)
        scores = {item: float(scorer.table[item] @ user) for item in range(1, 31)}
        masked = {item: -np.inf if item in seen else score for item, score in scores.items()}
        rivals = [masked[item] >= masked[target] for item in masked if item != target]
        # A target that the user has seen is masked, so it has no rank.
        assert rank == (UNRANKED if masked[target] == -np.inf else 1 + sum(rivals))
        listed |= {item for item, score in masked.items() if score > -np.inf}
    assert actual.metrics["Recall@5"] == pytest.approx(np.mean(actual.ranks <= 5))
    assert actual.metrics["Coverage@5"] <= len(listed) / 30


def test_counting_by_bytes_equals_the_sum() -> None:
    mask = torch.rand(7, 1000) < 0.3
    assert torch.equal(ranking.count_true(mask), mask.sum(dim=1))
    assert torch.equal(ranking.count_true(mask[:, 5:60]), mask[:, 5:60].sum(dim=1))
    assert ranking.count_true(mask[:0]).shape == (0,)


def test_scores_into_a_larger_matrix_equal_new_ones() -> None:
    users, items = torch.randn(3, 4), torch.randn(8, 4)
    out = torch.full((5, 8), 7.0)
    scores = ranking.full_scores(users, lambda a, b: items[a:b], 7, 3, out)
    assert torch.equal(scores, ranking.full_scores(users, lambda a, b: items[a:b], 7, 3))
    assert scores.data_ptr() == out.data_ptr()
    assert torch.equal(out[3:], torch.full((2, 8), 7.0))


def test_rows_of_finds_rows_and_misses() -> None:
    cache = ItemCache(["b", "a", "01"], torch.zeros(3, 1))
    assert cache.rows_of(["a", "1", "01", "b", "x"]).tolist() == [1, -1, 2, 0, -1]


@pytest.mark.parametrize("most_sorted", [0, 1_000_000])
def test_values_are_numbered_by_first_appearance(
    monkeypatch: pytest.MonkeyPatch, most_sorted: int
) -> None:
    monkeypatch.setattr(plain_csv, "_MOST_SORTED", most_sorted)
    values = np.array([7, 3, 7, 2**63, 0, 3], dtype=np.uint64)
    codes, distinct = plain_csv._factorize(values)
    assert (codes.tolist(), distinct) == ([0, 1, 0, 2, 3, 1], 4)

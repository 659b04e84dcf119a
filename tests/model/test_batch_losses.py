"""The loss of whole batches, from histories to a number, against plain NumPy in float64.

Batches come from the real dataset and collate function: histories of different lengths (padding),
items that occur more than once, and targets that are other positions' negatives (collisions).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainBatch, TrainCollate
from hsft.data.dataset.packing import Buckets
from hsft.data.interactions import Interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import leave_one_out
from hsft.model.item_table import ItemTable
from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder

DIM, ITEMS, LENGTH = 3, 9, 4
THRESHOLD = 0.99
# Of central differences.
STEP = 1e-5


class RunningMean(SequenceEncoder):
    """State t is a trainable matrix times the mean of items 0..t: small enough to do by hand."""

    def __init__(self, table: Tensor, matrix: Tensor, adapter: Tensor | None = None) -> None:
        super().__init__()
        self.items = ItemTable(table, "none" if adapter is None else "linear")
        if adapter is not None:
            self.items.adapter.weight.data = adapter  # type: ignore[union-attr]
        self.matrix = nn.Parameter(matrix)

    def forward(
        self,
        history: Tensor,
        positions: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        vectors = self.items(history) if vectors is None else vectors
        steps = torch.arange(1, history.shape[1] + 1).reshape(1, -1, 1)
        return (vectors.cumsum(dim=1) / steps) @ self.matrix


def interactions(rng: np.random.Generator, users: int) -> Interactions:
    lengths = rng.integers(4, 12, size=users)
    total = int(lengths.sum())
    return Interactions(
        user_ids=np.array([f"u{n}" for n in range(users)], dtype=object),
        item_ids=np.array(["[PAD]", *(f"i{n}" for n in range(1, ITEMS + 1))], dtype=object),
        # Few items and long histories: users meet items again.
        items=rng.integers(1, ITEMS + 1, size=total).astype(np.int32),
        timestamps=np.arange(total),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )


def transitions(data: Interactions) -> list[tuple[list[int], int]]:
    """Every (history, next item) of the training pieces, cut by hand."""
    actual = []
    for user in range(data.num_users):
        kept = data.items[data.offsets[user] : data.offsets[user + 1] - 2].tolist()
        pieces = [kept] if len(kept) <= LENGTH else []
        while len(kept) > LENGTH:
            pieces.append(kept[-LENGTH - 1 :])
            kept = kept[: -LENGTH - 1]
        for piece in pieces:
            actual += [(piece[: n + 1], piece[n + 1]) for n in range(len(piece) - 1)]
    return actual


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def logaddexp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def reference(
    pairs: list[tuple[list[int], int]],
    table: np.ndarray,
    matrix: np.ndarray,
    pool: list[int],
    kind: LossSettings,
    scale: float,
) -> float:
    total, count = 0.0, 0
    for history, target in pairs:
        state = table[history].mean(axis=0) @ matrix
        if kind.loss == "bce":
            total += math.log1p(math.exp(-float(state @ table[target])))
            rivals = [item for item in pool if item != target]
            total += sum(math.log1p(math.exp(float(state @ table[item]))) for item in rivals)
            count += 1 + len(rivals)
            continue
        if kind.negatives == "catalogue":
            rivals = [item for item in range(1, ITEMS + 1) if item != target]
        else:
            # The positive is no negative of its own, even where nothing is masked.
            others = [item for item in pool if item != target]
            most = kind.nce_thres
            rivals = [item for item in others if cosine(table[target], table[item]) <= most]
        scores = [math.exp(scale) * cosine(state, table[item]) for item in [target, *rivals]]
        total += logaddexp(scores) - scores[0]
        count += 1
    return total / count


def reference_counts(
    pairs: list[tuple[list[int], int]], table: np.ndarray, pool: list[int], kind: LossSettings
) -> list[int]:
    """Masked pairs and pairs of other items, positions without a negative, positions."""
    if kind.negatives == "catalogue":
        return [0, 0, 0, 0]
    counts = np.zeros(4, dtype=int)
    for _, target in pairs:
        others = [item for item in pool if item != target]
        masked = 0
        if kind.loss == "nce":
            masked = sum(cosine(table[target], table[item]) > kind.nce_thres for item in others)
        counts += [masked, len(others), masked == len(others), 1]
    return counts.tolist()


KINDS = [
    LossSettings("nce", "in_batch", THRESHOLD, 1 << 28, "cosine"),
    LossSettings("nce", "sampled", THRESHOLD, 1 << 28, "cosine"),
    LossSettings("nce", "catalogue", THRESHOLD, 1 << 28, "cosine"),
    LossSettings("nce", "in_batch", 1.01, 1 << 28, "cosine"),
    LossSettings("nce", "sampled", 1.01, 1 << 28, "cosine"),
    LossSettings("bce", "in_batch", THRESHOLD, 1 << 28, "dot"),
    LossSettings("bce", "sampled", THRESHOLD, 1 << 28, "dot"),
]


def central_differences(value: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Return the gradient of a function of a matrix."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = STEP
        gradient[index] = (value(at + shift) - value(at - shift)) / (2 * STEP)
    return gradient


@pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: f"{kind.loss}-{kind.negatives}-{kind.nce_thres}"
)
@given(st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_batch_costs_what_the_formula_says(kind: LossSettings, users: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = interactions(rng, users)
    split = leave_one_out(data)
    dataset = CachedEmbeddingTrainDataset(split, LENGTH)
    sampler = NegativeSampler(data, held_out=2) if kind.negatives == "sampled" else None
    collate = TrainCollate(dataset, sampler=sampler, num_negatives=3, seed=seed)
    drawn_from = [int(n) for n in NegativeSampler(data, held_out=2).available]
    if sampler is not None and min(drawn_from) < 1:
        return  # a user has met every item: there is nothing to draw
    batch: TrainBatch = collate(list(range(len(dataset))))
    table = np.concatenate([np.zeros((1, DIM)), rng.normal(size=(ITEMS, DIM))])
    table[2] = 2.0 * table[1]  # another item in the same direction: masked by the threshold
    matrix = rng.normal(size=(DIM, DIM))
    encoder = RunningMean(torch.tensor(table, dtype=torch.float32), torch.tensor(matrix).float())
    model = Recommender(encoder, kind, logit_scale=1.3)
    loss = model(batch)
    loss.backward()

    pairs = transitions(data)
    pool = (
        batch.negatives.reshape(-1).tolist()
        if kind.negatives == "sampled"
        else [target for _, target in pairs]
    )

    def value(of: np.ndarray, scale: float = 1.3) -> float:
        return reference(pairs, table, of, pool, kind, scale)

    assert loss.item() == pytest.approx(value(matrix), rel=1e-4, abs=1e-5)
    assert model.take_negative_counts().tolist() == reference_counts(pairs, table, pool, kind)
    assert model.take_negative_counts().tolist() == [0, 0, 0, 0]
    expected = central_differences(value, matrix)
    assert encoder.matrix.grad is not None
    np.testing.assert_allclose(encoder.matrix.grad.numpy(), expected, rtol=2e-3, atol=2e-4)
    if kind.loss == "nce":
        slope = (value(matrix, 1.3 + STEP) - value(matrix, 1.3 - STEP)) / (2 * STEP)
        assert model.logit_scale.grad is not None
        assert model.logit_scale.grad.item() == pytest.approx(slope, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: f"{kind.loss}-{kind.negatives}-{kind.nce_thres}"
)
@pytest.mark.parametrize("listed", [False, True])
def test_an_adapter_applied_once_an_item_has_the_gradient_of_one_applied_at_every_use(
    kind: LossSettings, listed: bool
) -> None:
    rng = np.random.default_rng(3)
    data = interactions(rng, 6)
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), LENGTH)
    sampler = (
        NegativeSampler(data, held_out=2, exclude="none") if kind.negatives == "sampled" else None
    )
    collate = TrainCollate(dataset, sampler=sampler, num_negatives=3, list_items=listed)
    batch: TrainBatch = collate(list(range(len(dataset))))
    table = np.concatenate([np.zeros((1, DIM)), rng.normal(size=(ITEMS, DIM))])
    matrix, adapter = rng.normal(size=(DIM, DIM)), 0.3 * rng.normal(size=(DIM, DIM))
    encoder = RunningMean(
        torch.tensor(table).float(), torch.tensor(matrix).float(), torch.tensor(adapter).float()
    )
    rows: list[int] = []
    assert encoder.items.adapter is not None
    encoder.items.adapter.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0][..., 0].numel())
    )
    model = Recommender(encoder, kind, logit_scale=1.3)
    loss = model(batch)
    loss.backward()

    pairs = transitions(data)
    drawn = kind.negatives == "sampled"
    pool = batch.negatives.reshape(-1).tolist() if drawn else [target for _, target in pairs]
    used = {item for history, target in pairs for item in (*history, target)}
    once = [1 + len(used)]
    more = {"in_batch": [], "sampled": [len(pool)], "catalogue": [ITEMS]}[kind.negatives]
    assert rows == once + more if listed else len(rows) == 2 + (kind.negatives == "sampled")

    def value(weight: np.ndarray) -> float:
        return reference(pairs, table + table @ weight.T, matrix, pool, kind, 1.3)

    assert loss.item() == pytest.approx(value(adapter), rel=1e-4)
    expected = central_differences(value, adapter)
    (weight,) = encoder.items.adapter.parameters()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=2e-3, atol=2e-4)


def test_a_bucket_lists_as_many_items_whatever_is_in_it() -> None:
    dataset = CachedEmbeddingTrainDataset(
        leave_one_out(interactions(np.random.default_rng(5), 8)), LENGTH
    )
    buckets = Buckets(step=16, sequences=4, max_length=LENGTH)
    collate = TrainCollate(dataset, single_row=True, buckets=buckets, list_items=True)
    sizes: dict[int, set[int]] = {}
    for start in range(len(dataset) - 4):
        batch = collate([start, start + 1, start + 2, start + 3][: 3 + start % 2])
        sizes.setdefault(batch.history.shape[1], set()).add(len(batch.items))
        assert (batch.items.diff() >= 0).all()
        assert batch.items[0] == 0
        uses = torch.cat([batch.history.flatten(), batch.targets.flatten()])
        assert set(batch.items.tolist()) == {0, *uses.tolist()}
    # By hand: 16 positions, one item more for each of 4 sequences, and one 0.
    assert sizes[16] == {21}
    assert all(len(actual) == 1 for actual in sizes.values())

"""Losses against float64 NumPy references, values and gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hsft.model import losses
from hsft.model.id_model import IdTable
from hsft.model.item_table import ItemTable

Array = np.ndarray


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reference_nce(q: Array, p: Array, pool: Array, scale: float, threshold: float) -> float:
    """One row after the other, as the formula reads."""
    q, p, pool = unit(q), unit(p), unit(pool)
    total = 0.0
    for row in range(len(q)):
        positive = math.exp(scale) * float(q[row] @ p[row])
        rivals = [
            math.exp(scale) * float(q[row] @ item)
            for item in pool
            if float(p[row] @ item) <= threshold
        ]
        largest = max([positive, *rivals])
        denominator = sum(math.exp(value - largest) for value in [positive, *rivals])
        total += math.log(denominator) + largest - positive
    return total / len(q)


def reference_bce(q: Array, p: Array, pool: Array, excluded: Array) -> float:
    values = []
    for row in range(len(q)):
        values.append(math.log1p(math.exp(-float(q[row] @ p[row]))))
        for column in range(len(pool)):
            if not excluded[row, column]:
                values.append(math.log1p(math.exp(float(q[row] @ pool[column]))))
    return sum(values) / len(values)


def reference_softmax(
    q: Array, items: Array, targets: Array, scale: float, cosine: bool = True
) -> float:
    if cosine:
        q, items = unit(q), unit(items)
    total = 0.0
    for row, target in enumerate(targets):
        scores = np.array([math.exp(scale) * float(q[row] @ item) for item in items])
        total += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
    return total / len(q)


def numeric_gradient(value: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (value(up) - value(down)) / (2 * step)
    return gradient


def tensor(x: Array) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32, requires_grad=True)


def close(gradient: torch.Tensor | None, expected: Array, rtol: float, atol: float) -> None:
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=rtol, atol=atol)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))


def check_gradients(
    tensors: dict[str, torch.Tensor],
    values: dict[str, Array],
    value: Callable[[dict[str, Array]], float],
) -> None:
    """Compare every tensor's gradient with numeric derivatives of the reference."""
    for name, actual in tensors.items():

        def at(x: Array, name: str = name) -> float:
            return value({**values, name: x})

        expected = numeric_gradient(at, values[name])
        close(actual.grad, expected.reshape(actual.shape), rtol=2e-3, atol=2e-3)


def far_from_threshold(p: Array, pool: Array, threshold: float) -> bool:
    """Numeric derivatives are wrong where a small step changes which negatives are masked."""
    return bool((np.abs(unit(p) @ unit(pool).T - threshold) > 1e-3).all())


@given(shapes, st.floats(0.0, math.log(100)), st.sampled_from([1 << 28, 1]))
@settings(max_examples=25, deadline=None)
def test_info_nce_and_its_gradients(
    shape: tuple[int, int, int, int], scale: float, budget: int
) -> None:
    rows, pool_size, dim, seed = shape
    rng = np.random.default_rng(seed)
    values = {
        "q": rng.normal(size=(rows, dim)),
        "p": rng.normal(size=(rows, dim)),
        "pool": rng.normal(size=(pool_size, dim)),
        "scale": np.array([scale]),
    }
    values["pool"][0] = values["p"][0] * 3.0  # a collision: the positive, at another length
    values["p"][-1] = values["p"][0]  # a repeated item
    assume(far_from_threshold(values["p"], values["pool"], 0.99))

    def reference(v: dict[str, Array]) -> float:
        return reference_nce(v["q"], v["p"], v["pool"], float(v["scale"][0]), 0.99)

    actual = {name: tensor(value) for name, value in values.items()}
    loss = losses.info_nce(
        actual["q"], actual["p"], actual["pool"], actual["scale"].sum(), 0.99, budget_bytes=budget
    )
    assert loss.item() == pytest.approx(reference(values), rel=1e-4, abs=1e-4)
    loss.backward()
    check_gradients(actual, values, reference)


@given(shapes, st.sampled_from([1 << 28, 1]))
@settings(max_examples=25, deadline=None)
def test_binary_cross_entropy_and_its_gradients(
    shape: tuple[int, int, int, int], budget: int
) -> None:
    rows, pool_size, dim, seed = shape
    rng = np.random.default_rng(seed)
    values = {
        "q": rng.normal(size=(rows, dim)),
        "p": rng.normal(size=(rows, dim)),
        "pool": rng.normal(size=(pool_size, dim)),
    }
    excluded = rng.random((rows, pool_size)) < 0.3

    def reference(v: dict[str, Array]) -> float:
        return reference_bce(v["q"], v["p"], v["pool"], excluded)

    actual = {name: tensor(value) for name, value in values.items()}
    loss = losses.binary_cross_entropy(
        actual["q"], actual["p"], actual["pool"], torch.tensor(excluded), budget
    )
    assert loss.item() == pytest.approx(reference(values), rel=1e-4)
    loss.backward()
    check_gradients(actual, values, reference)


@given(shapes, st.floats(0.0, math.log(100)), st.booleans(), st.sampled_from([1 << 28, 1]))
@settings(max_examples=25, deadline=None)
def test_catalogue_softmax_and_its_gradients(
    shape: tuple[int, int, int, int], scale: float, cosine: bool, budget: int
) -> None:
    rows, items, dim, seed = shape
    scale = scale if cosine else min(scale, 1.0)
    rng = np.random.default_rng(seed)
    values = {
        "q": rng.normal(size=(rows, dim)),
        "items": rng.normal(size=(items, dim)),
        "scale": np.array([scale]),
    }
    targets = rng.integers(0, items, size=rows)

    def reference(v: dict[str, Array]) -> float:
        return reference_softmax(v["q"], v["items"], targets, float(v["scale"][0]), cosine)

    actual = {name: tensor(value) for name, value in values.items()}
    loss = losses.catalogue_softmax(
        actual["q"],
        actual["items"],
        torch.tensor(targets),
        actual["scale"].sum(),
        cosine=cosine,
        budget_bytes=budget,
    )
    assert loss.item() == pytest.approx(reference(values), rel=1e-4, abs=1e-4)
    loss.backward()
    check_gradients(actual, values, reference)


def test_nce_by_hand() -> None:
    # Scale 0, cosines 1 with the positive and 0 with the one negative: log(e + 1) - 1.
    q = torch.tensor([[2.0, 0.0]])
    loss = losses.info_nce(q, q, torch.tensor([[0.0, 5.0]]), torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(math.e + 1) - 1)


def test_nce_masks_the_positive_among_the_negatives_by_threshold() -> None:
    q = torch.tensor([[1.0, 0.0]])
    twin = torch.tensor([[7.0, 0.0]])
    assert losses.info_nce(q, q, twin, torch.tensor(1.0), 0.99).item() == pytest.approx(0.0)
    assert losses.info_nce(q, q, twin, torch.tensor(1.0), 1.01).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("budget", [1 << 28, 1])
def test_masked_negatives_are_counted_once(budget: int) -> None:
    # Cosines with the positives: 1 and 0; 0 and 0; 1 and 0. The last column fills up, as does the
    # last row; the first pair is of one item.
    positives = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1e-4, 0.0]])
    pool = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    fillers = torch.tensor([False, False, True]).expand(3, -1)
    queries = torch.ones(3, 3, requires_grad=True)
    scale = torch.tensor(1.0)
    counts = torch.zeros(4, dtype=torch.int64)
    for ids in ([7, 8, 9], [6, 8, 9]):
        losses.info_nce(
            *(queries, positives, pool, scale, 0.99, fillers, budget),
            weights=torch.tensor([1.0, 1.0, 0.0]),
            item_ids=(torch.tensor(ids), torch.tensor([7, 5, 0])),
            counts=counts,
        ).backward()
    # 3 pairs, none masked; then 4, of which one.
    assert counts.tolist() == [1, 7, 0, 4]
    losses.info_nce(
        *(queries, positives, pool[:1], scale, 0.99, None, budget),
        item_ids=(torch.tensor([7, 8, 9]), torch.tensor([7])),
        counts=counts,
    )
    # The first position has no negative: its only one is the positive; the third has a twin.
    assert counts.tolist() == [2, 9, 2, 7]


def test_bce_by_hand() -> None:
    # Scores 0 with the positive and with both negatives: every pair costs log 2.
    zero = torch.zeros(1, 3)
    loss = losses.binary_cross_entropy(zero, zero, torch.ones(2, 3))
    assert loss.item() == pytest.approx(math.log(2))


def test_no_positions_give_zero_not_nan() -> None:
    none, pool = torch.zeros(0, 3), torch.ones(2, 3)
    scale = torch.tensor(0.0)
    assert losses.info_nce(none, none, pool, scale).item() == 0.0
    assert losses.binary_cross_entropy(none, none, pool).item() == 0.0
    targets = torch.zeros(0, dtype=torch.int64)
    assert losses.catalogue_softmax(none, pool, targets, scale).item() == 0.0


def plain_softmax(
    q: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    cosine: bool,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Materialise everything, as the formula reads."""
    if cosine:
        q, items = (torch.nn.functional.normalize(x, dim=-1) for x in (q, items))
    logits = scale.exp() * q @ items.T
    terms = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return terms.mean() if weights is None else (terms * weights).sum() / weights.sum()


def loss_and_gradients(
    table: ItemTable, q: torch.Tensor, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return three times a loss of queries and scale, and its gradients, the table's last."""
    table.zero_grad()
    query = q.clone().requires_grad_()
    scale = torch.tensor(1.5, requires_grad=True)
    value = 3 * loss(query, scale)
    value.backward()
    return [value, query.grad, scale.grad, *(p.grad for p in table.parameters())]


@given(
    shapes,
    st.booleans(),
    st.sampled_from([1 << 28, 4096, 512, 1]),
    st.sampled_from(["none", "linear", "lowrank"]),
)
@settings(max_examples=40, deadline=None)
def test_a_chunked_catalogue_has_the_plain_loss_and_gradients(
    shape: tuple[int, int, int, int], cosine: bool, budget: int, adapter: str
) -> None:
    rows, count, dim, seed = shape
    rows, count = rows * 3, count * 5
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, dim, generator=generator)
    table = ItemTable(torch.randn(count + 1, dim, generator=generator), adapter, rank=2)
    for weight in table.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    targets = torch.randint(count, (rows,), generator=generator)
    actual = loss_and_gradients(
        table,
        q,
        lambda query, scale: losses.catalogue_softmax(
            query, table, targets, scale, cosine=cosine, budget_bytes=budget
        ),
    )
    expected = loss_and_gradients(
        table,
        q,
        lambda query, scale: plain_softmax(
            query, table.slice(1, count + 1), targets, scale, cosine
        ),
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("adapter", ["none", "linear"])
@pytest.mark.parametrize(("positions", "budget"), [(700, 130_000), (700, 60_000), (300, 60_000)])
def test_blocks_of_positions_and_chunks_of_items_have_the_plain_loss_and_gradients(
    cosine: bool, adapter: str, positions: int, budget: int
) -> None:
    items, dim = 50, 4
    rows, size = losses.chunk_shape(positions, items, dim, budget)
    assert (rows < positions and size == items) if budget > 100_000 else size < items
    generator = torch.Generator().manual_seed(positions)
    table = ItemTable(torch.randn(items + 1, dim, generator=generator).double(), adapter).double()
    targets = torch.randint(items, (positions,), generator=generator)
    weights = torch.randint(2, (positions,), generator=generator).float()
    # A score far above the others, first met in the last chunk, and one in the first.
    q = 3 * torch.randn(positions, dim, generator=generator)
    table.embeddings[[1, -1]] *= 20
    actual = loss_and_gradients(
        table,
        q,
        lambda query, scale: losses.catalogue_softmax(
            *(query, table, targets, scale), cosine=cosine, budget_bytes=budget, weights=weights
        ),
    )
    expected = loss_and_gradients(
        table,
        q,
        lambda query, scale: plain_softmax(
            *(query, table.slice(1, items + 1).float(), targets, scale, cosine, weights)
        ),
    )
    trained = list(table.parameters())
    assert len(trained) == (adapter == "linear")
    assert table.is_frozen == (not trained)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_blocks_leave_out_gradients_that_nobody_asks_for() -> None:
    q, p = torch.randn(9, 4), torch.randn(9, 4)
    pool = torch.randn(7, 4, requires_grad=True)
    whole, blocks = (
        losses.info_nce(q, p, pool, torch.tensor(1.0), budget_bytes=budget)
        for budget in (1 << 20, 4 * 3 * 7 * 2)
    )
    gradients = [torch.autograd.grad(loss, pool)[0] for loss in (whole, blocks)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        loss = losses.info_nce(q, p, pool, torch.tensor(1.0), budget_bytes=168)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole.detach())


def test_sasrecs_trained_table_gets_the_plain_gradients() -> None:
    torch.manual_seed(0)
    table, q = IdTable(30, 6), torch.randn(7, 6)
    targets, scale = torch.randint(30, (7,)), torch.tensor(0.0)
    plain_softmax(q, table.slice(1, 31), targets, scale, False).backward()
    expected, table.weight.grad = table.weight.grad, None
    losses.catalogue_softmax(q, table, targets, scale, cosine=False, budget_bytes=1024).backward()
    torch.testing.assert_close(table.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", [16, 320, 3_200, 100_000])
@pytest.mark.parametrize("items", [1_682, 96_282, 400_000])
@pytest.mark.parametrize("dim", [64, 576, 2_048])
def test_chunks_stay_within_the_budget(positions: int, items: int, dim: int) -> None:
    for budget in (1 << 20, 1 << 28):
        rows, size = losses.chunk_shape(positions, items, dim, budget)
        assert 1 <= rows <= positions
        assert 1 <= size <= items
        assert 4 * (2 * rows * size + 8 * size * dim) <= budget


class Living(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen and key not in given:
                    self._seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    self.largest = max(self.largest, size)
                    weakref.finalize(storage, self._drop, key, size)
        return made

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_memory_of_many_negatives_is_within_the_budget_and_the_vectors() -> None:
    dim, budget = 64, 4 << 20
    scale = torch.tensor(1.0)
    for positions, negatives in ((1_600, 1_000), (1_600, 16_000), (400, 16_000)):
        q = torch.randn(positions, dim, requires_grad=True)
        p, pool = torch.randn(positions, dim), torch.randn(negatives, dim)
        ids = (torch.arange(positions), torch.arange(negatives))
        counts = torch.zeros(4, dtype=torch.int64)
        with Living() as living:
            losses.info_nce(
                q, p, pool, scale, budget_bytes=budget, item_ids=ids, counts=counts
            ).backward()
        # The pool normalised, and a few vectors a position.
        vectors = 4 * dim * (negatives + 8 * positions)
        assert living.peak <= budget + vectors
        assert living.largest < 4 * positions * negatives


@pytest.mark.parametrize("adapter", ["none", "linear"])
def test_memory_is_within_the_budget_whatever_catalogue_and_batch(adapter: str) -> None:
    dim, budget = 64, 4 << 20
    peaks = {}
    # The first fit the budget as a whole, with a part of the positions at a time.
    for items in (1_000, 4_000, 16_000):
        for positions in (100, 1_600):
            table = ItemTable(torch.randn(items + 1, dim).half(), adapter)
            q = torch.randn(positions, dim, requires_grad=True)
            targets = torch.randint(items, (positions,))
            with Living() as living:
                loss = losses.catalogue_softmax(
                    q, table, targets, torch.tensor(1.0), budget_bytes=budget
                )
                loss.backward()
            # Queries, their gradients, and a few numbers per position and chunk come on top.
            rows, size = losses.chunk_shape(positions, items, dim, budget)
            small = 4 * positions * (8 * dim + 8 * math.ceil(items / size)) + (1 << 18)
            peaks[items, positions] = living.peak - small
            assert 0 < living.peak <= budget + small
            if (rows, size) != (positions, items):
                assert living.largest < items * positions * 4
            assert living.largest <= budget
    for positions in (100, 1_600):
        assert peaks[16_000, positions] <= peaks[4_000, positions] + (1 << 16)
    with Living() as plain:
        scale = torch.tensor(1.0)
        plain_softmax(q, table.slice(1, items + 1), targets, scale, True).backward()
    assert plain.peak > 4 * items * positions

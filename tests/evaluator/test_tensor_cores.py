"""Ranks from rounded products: those of exact scores, whatever the products' error within the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.evaluator import ranking
from hsft.evaluator.evaluator import EvalProtocol, Evaluator
from hsft.evaluator.metrics import UNRANKED
from hsft.evaluator.tensor_cores import (
    Product,
    accumulation_error,
    error_bound,
    tensor_core_ranks,
    tf32_product,
    to_tf32,
)

NOTHING = torch.empty(0, dtype=torch.int64)


def ranks(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] = (NOTHING, NOTHING),
    product: Product = tf32_product,
    budget_bytes: int = 1 << 16,
) -> list[int] | None:
    actual = tensor_core_ranks(
        users,
        lambda start, end: items[start:end],
        len(items) - 1,
        targets,
        seen,
        items_at_a_time=100,
        budget_bytes=budget_bytes,
        product=product,
    )
    return None if actual is None else actual.tolist()


def exact_ranks(users: Tensor, items: Tensor, targets: Tensor) -> list[int]:
    """Ranks of float64 scores rounded to float32, the padding item left out."""
    scores = (users.double() @ items.double().T).float()[:, 1:]
    return (scores >= scores.gather(1, targets.unsqueeze(1) - 1)).sum(dim=1).tolist()


def test_tf32_by_hand() -> None:
    step = 2.0**-10
    given = [1.0, 1 + step, 1 + step / 4, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3.3, 0.0]
    expected = [1.0, 1 + step, 1.0, 1.0, 1 + 2 * step, 1 + step, -3.30078125, 0.0]
    assert to_tf32(torch.tensor(given)).tolist() == expected
    assert to_tf32(torch.tensor([torch.inf, -torch.inf])).tolist() == [torch.inf, -torch.inf]


def near_ties(seed: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """20 users, 400 items of unit length; those of each user's target are within 1e-7 of it."""
    draw = torch.Generator().manual_seed(seed)
    users = torch.randn(20, dim, generator=draw)
    items = torch.randn(401, dim, generator=draw)
    items[0] = 0.0
    for number in range(20):
        first = 1 + 20 * number
        sizes = torch.logspace(-8, -2, 15).unsqueeze(1)
        noise = torch.randn(15, dim, generator=draw)
        # The target, 15 items ever further from it, and four that are equal to it.
        items[first + 1 : first + 16] = items[first] + sizes * noise
        items[first + 16 : first + 20] = items[first]
    targets = 1 + 20 * torch.arange(20)
    return torch.nn.functional.normalize(users), torch.nn.functional.normalize(items), targets


@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("seed", range(3))
def test_near_ties_have_the_ranks_of_exact_scores(seed: int, dim: int) -> None:
    users, items, targets = near_ties(seed, dim)
    expected = exact_ranks(users, items, targets)
    assert ranks(users, items, targets) == expected
    rounded = (to_tf32(users) @ to_tf32(items).T)[:, 1:]
    alone = (rounded >= rounded.gather(1, targets.unsqueeze(1) - 1)).sum(dim=1).tolist()
    assert alone != expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [1.0, -1.0], ids=["up", "down"])
def test_no_error_within_the_bound_changes_a_rank(seed: int, share: float) -> None:
    users, items, targets = near_ties(seed, 64)
    expected = exact_ranks(users, items, targets)
    gamma = accumulation_error(64)
    rounded_users = to_tf32(users)
    at = 0

    def worst(vectors: Tensor, transposed: Tensor) -> Tensor:
        nonlocal at
        exact = vectors.double() @ transposed.double()
        limit = gamma * vectors.double().norm(dim=1, keepdim=True) * transposed.double().norm(dim=0)
        signs = torch.ones_like(exact)
        # Targets err in one direction, all others in the other.
        for user, target in enumerate(targets.tolist()):
            if at <= target < at + len(vectors):
                signs[target - at, user] = -1.0
        at += len(vectors)
        return (exact + share * signs * limit).float()

    assert ranks(users, items, targets, product=worst) == expected
    # The bound holds for these products, and is not much larger than their error.
    errors = (to_tf32(items) - items).norm(dim=1) + gamma * to_tf32(items).norm(dim=1)
    bound = error_bound(users, errors.max(), items.norm(dim=1).max()).double()
    at = 0
    products = worst(to_tf32(items), rounded_users.T).T.double()
    error = (products - users.double() @ items.double().T).abs()
    assert (error <= bound.unsqueeze(1)).all()
    assert error.max() > 0.05 * bound.max()


@pytest.mark.parametrize("seed", range(4))
def test_where_float32_is_exact_the_ranks_are_its_own(seed: int) -> None:
    # Integers below 2^12 times integers below 2^5, 64 of them: no sum needs more than 24 bits, but
    # TF32 rounds the first.
    rng = np.random.default_rng(seed)
    users = torch.from_numpy(rng.integers(-(2**12), 2**12, (30, 64)).astype(np.float32))
    items = torch.from_numpy(rng.integers(-16, 17, (301, 64)).astype(np.float32))
    # Many ties and differences of 1: every item has copies and a neighbour in one dimension.
    items[100:200] = items[:100]
    items[200:300] = items[:100]
    items[200:300, 0] += 1
    users[:, 0] = torch.from_numpy(rng.integers(-1, 2, 30).astype(np.float32))
    targets = torch.from_numpy(rng.integers(1, 301, 30))
    seen_rows = torch.from_numpy(rng.integers(0, 30, 200))
    seen_items = torch.from_numpy(rng.integers(1, 301, 200))
    seen_rows[0], seen_items[0] = 5, targets[5]
    scores = ranking.full_scores(users, lambda start, end: items[start:end], 300, 100)
    expected = ranking.full_ranks(scores, targets, seen_rows, seen_items).tolist()
    assert expected[5] == UNRANKED
    assert ranks(users, items, targets, (seen_rows, seen_items)) == expected
    # In pieces of one pair each.
    assert ranks(users, items, targets, (seen_rows, seen_items), budget_bytes=1) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e37])
def test_numbers_without_a_bound_are_left_to_float32(value: float) -> None:
    users, items, targets = near_ties(0, 8)
    items[7, 2] = value
    assert ranks(users, items, targets) is None
    users[3, 1] = value
    assert ranks(users, near_ties(0, 8)[1], targets) is None


def test_a_catalogue_of_equal_items_is_left_to_float32() -> None:
    users, _, targets = near_ties(0, 8)
    assert ranks(users, torch.ones(401, 8), targets) is None


@pytest.mark.parametrize("equal", [False, True])
def test_an_evaluation_has_the_same_ranks(equal: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rng = np.random.default_rng(3)
    data = Interactions(
        user_ids=np.array([f"u{n}" for n in range(12)], dtype=object),
        item_ids=np.array([f"i{n}" for n in range(301)], dtype=object),
        items=rng.integers(1, 301, size=72).astype(np.int32),
        timestamps=np.arange(72),
        offsets=np.arange(13) * 6,
    )
    table = torch.from_numpy(rng.integers(-16, 17, (301, 16)).astype(np.float32))

    class Sums:
        num_items = 300

        def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
            return table[history].sum(dim=1)

        def item_slice(self, start: int, end: int) -> Tensor:
            return table[start:end]

        def item_vectors(self, items: Tensor) -> Tensor:
            return table[items]

    if equal:
        table[:] = 1.0
    dataset = CachedEmbeddingEvalDataset(leave_one_out(data), "test", 5)
    # Groups of a few users.
    protocol = EvalProtocol("full", (5,), ("Recall",), budget_bytes=4 * 301 * 5)
    actual = [
        Evaluator(dataset, replace(protocol, tensor_cores=cores), batch_size=4)
        .run(Sums(), torch.device("cpu"))
        .ranks.tolist()
        for cores in (False, True)
    ]
    assert actual[0] == actual[1]
    assert sum("too near the targets" in line for line in caplog.messages) == int(equal)

"""`negatives_logq`: sampled and in-batch negatives that estimate the softmax over the catalogue."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainCollate
from hsft.data.interactions import Interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import leave_one_out
from hsft.model import losses
from hsft.model.item_table import ItemTable
from hsft.model.proposal import Proposal
from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder
from tests.conftest import Project

ITEMS = 5


class LastItem(SequenceEncoder):
    """State t is a matrix times item t."""

    def __init__(self, table: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.items = ItemTable(table)
        self.matrix = nn.Parameter(matrix)

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.items(history) @ self.matrix


def two_users() -> Interactions:
    """Training items 1 2 1 3 and 4 1, then two held out of each user."""
    items = [1, 2, 1, 3, 5, 5, 4, 1, 2, 2]
    return Interactions(
        user_ids=np.array(["a", "b"], dtype=object),
        item_ids=np.array(["[PAD]", *(f"i{n}" for n in range(1, ITEMS + 1))], dtype=object),
        items=np.array(items, dtype=np.int32),
        timestamps=np.arange(len(items)),
        offsets=np.array([0, 6, 10]),
    )


def test_shares_by_hand() -> None:
    data = two_users()
    split = leave_one_out(data)
    sequences = CachedEmbeddingTrainDataset(split, 8)
    # Targets: 2, 1, 3 of the first user and 1 of the second.
    assert sequences.target_shares(False) == pytest.approx([0, 2 / 4, 1 / 4, 1 / 4, 0, 0])
    # One position of either: 1/2 (1/3 each of 2, 1, 3), and 1/2 of 1.
    assert sequences.target_shares(True) == pytest.approx([0, 4 / 6, 1 / 6, 1 / 6, 0, 0])
    # The first draws from 4, 5, the second from 2, 3, 5.
    history = NegativeSampler(data, held_out=2)
    assert history.shares(np.array([0, 1])) == pytest.approx([0, 0, 1 / 6, 1 / 6, 1 / 4, 5 / 12])
    # A user with two sequences counts twice.
    assert history.shares(np.array([0, 0, 1]))[4] == pytest.approx(2 / 3 * 1 / 2)
    everything = NegativeSampler(data, held_out=2, exclude="none")
    assert everything.shares(np.array([0, 1])) == pytest.approx([0, *[1 / 5] * 5])


def test_expected_counts_by_hand() -> None:
    proposal = Proposal(np.array([0, 0.5, 0.25, 0.25]), np.array([0, 0.2, 0.4, 0.4]))
    # Three targets, of which one fills a bucket up: a position has one other target.
    counts = proposal.log_counts(torch.tensor([1, 2, 0]), torch.tensor([3, 3, 1, 2])).exp()
    one, other = 4 * 0.2 + 0.5, 4 * 0.4 + 0.25
    assert counts[[0, 1, 3, 4, 5, 6]].tolist() == pytest.approx(
        [one, other, other, other, one, other]
    )
    assert counts.isfinite().all()


def test_the_corrected_loss_by_hand() -> None:
    # Cosines 1 to the positive, 0 and 0.6 to two negatives that come up 4 times and half a time.
    query, positive = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    pool = torch.tensor([[0.0, 3.0], [0.6, 0.8]])
    loss = losses.info_nce(
        query, positive, pool, torch.tensor(0.0), log_counts=torch.tensor([4.0, 0.5]).log()
    )
    expected = math.log(math.e + 1 / 4 + math.exp(0.6) / 0.5) - 1
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("budget", [1 << 28, 1])
def test_the_estimate_of_the_partition_is_unbiased(budget: int) -> None:
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(ITEMS + 1, 3))).float()
    query = torch.from_numpy(rng.normal(size=(1, 3))).float()
    scale = torch.tensor(1.3)
    popularity = np.array([0, 0.4, 0.3, 0.15, 0.1, 0.05])
    uniform = np.array([0, *[0.2] * 5])
    proposal = Proposal(popularity, uniform)
    target = 2
    whole = losses.catalogue_softmax(query, vectors[1:], torch.tensor([target - 1]), scale)
    # All pools of the target of one other position and two drawn items, with their probabilities.
    mean = 0.0
    for other, first, second in itertools.product(range(1, ITEMS + 1), repeat=3):
        targets, drawn = torch.tensor([target, other]), torch.tensor([first, second])
        pool = torch.cat([targets, drawn])
        loss = losses.info_nce(
            query,
            vectors[[target]],
            vectors[pool],
            scale,
            1.01,
            (pool == target).unsqueeze(0),
            budget,
            log_counts=proposal.log_counts(targets, drawn),
        )
        mean += popularity[other] * uniform[first] * uniform[second] * math.exp(loss.item())
    # exp(loss) is the partition over the positive's term.
    assert mean == pytest.approx(math.exp(whole.item()), rel=1e-5)


def test_the_expected_loss_and_gradient_approach_the_full_softmax() -> None:
    rng = np.random.default_rng(1)
    items, dim = 40, 4
    table = torch.from_numpy(rng.normal(size=(items + 1, dim))).float()
    shares = np.concatenate([[0], rng.dirichlet(np.full(items, 0.3))])
    uniform = np.concatenate([[0], np.full(items, 1 / items)])
    proposal = Proposal(shares, uniform)
    query = torch.from_numpy(rng.normal(size=(1, dim))).float().requires_grad_()
    target, scale = torch.tensor([7]), torch.tensor(1.0)
    whole = losses.catalogue_softmax(query, table[1:], target - 1, scale)
    (exact,) = torch.autograd.grad(whole, query)
    distances = []
    for size in (8, 64, 512):
        total, gradient = 0.0, torch.zeros_like(query)
        plain = 0.0
        for _ in range(60):
            others = torch.from_numpy(rng.choice(items + 1, size // 2, p=shares))
            targets = torch.cat([target, others])
            drawn = torch.from_numpy(rng.integers(1, items + 1, size // 2))
            pool = torch.cat([targets, drawn])
            same = (pool == target).unsqueeze(0)
            counts = proposal.log_counts(targets, drawn)
            given = (query, table[target], table[pool], scale, 1.01, same)
            loss = losses.info_nce(*given, log_counts=counts)
            total += loss.item() / 60
            gradient += torch.autograd.grad(loss, query)[0] / 60
            plain += losses.info_nce(*given).item() / 60
        distances.append((abs(total - whole.item()), float((gradient - exact).norm())))
    # Without the correction it goes to log of the pool's size, not to the catalogue's partition.
    assert abs(plain - whole.item()) > 1
    values, gradients = zip(*distances, strict=True)
    assert values[0] > values[1] > values[2] < 0.02
    assert gradients[0] > gradients[2] < 0.02


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "in_batch"])
@pytest.mark.parametrize("single_row", [False, True])
def test_a_batch_costs_what_the_formula_says(sampled: bool, single_row: bool) -> None:
    data = two_users()
    sequences = CachedEmbeddingTrainDataset(leave_one_out(data), 8)
    sampler = NegativeSampler(data, held_out=2)
    collate = TrainCollate(
        sequences,
        sampler=sampler if sampled else None,
        num_negatives=3,
        single_row=single_row,
        seed=4,
    )
    batch = collate([0, 1])
    rng = np.random.default_rng(3)
    table, matrix = rng.normal(size=(ITEMS + 1, 3)), rng.normal(size=(3, 3))
    kind = LossSettings("nce", "sampled" if sampled else "in_batch", 1.01, 1 << 28, "cosine")
    model = Recommender(
        LastItem(torch.tensor(table).float(), torch.tensor(matrix).float()), kind, 0.7
    )
    targets = sequences.target_shares(False)
    drawn = sampler.shares(np.array([0, 1])) if sampled else np.zeros(ITEMS + 1)
    model.proposal = Proposal(targets, drawn)
    if single_row:
        # The encoder here reads every position by itself, so a row of several is as good.
        batch = batch._replace(positions=batch.positions[:0, :0], cu_lengths=batch.cu_lengths[:0])
    actual = model(batch)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    negatives = batch.negatives.flatten().tolist()
    pairs = [(1, 2), (2, 1), (1, 3), (4, 1)]
    pool = [2, 1, 3, 1, *negatives]
    total = 0.0
    for last, target in pairs:
        query = table[last] @ matrix
        partition = math.exp(math.exp(0.7) * cosine(query, table[target]))
        positive = partition
        for item in pool:
            if item != target:
                expected = 3 * targets[item] + len(negatives) * drawn[item]
                partition += math.exp(math.exp(0.7) * cosine(query, table[item])) / expected
        total += math.log(partition / positive)
    assert actual.item() == pytest.approx(total / len(pairs), rel=1e-5)


def test_a_run_with_corrected_negatives(project: Project) -> None:
    # Too slow a rate to learn, so that the losses are those of one model.
    train = ("--use_qlora", "True", "--epochs", "1", "--optim_args.learning_rate", "1e-9")
    more = ("--negatives_logq", "True", "--eval_baseline", "False", "--run_name")
    runs = {
        "whole": ("--negatives", "catalogue", "--negatives_logq", "False"),
        "drawn": ("--num_negatives", "400"),
        "batch": ("--train_batch_size", "30"),
        "plain": ("--num_negatives", "400", "--negatives_logq", "False"),
    }
    actual = {}
    for name, negatives in runs.items():
        code, _, err = project.run(*train, *more, name, *negatives)
        assert code == 0, err
        result = json.loads((project.root / f"saved/{name}/result.json").read_text())
        actual[name] = result["training"]["history"][0]["loss"]
    assert actual["drawn"] == pytest.approx(actual["whole"], abs=0.2)
    assert actual["batch"] == pytest.approx(actual["whole"], abs=0.2)
    assert actual["plain"] > actual["whole"] + 2
    code, _, err = project.run(*train, *more, "bad", "--loss", "bce")
    assert code == 2
    assert "negatives_logq corrects loss: nce" in err
    code, _, err = project.run(*train, *more, "bad", "--negatives", "catalogue")
    assert code == 2
    assert "negatives_logq has nothing to correct" in err

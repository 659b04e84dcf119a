"""Ensembles of two models: the sum of standardised scores, and the weight that is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hsft.model import ensemble as module
from hsft.model.ensemble import Ensemble, Member, last_items, weight_grid


class Table:
    """Scores by the dot product of a user's mean item vector: float32 [I + 1, D]."""

    def __init__(self, items: int, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(items + 1, dim, generator=generator) * (1 + seed) + 0.5
        self.table[0] = 0
        self.num_items = items

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        return self.table[history].sum(dim=1) / lengths.unsqueeze(1)

    def item_slice(self, start: int, end: int) -> Tensor:
        return self.table[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        return self.table[items]


@pytest.mark.parametrize("widest", [2048, 4])
def test_scores_are_the_weighted_sum_of_z_scores(
    widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The deviation comes from the covariance, or of the wider model from all scores, in slices.
    monkeypatch.setattr(module, "_WIDEST_COVARIANCE", widest)
    monkeypatch.setattr(module, "_VALUES_AT_A_TIME", 35)
    first, second = Table(40, 5, 1), Table(40, 3, 2)
    history, lengths = torch.tensor([[3, 9, 4, 7], [12, 5, 0, 0]]), torch.tensor([4, 2])
    ensemble = Ensemble([Member(first, 10), Member(second, 2)], [0.3, 0.7])
    expected = np.zeros((2, 40))
    # The second model reads the last two items.
    shorter = torch.tensor([[4, 7], [12, 5]])
    for model, read, weight in ((first, history, 0.3), (second, shorter, 0.7)):
        users = model.user_vectors(read, (read > 0).sum(dim=1)).double()
        scores = (users @ model.table[1:].double().T).numpy()
        z = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
        expected += weight * z
    users = ensemble.user_vectors(history, lengths)
    actual = (users @ ensemble.item_slice(1, 41).T).double().numpy()
    # A constant a user is left out: it changes no ranking.
    np.testing.assert_allclose(
        actual - actual.mean(axis=1, keepdims=True), expected, rtol=0, atol=1e-5
    )
    items = torch.tensor([[4, 0], [40, 1]])
    assert torch.equal(ensemble.item_vectors(items), ensemble.item_slice(0, 41)[items])
    with pytest.raises(ValueError, match="need the same items"):
        Ensemble([Member(first, 10), Member(Table(41, 3, 2), 10)], [0.5, 0.5])


def test_histories_are_cut_to_their_last_items() -> None:
    history = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 9, 1, 2, 0]])
    cut, lengths = last_items(history, torch.tensor([5, 2, 4]), 3)
    assert cut.tolist() == [[3, 4, 5], [6, 7, 0], [9, 1, 2]]
    assert lengths.tolist() == [3, 2, 3]
    same, _ = last_items(history, torch.tensor([5, 2, 4]), 5)
    assert same is history


def test_equal_scores_of_a_model_leave_the_ranking_to_the_others() -> None:
    flat, other = Table(6, 3, 1), Table(6, 3, 2)
    flat.table[1:] = 1.0
    ensemble = Ensemble([Member(flat, 3), Member(other, 3)], [0.5, 0.5])
    users = ensemble.user_vectors(torch.tensor([[2, 3]]), torch.tensor([2]))
    scores = users @ ensemble.item_slice(1, 7).T
    alone = Table(6, 3, 2).table[[2, 3]].mean(dim=0) @ other.table[1:].T
    assert scores.isfinite().all()
    assert scores[0].argsort().tolist() == alone.argsort().tolist()


def test_the_weights_that_are_tried() -> None:
    two = weight_grid(2)
    assert two.shape == (21, 2)
    assert two[0].tolist() == [0.5, 0.5]
    assert sorted(two[:, 0].round(2).tolist()) == [round(0.05 * n, 2) for n in range(21)]
    three = weight_grid(3)
    # 10 tenths over three: (12 choose 2).
    assert three.shape == (66, 3)
    assert sorted(three[0].tolist()) == [0.3, 0.3, 0.4]
    assert {(1.0, 0, 0), (0, 0, 1.0)} <= set(map(tuple, three.tolist()))
    for grid in (two, three):
        np.testing.assert_allclose(grid.sum(axis=1), 1)
        assert len(np.unique(grid, axis=0)) == len(grid)

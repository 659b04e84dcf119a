"""SASRec's gated layers, and what its keys do."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hsft.config import Config
from hsft.data.dataset import TrainBatch
from hsft.finished.open_run import open_run
from hsft.model.sasrec import LigrLayer, SASRec, build_sasrec
from tests.conftest import Project


def test_a_gated_layer_equals_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    layer = LigrLayer(8, 2, 0.5).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.4)
        normed = F.layer_norm(x, (8,), layer.attention_norm.weight, layer.attention_norm.bias)
        q, k, v = (normed @ layer.read.weight.T + layer.read.bias).split(8, dim=-1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
            scores += torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        attended = torch.cat(heads, dim=-1) @ layer.write.weight.T + layer.write.bias
        gate = torch.sigmoid(x @ layer.attention_gate.weight.T + layer.attention_gate.bias)
        y = x + gate * attended
        normed = F.layer_norm(y, (8,), layer.hidden_norm.weight, layer.hidden_norm.bias)
        wide = normed @ layer.widen.weight.T + layer.widen.bias
        hidden = wide[..., :32] * (wide[..., 32:] * torch.sigmoid(wide[..., 32:]))
        hidden = hidden @ layer.narrow.weight.T + layer.narrow.bias
        gate = torch.sigmoid(y @ layer.hidden_gate.weight.T + layer.hidden_gate.bias)
        torch.testing.assert_close(layer(x), y + gate * hidden)


def test_neither_padding_nor_later_items_change_a_state() -> None:
    for block in ("transformer", "ligr"):
        torch.manual_seed(0)
        model = SASRec(9, 6, dim=8, layers=2, heads=2, dropout=0.5, block=block).eval()
        with torch.no_grad():
            short, long = model(torch.tensor([[4, 2, 7]])), model(torch.tensor([[4, 2, 7, 1, 0]]))
        torch.testing.assert_close(short[0], long[0, :3])
        assert not torch.allclose(short[0, 0], short[0, 1])


@pytest.mark.parametrize("block", ["transformer", "ligr"])
def test_packed_rows_give_the_states_and_gradients_of_separate_rows(block: str) -> None:
    torch.manual_seed(0)
    model = SASRec(9, 4, dim=8, layers=2, heads=2, dropout=0.5, block=block).double().eval()
    separate = torch.tensor([[4, 2, 7, 0], [1, 3, 0, 0], [5, 6, 8, 9]])
    # The second row ends in three positions of padding, a sequence of their own.
    rows = torch.tensor([[4, 2, 7, 1, 3, 0, 0], [5, 6, 8, 9, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]])
    padded, packed = model(separate), model(rows, positions)
    torch.testing.assert_close(packed[0, :3], padded[0, :3])
    torch.testing.assert_close(packed[0, 3:5], padded[1, :2])
    torch.testing.assert_close(packed[1, :4], padded[2])
    weights = list(model.parameters())
    loss = (padded[separate > 0].sin()).sum()
    other = (packed[rows > 0].sin()).sum()
    for one, two in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(other, weights), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_a_packed_run_learns_as_an_unpacked_one_does(project: Project) -> None:
    losses = []
    for pack in ("True", "False"):
        code, _, err = project.run(
            *("--model", "sasrec", "--sasrec.dropout", "0", "--epochs", "3", "--run_name", pack),
            *("--pack_sequences", pack, "--optim_args.learning_rate", "1e-2"),
        )
        assert code == 0, err
        result = json.loads((project.root / "saved" / pack / "result.json").read_text())
        losses.append([epoch["loss"] for epoch in result["training"]["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_scores_are_dot_products_or_cosines_with_a_fixed_temperature() -> None:
    model = build_sasrec(Config(), 9)
    assert model.settings.similarity == "dot"
    assert float(model.scale()) == 0
    fixed = build_sasrec(Config(similarity="cosine", temperature=0.05, fix_temp=True), 9)
    assert float(fixed.scale()) == torch.tensor(math.log(20)).item()
    assert not fixed.logit_scale.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(fixed.item_slice(1, 10).norm(dim=1), torch.ones(9))
    assert build_sasrec(Config(similarity="cosine"), 9).logit_scale.requires_grad


def test_gated_layers_and_temperature_come_back_from_a_run(project: Project) -> None:
    more = ("--sasrec.block", "ligr", "--similarity", "cosine", "--temperature", "0.1")
    code, _, err = project.run(
        *("--model", "sasrec", *more, "--fix_temp", "True", "--epochs", "4", "--run_name", "run"),
        *("--optim_args.learning_rate", "1e-2"),
    )
    assert code == 0, err
    run = open_run("saved/run")
    assert float(run.build("sasrec").scale()) == torch.tensor(math.log(10)).item()  # type: ignore[attr-defined]
    actual = json.loads((project.root / "saved/run/result.json").read_text())
    history = actual["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    code, _, err = project.run("--temperature", "0.1", "--loss", "bce")
    assert code == 2
    assert "fix_temp and temperature belong to loss: nce" in err
    dots = (("sasrec",), ("hstu", "--similarity", "dot"))
    for model in dots:
        code, _, err = project.run("--model", *model, "--temperature", "0.1")
        assert code == 2
        assert f"model: {model[0]} is trained with dot products here; add similarity: cosine" in err


@pytest.mark.parametrize("similarity", ["auto", "cosine"])
def test_sampled_softmax_equals_its_formula_in_float64(similarity: str) -> None:
    config = Config.model_validate(
        {"num_negatives": 4, "similarity": similarity, "temperature": 0.5}
    )
    model = build_sasrec(config, 9).eval()
    history, targets = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[2, 3, 6], [5, 7, 0]])
    # Of the drawn items 7 and 2 are some position's positive, which it does not compete with.
    negatives = torch.tensor([[7, 8], [2, 8]])
    mask = targets > 0
    with torch.no_grad():
        states = model.encoder(history).double().numpy()
        table = model.encoder.items(torch.arange(10)).double().numpy()
        actual = model(TrainBatch(history, mask, targets, mask, negatives))
    scale = 1.0
    if similarity == "cosine":
        states = states / np.linalg.norm(states, axis=-1, keepdims=True)
        table = table / np.linalg.norm(table, axis=-1, keepdims=True)
        scale = 2.0
    total = []
    for row, column in zip(*np.nonzero(mask.numpy()), strict=True):
        target = int(targets[row, column])
        pool = [target, *(n for n in (7, 8, 2, 8) if n != target)]
        scores = scale * table[pool] @ states[row, column]
        total.append(np.log(np.exp(scores).sum()) - scores[0])
    assert actual.item() == pytest.approx(np.mean(total), rel=1e-5)


def test_a_run_with_sampled_softmax_learns(project: Project) -> None:
    more = ("--num_negatives", "64", "--negatives_logq", "True", "--sasrec.dropout", "0")
    code, _, err = project.run(
        *("--model", "sasrec", *more, "--epochs", "8", "--run_name", "run"),
        *("--optim_args.learning_rate", "1e-2"),
    )
    assert code == 0, err
    result = json.loads((project.root / "saved/run/result.json").read_text())
    history = result["training"]["history"]
    # Corrected, it starts at the log of the catalogue's 20 items whatever is drawn.
    assert history[0]["loss"] < math.log(20) + 0.2
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    code, _, err = project.run("--model", "sasrec", "--negatives_logq", "True")
    assert code == 2
    assert "negatives_logq needs num_negatives with model: sasrec" in err

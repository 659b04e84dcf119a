"""HSTU: its layer against the formula, packed rows, times, and runs on the command line."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch

from hsft.config import Config, load_config
from hsft.finished.open_run import open_run
from hsft.model.hstu import HSTU, HstuLayer, build_hstu, time_buckets
from hsft.report.result import read_ranks
from hsft.trainer import loop
from recommend import main as recommend_main
from tests.conftest import Project
from tests.helpers import ROOT
from tests.training_runs import at_step, send

SMALL = (
    *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/IDNet/hstu.yaml"),
    *("--hstu.hidden_size", "16", "--hstu.heads", "2", "--optim_args.learning_rate", "1e-2"),
    *("--train_batch_size", "8"),
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def norm(x: np.ndarray) -> np.ndarray:
    """Layer norm of one vector without weights, with HSTU's epsilon."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


@pytest.mark.parametrize("times_of", [None, "own", "next"])
def test_a_layer_equals_its_formula_in_float64(times_of: str | None) -> None:
    rng = np.random.default_rng(0)
    length, dim, heads, longest = 5, 6, 2, 9
    layer = HstuLayer(dim, heads, 0.3, longest, position_bias=True, time_bias=times_of is not None)
    layer = layer.double().eval()
    read, write = rng.normal(size=(4 * dim, dim)), rng.normal(size=(dim, dim))
    offset, by_distance = rng.normal(size=dim), rng.normal(size=longest)
    by_gap = rng.normal(size=129)
    with torch.no_grad():
        layer.read.weight.copy_(torch.from_numpy(read))
        layer.write.weight.copy_(torch.from_numpy(write))
        layer.write.bias.copy_(torch.from_numpy(offset))
        assert layer.position_bias is not None
        layer.position_bias.copy_(torch.from_numpy(by_distance))
        if layer.time_bias is not None:
            layer.time_bias.copy_(torch.from_numpy(by_gap))
    x = rng.normal(size=(length, dim))
    moments = np.array([0, 3, 3, 500, 90_000, 90_100])
    asked = moments[1:] if times_of == "next" else moments[:-1]
    expected = np.empty_like(x)
    parts = [read @ norm(row) for row in x]
    gate, value, query, key = np.split(np.stack([p * sigmoid(p) for p in parts]), 4, axis=1)
    for t in range(length):
        attended = np.zeros(dim)
        for head in range(heads):
            own = slice(head * dim // heads, (head + 1) * dim // heads)
            for s in range(t + 1):
                score = query[t, own] @ key[s, own] + by_distance[t - s]
                if times_of is not None:
                    gap = max(abs(int(asked[t]) - int(moments[s])), 1)
                    score += by_gap[math.floor(math.log(gap) / 0.301)]
                attended[own] += score * sigmoid(score) * value[s, own] / longest
        expected[t] = x[t] + write @ (gate[t] * norm(attended)) + offset
    reads = torch.ones(1, length, length, dtype=torch.bool).tril()
    buckets = None
    if times_of is not None:
        buckets = time_buckets(torch.from_numpy(asked)[None], torch.from_numpy(moments[:-1])[None])
    with torch.no_grad():
        actual = layer(torch.from_numpy(x)[None], reads, buckets)[0]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)


def test_gaps_fall_into_buckets_of_equal_ratios() -> None:
    day = 86_400
    times = torch.tensor([[0, 1, 2, 60, day, 3650 * day]])
    # ln(60) / 0.301 = 13.60, ln(day) / 0.301 = 37.76, ln(3650 day) / 0.301 = 65.01
    assert time_buckets(times, times)[0, :, 0].tolist() == [0, 0, 2, 13, 37, 65]
    assert time_buckets(torch.tensor([[2**62]]), torch.tensor([[-(2**61)]])).tolist() == [[[128]]]


def small(time_bias: str | None = None, item_width: int | None = None) -> HSTU:
    torch.manual_seed(0)
    model = HSTU(
        *(9, 4),
        dim=8,
        layers=2,
        heads=2,
        dropout=0.5,
        input_dropout=0.5,
        item_width=item_width,
        time_bias=time_bias,
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model.double().eval()


@pytest.mark.parametrize("time_bias", [None, "own", "next"])
def test_neither_padding_nor_later_items_change_a_state(time_bias: str | None) -> None:
    model = small(time_bias)
    times = torch.tensor([[[5, 9], [9, 400], [400, 7_000], [7_000, 0]]])[
        ..., : 2 if time_bias == "next" else 1
    ]
    given = {} if time_bias is None else {"times": times}
    short = {} if time_bias is None else {"times": times[:, :2]}
    with torch.no_grad():
        two = model(torch.tensor([[4, 2]]), **short)
        padded = model(torch.tensor([[4, 2, 0, 0]]), **given)
        longer = model(torch.tensor([[4, 2, 7, 1]]), **given)
    torch.testing.assert_close(two[0], padded[0, :2])
    torch.testing.assert_close(two[0], longer[0, :2])
    assert not torch.allclose(longer[0, 1], longer[0, 2])


@pytest.mark.parametrize("time_bias", [None, "next"])
def test_packed_rows_give_the_states_and_gradients_of_separate_rows(time_bias: str | None) -> None:
    model = small(time_bias, item_width=5)
    separate = torch.tensor([[4, 2, 7, 0], [1, 3, 0, 0], [5, 6, 8, 9]])
    # The second row ends in three positions of padding, a sequence of their own.
    rows = torch.tensor([[4, 2, 7, 1, 3, 0, 0], [5, 6, 8, 9, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]])
    moments = torch.randint(0, 10**6, (3, 4, 2), generator=torch.Generator().manual_seed(0))
    moments *= (separate > 0).unsqueeze(-1)
    together = torch.zeros(2, 7, 2, dtype=torch.int64)
    together[rows > 0] = moments[separate > 0]
    padded = model(separate, times=moments if time_bias else None)
    packed = model(rows, positions, times=together if time_bias else None)
    torch.testing.assert_close(packed[rows > 0], padded[separate > 0])
    weights = list(model.parameters())
    for one, two in zip(
        torch.autograd.grad(padded[separate > 0].sin().sum(), weights),
        torch.autograd.grad(packed[rows > 0].sin().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "layers", "weights"),
    [
        # 512 x 2048 of U, V, Q and K, 512 x 512 + 512 of the output, 50 of the distances
        ("hstu", 2, 2 * (1_048_576 + 262_656 + 50)),
        ("hstu_large", 16, 16 * (16_384 + 4_160 + 50)),
    ],
)
def test_the_shipped_shapes_have_the_weights_of_their_formula(
    name: str, layers: int, weights: int
) -> None:
    config, _ = load_config([ROOT / f"code/IDNet/{name}.yaml"])
    model = build_hstu(config, 9).encoder
    assert isinstance(model, HSTU)
    assert len(model.layers) == layers
    assert sum(weight.numel() for weight in model.layers.parameters()) == weights
    large = build_hstu(Config.model_validate({"model": "hstu", "hstu": {"item_width": 32}}), 9)
    assert large.encoder.items.weight.shape == (10, 32)
    with torch.no_grad():
        assert large.item_slice(1, 10).shape == (9, 512)


def test_a_run_learns_is_recommended_from_and_refuses_what_it_lacks(project: Project) -> None:
    code, _, err = project.run(*SMALL, "--epochs", "6", "--run_name", "run")
    assert code == 0, err
    result = json.loads((project.root / "saved/run/result.json").read_text())
    history = result["training"]["history"]
    assert [row["name"] for row in result["rows"]] == ["hstu"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert result["rows"][0]["metrics"]["NDCG@5"] > 0.5
    code, out, err = project.call(
        recommend_main, ["--run", "saved/run", "--user", "u1", "--topk", "3"]
    )
    assert code == 0, err
    assert "hstu" in out
    for more, sentence in {
        (
            "--use_qlora",
            "True",
        ): "use_qlora adapts the weights of an LLM, and model: hstu has none",
        ("--val_only", "True"): "model: hstu has nothing to evaluate untrained; drop val_only",
        ("--loss", "bce"): "model: hstu is trained with loss: nce",
        ("--gradient_checkpointing", "True"): "belongs to an LLM, not to model: hstu",
        ("--hstu.heads", "3"): "hstu.heads (3) must divide hstu.hidden_size (16)",
    }.items():
        code, _, err = project.run(*SMALL, *more)
        assert code == 2
        assert sentence in err


def test_packed_and_unpacked_runs_learn_alike(project: Project) -> None:
    losses = []
    for pack in ("True", "False"):
        code, _, err = project.run(
            *(*SMALL, "--hstu.dropout", "0", "--epochs", "2", "--run_name", pack),
            *("--pack_sequences", pack, "--negatives", "catalogue"),
        )
        assert code == 0, err
        result = json.loads((project.root / "saved" / pack / "result.json").read_text())
        losses.append([epoch["loss"] for epoch in result["training"]["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_with_times_goes_on_after_an_interruption(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project.root / "dataset/tiny.csv"
    header, *rows = (row.split(",") for row in path.read_text().splitlines())
    dated = [[item, user, str(10**9 + int(time) ** 3)] for item, user, time in rows]
    path.write_text("\n".join(",".join(row) for row in [header, *dated]) + "\n")
    more = ("--use_timestamps", "True", "--predict_at", "target", "--epochs", "3")
    run = (*SMALL, *more, "--hstu.item_width", "8")
    assert project.run(*run, "--run_name", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, send(signal.SIGTERM)))
        assert project.run(*run, "--run_name", "stopped")[0] == 143
    code, _, err = project.run(*run, "--run_name", "stopped", "--auto_resume", "True")
    assert code == 0, err
    ranks = [read_ranks(f"saved/{name}", "hstu")[1] for name in ("whole", "stopped")]
    np.testing.assert_array_equal(ranks[0], ranks[1])
    opened = open_run("saved/stopped")
    scorer = opened.build("hstu")
    history, times = opened.history("u1"), opened.history_times("u1", "2021-01-01")
    assert times is not None
    later = opened.history_times("u1", "2031-01-01")
    assert later is not None
    first, second = (
        opened.recommend(scorer, [history], 3, times=[given]).scores for given in (times, later)
    )
    assert not np.allclose(first, second)


@pytest.mark.parametrize("item_width", [None, 4])
def test_weights_may_be_16_bit_throughout(item_width: int | None) -> None:
    """As under `precision: bf16-true`, with item vectors that a map brings to the layers' width."""
    torch.manual_seed(0)
    model = HSTU(9, 5, dim=8, layers=2, heads=2, dropout=0.0, item_width=item_width).eval()
    history = torch.tensor([[1, 2, 3], [4, 5, 0]])
    exact = model(history)
    rounded = model.bfloat16()(history)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)

"""The training benchmarks' own code: they run, and the plain way computes what HSFT computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, hstu
from benchmarks.padding_data import PIXEL_INTERACTIONS, PIXEL_USERS, pixel_like
from benchmarks.plain_training import PlainModel, pad_to
from hsft.data.dataset import TrainBatch
from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM


def test_the_plain_way_has_the_same_catalogue_loss(llama: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(21, 64)
    lora = LoraSettings(4, 8, 0.0, ("q_proj",), "none", torch.float32)

    def decoder() -> torch.nn.Module:
        return load_decoder(llama, dtype=torch.float32, attention="sdpa", lora=lora)

    loss = LossSettings("nce", "catalogue", 0.99, 1 << 28, "cosine")
    ours = Recommender(UserLLM(add_lora(decoder(), lora, False), ItemTable(table)), loss, 2.659)
    plain = PlainModel(
        decoder(),
        table,
        rank=4,
        targets=["q_proj"],
        quantised=False,
        checkpointing=False,
        catalogue=True,
        adapter=True,
        dropout=0.0,
    )
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0]])
    mask = history > 0
    batch = TrainBatch(history, mask, targets, mask, torch.zeros(2, 0, dtype=torch.int64))
    torch.testing.assert_close(plain(*pad_to(9, batch)), ours(batch), rtol=1e-5, atol=1e-5)


def test_synthetic_histories_have_pixel200ks_mean_length() -> None:
    data = pixel_like(seed=3, users=20_000)
    assert data.lengths.mean() == pytest.approx(PIXEL_INTERACTIONS / PIXEL_USERS, rel=0.02)
    assert data.lengths.min() >= 5
    assert np.array_equal(data.items, pixel_like(seed=3, users=20_000).items)


def test_the_gpu_script_runs_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "True", "--steps", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["rows"]
    assert not [row for row in rows if "error" in row]
    assert all(row.get("passed", True) for row in rows)
    assert {row["section"] for row in rows} == {*gpu.SECTIONS, "memory"}
    for section, fewest in (("training", 9), ("grid", 8), ("demo", 3)):
        rates = [row["real_tokens_per_s"] for row in rows if row["section"] == section]
        assert len(rates) >= fewest
        assert min(rates) > 0
    compared = [row for row in rows if row["section"] == "grid" and "HSFT" in row["label"]]
    plain = [row for row in rows if row["section"] == "grid" and "plain" in row["label"]]
    for ours, other in zip(compared, plain, strict=True):
        rate = ours["overlapped_tokens_per_s"] / other["overlapped_tokens_per_s"]
        assert ours["against_plain"] == pytest.approx(rate)
    page = (tmp_path / "gpu.md").read_text()
    assert "--dry_run GiB" in page
    assert "### checks" in page
    out, err = capsys.readouterr()
    assert out.count("[grid]") == len(compared) + len(plain)
    assert out.splitlines()[-1].startswith(f"{result['seconds']:.0f} s in all")
    # Tables of whole runs, and other packages' lines and bars.
    assert "NDCG" not in out + err
    assert "shards" not in err


def test_the_gpu_script_begins_no_row_when_its_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tiny", "True", "--steps", "1", "--only", "checks", "--seconds", "0")
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["rows"] == []
    assert "[checks] a step waits for nothing" in result["left_out"]
    assert "left out: [checks] a step waits for nothing" in capsys.readouterr().out
    assert "Left out for want of time" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_gpu_script_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_way_of_hstu_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "True", "--cases", "1", "--steps", "1", "--limit", "1000"]
    assert hstu.main([*words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "hstu.json").read_text())
    rows = [row for row in result["rows"] if row["way"] != "no layers"]
    assert {row["way"] for row in rows} == {way.name for way in hstu.WAYS[1:]}
    assert all(row["passed"] and row["ms_per_step"] > 0 for row in rows)
    grouped = next(row for row in rows if row["way"] == "grouped")
    padded = next(row for row in rows if row["way"] == "padded")
    assert grouped["real_positions"] == padded["real_positions"]
    assert grouped["scores"] < padded["scores"]
    assert capsys.readouterr().out.count(" ms ") == len(result["rows"])


@pytest.mark.filterwarnings("ignore:flex_attention called:UserWarning")
@pytest.mark.filterwarnings("ignore:return_lse:FutureWarning")
def test_flex_attention_computes_hstu_by_two_softmaxes() -> None:
    torch.manual_seed(0)
    layers = [
        kind(32, 2, 0.0, 20, position_bias=True, time_bias=False)
        for kind in (hstu.HstuLayer, hstu.FlexLayer)
    ]
    # Scores far from 0, where silu is no line.
    layers[0].read.weight.data.mul_(40)
    layers[1].load_state_dict(layers[0].state_dict())
    states, reads = torch.randn(3, 13, 32), torch.ones(1, 13, 13, dtype=torch.bool).tril()
    with torch.no_grad():
        expected, actual = (layer(states, reads) for layer in layers)
    torch.testing.assert_close(actual, expected)

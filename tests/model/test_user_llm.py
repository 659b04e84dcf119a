"""The UserLLM: causality, padding, LoRA, quantisation, and what is saved of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hsft.data.dataset import TrainBatch
from hsft.model.backbone import load_decoder
from hsft.model.item_table import ItemTable, fit_standardize, fit_whiten
from hsft.model.recommender import LossSettings
from hsft.model.weights import load_trained, save_trained
from hsft.utils.errors import InputError
from tests.decoders import LORA, NCE, build


def batch() -> TrainBatch:
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 7], [6, 8, 0, 0]])
    mask = history > 0
    return TrainBatch(history, mask, targets, mask, torch.zeros(2, 0, dtype=torch.int64))


def test_states_equal_plain_transformers_on_the_item_vectors(llama: Path) -> None:
    model = build(llama, None).eval()
    history = torch.tensor([[3, 1, 2]])
    plain = AutoModel.from_pretrained(llama).eval()
    with torch.no_grad():
        expected = plain(inputs_embeds=model.encoder.items(history)).last_hidden_state
        torch.testing.assert_close(model.encoder(history), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scoring_normalises_items_and_leaves_the_table_alone(
    llama: Path, dtype: torch.dtype
) -> None:
    model = build(llama, None).eval()
    model.encoder.items = ItemTable(model.encoder.items.slice(0, 21).to(dtype), "none")
    before = model.encoder.items.slice(0, 21).clone()
    with torch.no_grad():
        scored = model.item_slice(3, 9)
        single = model.item_vectors(torch.arange(3, 9))
    expected = before[3:9].double() / before[3:9].double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(scored, expected.float())
    assert torch.equal(scored, single)
    assert torch.equal(model.encoder.items.slice(0, 21), before)


def test_padding_and_batch_mates_change_nothing(llama: Path) -> None:
    model = build(llama, None).eval()
    with torch.no_grad():
        short = model.user_vectors(torch.tensor([[5, 6]]), torch.tensor([2]))
        padded = model.user_vectors(
            torch.tensor([[5, 6, 0, 0], [1, 2, 3, 4]]), torch.tensor([2, 4])
        )
    torch.testing.assert_close(padded[0], short[0], rtol=1e-4, atol=1e-5)


def test_a_position_does_not_see_later_items(llama: Path) -> None:
    model = build(llama, None).eval()
    with torch.no_grad():
        one = model.encoder(torch.tensor([[1, 2, 3, 4]]))
        other = model.encoder(torch.tensor([[1, 2, 9, 8]]))
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


def test_only_the_adapter_and_the_scale_are_trained(llama: Path) -> None:
    model = build(llama)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "logit_scale" for name in trained)
    # Two layers, q and v, A and B each, and the scale.
    assert len(trained) == 2 * 2 * 2 + 1


@pytest.mark.parametrize("quantised", ["nf4", "fp4", "int8", "none"])
def test_every_quantisation_learns(llama: Path, quantised: str) -> None:
    model = build(llama, replace(LORA, quant_type=quantised))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        loss = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
def test_an_evaluation_between_steps_leaves_the_gradients_alone(
    llama: Path, quantised: str
) -> None:
    model = build(llama, replace(LORA, quant_type=quantised), adapter="linear")
    actual = []
    for _ in range(2):
        model.train().zero_grad()
        model(batch()).backward()
        actual.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            model.eval().user_vectors(torch.tensor([[1, 2]]), torch.tensor([2]))
    for before, after in zip(*actual, strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "settings",
    [
        NCE,
        replace(NCE, negatives="catalogue"),
        replace(NCE, loss="bce", similarity="dot"),
    ],
)
def test_a_chunked_loss_has_the_plain_loss_gradients(llama: Path, settings: LossSettings) -> None:
    gradients = []
    for budget in (1 << 28, 1):
        model = build(llama, LORA, replace(settings, budget_bytes=budget), adapter="linear")
        model(batch()).backward()
        gradients.append(
            [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        )
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_logit_scale_is_clamped(llama: Path) -> None:
    model = build(llama, None)
    with torch.no_grad():
        model.logit_scale.fill_(99.0)
    assert model.scale().item() == pytest.approx(4.605170)
    with torch.no_grad():
        model.logit_scale.fill_(-3.0)
    assert model.scale().item() == 0.0


def test_saved_weights_come_back(llama: Path, tmp_path: Path) -> None:
    model = build(llama, adapter="linear")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    save_trained(model, tmp_path / "best")
    other = build(llama, adapter="linear")
    history, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    expected = model.eval().user_vectors(history, lengths)
    assert not torch.allclose(other.eval().user_vectors(history, lengths), expected)
    load_trained(other, tmp_path / "best")
    torch.testing.assert_close(other.user_vectors(history, lengths), expected)


def test_weights_of_another_rank_are_refused(llama: Path, tmp_path: Path) -> None:
    save_trained(build(llama), tmp_path / "best")
    with pytest.raises(InputError, match="does not fit"):
        load_trained(build(llama, replace(LORA, rank=2)), tmp_path / "best")


def test_first_layers_are_kept(llama: Path) -> None:
    decoder = load_decoder(llama, dtype=torch.float32, attention="sdpa", layers=1)
    assert len(decoder.layers) == 1
    with pytest.raises(InputError, match="has only 2 layers"):
        load_decoder(llama, dtype=torch.float32, attention="sdpa", layers=3)


def test_an_untrained_adapter_changes_nothing(llama: Path) -> None:
    plain, adapted = build(llama, None), build(llama, None, adapter="lowrank")
    items = torch.arange(5)
    torch.testing.assert_close(adapted.encoder.items(items), plain.encoder.items(items))


def test_standardize_and_whiten() -> None:
    rows = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    flat = torch.cat([rows, torch.full((500, 1), 4.0)], dim=1)
    scaled = fit_standardize(flat)(flat)
    torch.testing.assert_close(scaled[:, :6].std(dim=0, correction=0), torch.ones(6))
    assert scaled[:, 6].abs().max() == 0
    white = fit_whiten(rows, floor=0.0)(rows)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(6), rtol=1e-3, atol=1e-3)

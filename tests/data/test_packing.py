"""Packed batches: the same sequences, the same loss and the same gradients as padded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsft.data.dataset import CachedEmbeddingTrainDataset, TrainBatch, TrainCollate
from hsft.data.dataset.packing import Buckets, pack, real_share
from hsft.data.interactions import Interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import leave_one_out
from hsft.model.backbone import LoraSettings, add_lora, load_decoder
from hsft.model.item_table import ItemTable
from hsft.model.norms import fuse_norms
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.user_llm import UserLLM
from hsft.trainer.micro_batch import count_sequences, unpack

ITEMS, DIM = 20, 64
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
LOSSES = {
    "nce in_batch": LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine"),
    "nce sampled": LossSettings("nce", "sampled", 0.99, 1 << 28, "cosine"),
    "nce catalogue": LossSettings("nce", "catalogue", 0.99, 1 << 28, "cosine"),
    "bce in_batch": LossSettings("bce", "in_batch", 0.99, 1 << 28, "dot"),
    "bce sampled": LossSettings("bce", "sampled", 0.99, 1 << 28, "dot"),
}


def interactions(transitions: list[int], seed: int) -> Interactions:
    """Users with so many transitions to train on, and two held-out items after them."""
    sizes = np.array(transitions) + 3
    items = np.random.default_rng(seed).integers(1, ITEMS + 1, sizes.sum()).astype(np.int32)
    return Interactions(
        item_ids=np.array(["", *(f"i{n}" for n in range(ITEMS))]),
        user_ids=np.array([f"u{n}" for n in range(len(sizes))]),
        items=items,
        timestamps=np.arange(len(items)),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def collated(
    transitions: list[int],
    seed: int,
    row_length: int | None,
    *,
    drawn: bool,
    split: bool = False,
    one: bool = False,
    buckets: Buckets | None = None,
) -> TrainBatch:
    data = interactions(transitions, seed)
    collate = TrainCollate(
        CachedEmbeddingTrainDataset(leave_one_out(data), max_length=9),
        sampler=NegativeSampler(data, held_out=2) if drawn else None,
        num_negatives=3,
        random_split=split,
        seed=seed,
        row_length=row_length,
        pack_below=1.1,
        single_row=one,
        buckets=buckets,
    )
    return collate(np.arange(len(transitions)))


@given(LENGTHS, st.integers(0, 99), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_transition_and_starts_each_sequence_at_zero(
    transitions: list[int], seed: int, row_length: int, split: bool
) -> None:
    padded = collated(transitions, seed, None, drawn=True, split=split)
    packed = collated(transitions, seed, row_length, drawn=True, split=split)
    assert torch.equal(packed.negatives, padded.negatives)
    assert (packed.attention_mask == (packed.history > 0)).all()
    actual = []
    for row in range(len(packed.history)):
        begins = np.flatnonzero(packed.positions[row].numpy() == 0)
        for start, end in zip(begins, [*begins[1:], packed.history.shape[1]], strict=True):
            assert packed.positions[row, start:end].tolist() == list(range(end - start))
            columns = [
                tuple(part[row, start:end].tolist())
                for part in (packed.history, packed.targets, packed.loss_mask)
            ]
            if any(columns[0]):
                actual.append(tuple(columns))
            else:
                assert end == packed.history.shape[1]
                assert not any(columns[1])
                assert not any(columns[2])
    expected = [
        tuple(
            tuple(part[n, :size].tolist())
            for part in (padded.history, padded.targets, padded.loss_mask)
        )
        for n, size in enumerate(transitions)
    ]
    assert sorted(actual) == sorted(expected)


def test_a_batch_with_little_padding_is_left_padded() -> None:
    data = interactions([9, 9, 9, 8], 0)
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), max_length=9)
    assert TrainCollate(dataset, row_length=18)(np.arange(4)).positions.numel() == 0
    data = interactions([9, 2, 9, 2], 0)
    dataset = CachedEmbeddingTrainDataset(leave_one_out(data), max_length=9)
    assert TrainCollate(dataset, row_length=18)(np.arange(4)).history.shape == (2, 11)


def test_packing_by_hand() -> None:
    # Dealt out as 5 | 4, then backwards 3 | 2: rows of 5 + 2 and 4 + 3.
    layout = pack(np.array([2, 5, 3, 4]), row_length=7)
    assert layout.shape == (2, 7)
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3]]
    lengths = np.array([2, 5, 3, 4])
    batches = [np.arange(4)]
    assert real_share(lengths, batches, None) == pytest.approx(14 / 20)
    assert real_share(lengths, batches, 7) == 1.0


def model(folder: Path, attention: str, quantised: str, loss: LossSettings) -> Recommender:
    torch.manual_seed(1)
    lora = LoraSettings(4, 8, 0.0, ("q_proj", "v_proj"), quantised, torch.float32)
    decoder = load_decoder(folder, dtype=torch.float32, attention=attention, lora=lora)
    fuse_norms(decoder)
    adapted = add_lora(decoder, lora, False)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    table = torch.randn(ITEMS + 1, DIM) * 0.5
    items = ItemTable(table, "linear")
    return Recommender(UserLLM(adapted, items, max_length=9), loss)


@pytest.fixture(scope="module", params=[("sdpa", "none"), ("eager", "none"), ("sdpa", "nf4")])
def models(request: pytest.FixtureRequest, llama: Path) -> dict[str, Recommender]:
    attention, quantised = request.param
    return {name: model(llama, attention, quantised, loss) for name, loss in LOSSES.items()}


@given(LENGTHS, st.integers(0, 99), st.integers(1, 40), st.sampled_from(list(LOSSES)))
@settings(max_examples=25, deadline=None)
def test_the_packed_loss_and_its_gradients_are_the_padded_ones(
    models: dict[str, Recommender], transitions: list[int], seed: int, row_length: int, loss: str
) -> None:
    actual = []
    for length in (None, row_length):
        batch = collated(transitions, seed, length, drawn="sampled" in loss)
        models[loss].zero_grad()
        value = models[loss](batch)
        value.backward()
        gradients = {n: p.grad for n, p in models[loss].named_parameters() if p.requires_grad}
        actual.append((value.detach(), gradients))
    (value, gradients), (packed_value, packed) = actual
    torch.testing.assert_close(packed_value, value, rtol=1e-5, atol=1e-6)
    for name, expected in gradients.items():
        assert (expected is None) == (packed[name] is None), name
        if expected is not None:
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(packed[name], expected, rtol=1e-3, atol=2e-5 * scale)


@given(LENGTHS, st.integers(0, 99), st.sampled_from(list(LOSSES)), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
@pytest.mark.usefixtures("emulated_varlen")
def test_a_single_row_has_the_same_loss_and_gradients_in_a_bucket_or_not(
    models: dict[str, Recommender],
    transitions: list[int],
    seed: int,
    loss: str,
    split: bool,
    padded: bool,
) -> None:
    model = models[loss]
    drawn = "sampled" in loss
    wanted_batch = collated(transitions, seed, None, drawn=drawn, split=split)
    buckets = Buckets(8, len(transitions) + 2, 9) if padded else None
    batch = collated(transitions, seed, None, drawn=drawn, split=split, one=True, buckets=buckets)
    actual = []
    config = model.encoder.decoder.config  # type: ignore[union-attr]
    kept = config._attn_implementation  # type: ignore[union-attr]
    for kernel, given_batch in ((kept, wanted_batch), ("varlen", batch)):
        config._attn_implementation = kernel  # type: ignore[union-attr]
        model.zero_grad()
        value = model(given_batch)
        value.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        actual.append((value.detach(), gradients))
    config._attn_implementation = kept  # type: ignore[union-attr]
    (value, gradients), (row_value, row_gradients) = actual
    torch.testing.assert_close(row_value, value, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == row_gradients.keys()
    for name, expected in gradients.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(row_gradients[name], expected, rtol=1e-3, atol=2e-5 * scale)


def test_sequences_in_one_row_do_not_see_each_other(llama: Path) -> None:
    encoder = model(llama, "sdpa", "none", LOSSES["nce in_batch"]).encoder.eval()
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with torch.no_grad():
        one = encoder(torch.tensor([[1, 2, 3, 4, 5]]), positions)
        other = encoder(torch.tensor([[6, 7, 8, 4, 5]]), positions)
        alone = encoder(torch.tensor([[4, 5]]))
    torch.testing.assert_close(one[:, 3:], other[:, 3:])
    torch.testing.assert_close(one[:, 3:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[:, :3], other[:, :3])


@pytest.mark.parametrize("loss", ["bce in_batch", "nce in_batch"])
def test_all_positions_are_trained_at_once(llama: Path, loss: str) -> None:
    """A pass over [B, T] gives the mean over every transition, each worked out on its own."""
    whole = collated([3, 5, 1], 4, None, drawn=False)
    assert whole.loss_mask.sum() == 3 + 5 + 1
    recommender = model(llama, "sdpa", "none", LOSSES[loss]).eval()
    with torch.no_grad():
        table = recommender.encoder.items(torch.arange(ITEMS + 1))
        targets = whole.targets[whole.loss_mask]
        values: list[float] = []
        for row, size in enumerate([3, 5, 1]):
            for end in range(1, size + 1):
                # A prefix of its own, as one random split point a user would train it.
                query = recommender.encoder(whole.history[row : row + 1, :end])[0, -1]
                target = int(whole.targets[row, end - 1])
                if loss.startswith("bce"):
                    values.append(torch.nn.functional.softplus(-(query @ table[target])).item())
                    values += [
                        torch.nn.functional.softplus(query @ table[int(other)]).item()
                        for other in targets
                        if int(other) != target
                    ]
                else:
                    cosine = torch.nn.functional.cosine_similarity
                    factor = recommender.scale().exp()
                    positive = factor * cosine(query, table[target], dim=0)
                    rivals = [
                        factor * cosine(query, table[int(other)], dim=0)
                        for other in targets
                        if cosine(table[target], table[int(other)], dim=0) <= 0.99
                    ]
                    logits = torch.stack([positive, *rivals])
                    values.append((logits.logsumexp(0) - positive).item())
        assert recommender(whole).item() == pytest.approx(sum(values) / len(values), rel=1e-4)


@given(LENGTHS, st.integers(0, 99), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_unpacking_gives_every_sequence_its_own_row_again(
    transitions: list[int], seed: int, row_length: int
) -> None:
    padded = collated(transitions, seed, None, drawn=True, split=True)
    packed = collated(transitions, seed, row_length, drawn=True, split=True)
    actual = unpack(packed)
    assert count_sequences(packed) == count_sequences(padded) == len(transitions)
    assert not actual.positions.numel()
    assert torch.equal(actual.negatives, padded.negatives)

    def rows(batch: TrainBatch) -> list[list[list[int]]]:
        parts = (batch.history, batch.attention_mask, batch.targets, batch.loss_mask)
        return sorted([part[n].int().tolist() for part in parts] for n in range(len(batch.history)))

    assert rows(actual) == rows(padded)

"""Texts in a single row: the layout, and the same embeddings as padded texts have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hsft.data.cache import open_cache
from hsft.data.item_text import ItemTexts
from hsft.encoding.build_cache import CacheBuilder, EncodingJob, encode_items
from hsft.encoding.item_llm import ItemEncoder, load_item_encoder
from hsft.encoding.packed import PackedTexts, pack_texts
from hsft.model import varlen
from hsft.model.backbone import load_decoder

VOCABULARY = 40


def encoder(folder: Path, attention_kernel: str, emb_token: bool) -> ItemEncoder:
    model = load_decoder(
        folder, dtype=torch.float32, attention=attention_kernel, keep_token_embedding=True
    )
    token = torch.randn(64, generator=torch.Generator().manual_seed(5)) if emb_token else None
    return ItemEncoder(model, None, token, 64)


def texts_of(lengths: list[int], prefix: np.ndarray, seed: int) -> list[np.ndarray]:
    """Texts that begin with the prefix, but for those too short for it."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, VOCABULARY, length) for length in lengths]
    for ids in texts:
        if len(ids) >= len(prefix):
            ids[: len(prefix)] = prefix
    return texts


def test_the_layout_by_hand() -> None:
    texts = [np.array(ids, dtype=np.int64) for ids in ([7, 8, 1, 2], [], [3], [7, 8, 4])]
    packed = pack_texts(texts, np.array([7, 8]), emb_token=True)
    assert packed.ids.tolist() == [[1, 2, 0, 0, 3, 0, 4, 0]]
    assert packed.is_emb_token.int().tolist() == [[0, 0, 1, 1, 0, 1, 0, 1]]
    assert packed.positions.tolist() == [[2, 3, 4, 0, 0, 1, 2, 3]]
    assert packed.cu_lengths.tolist() == [0, 3, 4, 6, 8]
    assert packed.cu_keys.tolist() == [0, 5, 6, 8, 12]
    # The prefix's two keys are numbers 0 and 1.
    assert packed.key_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 8, 9]
    assert packed.pooled.tolist() == [[2], [3], [5], [7]]
    assert (packed.longest, packed.longest_keys) == (3, 5)
    means = pack_texts(texts, np.array([7, 8]))
    assert means.ids.tolist() == [[1, 2, 3, 4]]
    assert means.counts.tolist() == [2, 0, 1, 1]
    assert means.before.tolist() == [2, 0, 0, 2]
    assert means.pooled.tolist() == [[0, 1], [2, 3], [2, 3], [3, 3]]
    empty = pack_texts([texts[1]] * 2)
    assert empty.ids.tolist() == [[0]]
    assert empty.cu_lengths.tolist() == [0, 0, 0, 1]


@pytest.mark.usefixtures("emulated_varlen")
@pytest.mark.parametrize("emb_token", [False, True], ids=["mean", "emb_token"])
@pytest.mark.parametrize("size", [0, 5], ids=["plain", "prefix"])
def test_packed_texts_have_the_embeddings_of_padded_ones(
    llama: Path, emb_token: bool, size: int
) -> None:
    packed, padded = (encoder(llama, kernel, emb_token) for kernel in ("varlen", "sdpa"))
    prefix = np.random.default_rng(1).integers(1, VOCABULARY, size)
    for actual in (packed, padded):
        actual.share_prefix(prefix)
    assert packed.packed
    assert not padded.packed
    rng = np.random.default_rng(2)
    cases = [[0], [0, 0], [1], [size], [size, 0, size + 1], [30, 1, 2, 0, 9]]
    cases += [rng.integers(0, 25, rng.integers(1, 9)).tolist() for _ in range(12)]
    for seed, lengths in enumerate(cases):
        texts = texts_of(lengths, prefix, seed)
        expected = padded.encode(texts)
        torch.testing.assert_close(packed.encode(texts), expected, rtol=1e-4, atol=1e-5)
        # A text has the same embedding alone.
        torch.testing.assert_close(packed.encode(texts[:1]), expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("emulated_varlen")
def test_a_kernel_that_aligns_first_positions_is_not_used(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = varlen.varlen_attn
    assert plain is not None

    def misaligned(q: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        return plain(q, *given, **{**more, "window_size": (2, 0)})

    actual = encoder(llama, "varlen", emb_token=True)
    prefix = np.arange(1, 7)
    monkeypatch.setattr(varlen, "varlen_attn", misaligned)
    actual.share_prefix(prefix)
    assert not actual.packed
    assert sum("texts are padded" in line for line in caplog.messages) == 1
    texts = texts_of([9, 3, 12], prefix, 0)
    padded = encoder(llama, "sdpa", emb_token=True)
    torch.testing.assert_close(actual.encode(texts), padded.encode(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("emulated_varlen")
def test_batches_prepared_ahead_come_in_their_order(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedTexts, "pin_memory", lambda self: self)
    actual = encoder(llama, "varlen", emb_token=True)
    batches = [texts_of([length, 2], np.arange(0), length) for length in (5, 3, 8)]
    expected = [actual.encode(texts) for texts in batches]
    for embeddings, other in zip(actual._encode_ahead(batches), expected, strict=True):
        assert torch.equal(embeddings, other)
    assert list(actual._encode_ahead([])) == []


@pytest.mark.usefixtures("emulated_varlen")
def test_a_cache_begun_with_padded_texts_is_finished_with_packed_ones(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsft.encoding.build_cache.ITEMS_PER_PART", 3)
    items = ItemTexts([str(n) for n in range(9)], [f"title : item {n}" for n in range(9)], "f")
    encoders = []
    for kernel in ("sdpa", "varlen"):
        encoders.append(
            load_item_encoder(
                llama,
                item_emb_token_n=0,
                max_text_length=64,
                device=torch.device("cpu"),
                dtype=torch.float32,
                attention=kernel,
            )
        )
    padded, packed = encoders
    job = EncodingJob("m", ("title",), "", 64, "float32", "mean", "f", 12)
    whole = encode_items(padded, items, job, show_progress=False)
    counts: list[int] = []

    def build(encoder: ItemEncoder, most: int) -> None:
        plain = encoder.encode

        def counted(tokens: list[np.ndarray]) -> torch.Tensor:
            if len(counts) == most:
                raise KeyboardInterrupt
            counts.append(len(tokens))
            return plain(tokens)

        monkeypatch.setattr(encoder, "_try_packed", lambda tokens: None)
        monkeypatch.setattr(encoder, "encode", counted)
        builder = CacheBuilder(tmp_path / "c.safetensors", tmp_path / "parts", show_progress=False)
        builder.build(encoder, job, items.item_ids, lambda: items.texts)

    with pytest.raises(KeyboardInterrupt):
        build(padded, 2)
    begun = sum(counts)
    assert 0 < begun < 9
    build(packed, -1)
    assert sum(counts) == 9
    made = open_cache(tmp_path / "c.safetensors")
    torch.testing.assert_close(made.embeddings, whole, rtol=1e-4, atol=1e-5)
    assert (made.embeddings == whole).all(dim=1).sum() >= begun

"""Item embeddings: pooling, the emb token, and independence of batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, MistralConfig, MistralModel

from hsft.data.cache import open_cache
from hsft.data.item_text import ItemTexts
from hsft.encoding.build_cache import CacheBuilder, EncodingJob, encode_items
from hsft.encoding.item_llm import ItemEncoder, length_batches, load_item_encoder
from hsft.encoding.prefix import encode_prefix
from tests.helpers import make_llama

TEXTS = ["title : item 3", "tag : 1 2 3 4 5 6 7", "item", "title : 9 tag : 8 description : 7 6", ""]


def encoder(folder: Path, emb_token_n: int = 1, max_text_length: int = 64) -> ItemEncoder:
    return load_item_encoder(
        folder,
        item_emb_token_n=emb_token_n,
        max_text_length=max_text_length,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="sdpa",
    )


@pytest.fixture(scope="module")
def hllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("hllm"), seed=3)
    token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(5))
    extra = {"item_emb_tokens": token, "logit_scale": torch.tensor(2.0)}
    save_file(extra, folder / "hllm_extra.safetensors")
    return folder


def alone(folder: Path, text: str, emb_token: torch.Tensor | None) -> torch.Tensor:
    """One item through plain transformers: mean over tokens, or the emb token's last state."""
    model = AutoModel.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    inputs = model.get_input_embeddings()(torch.tensor([ids], dtype=torch.int64))
    if emb_token is not None:
        inputs = torch.cat([inputs, emb_token.reshape(1, 1, -1)], dim=1)
    with torch.no_grad():
        states = model(inputs_embeds=inputs).last_hidden_state[0]
    return states.mean(dim=0) if emb_token is None else states[-1]


@pytest.mark.parametrize("text", TEXTS[:4])
def test_mean_pooling_is_the_mean_over_the_text_tokens(llama: Path, text: str) -> None:
    actual = encoder(llama, emb_token_n=0)
    batch = actual.tokenize([*TEXTS, text])
    torch.testing.assert_close(
        actual.encode(batch)[-1], alone(llama, text, None), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("text", TEXTS)
def test_emb_token_is_appended_in_embedding_space(hllm: Path, text: str) -> None:
    actual = encoder(hllm)
    assert actual.pooling == "emb_token"
    batch = actual.tokenize([*TEXTS, text])
    expected = alone(hllm, text, actual.emb_token)
    torch.testing.assert_close(actual.encode(batch)[-1], expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_emb_token_is_mean_pooled_and_says_so(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert encoder(llama).pooling == "mean"
    assert "mean-pooled" in caplog.text


def test_text_is_cut_before_the_emb_token_is_appended(hllm: Path) -> None:
    actual = encoder(hllm, max_text_length=3)
    full = encoder(hllm).tokenize([TEXTS[1]])[0]
    cut = actual.tokenize([TEXTS[1]])[0]
    np.testing.assert_array_equal(cut, full[:3])


@pytest.mark.parametrize("budget", [1, 16, 10_000])
def test_embeddings_do_not_depend_on_the_batch_size(hllm: Path, budget: int) -> None:
    items = ItemTexts([str(n) for n in range(len(TEXTS))], TEXTS, "f")
    actual = encoder(hllm)
    job = EncodingJob("m", ("title",), "", 64, "float32", actual.pooling, "f", budget)
    rows = encode_items(actual, items, job, show_progress=False)
    expected = torch.stack([actual.encode(actual.tokenize([text]))[0] for text in TEXTS])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


BEGUN = ["title : item 3 tag : 1", "title : item 3", "title : item 3 tag : 2 3 4 5", ""]


@pytest.mark.parametrize("emb_token_n", [0, 1], ids=["mean", "emb_token"])
def test_a_shared_beginning_changes_nothing(hllm: Path, emb_token_n: int) -> None:
    actual = encoder(hllm, emb_token_n)
    tokens = actual.tokenize([*BEGUN, *TEXTS])
    expected = actual.encode(tokens)
    actual.share_prefix(tokens[1])
    widths: list[int] = []
    forward = actual._forward

    def watched(**inputs: Any) -> Any:
        widths.append(inputs["inputs_embeds"].shape[1])
        return forward(**inputs)

    actual._forward = watched
    torch.testing.assert_close(actual.encode(tokens), expected, rtol=1e-4, atol=1e-5)
    # A second batch, of another size, does not see the first one's keys and values.
    torch.testing.assert_close(actual.encode(tokens[:3]), expected[:3], rtol=1e-4, atol=1e-5)
    extra = actual.pooling == "emb_token"
    # Of the longest text, 10 tokens, 4 are the beginning; texts that begin otherwise are read whole.
    assert widths == [6 + extra, 10 + extra, 6 + extra]


def test_items_of_one_beginning_are_encoded_as_one_by_one(
    hllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = encoder(hllm)
    expected = torch.stack([actual.encode(actual.tokenize([text]))[0] for text in BEGUN])
    shared: list[list[int]] = []
    plain = actual.share_prefix

    def watched(tokens: np.ndarray) -> None:
        shared.append(tokens.tolist())
        plain(tokens)

    monkeypatch.setattr(actual, "share_prefix", watched)
    items = ItemTexts([str(n) for n in range(len(BEGUN))], BEGUN, "f")
    job = EncodingJob("m", ("title",), "", 64, "float32", actual.pooling, "f", 10_000)
    rows = encode_items(actual, items, job, show_progress=False)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    assert shared == [actual.tokenize(BEGUN)[1].tolist()]


def test_a_model_with_sliding_windows_shares_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    assert encode_prefix(MistralModel(config).eval(), np.arange(8)) is None


def test_an_interrupted_encoding_is_continued(
    hllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsft.encoding.build_cache.ITEMS_PER_PART", 2)
    items = ItemTexts([str(n) for n in range(len(TEXTS))], TEXTS, "f")
    actual = encoder(hllm)
    job = EncodingJob("m", ("title",), "", 64, "float32", actual.pooling, "f", 1)
    whole = encode_items(actual, items, job, show_progress=False)
    encoded: list[int] = []
    plain = actual.encode

    def stops(tokens: list[np.ndarray]) -> torch.Tensor:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(tokens))
        return plain(tokens)

    def build() -> None:
        target = tmp_path / "cache.safetensors"
        made = CacheBuilder(target, tmp_path / "parts", show_progress=False)
        made.build(actual, job, items.item_ids, lambda: items.texts)

    monkeypatch.setattr(actual, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        build()

    def counts(tokens: list[np.ndarray]) -> torch.Tensor:
        encoded.append(9)
        return plain(tokens)

    monkeypatch.setattr(actual, "encode", counts)
    build()
    again = open_cache(tmp_path / "cache.safetensors").embeddings
    # The third item was alone in a part that was not full when the stop came.
    assert encoded == [1, 1, 1, 9, 9]
    assert torch.equal(again, whole)


def test_length_batches_keep_the_budget_and_every_item() -> None:
    lengths = np.array([3, 9, 1, 4, 4, 0])
    batches = list(length_batches(lengths, 10, extra=1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(6))
    assert all(len(b) == 1 or len(b) * (lengths[b].max() + 1) <= 10 for b in batches)
    assert batches[0].tolist() == [1]

"""The ItemLLM in training: gradients by chunks are those of one pass, and a run with it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hsft.config import Config
from hsft.data.cache import open_cache, save_cache
from hsft.data.dataset import TrainBatch
from hsft.encoding.build_cache import EncodingJob
from hsft.encoding.item_llm import load_item_encoder, model_fingerprint
from hsft.encoding.item_tower import ItemTower, freeze
from hsft.encoding.tokens import tokenize_in_memory
from hsft.model.backbone import LoraSettings, enable_checkpointing
from hsft.model.item_table import ItemTable, fit_standardize
from hsft.trainer import loop
from hsft.trainer.item_training import ItemTraining
from tests.conftest import Project
from tests.decoders import build
from tests.helpers import make_llama
from tests.training_runs import RESUME, Crash, at_step, crash, folder, outcome, result

CPU = torch.device("cpu")
TEXTS = [f"title : item {n} tag : {' '.join(map(str, range(n % 5)))}" for n in range(20)]
IDS = [f"i{n}" for n in range(20)]


@pytest.fixture(scope="module")
def item_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ItemLLM with an emb token."""
    path = make_llama(tmp_path_factory.mktemp("items"), seed=3)
    token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(5))
    save_file({"item_emb_tokens": token}, path / "hllm_extra.safetensors")
    return path


def training(
    path: Path,
    chunk_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    lora: LoraSettings | None = None,
    table: ItemTable | None = None,
    transform: Any = None,
) -> ItemTraining:
    torch.manual_seed(0)
    encoder = load_item_encoder(
        path,
        item_emb_token_n=1,
        max_text_length=64,
        device=CPU,
        dtype=dtype,
        attention="sdpa",
        lora=lora,
    )
    tokens = tokenize_in_memory(encoder.tokenize, TEXTS)
    tower = ItemTower(encoder, tokens, chunk_tokens=chunk_tokens, transform=transform)
    if lora is not None:
        with torch.no_grad():
            for name, weight in tower.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2)
    table = ItemTable(torch.zeros(21, 64)) if table is None else table
    job = EncodingJob("m", ("title",), "", 64, "float32", encoder.pooling, "f", 64)
    return ItemTraining(tower.train(), table, job, IDS, CPU, show_progress=False)


def batch(rows: int = 4) -> TrainBatch:
    generator = torch.Generator().manual_seed(2)
    history, targets = (torch.randint(1, 17, (rows, 5), generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 1, 4, 2])[:rows, None]
    negatives = torch.tensor([[18], [3]])
    return TrainBatch(history * mask, mask, targets * mask, mask, negatives)


def loss_of(table: ItemTable, group: list[TrainBatch]) -> Tensor:
    """A loss that no item's vector enters linearly."""
    logits = []
    for each in group:
        vectors = F.normalize(table(each.history), dim=-1)
        logits.append((vectors * table(each.targets)).sum(dim=-1)[each.loss_mask])
        logits.append(table(each.negatives).pow(3).sum(dim=-1).flatten())
    return torch.cat(logits).logsumexp(dim=0)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    actual = {name: w.grad for name, w in module.named_parameters() if w.grad is not None}
    module.zero_grad()
    return actual


LORA = LoraSettings(4, 8, 0.0, ("q_proj", "v_proj"), "none", torch.float32)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("chunk_tokens", [1, 24, 10_000])
def test_gradients_by_chunks_are_those_of_one_pass(
    item_llm: Path, chunk_tokens: int, lora: LoraSettings | None
) -> None:
    fixed = fit_standardize(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)))
    items = training(item_llm, chunk_tokens, dtype=torch.float64, lora=lora, transform=fixed)
    group = [batch(), batch(2)]
    numbers = np.unique(torch.cat([part.flatten() for b in group for part in b[:3:2]]).numpy())
    numbers = np.unique(np.concatenate([numbers[numbers > 0], [3, 18]]))
    vectors = items.tower(numbers)
    padded = torch.cat([torch.zeros(1, 64, dtype=torch.float64), vectors])
    with items.table.reading(torch.from_numpy(numbers), padded):
        loss_of(items.table, group).backward()
    expected = gradients(items.tower)
    with items.encoded(group):
        loss_of(items.table, group).backward()
    actual = gradients(items.tower)
    assert actual.keys() == expected.keys()
    assert "emb_token" in actual
    assert any("lora_A" in name for name in actual) == (lora is not None)
    for name, value in expected.items():
        assert value.abs().max() > 0 or "embed_tokens" in name
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13)
    # The table reads its own embeddings again.
    assert not items.table(batch().history).any()


def test_chunks_are_encoded_again_with_the_dropout_that_the_loss_saw(item_llm: Path) -> None:
    lora = LoraSettings(4, 8, 0.4, ("q_proj", "v_proj"), "none", torch.float32)
    group = [batch()]
    model = build(item_llm).train()
    items = training(item_llm, 24, lora=lora, table=model.encoder.items)
    chunks = items.tower.chunks(items._items(group))
    assert len(chunks) > 2

    torch.manual_seed(7)
    vectors = [items.tower(chunk) for chunk in chunks]
    padded = torch.cat([torch.zeros(1, 64), *vectors])
    with items.table.reading(torch.from_numpy(np.concatenate(chunks)), padded):
        expected_loss = model(group[0])
        expected_loss.backward()
    expected = gradients(items.tower), gradients(model)

    torch.manual_seed(7)
    with items.encoded(group):
        loss = model(group[0])
        loss.backward()
    actual = gradients(items.tower), gradients(model)
    assert loss.item() == expected_loss.item()
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_parts_that_are_frozen_have_no_gradient(item_llm: Path) -> None:
    items = training(item_llm, 10_000)
    freeze(items.tower.model, 1, embeddings=False)
    with items.encoded([batch()]):
        loss_of(items.table, [batch()]).backward()
    actual = gradients(items.tower)
    assert not any("layers.0." in name or "embed_tokens" in name for name in actual)
    assert any("layers.1." in name for name in actual)


def test_recomputed_activations_change_no_gradient(item_llm: Path) -> None:
    lora = LoraSettings(4, 8, 0.4, ("q_proj", "v_proj"), "none", torch.float32)
    actual = []
    for again in (False, True):
        items = training(item_llm, 24, lora=lora)
        if again:
            enable_checkpointing(items.tower.encoder.model)
        torch.manual_seed(7)
        with items.encoded([batch()]):
            loss_of(items.table, [batch()]).backward()
        actual.append(gradients(items.tower))
    assert actual[0].keys() == actual[1].keys()
    for name, value in actual[0].items():
        torch.testing.assert_close(actual[1][name], value, rtol=1e-5, atol=1e-7)


def test_the_catalogue_is_encoded_and_kept(item_llm: Path, tmp_path: Path) -> None:
    fixed = fit_standardize(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)))
    items = training(item_llm, 24, lora=LORA, transform=fixed)
    items.encode_catalogue()
    items.tower.eval()
    with torch.no_grad():
        expected = items.tower(np.arange(1, 21))
    torch.testing.assert_close(items.table.embeddings[1:], expected, rtol=1e-4, atol=1e-5)
    items.save(tmp_path)
    other = training(item_llm, 24, lora=LORA)
    with torch.no_grad():
        for weight in other.tower.parameters():
            if weight.requires_grad:
                weight.zero_()
    other.load(tmp_path)
    assert torch.equal(other.table.embeddings, items.table.embeddings)
    with torch.no_grad():
        assert torch.equal(other.tower.eval()(np.arange(1, 21)), expected)


# --- runs

RUN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--qlora_dropout", "0.2"),
    *("--train_item_llm", "lora", "--item_lora_dropout", "0.2", "--item_chunk_tokens", "64"),
    *("--item_embedding_transform", "standardize", "--item_lr_mult", "0.5", "--nce_thres", "1.01"),
    *("--use_item_cache", "False", "--num_negatives", "6", "--eval_baseline", "False"),
    *("--gradient_accumulation_steps", "2", "--epochs", "3", "--num_threads", "1"),
    *("--optim_args.learning_rate", "1e-2", "--run_name", "run"),
)


def test_a_killed_run_goes_on_to_the_same_weights(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*RUN, "--item_pretrain_dir", str(project.llama), "--checkpoint_every", "1")
    code, _, err = project.run(*words, "--run_name", "whole")
    assert code == 0, err
    # In the first epoch, and in the second one after a validation.
    for number, more in ((2, ()), (4, RESUME)):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "update", at_step(number, crash))
            with pytest.raises(Crash):
                project.run(*words, *more)
    code, _, err = project.run(*words, *RESUME)
    assert code == 0, err
    assert result(project)["training"]["resumed_from"] == [1, 3]
    assert outcome(project) == outcome(project, "whole")
    for name in ("item_llm.safetensors", "item_cache.safetensors", "trained.safetensors"):
        actual, whole = (folder(project, run) / "best" / name for run in ("run", "whole"))
        assert actual.read_bytes() == whole.read_bytes(), name


def test_texts_that_changed_are_not_trained_on_further(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    words = (*RUN, "--item_pretrain_dir", str(project.llama), "--use_item_cache", "True")
    assert cache.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(2, crash))
        with pytest.raises(Crash):
            project.run(*words, "--checkpoint_every", "1")
    table = project.root / "information" / "tiny.csv"
    table.write_text(table.read_text().replace("item 7", "item 8"))
    code, _, err = project.run(*words, *RESUME)
    assert code == 2
    assert "was trained on other data" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--negatives", "catalogue"), "use negatives: in_batch, or num_negatives"),
        (("--strategy", "deepspeed"), "runs under strategy: ddp only"),
        (("--val_only", "True"), "belongs to the training of model: HLLM"),
        (("--model", "sasrec"), "belongs to the training of model: HLLM"),
        (("--compile", "graph"), "compile: graph cannot capture"),
        (
            ("--train_item_llm", "full", "--item_quant_type", "nf4"),
            "which quantised ones cannot be",
        ),
        (("--item_freeze_layers", "2"), "leaves none of the ItemLLM's 2 layers"),
        (("--item_lora_target_modules", "[query]"), "item_lora_target_modules ['query'] names no"),
        (("--item_pretrain_dir", "nowhere"), "model folder nowhere does not exist"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_what_cannot_be_trained_is_refused(
    project: Project, more: tuple[str, ...], words: str
) -> None:
    where = ("--item_pretrain_dir", str(project.llama), "--train_item_llm", "lora")
    code, out, err = project.run(*where, *more, "--check", "True")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_cache_of_another_item_llm_is_refused(project: Project) -> None:
    make_llama(project.root / "other", seed=1)
    path = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache = open_cache(path)
    metadata = {"model_fingerprint": model_fingerprint(project.llama)}
    save_cache(path, cache.item_ids, cache.embeddings.clone(), metadata)
    for more in ((), ("--check", "True")):
        code, _, err = project.run(
            *("--train_item_llm", "lora", "--item_pretrain_dir", "other", *more)
        )
        assert code == 2
        assert "was not made by the ItemLLM in other" in err.splitlines()[-1]
    assert not (project.root / "saved").exists()


def test_items_that_are_all_alike_are_pretrained(project: Project) -> None:
    where = ("--item_pretrain_dir", str(project.llama), "--use_item_cache", "False")
    code, _, err = project.run(*where, "--train_item_llm", "lora")
    assert code == 2
    assert err.splitlines()[-1].endswith("or --item_pretrain_epochs 1.")


def test_it_is_trained_only_by_its_name() -> None:
    with pytest.raises(ValueError, match="needs the ItemLLM that made the item cache"):
        Config(train_item_llm="lora")

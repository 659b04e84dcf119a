"""The memory estimate against real tiny models: weights to the byte, activations as autograd saves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from hsft.config.loader import load_config
from hsft.encoding.item_tower import freeze
from hsft.model.hstu import build_hstu
from hsft.model.item_table import ItemTable
from hsft.model.meta import meta_decoder, read_structure
from hsft.model.recommender import LossSettings, Recommender
from hsft.model.sasrec import build_sasrec
from hsft.model.structure import DecoderSource
from hsft.model.user_llm import UserLLM
from hsft.report import memory
from hsft.run.dry_run import TINYLLAMA, _trained_part, training_shape
from tests.conftest import Project
from tests.decoders import real_model, real_weight_bytes, saved_by_autograd, shape
from tests.helpers import make_cache, make_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd sizes: 192 wide, blocks of 64 that do not fill 256."""
    return make_llama(tmp_path_factory.mktemp("llama"), hidden=192, layers=3)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
def test_weight_bytes_are_exact(folder: Path, kind: Any, double: bool) -> None:
    expected = shape(folder, quant_type=kind)
    model = real_model(folder, expected, double)
    counted = memory.weight_bytes(expected)
    assert counted == real_weight_bytes(model)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_trained_weights_and_adamw_states_are_exact(folder: Path, targets: tuple[str, ...]) -> None:
    expected = shape(folder, lora_targets=targets, adapter="linear", quant_type="none")
    model = real_model(folder, expected)
    table = ItemTable(torch.zeros(501, 192).half(), "linear")
    loss = LossSettings("nce", "catalogue", 0.99, 1 << 28, "cosine")
    recommender = Recommender(UserLLM(model, table), loss)
    trained = [p for p in recommender.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    actual = memory.estimate(expected, 4)
    assert actual.adapters == actual.gradients == sum(p.numel() * 4 for p in trained)
    assert actual.optimizer == states
    assert actual.item_table == table.embeddings.numel() * 2


class NormOnGpu(torch.autograd.Function):
    """Saves the input, the weight and a float32 per row, as torch's fused kernel does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.float().pow(2).mean(dim=-1))
        return torch.rms_norm(x, (x.shape[-1],), weight, 1e-6)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def saves_as_on_a_gpu(x: torch.Tensor, _: Any, weight: torch.Tensor, __: float) -> torch.Tensor:
    actual: torch.Tensor = NormOnGpu.apply(x, weight)
    return actual


@pytest.mark.parametrize(
    ("kind", "mixed", "targets", "packed"),
    [
        ("nf4", True, ("q_proj", "v_proj"), False),
        ("nf4", True, ("q_proj", "v_proj"), True),
        ("nf4", True, ("all-linear",), False),
        ("nf4", False, ("all-linear",), True),
        ("none", False, ("q_proj", "v_proj"), False),
    ],
)
def test_activations_are_within_5_percent_of_what_autograd_saves(
    folder: Path,
    kind: Any,
    mixed: bool,
    targets: tuple[str, ...],
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = shape(
        folder,
        quant_type=kind,
        mixed=mixed,
        dtype=torch.bfloat16 if mixed else torch.float32,
        lora_targets=targets,
        masked_row=40 if packed else None,
    )
    # On the CPU torch's norm saves its steps one by one, on a GPU what is counted.
    monkeypatch.setattr("hsft.model.norms.F.rms_norm", saves_as_on_a_gpu)
    real = saved_by_autograd(real_model(folder, expected).train(), mixed, packed)
    layer, rest = memory.saved_bytes_per_token(expected)
    assert 6 * 40 * (3 * layer + rest) == pytest.approx(real, rel=0.05)


def test_the_parts_move_with_their_causes(folder: Path) -> None:
    base = memory.estimate(shape(folder), 8)
    assert base.total == sum(size for name, size in memory.rows(base) if name != "total")
    assert memory.estimate(shape(folder, checkpointing=True), 8).activations < base.activations
    assert memory.estimate(shape(folder), 16).activations == 2 * base.activations
    # By hand: 8-bit states of 5,000 weights are 2 x (5,000 + 20 blocks x 4) bytes; 100 stay as is.
    assert memory.optimizer_bytes([5000, 100], bits8=True) == 2 * 5080 + 800
    # Two workspaces of cuBLAS on Hopper.
    captured = memory.estimate(shape(folder, graph=True), 8)
    assert captured.total - base.total == 2 * 32 * 1024**2
    table = memory.estimate(shape(folder, items=1000), 8).item_table
    assert table == 1001 * 192 * 2
    # By hand: LoRA of rank 4 on q (192 -> 192) and v (192 -> 96) in three layers, and the scale.
    assert base.adapters == 4 * (3 * 4 * ((192 + 192) + (192 + 96)) + 1)


def test_the_largest_batch_is_the_last_that_fits(folder: Path) -> None:
    expected = shape(folder)
    available = memory.CUDA_CONTEXT + (40 << 20)
    size = memory.largest_batch(expected, available)
    assert size > 0
    assert memory.estimate(expected, size).total <= available
    assert memory.estimate(expected, size + 1).total > available
    assert memory.largest_batch(expected, memory.CUDA_CONTEXT) == 0


def test_dry_run_reads_no_weights_and_writes_nothing(project: Project) -> None:
    for file in project.llama.glob("*.safetensors"):
        assert file.is_file()
    folder = project.root / "shape_only"
    folder.mkdir()
    (folder / "config.json").write_text((project.llama / "config.json").read_text())
    before = set(project.root.rglob("*"))
    code, out, err = project.run(
        *("--dry_run", "True", "--use_qlora", "True", "--user_pretrain_dir", str(folder))
    )
    assert code == 0, err
    assert set(project.root.rglob("*")) == before
    for word in ("weights", "optimizer", "activations", "logits", "item table", "24 GiB"):
        assert word in out
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_what_trains_nothing_is_estimated_as_an_evaluation(project: Project) -> None:
    dry = ("--dry_run", "True")
    before = set(project.root.rglob("*"))
    code, out, err = project.run(*dry, "--val_only", "True")
    assert code == 0, err
    assert "Estimated GPU memory of an evaluation: 256 users at a time" in out
    assert "20 items in the catalogue. Nothing is trained." in out
    assert "estimated time of the evaluation (30 users)" in out
    assert "optimizer" not in out
    weights = re.search(r"^weights +([\d,]+) MiB", out, re.MULTILINE)
    assert weights is None or int(weights[1]) <= 1
    code, out, err = project.run(*dry, "--model", "pop")
    assert code == 0, err
    # 30 users of 21 scores, four bytes each, are shown as 0.0 MiB.
    assert (
        "model: pop trains nothing and loads no LLM. An evaluation holds the scores of 256" in out
    )
    code, out, err = project.run(*dry, "--model", "item_knn")
    assert (code, "every vector of the item cache in float32" in out) == (0, True)
    assert set(project.root.rglob("*")) == before
    (project.root / "dataset/tiny.csv").unlink()
    for more in (("--model", "pop"), ("--val_only", "True")):
        code, out, err = project.run(*dry, *more)
        assert code == 0, err
        assert "o time is estimated" in out


def test_an_evaluation_holds_scores_within_the_budget(folder: Path) -> None:
    plain = shape(folder, lora_rank=None, quant_type="none", items=10_000, budget_bytes=1 << 20)
    few, many = (memory.evaluation_memory(plain, users) for users in (1, 1000))
    # By hand: a MiB holds 25 users of 10,001 scores and 192 numbers; 341 vectors at a time, thrice.
    assert few.logits == 4 * (10_001 + 192 + 3 * 341 * 192)
    assert many.logits == 4 * (25 * (10_001 + 192) + 3 * 341 * 192)
    assert few.gradients == few.optimizer == few.workspace == 0
    assert few.weights == 4 * sum(plain.decoder.sizes)


@pytest.mark.parametrize("model", ["sasrec", "hstu"])
def test_models_on_item_ids_are_estimated_alike(project: Project, model: str) -> None:
    files = ("--model", model, "--loss", "nce", "--dry_run", "True", "--precision", "32-true")
    given = (*files, "--train_batch_size", "8", f"--{model}.hidden_size", "16")
    code, out, err = project.run(*given, f"--{model}.heads", "2")
    assert code == 0, err
    assert f"{'HSTU' if model == 'hstu' else 'SASRec'}'s 2 layers and the item table" in out
    assert "20 items in the catalogue" in out
    for word in ("weights", "optimizer", "activations", "logits", "item table", "24 GiB"):
        assert word in out
    assert "without and with gradient_checkpointing" not in out
    assert "an epoch (4 batches, launched kernel by kernel) and of a validation (30 users)" in out


@pytest.mark.parametrize(
    ("model", "section"),
    [("sasrec", {"block": "ligr"}), ("sasrec", {}), ("hstu", {}), ("hstu", {"item_width": 8})],
)
def test_weights_and_states_of_id_models_are_exact(
    project: Project, model: str, section: dict[str, Any]
) -> None:
    given = {"model": model, model: {"hidden_size": 16, "heads": 2, **section}, "dataset": "tiny"}
    config, _ = load_config(
        ["overall/LLM_ddp.yaml"], {**given, "loss": "nce", "precision": "32-true"}
    )
    known = training_shape(config)
    assert known.items is not None
    encoder = (build_hstu if model == "hstu" else build_sasrec)(config, known.items).encoder
    sizes = [weight.numel() for weight in encoder.parameters()]
    # And the logit scale.
    assert sum(memory.trained_sizes(known)) == sum(sizes) + 1
    estimated = memory.estimate(known, 4)
    assert estimated.optimizer == 8 * (sum(sizes) + 1)
    projection = 16 * 8 if section.get("item_width") else 0
    assert estimated.weights + estimated.item_table == 4 * (sum(sizes) - projection)


CACHE = "dataset/tiny_item_embeddings.safetensors"
DRY = ("--dry_run", "True", "--use_qlora", "True")


def item_table(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("item table"))


def test_dry_run_needs_no_item_cache(project: Project) -> None:
    code, whole, err = project.run(*DRY)
    assert code == 0, err
    assert "Assumed" not in whole
    (project.root / CACHE).unlink()
    code, out, err = project.run(*DRY)
    assert code == 0, err
    assert f"Assumed: no item cache at {CACHE}: its vectors are taken as 64 wide." in out
    assert "Assumed: the number of items is that of dataset/tiny.csv." in out
    kept = [line for line in out.splitlines() if not line.startswith("Assumed")]
    # float16 as in the cache that item_caching.py would write.
    assert kept == whole.splitlines()
    (project.root / "dataset/tiny.csv").unlink()
    for more in ((), ("--negatives", "catalogue"), ("--dataset", "null")):
        code, out, err = project.run(*DRY, *more)
        assert code == 0, err
        assert "unknown and the item table is not counted" in out
        assert "\nitem table" not in out


def test_dry_run_does_not_open_a_cache_that_the_run_would_not(project: Project) -> None:
    make_cache(project.root / CACHE, dim=32)
    assert project.run(*DRY)[0] == 2
    code, out, err = project.run(*DRY, "--use_item_cache", "False")
    assert code == 0, err
    assert "20 items in the catalogue" in out


def test_dry_run_reads_pt_caches(project: Project) -> None:
    # Named, but not there: the native twin is meant, as in a run.
    code, out, _ = project.run(*DRY, "--item_cache_path", CACHE.replace(".safetensors", ".pt"))
    assert code == 0
    assert "Assumed" not in out
    torch.save({f"i{n}": torch.ones(64) for n in range(4000)}, project.root / "c.pt")
    code, out, err = project.run(*DRY, "--item_cache_path", "c.pt")
    assert code == 0, err
    assert "4,000 items in the catalogue" in out
    # By hand: 4,001 x 64 float32.
    assert item_table(out).split()[-2:] == ["1", "MiB"]
    torch.save({"i0": torch.ones(32)}, project.root / "c.pt")
    code, _, err = project.run(*DRY, "--item_cache_path", "c.pt")
    assert code == 2
    assert "32 dimensions" in err


def test_dry_run_without_a_model_folder_takes_tinyllamas_shape(project: Project) -> None:
    none = ("--user_pretrain_dir", "model_checkpoints/UserLLM_complete")
    code, out, err = project.run(*DRY, *none, "--user_llm_layers", "2")
    assert code == 0, err
    assert (
        "no model folder at model_checkpoints/UserLLM_complete: estimated for TinyLlama-1.1B's "
        "shape, HLLM-1B's UserLLM."
    ) in out
    assert "has 64 dimensions: only its number of items is used" in out
    code, _, err = project.run(*DRY, *none, "--user_llm_layers", "23")
    assert code == 2
    assert "TinyLlama-1.1B has only 22 layers" in err
    code, out, err = project.run(*DRY, "--user_pretrain_dir", "null")
    assert code == 0, err
    assert "no UserLLM is named: estimated for TinyLlama-1.1B's shape" in out
    assert project.run(*DRY, "--qlora_r", "none")[0] == 2


def test_tinyllamas_shape_is_tinyllamas() -> None:
    config = LlamaConfig(**TINYLLAMA)
    decoder = meta_decoder(config)
    # TinyLlama-1.1B has 1,100,048,384 weights; 32,000 x 2,048 of them are the output head.
    assert sum(p.numel() for p in decoder.parameters()) == 1_100_048_384 - 32_000 * 2048


def test_packed_batches_are_counted_by_their_lengths(project: Project) -> None:
    # By hand: 30 users of 12, 11 and 10 items, two held out, cut to the last 8 transitions.
    code, out, err = project.run(*DRY, "--train_batch_size", "4")
    assert code == 0, err
    rng_lengths = [min(8, 12 - user % 3 - 3) for user in range(30)]
    mean = sum(rng_lengths) / 30
    deviation = (sum((n - mean) ** 2 for n in rng_lengths) / 30) ** 0.5
    assert f"({min(32, -(-(4 * mean + 6 * deviation) // 1)):,.0f} positions)" in out
    code, out, err = project.run(*DRY, "--train_batch_size", "4", "--pack_sequences", "False")
    assert "(32 positions)" in out
    (project.root / "dataset/tiny.csv").unlink()
    assert "(32 positions)" in project.run(*DRY, "--train_batch_size", "4")[1]


def test_a_trained_item_llm_is_counted(project: Project) -> None:
    make_llama(project.root / "items", layers=3)
    frozen = ("--use_qlora", "True", "--num_negatives", "4", "--dry_run", "True")
    trained = (*frozen, "--item_pretrain_dir", "items", "--train_item_llm")
    code, out, err = project.run(*frozen)
    assert code == 0, err
    assert "item llm" not in out
    sizes = {}
    for how in (("lora",), ("full",), ("full", "--item_freeze_embeddings", "True")):
        code, out, err = project.run(*trained, *how)
        assert code == 0, err
        assert "2,048 tokens at a time" in out
        sizes[how] = float(re.search(r"^item llm +([\d,.]+) MiB$", out, re.MULTILINE)[1])  # type: ignore[index]
    # Hidden size 64: too small to be told apart in MiB but for the activations of 2,048 tokens.
    assert sizes[("full",)] >= sizes[("lora",)] > 0
    code, out, err = project.run(*trained, "lora", "--item_pretrain_dir", "nowhere")
    assert code == 0, err
    assert "Assumed: no model folder at nowhere" in out


def test_the_item_llm_s_weights_and_states_are_exact(folder: Path) -> None:
    decoder = read_structure(DecoderSource(folder, keep_token_embedding=True))
    expected = shape(folder, lora_rank=None, quant_type="none", items=None, decoder=decoder)
    held, chunk = memory.item_llm_bytes(expected, _trained_part(decoder, 0, True), 100)
    real = AutoModel.from_pretrained(folder)
    freeze(real, 0, embeddings=True)
    every = sum(weight.numel() for weight in real.parameters())
    trained = sum(weight.numel() for weight in real.parameters() if weight.requires_grad)
    assert 0 < trained < every
    # A gradient and two states for each trained number, logit_scale counted with them.
    assert held == 4 * every + 12 * (trained + 1)
    assert chunk > 100 * 3 * 192 * 4

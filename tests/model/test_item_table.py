"""The item table: projections from caches of another width, and trained id vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cold_start import main as cold_start_main
from export import main as export_main
from hsft.data.cache import ItemCache, open_cache
from hsft.finished.open_run import open_run
from hsft.model.item_table import ItemTable, pca_projection, table_from_cache
from hsft.model.losses import catalogue_softmax
from hsft.report.result import read_ranks
from tests.conftest import Project
from tests.helpers import make_cache

CACHE = "dataset/tiny_item_embeddings.safetensors"
TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
    *("--epochs", "2", "--optim_args.learning_rate", "3e-2"),
)


def embeddings(items: int = 30, width: int = 12, seed: int = 0) -> Tensor:
    rows = torch.randn(items + 1, width, generator=torch.Generator().manual_seed(seed))
    rows[0] = 0
    return rows


def cosines(rows: Tensor) -> Tensor:
    unit = F.normalize(rows.double(), dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize("kind", ["linear", "mlp", "lowrank"])
@pytest.mark.parametrize("dim", [20, 12])
def test_an_untrained_adapter_keeps_cosines_and_the_size_of_numbers(kind: str, dim: int) -> None:
    rows = embeddings()
    table = ItemTable(rows, kind, 64, dim=dim)
    vectors = table.slice(1, 31)
    assert vectors.shape == (30, dim)
    torch.testing.assert_close(cosines(vectors), cosines(rows[1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.square().mean(), rows[1:].square().mean())
    torch.testing.assert_close(table(torch.tensor([[3, 0]]))[0, 0], vectors[2])


def test_a_narrower_projection_is_the_best_of_its_rank() -> None:
    # Unit rows of rank 3 in 12 dimensions, and a little noise: three dimensions keep their cosines.
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    rows = low @ torch.randn(3, 12, generator=generator, dtype=torch.float64)
    first, second = pca_projection(rows.float(), 3)
    torch.testing.assert_close(
        cosines(rows @ (second @ first).T.double()), cosines(rows), rtol=0, atol=1e-5
    )
    noisy = rows + 0.1 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
    first, second = pca_projection(noisy.float(), 3)
    unit = F.normalize(noisy, dim=-1)
    # numpy's singular vectors give the best approximation of the Gram matrix.
    _, _, directions = np.linalg.svd(unit.numpy(), full_matrices=False)
    best = torch.from_numpy(unit.numpy() @ directions[:3].T)
    actual = unit @ (second @ first).T.double()
    torch.testing.assert_close(cosines(actual), cosines(best), rtol=0, atol=1e-4)


def test_a_low_rank_projection_has_that_rank() -> None:
    table = ItemTable(embeddings(), "lowrank", 5, dim=20)
    assert torch.linalg.matrix_rank(table.slice(1, 31).detach(), rtol=1e-4) == 5
    with pytest.raises(ValueError, match="embeddings of 12 dimensions need an adapter to 20"):
        ItemTable(embeddings(), dim=20)


@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
def test_vectors_are_the_adapted_text_plus_the_id(kind: str) -> None:
    rows = embeddings(width=8)
    table = ItemTable(rows, kind, id_items=25)
    assert table.id_vectors is not None
    with torch.no_grad():
        table.id_vectors[1:].normal_()
        if table.adapter is not None:
            for weight in table.adapter.parameters():
                weight.normal_()
    text = ItemTable(rows, kind)
    text.load_state_dict(
        {name: value for name, value in table.state_dict().items() if name != "id_vectors"}
    )
    expected = text.slice(1, 31).clone()
    expected[:25] += table.id_vectors[1:]
    torch.testing.assert_close(table.slice(1, 31), expected)
    torch.testing.assert_close(table.slice(24, 31), expected[23:])
    torch.testing.assert_close(table(torch.arange(1, 31)), expected)
    # Seven at a time: the last chunk with id vectors is not full, the last one has none.
    torch.testing.assert_close(torch.cat([piece() for piece in table.chunks(7)]), expected)


def test_a_slice_is_read_in_a_call_of_the_module() -> None:
    # ZeRO stage 3 brings divided parameters together in hooks of such calls.
    table = ItemTable(embeddings(), id_items=30)
    vectors = torch.randn(31, 12)

    def put_together(module: torch.nn.Module, arguments: object) -> None:
        assert table.id_vectors is not None
        table.id_vectors.data = vectors

    table.register_forward_pre_hook(put_together)
    torch.testing.assert_close(table.slice(3, 7), embeddings()[3:7] + vectors[3:7])


def test_id_dropout_leaves_out_whole_vectors_and_is_off_in_evaluation() -> None:
    table = ItemTable(torch.zeros(2001, 4), id_items=2000, id_dropout=0.3).train()
    assert table.id_vectors is not None
    with torch.no_grad():
        table.id_vectors[1:] = torch.arange(1, 2001).unsqueeze(1)
    items = torch.arange(1, 2001)
    expected = table.id_vectors[1:].detach()
    for read in (table(items), torch.cat([piece() for piece in table.chunks(300)])):
        dropped = (read == 0).all(dim=1)
        assert 0.25 < dropped.float().mean() < 0.35
        assert torch.equal(read[~dropped], expected[~dropped])
    again = [torch.stack([piece() for piece in pieces]) for pieces in [table.chunks(500)] * 2]
    assert torch.equal(*again)
    # Every occurrence is drawn by itself.
    assert 0 < (table(items.new_full((200,), 7)) == 0).all(dim=1).sum() < 200
    table.eval()
    assert torch.equal(table(items), expected)
    assert torch.equal(torch.cat([piece() for piece in table.chunks(300)]), expected)


def test_gradients_of_id_vectors_equal_a_float64_reference() -> None:
    rows = embeddings(items=17, width=6)
    table = ItemTable(rows, "linear", id_items=17)
    assert table.id_vectors is not None
    assert isinstance(table.adapter, torch.nn.Linear)
    with torch.no_grad():
        table.id_vectors[1:].normal_()
        table.adapter.weight.normal_()
    history, targets = torch.tensor([3, 5, 0, 3]), torch.tensor([0, 4, 9, 16])
    # The smallest budget: many chunks of few items.
    loss = catalogue_softmax(
        table(history), table, targets, torch.tensor(1.0), cosine=True, budget_bytes=2000
    )
    loss.backward()
    ids = table.id_vectors.detach().double().requires_grad_()
    weight = table.adapter.weight.detach().double().requires_grad_()
    whole = rows.double() + rows.double() @ weight.T + ids
    logits = F.normalize(whole[history], dim=-1) @ F.normalize(whole[1:], dim=-1).T * np.e
    F.cross_entropy(logits, targets).backward()
    assert ids.grad is not None
    assert table.id_vectors.grad is not None
    torch.testing.assert_close(table.id_vectors.grad[1:].double(), ids.grad[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(table.adapter.weight.grad.double(), weight.grad, atol=1e-5, rtol=0)  # type: ignore[union-attr]
    # The padding item stays at zero.
    assert torch.equal(table.id_vectors.grad[0], torch.zeros(6))


@pytest.mark.parametrize(
    "more",
    [
        ("--item_adapter", "linear"),
        ("--item_adapter", "mlp", "--item_id_embedding", "True", "--item_id_dropout", "0.2"),
        ("--item_adapter", "lowrank", "--item_adapter_rank", "9", "--item_dropout", "0.1"),
    ],
    ids=["linear", "mlp and ids", "lowrank"],
)
def test_a_cache_of_another_width_goes_through_every_program(
    project: Project, more: tuple[str, ...]
) -> None:
    make_cache(project.root / CACHE, dim=24)
    for program in ("--check", "--dry_run"):
        code, out, err = project.run(*TRAIN, *more, program, "True")
        assert code == 0, err
    assert "20 items in the catalogue" in out
    code, _, err = project.run(*TRAIN, *more, "--eval_baseline", "True", "--run_name", "run")
    assert code == 0, err
    run = open_run("saved/run")
    model = run.build("fine-tuned")
    recommended = run.recommend(model, [run.history("u1")], 3)
    assert recommended.items.shape == (1, 3)
    code, _, err = project.call(
        export_main, ["--run", "saved/run", "--dtype", "float32", "--evaluate", "True"]
    )
    assert code == 0, err
    out_dir = project.root / "saved" / "run" / "export"
    code, _, err = project.run(
        *("--config_file", str(out_dir / "config.yaml"), "--user_pretrain_dir", str(out_dir)),
        *("--run_name", "again"),
    )
    assert code == 0, err
    expected = read_ranks("saved/run", "fine-tuned")[1]
    assert read_ranks("saved/again", "untrained")[1].tolist() == expected.tolist()
    ids = out_dir / "item_id_vectors.safetensors"
    assert ids.is_file() == ("--item_id_embedding" in more)
    if ids.is_file():
        stored = open_cache(ids)
        assert stored.item_ids == run.data.interactions.item_ids[1:].tolist()
        assert torch.equal(stored.embeddings, model.encoder.items.id_vectors[1:].detach())  # type: ignore[attr-defined]


def test_training_goes_on_from_exported_id_vectors(project: Project) -> None:
    code, _, err = project.run(*TRAIN, "--item_id_embedding", "True", "--run_name", "run")
    assert code == 0, err
    code, _, err = project.call(export_main, ["--run", "saved/run", "--dtype", "float32"])
    assert code == 0, err
    start = open_cache("saved/run/export/item_id_vectors.safetensors").embeddings
    assert start.abs().min(dim=1).values.max() > 0
    for trained in ("True", "False"):
        code, _, err = project.run(
            *(*TRAIN, "--user_pretrain_dir", "saved/run/export", "--epochs", "1"),
            *("--item_id_embedding", trained, "--run_name", trained),
        )
        assert code == 0, err
        model = open_run(f"saved/{trained}").build("fine-tuned")
        ids = model.encoder.items.id_vectors[1:].detach()  # type: ignore[attr-defined]
        assert torch.equal(ids, start) == (trained == "False")
    code, _, err = project.call(export_main, ["--run", "saved/False", "--format", "adapter"])
    assert code == 2
    assert "comes with id vectors" in err


def test_new_items_have_no_id_vector(project: Project) -> None:
    lines = (project.root / "dataset" / "tiny.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[0] not in ("i17", "i3")]
    (project.root / "dataset" / "warm.csv").write_text("\n".join(kept) + "\n")
    code, _, err = project.run(
        *(*TRAIN, "--dataset", "warm", "--item_cache_path", CACHE, "--item_id_embedding", "True"),
        *("--item_id_dropout", "0.3", "--run_name", "run"),
    )
    assert code == 0, err
    code, out, err = project.call(cold_start_main, ["--run", "saved/run", "--dataset", "tiny"])
    assert code == 0, err
    assert "| fine-tuned |" in out
    assert "| item_knn |" in out
    run = open_run("saved/run")
    extended = run.with_items(make_items(project.root / CACHE, ["i17", "i3"]))
    before, after = (opened.build("fine-tuned").encoder.items for opened in (run, extended))  # type: ignore[attr-defined]
    assert torch.equal(before.slice(0, 19), after.slice(0, 19))
    text = table_from_cache(extended.data.cache, extended.data.interactions.item_ids)  # type: ignore[arg-type]
    assert torch.equal(after.slice(19, 21), text[19:21])
    assert torch.equal(after(torch.tensor([19, 20])), text[19:21])


def make_items(cache: Path, ids: list[str]) -> ItemCache:
    whole = open_cache(cache)
    rows = whole.rows_of(ids)
    return ItemCache(ids, whole.embeddings[torch.from_numpy(rows)], whole.metadata)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((), "set --item_adapter linear (or mlp, lowrank) to train a projection"),
        (("--val_only", "True"), "set --item_adapter linear"),
        (("--item_id_dropout", "0.1"), "item_id_dropout needs item_id_embedding: True"),
    ],
)
def test_bad_combinations_are_refused_in_one_line(
    project: Project, more: tuple[str, ...], sentence: str
) -> None:
    make_cache(project.root / CACHE, dim=24)
    code, _, err = project.run(*more)
    assert code == 2
    assert sentence in err
    assert err.count("error:") == 1


def test_an_exported_adapter_reads_its_own_width_only(project: Project) -> None:
    make_cache(project.root / CACHE, dim=24)
    assert project.run(*TRAIN, "--item_adapter", "linear", "--run_name", "run")[0] == 0
    assert project.call(export_main, ["--run", "saved/run", "--dtype", "float32"])[0] == 0
    make_cache(project.root / CACHE, dim=64)
    code, _, err = project.run("--val_only", "True", "--user_pretrain_dir", "saved/run/export")
    assert code == 2
    assert "the item adapter that comes with the UserLLM in saved/run/export reads 24" in err

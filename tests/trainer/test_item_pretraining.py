"""The first stage of the ItemLLM: neighbours in histories, their loss, and a run that begins with it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hsft.data.cache import open_cache
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.finished.new_items import add_items
from hsft.finished.open_run import open_run
from hsft.model.item_table import ItemTable
from hsft.report.result import read_ranks
from hsft.trainer import item_pretraining, loop
from hsft.trainer.item_pretraining import neighbour_loss, neighbours
from recommend import main as recommend_main
from tests.conftest import Project
from tests.training_runs import RESUME, Crash, at_step, crash, folder, outcome

RUN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--qlora_dropout", "0.2"),
    *("--item_pretrain_epochs", "3", "--item_pretrain_batch_size", "16", "--item_lora_dropout"),
    *("0.1", "--item_embedding_transform", "standardize", "--use_item_cache", "False"),
    *("--item_lora_target_modules", "[all-linear]", "--item_lr_mult", "0.1"),
    *("--negatives", "catalogue", "--eval_baseline", "False", "--epochs", "2"),
    *("--optim_args.learning_rate", "1e-2", "--num_threads", "1", "--run_name", "run"),
)


def test_neighbours_are_those_of_training_items() -> None:
    # Users: 1 2 2 3 | 4 5; 6 | 7 8 (one training item); 9 | 1 (none); 3 1 | 2 9.
    items = np.array([1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 1, 3, 1, 2, 9], dtype=np.int32)
    data = Interactions(
        items=items,
        timestamps=np.arange(15),
        offsets=np.array([0, 6, 9, 11, 15]),
        user_ids=np.array(list("abcd"), dtype=object),
        item_ids=np.array(["", *"123456789"], dtype=object),
    )
    left, right = neighbours(leave_one_out(data))
    assert left.tolist() == [1, 2, 3]
    assert right.tolist() == [2, 3, 1]


def test_the_loss_by_hand() -> None:
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(table, dim=-1)
    pairs = [(1, 2), (3, 2), (4, 5)]
    left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
    actual = neighbour_loss(ItemTable(table), left, right, torch.tensor(2.0).log(), 1 << 20)
    pool = [item for pair in pairs for item in pair]
    terms = []
    for query, positive in [*pairs, *(pair[::-1] for pair in pairs)]:
        others = [item for item in pool if item not in (query, positive)]
        logits = 2.0 * unit[[positive, *others]] @ unit[query]
        terms.append(logits.logsumexp(dim=0) - logits[0])
    assert float(actual) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_two_processes_have_the_gradient_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    left, right = torch.tensor([1, 3, 4, 6]), torch.tensor([2, 2, 5, 1])

    def gradient(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        table, leaf = ItemTable(torch.zeros(7, 4)), vectors.clone().requires_grad_()
        with table.reading(torch.arange(1, 7), leaf):
            neighbour_loss(table, left, right, torch.tensor(1.0), 1 << 20).backward()
        assert leaf.grad is not None
        return leaf.grad

    whole = gradient(left, right)
    parts = [(left[rank::2], right[rank::2]) for rank in range(2)]
    pool = torch.cat([torch.cat([right, left]) for left, right in parts])
    monkeypatch.setattr(item_pretraining, "all_gather_ids", lambda _: pool)
    # As `ItemTraining.encoded` takes it: the average over processes.
    torch.testing.assert_close((gradient(*parts[0]) + gradient(*parts[1])) / 2, whole)


def test_a_run_begins_with_it_and_keeps_its_vectors(project: Project) -> None:
    words = (*RUN, "--item_pretrain_dir", str(project.llama))
    code, _, err = project.run(*words, "--item_pretrain_epochs", "10")
    assert code == 0, err
    losses = [float(text) for text in re.findall(r"item pretraining: loss ([\d.]+) in", err)]
    assert len(losses) == 10
    assert losses[-1] < 0.95 * losses[0]
    # All of the untrained Llama's vectors have nearly the same direction.
    assert "of them above nce_thres" not in err
    run = open_run(folder(project))
    assert run.models == ("fine-tuned",)
    cache = open_cache(folder(project) / "best/item_cache.safetensors")
    assert cache.embeddings.float().std(dim=0).mean() == pytest.approx(1, abs=0.1)
    code, _, err = project.call(
        recommend_main, ["--run", "saved/run", "--user", "u3", "--topk", "20"]
    )
    assert code == 0, err
    # Texts of two of the run's own items.
    (project.root / "new.csv").write_text(
        "item_id,title,tag,description\nn1,item 19,3,5\nn2,item 4,0,4\n"
    )
    extended = add_items(run, "new.csv").data.cache
    assert extended is not None
    rows = [extended.item_ids.index(name) for name in ("i19", "i4")]
    torch.testing.assert_close(
        extended.embeddings[-2:].float(), extended.embeddings[rows].float(), rtol=2e-3, atol=2e-3
    )


def test_it_is_continued_after_an_epoch(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*RUN, "--item_pretrain_dir", str(project.llama))
    code, _, err = project.run(*words, "--run_name", "whole")
    assert code == 0, err
    save = item_pretraining._save

    def save_and_crash(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        if args[-1] == 2:
            crash()

    with monkeypatch.context() as patch:
        patch.setattr(item_pretraining, "_save", save_and_crash)
        with pytest.raises(Crash):
            project.run(*words)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(6, crash))
        with pytest.raises(Crash):
            project.run(*words, *RESUME)
    code, _, err = project.run(*words, *RESUME)
    assert code == 0, err
    assert "item pretraining: going on after epoch 3" in err
    assert outcome(project) == outcome(project, "whole")
    ranks = [read_ranks(folder(project, name), "fine-tuned")[1] for name in ("run", "whole")]
    assert ranks[0].tolist() == ranks[1].tolist()
    for name in ("item_llm.safetensors", "item_cache.safetensors"):
        actual, whole = (folder(project, run) / "best" / name for run in ("run", "whole"))
        assert actual.read_bytes() == whole.read_bytes(), name


def test_without_neighbours_there_is_nothing_to_train(project: Project) -> None:
    path = project.root / "dataset" / "tiny.csv"
    rows = [f"i{n % 20},u{n // 3},{n}" for n in range(60)]
    path.write_text("\n".join(["item_id,user_id,timestamp", *rows]) + "\n")
    code, _, err = project.run(*RUN, "--item_pretrain_dir", str(project.llama))
    assert code == 2
    assert "has 0 pairs of neighbouring items" in err.splitlines()[-1]

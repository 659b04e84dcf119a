"""A run that trained the ItemLLM: whatever comes after it reads the vectors of the trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from cold_start import main as cold_start_main
from export import main as export_main
from hsft.data.cache import open_cache
from hsft.encoding.item_llm import model_fingerprint
from hsft.finished.new_items import NewItemEncoder, add_items
from hsft.finished.open_run import open_run
from hsft.report.result import read_ranks
from item_caching import main as cache_main
from recommend import main as recommend_main
from report import main as report_main
from tests.conftest import Project
from tests.helpers import make_llama

COLD = ("i17", "i18", "i3")
PROMPT = "Compress the following sentence into embedding: "
TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "2", "--eval_baseline"),
    *("False", "--optim_args.learning_rate", "1e-2", "--nce_thres", "1.01", "--num_negatives"),
    *("6", "--item_pretrain_dir", "items", "--dataset", "warm", "--item_cache_path"),
    *("cache.safetensors", "--item_cache_dtype", "float32", "--run_name", "run"),
)


def make_items(folder: Path) -> Path:
    make_llama(folder, seed=3)
    token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(5))
    save_file({"item_emb_tokens": token}, folder / "hllm_extra.safetensors")
    return folder


def train(project: Project, *more: str) -> Path:
    """Train on tiny without some items, from a cache of its ItemLLM."""
    for name in ("dataset", "information"):
        lines = (project.root / name / "tiny.csv").read_text().splitlines()
        kept = [line for line in lines if line.split(",")[0] not in COLD]
        (project.root / name / "warm.csv").write_text("\n".join(kept) + "\n")
    make_items(project.root / "items")
    words = [*project.arguments, *TRAIN[TRAIN.index("--item_pretrain_dir") : -2]]
    code, _, err = project.call(cache_main, words)
    assert code == 0, err
    code, _, err = project.run(*TRAIN, *more)
    assert code == 0, err
    return project.root / "saved" / "run"


def encode(folder: Path, texts: list[str]) -> np.ndarray:
    """Encode texts with plain transformers, the emb token last."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    token = load_file(folder / "hllm_extra.safetensors")["item_emb_tokens"]
    rows = []
    for text in texts:
        ids = tokenizer(PROMPT + text, return_tensors="pt")["input_ids"]
        inputs = torch.cat([model.get_input_embeddings()(ids), token], dim=1)
        with torch.no_grad():
            rows.append(model(inputs_embeds=inputs).last_hidden_state[0, -1].numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    "how",
    [
        (
            *("--train_item_llm", "lora", "--item_lora_target_modules", "[all-linear]"),
            *("--item_quant_type", "nf4"),
        ),
        ("--train_item_llm", "full"),
    ],
    ids=["lora", "full"],
)
def test_everything_after_reads_the_trained_item_llm(
    project: Project, how: tuple[str, ...]
) -> None:
    folder = train(project, *how)
    before, after = (
        open_cache("cache.safetensors"),
        open_cache(folder / "best/item_cache.safetensors"),
    )
    assert after.item_ids == open_run(folder).data.interactions.item_ids[1:].tolist()
    rows = before.rows_of(after.item_ids)
    assert not torch.allclose(before.embeddings[rows], after.embeddings, atol=1e-3)
    assert after.metadata["base_model_fingerprint"] == model_fingerprint("items")
    assert after.metadata["model_fingerprint"] != model_fingerprint("items")
    result = json.loads((folder / "result.json").read_text())
    assert (
        result["training"]["item_cache"]["model_fingerprint"] == after.metadata["model_fingerprint"]
    )

    # recommend: the run's own users, as they were ranked, and items from their texts.
    run = open_run(folder)
    assert run.models == ("fine-tuned",)
    model: Any = run.build("fine-tuned")
    assert torch.equal(model.encoder.items.embeddings[1:], after.embeddings)
    (project.root / "new.csv").write_text("item_id,title,tag,description\nn1,item 3,3,3\n")
    asked = ["--run", "saved/run", "--user", "u3", "--add_items", "new.csv", "--json"]
    code, out, err = project.call(recommend_main, asked)
    assert code == 0, err
    assert any(entry["item_id"] == "n1" for entry in json.loads(out)["recommendations"])

    # cold start: the items' texts through the trained ItemLLM.
    asked = ["--run", "saved/run", "--dataset", "tiny", "--json"]
    code, out, err = project.call(cold_start_main, asked)
    assert code == 0, err
    actual = {(row["model"], row["candidates"]) for row in json.loads(out)}
    assert ("fine-tuned", "cold items") in actual

    # export: both LLMs, and one more evaluation with what lies in the folder.
    asked = ["--run", "saved/run", "--out", "out", "--dtype", "float32", "--evaluate", "True"]
    code, _, err = project.call(export_main, asked)
    assert code == 0, err
    assert json.loads(Path("out/export.json").read_text())["exported"]["other_ranks"] == 0
    texts = [f"title: item {n}tag: {n % 4}description: {n % 7}" for n in range(20)]
    numbers = [int(item[1:]) for item in after.item_ids]
    made = encode(Path("out/item_llm"), [texts[n] for n in numbers])
    np.testing.assert_allclose(made, after.embeddings.numpy(), rtol=2e-3, atol=2e-4)
    assert "`item_llm/` encodes new ones" in Path("out/README.md").read_text()
    where = ("--config_file", "out/config.yaml", "--user_pretrain_dir", "out", "--item_cache_path")
    code, _, err = project.run(
        *where, "out/item_cache.safetensors", "--run_name", "again", "--dataset", "warm"
    )
    assert code == 0, err
    again = read_ranks(project.root / "saved" / "again", "untrained")[1]
    assert again.tolist() == read_ranks(folder, "fine-tuned")[1].tolist()


def test_the_pages_and_an_ensemble_read_it_too(project: Project) -> None:
    folder = train(project, "--train_item_llm", "lora", "--eval_baseline", "True")
    code, _, err = project.call(report_main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    assert "All ranks computed now equal the recorded ones." in Path("page.html").read_text()
    knn = ("--dataset", "warm", "--model", "item_knn", "--item_cache_path", "cache.safetensors")
    code, _, err = project.run(*knn, "--run_name", "knn")
    assert code == 0, err
    runs = ("--model", "ensemble", "--runs", "[saved/run,saved/knn]", "--dataset", "warm")
    code, _, err = project.run(*runs, "--run_name", "both")
    assert code == 0, err
    ensemble: Any = open_run("saved/both").build("ensemble")
    table = ensemble.parts[0].encoder.items.embeddings
    assert torch.equal(table[1:], open_cache(folder / "best/item_cache.safetensors").embeddings)


def test_new_items_are_those_of_the_same_texts(project: Project) -> None:
    """With a fixed map, 4-bit weights and an adapter to the run's own numbers."""
    more = ("--train_item_llm", "lora", "--item_quant_type", "nf4", "--item_id_embedding", "True")
    folder = train(project, *more, "--item_embedding_transform", "standardize")
    run = open_run(folder)
    cache = run.data.cache
    assert cache is not None
    # As the last one of the run's items is.
    (project.root / "new.csv").write_text("item_id,title,tag,description\nn1,item 19,3,5\n")
    # The ItemLLM is kept: another text was encoded before.
    (project.root / "other.csv").write_text("item_id,title,tag,description\nn0,item item 2,0,\n")
    encoder = NewItemEncoder(run)
    extended = add_items(add_items(run, "other.csv", encoder), "new.csv", encoder).data.cache
    assert extended is not None
    assert extended.item_ids[-2:] == ["n0", "n1"]
    row = extended.item_ids.index("i19")
    torch.testing.assert_close(
        extended.embeddings[-1], extended.embeddings[row], rtol=1e-4, atol=1e-4
    )
    code, _, err = project.call(export_main, ["--run", "saved/run", "--format", "adapter"])
    assert code == 0, err
    assert (folder / "export-adapter" / "item_llm.safetensors").is_file()
    make_llama(project.root / "items", seed=4)
    code, _, err = project.call(
        recommend_main, ["--run", "saved/run", "--user", "u3", "--add_items", "new.csv"]
    )
    assert code == 2
    assert "is not the one that made the item cache" in err

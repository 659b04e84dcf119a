"""`--check True`: all problems at once, nothing written, no weights loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from hsft.data.cache import ItemCache, open_cache, save_cache
from hsft.data.item_text import read_item_texts
from hsft.model.item_table import sample_cosines
from hsft.run import check as checks
from item_caching import main as cache_main
from tests.bad_input import CACHE, CSV, INFORMATION
from tests.conftest import Project
from tests.helpers import make_cache

CHECK = ("--check", "True")
KEYS = ["title", "tag", "description"]
PROMPT = "Compress the following sentence into embedding: "


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make loading an LLM's weights an error."""
    from transformers import AutoModel

    read = AutoModel.from_pretrained

    def refuse(*args: Any, **kwargs: Any) -> Any:
        # The meta device takes names and shapes from the headers.
        assert kwargs.get("device_map") == "meta", "weights are loaded"
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)


@pytest.mark.parametrize(
    "more",
    [
        ("--val_only", "True"),
        ("--use_qlora", "True"),
        ("--use_qlora", "False"),
        ("--model", "pop"),
        ("--model", "item_knn"),
        ("--model", "sasrec"),
        ("--num_negatives", "16", "--loss", "bce", "--use_qlora", "True"),
    ],
    ids=" ".join,
)
def test_a_good_run_has_no_problem(project: Project, more: tuple[str, ...]) -> None:
    before = set(project.root.rglob("*"))
    code, out, err = project.run(*CHECK, *more)
    assert code == 0, err
    assert "30 users, 20 items, 330 interactions" in out
    assert "test: 30 users are scored" in out
    assert out.splitlines()[-1] == "no problem found"
    assert set(project.root.rglob("*")) == before


def test_every_problem_is_a_line(project: Project) -> None:
    rows = (project.root / CSV).read_text().splitlines()
    rows[3] = rows[3].replace("u0", " u0")
    rows[7] += ",9"
    rows[8] = rows[8].rpartition(",")[0] + ",noon"
    (project.root / CSV).write_text("\n".join(rows) + "\n")
    content = load_file(project.root / CACHE)
    content["embeddings"][4, 0] = float("nan")
    save_file(content, project.root / CACHE)
    (project.root / "saved/r").mkdir(parents=True)
    before = set(project.root.rglob("*"))
    code, out, err = project.run(
        *(*CHECK, "--run_name", "r", "--user_llm_layers", "9", "--use_qlora", "True"),
        *("--attn_implementation", "flash_attention_2", "--precision", "16-mixed"),
    )
    assert code == 2
    assert out == ""
    actual = "\n".join(errors(err))
    for words in (
        "precision: 16-mixed needs CUDA",
        "the run saved/r",
        "has only 2 layers",
        "flash_attention_2",
        "row 4: user_id ' u0' begins or ends with a blank",
        "row 8: has 4 fields",
        "row 9: timestamp 'noon'",
        "item 'i4' holds NaN",
    ):
        assert words in actual
    assert len(errors(err)) == 8
    assert set(project.root.rglob("*")) == before


def parallel(path: Path, spread: float) -> None:
    """Write a cache whose vectors differ by a little noise, or without it in their length alone."""
    noise = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.ones(20, 1) if spread else torch.arange(1.0, 21.0).unsqueeze(1)
    save_cache(path, [f"i{n}" for n in range(20)], lengths * (1 + spread * noise), {})


PROBLEMS: dict[str, tuple[Callable[[Path], object] | None, tuple[str, ...], str]] = {
    "no UserLLM": (None, ("--user_pretrain_dir", "null"), "no UserLLM is named"),
    "dimension": (lambda root: make_cache(root / CACHE, dim=32), (), "32 dimensions"),
    "items": (lambda root: make_cache(root / CACHE, items=15), (), "5 of 20 items"),
    "target modules": (None, ("--qlora_target_modules", "[qq]"), "q_proj"),
    "too short to train": (
        lambda root: (root / CSV).write_text("item_id,user_id,timestamp\ni1,a,1\ni2,a,2\ni3,a,3\n"),
        (),
        "enough items to train on",
    ),
    "nobody to score": (
        lambda root: (root / CSV).write_text("item_id,user_id,timestamp\ni1,a,1\n"),
        ("--val_only", "True"),
        "no user has a history",
    ),
    "nothing to draw": (
        lambda root: (root / CSV).write_text(
            "item_id,user_id,timestamp\n"
            + "".join(f"i{n % 4},u{u},{n}\n" for u in range(3) for n in range(8))
        ),
        ("--num_negatives", "16"),
        "3 users, for example 'u0', have all 4 items",
    ),
    "nothing to draw by default": (
        lambda root: (root / CSV).write_text(
            "item_id,user_id,timestamp\n"
            + "".join(f"i{n % 4},u{u},{n}\n" for u in range(3) for n in range(8))
        ),
        (),
        "so none can be drawn for them; use negatives_exclude: none",
    ),
    "nothing to draw per sequence": (
        lambda root: (root / CSV).write_text(
            "item_id,user_id,timestamp\n"
            + "".join(f"i{n % 4},u{u},{n}\n" for u in range(3) for n in range(8))
        ),
        ("--negatives", "per_sequence"),
        "negatives: 3 users, for example 'u0', have all 4 items",
    ),
    "a single item": (
        lambda root: (root / CSV).write_text(
            "item_id,user_id,timestamp\n" + "".join(f"i1,a,{n}\n" for n in range(8))
        ),
        (),
        "has a single item",
    ),
    "batches of one position": (
        None,
        ("--train_positions", "random_split", "--train_batch_size", "1", "--negatives", "in_batch"),
        "every batch is a single one",
    ),
    "parallel items": (
        lambda root: parallel(root / CACHE, 0.01),
        (),
        "100.0% of them above nce_thres 0.99, so that every negative would be masked",
    ),
    "items of one direction": (
        lambda root: parallel(root / CACHE, 0.0),
        ("--negatives", "catalogue"),
        "all items have the same direction",
    ),
    "candidates": (
        None,
        ("--eval_protocol", "sampled", "--eval_neg_sample_num", "19", "--eval_phase", "valid"),
        "eval_neg_sample_num is 19",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_of_a_run_are_found(project: Project, case: str) -> None:
    spoil, more, words = PROBLEMS[case]
    if spoil is not None:
        spoil(project.root)
    code, _, err = project.run(*CHECK, "--use_qlora", "True", *more)
    assert code == 2
    assert len(errors(err)) == 1
    assert words in err


def test_disk_and_memory_are_compared_with_what_is_needed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda _: (64 << 20) + 100)
    code, _, err = project.run(*CHECK, "--use_qlora", "False")
    assert code == 2
    assert "the trained weights need about" in err
    monkeypatch.setattr(checks, "free_bytes", lambda _: 1 << 20)
    code, _, err = project.run(*CHECK, "--model", "pop")
    assert code == 2
    assert "1 MiB that are free" in err
    monkeypatch.undo()
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1024))
    code, _, err = project.run(*CHECK, "--val_only", "True", "--device", "cpu")
    assert code == 2
    assert "the UserLLM and the item table need" in err


def test_what_the_run_would_warn_of_is_said(project: Project) -> None:
    (project.root / "other").mkdir()
    text = (project.root / INFORMATION).read_text()
    (project.root / "other/tiny.csv").write_text(text.replace("item 3", "item 4"))
    # As item_caching.py writes it, for which weights would have to be loaded.
    cache = open_cache(project.root / CACHE)
    texts = read_item_texts("other/tiny.csv", KEYS, PROMPT)
    stated = {
        "text_keys": json.dumps(KEYS),
        "prompt": PROMPT,
        "fingerprint": texts.fingerprint,
        "information": "other/tiny.csv",
    }
    save_cache(project.root / CACHE, cache.item_ids, cache.embeddings.clone(), stated)
    code, out, err = project.run(*CHECK, "--val_only", "True", "--item_prompt", "x: ")
    assert code == 0, err
    warning = (
        f"warning: the item cache {CACHE} was not made with this configuration's item_prompt; it was "
        f"made from other/tiny.csv; make it again with item_caching.py if that is not intended."
    )
    assert out.splitlines()[-2:] == [warning, "no problem found; 1 warning above"]
    code, out, _ = project.run(*CHECK, "--val_only", "True")
    assert code == 0
    assert warning.replace("item_prompt", "text_path") in out
    code, out, _ = project.run(*CHECK, "--val_only", "True", "--text_path", "other/tiny.csv")
    assert code == 0
    assert out.splitlines()[-1] == "no problem found"


def test_item_caching_is_checked_too(project: Project) -> None:
    where = ["--item_pretrain_dir", str(project.llama), *CHECK]
    before = set(project.root.rglob("*"))
    code, out, err = project.call(cache_main, [*project.arguments, *where])
    assert code == 0, err
    assert "20 items of 64 dimensions" in out
    assert set(project.root.rglob("*")) == before
    text = (project.root / INFORMATION).read_text()
    (project.root / INFORMATION).write_text(text + "i1,again,1,1\n,nothing,1,1\n")
    (project.root / CSV).write_text("item_id,user_id,timestamp\ni1,a,noon\n")
    code, out, err = project.call(cache_main, [*project.arguments, *CHECK])
    assert code == 2
    assert out == ""
    actual = "\n".join(errors(err))
    for words in ("no ItemLLM is named", "'i1' is described a second time", "row 23", "noon"):
        assert words in actual
    assert len(errors(err)) == 4


def test_cheap_checks_come_before_the_data_is_read(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("the interactions are read")

    monkeypatch.setattr("hsft.run.setup.load_interactions", refuse)
    code, _, err = project.run("--user_llm_layers", "9", "--run_name", "a/b")
    assert code == 2
    assert len(errors(err)) == 2


@pytest.mark.parametrize(
    ("spread", "above", "warned"), [(0.05, "100.0%", None), (0.1, "", True), (1.0, "0.0%", False)]
)
def test_cosines_of_the_cache_are_told(
    project: Project, spread: float, above: str, warned: bool | None
) -> None:
    parallel(project.root / CACHE, spread)
    vectors = load_file(project.root / CACHE)["embeddings"].double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(20, 1)]
    share = (cosines > 0.99).mean()
    assert (share == 1, 0.2 < share < 1) == (warned is None, bool(warned))
    code, out, err = project.run(*CHECK, "--use_qlora", "True")
    if warned is None:
        assert (code, len(errors(err))) == (2, 1)
        return
    assert code == 0, err
    told = (
        f"cosine {cosines.mean():.3f} on average over 190 pairs of items, {share:.1%} of them "
        f"above nce_thres 0.99"
    )
    assert told in out
    assert above in out
    assert ("these are masked as negatives" in out) == warned


def test_cosines_are_those_after_the_transform(project: Project) -> None:
    parallel(project.root / CACHE, 0.01)
    more = ("--use_qlora", "True", "--item_embedding_transform", "standardize")
    code, out, err = project.run(*CHECK, *more)
    assert code == 0, err
    assert " 0.0% of them above nce_thres" in out


def test_many_items_are_sampled() -> None:
    vectors = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    cache = ItemCache([str(n) for n in range(5000)], vectors, {}, None)
    item_ids = np.array(["[PAD]", *cache.item_ids], dtype=object)
    cosines = sample_cosines(cache, item_ids)
    assert 10_000 < len(cosines) < 50_000
    assert abs(cosines.mean()) < 0.01
    # Of independent directions in 8 dimensions.
    assert cosines.var() == pytest.approx(1 / 8, rel=0.05)

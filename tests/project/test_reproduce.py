"""reproduce/: every row's commands are valid, and one is run through to its comparison."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from download_itemllm import main as download_main
from hsft.model.backbone import read_extra
from hsft.utils.program import run_program
from item_caching import main as cache_main
from main import main as train_main
from reproduce.emb_token import main as emb_token_main
from reproduce.emb_token import make_item_llm
from reproduce.table import (
    TINY_ITEM_LLM,
    TINY_LLAMA,
    Table,
    commands,
    compare,
    describe,
    expected_time,
    main,
)
from tests.helpers import ROOT, make_dataset

NAMES = ("pixel200k", "pixel1m", "pixel8m", "books")
TABLES: dict[str, Table] = {
    name: importlib.import_module(f"reproduce.{name}").TABLE for name in NAMES
}
ROWS = [(name, row.name) for name, table in TABLES.items() for row in table.rows if not row.refused]
TRAINED_ITEMS = "saved/Pixel200K-end-to-end/export/item_llm"
FOLDERS = (
    *("ItemLLM_complete", "UserLLM_complete", "ItemLLM_1B_books", "UserLLM_1B_books"),
    *("ItemLLM_1B_books_neg512", "UserLLM_1B_books_neg512", Path(TINY_LLAMA).name),
)
PROGRAMS = {"item_caching.py": cache_main, "code/main.py": train_main}


@pytest.fixture
def root(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the repo's root, in which a toy LLM stands for each of HLLM's."""
    (tmp_path / "code").symlink_to(ROOT / "code")
    (tmp_path / "model_checkpoints").mkdir()
    for name in FOLDERS:
        (tmp_path / "model_checkpoints" / name).symlink_to(llama)
    make_item_llm(llama, tmp_path / TINY_ITEM_LLM, seed=1)
    (tmp_path / TRAINED_ITEMS).parent.mkdir(parents=True)
    (tmp_path / TRAINED_ITEMS).symlink_to(tmp_path / TINY_ITEM_LLM)
    for table in TABLES.values():
        make_dataset(tmp_path, table.dataset)
        # Dates, which use_timestamps wants.
        data = tmp_path / "dataset" / f"{table.dataset}.csv"
        data.write_text(re.sub(r",(\d{4})$", r",150000\1", data.read_text(), flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "row_name"), ROWS, ids=str)
def test_a_row_passes_check_and_dry_run(
    root: Path, name: str, row_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLES[name]
    row = next(row for row in table.rows if row.name == row_name)
    *caching, (program, *training) = commands(table, row, [])
    for script, *words in caching:
        assert run_program(PROGRAMS[script], [*words, "--show_progress", "False"]) == 0
    # Vectors of a random LLM are nearly parallel, which --check refuses as nothing to learn from.
    spread = ["--nce_thres", "1.0"] if caching else []
    # In `saved` the row `end-to-end` of the fixture has been run.
    words = [*training, *spread, "--device", "cpu", "--checkpoint_dir", "runs"]
    assert run_program(PROGRAMS[program], [*words, "--check", "True"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    code = run_program(PROGRAMS[program], [*words, "--dry_run", "True"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert ("Estimated GPU memory of an evaluation" in out) == ("--val_only" in training)
    assert "24 GiB" in out
    assert commands(table, row, ["--dry_run", "True"])[0][0] == "code/main.py"


def test_published_and_measured_figures_stand_side_by_side(root: Path) -> None:
    script = str(ROOT / "reproduce" / "pixel8m.py")
    done = subprocess.run(
        [sys.executable, script, "sasrec", "--epochs", "1", "--train_batch_size", "8"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-3].split() == ["metric", "published", "measured"]
    metric, published, measured = lines[-2].split()
    assert (metric, published) == ("Recall@10", "5.080")
    assert 0 < float(measured) <= 100


def test_a_failure_ends_a_row_with_its_exit_code(tmp_path: Path) -> None:
    script = str(ROOT / "reproduce" / "pixel8m.py")
    words = [sys.executable, script, "end-to-end", "--check", "True"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "in percent" not in done.stdout
    assert "Traceback" not in done.stderr


def test_figures_are_compared_in_percent() -> None:
    row = TABLES["pixel8m"].rows[0]
    text = compare(row, {"Recall@10": 0.0612345, "NDCG@10": 0.5})
    assert "Recall@10          6.130       6.123" in text
    assert "Recall@200        21.180           -" in text
    unpublished = compare(TABLES["pixel1m"].rows[0], {"Recall@5": 0.05})
    assert "Recall@5               -       5.000" in unpublished
    assert "not published in what this page cites" in unpublished
    listed = describe(TABLES["pixel8m"], "reproduce/pixel8m.py")
    assert "python reproduce/pixel8m.py item-cached" in listed
    assert listed.count("expected: one card about ") == len(TABLES["pixel8m"].rows)
    assert "one card about 131 days, eight about 16 days; the authors: about 4.1 days" in listed
    assert expected_time(0.5) == "one card about 30 minutes, eight about 4 minutes"
    assert expected_time(24) == "one card about 24 hours, eight about 3 hours"


def test_a_row_that_cannot_be_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    table = TABLES["books"]
    refused = [row for row in table.rows if row.refused]
    assert [row.name for row in refused] == ["published-7B_books"]
    assert main(table, "reproduce/books.py", [refused[0].name, "--check", "True"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {refused[0].refused}.\n"
    listed = describe(table, "reproduce/books.py")
    assert f"    refused: {refused[0].refused}" in listed
    # The program that downloads it says the same.
    assert run_program(download_main, ["--checkpoint", "7B_books"]) == 2
    assert refused[0].refused.split(";")[0] in " ".join(capsys.readouterr().err.split())


def test_rows_of_the_papers_other_models_have_their_settings() -> None:
    rows = {row.name: row for row in TABLES["pixel200k"].rows}
    assert rows["trained-items-2-layers"].published == {"Recall@5": 3.494}
    assert rows["trained-items-1.1b"].published == {"Recall@5": 3.521}
    few = rows["trained-items-2-layers"].training
    assert few[few.index("--user_llm_layers") + 1] == "2"
    assert [*few[:-2]] == [*rows["trained-items-1.1b"].training]
    assert not rows["hstu-1b"].published


def test_a_new_emb_token_is_drawn_and_belongs_to_a_whole_folder(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "items"
    assert run_program(emb_token_main, [str(llama), str(target)]) == 0
    token = read_extra(target)["item_emb_tokens"]
    assert token.shape == (1, 1, 64)
    assert 0.015 < token.std() < 0.025
    assert float(read_extra(target)["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    assert {path.name for path in llama.iterdir()} < {path.name for path in target.iterdir()}
    for words, sentence in (
        ((llama, target), f"{target} exists"),
        ((target, tmp_path / "again"), "with a trained emb token"),
        ((tmp_path, tmp_path / "none"), "config.json is not a file"),
    ):
        assert run_program(emb_token_main, [str(word) for word in words]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "again").exists()

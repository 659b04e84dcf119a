"""TF-IDF of the item texts, by hand and through the programs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hsft.finished.open_run import open_run
from hsft.model.reference import ItemKNN
from hsft.model.tfidf import TfIdf, history_weights, tfidf_rows
from hsft.report.result import read_ranks
from tests.conftest import Project
from tests.helpers import ROOT

TEXTS = ["red shoe, RED!", "blue shoe", "blue hat a", "", "unique"]


def by_hand() -> torch.Tensor:
    """Unit vectors over red, shoe, blue, hat, unique: ln(6 / (1 + n)) + 1 a word in n of 5 texts."""
    one, two = math.log(6 / 2) + 1, math.log(6 / 3) + 1
    rows = torch.zeros(5, 5, dtype=torch.float64)
    rows[0, 0], rows[0, 1] = (1 + math.log(2)) * one, two
    rows[1, 1], rows[1, 2] = two, two
    rows[2, 2], rows[2, 3] = two, one
    rows[4, 4] = one
    return torch.nn.functional.normalize(rows, dim=1)


def test_cosines_equal_those_by_hand() -> None:
    rows = tfidf_rows(TEXTS)
    # red, hat and unique are in one text each.
    assert rows.width == 2
    actual = rows.dense(torch.arange(5)).double()
    whole = by_hand()
    expected = whole @ whole.T
    torch.testing.assert_close((actual @ actual.T).triu(1), expected.triu(1), rtol=0, atol=1e-7)
    assert torch.equal(rows.dense(torch.tensor([3, 1, 3]))[[0, 2]], torch.zeros(2, 2))
    fewest = tfidf_rows([*TEXTS, "shoe"], max_words=1)
    # shoe is in three texts, blue in two.
    assert fewest.width == 1
    assert (fewest.dense(torch.arange(6))[:, 0] > 0).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_scores_weigh_the_history() -> None:
    # Items 1 to 5; item 0 is the padding item.
    scorer = TfIdf(tfidf_rows(["", *TEXTS]), "mean", 0.5)
    assert scorer.num_items == 5
    history, lengths = torch.tensor([[2, 3, 2], [1, 0, 0]]), torch.tensor([3, 1])
    unit = tfidf_rows(["", *TEXTS]).dense(torch.arange(6))
    expected = torch.stack([1.25 * unit[2] + 0.5 * unit[3], unit[1]])
    torch.testing.assert_close(scorer.user_vectors(history, lengths), expected)
    torch.testing.assert_close(scorer.item_slice(2, 5), unit[2:5])
    items = torch.tensor([[0, 3], [5, 1]])
    torch.testing.assert_close(scorer.item_vectors(items), unit[items])
    last = TfIdf(tfidf_rows(["", *TEXTS]), "last", 0.5).user_vectors(history, lengths)
    torch.testing.assert_close(last, unit[[2, 1]])


def test_the_weights_of_a_history() -> None:
    history, lengths = torch.tensor([[4, 5, 6], [7, 0, 0]]), torch.tensor([3, 1])
    weights = history_weights(history, lengths, "mean", 0.5)
    assert weights.tolist() == [[0.25, 0.5, 1], [1, 0, 0]]
    assert history_weights(history, lengths, "mean", 1.0).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert history_weights(history, lengths, "last", 1.0).tolist() == [[0, 0, 1], [1, 0, 0]]
    table = torch.tensor([[0.0, 0], *[[1.0, 0]] * 4, [0.0, 1], [1, 0], [1, 0]])
    user = ItemKNN(table, "mean", 0.5).user_vectors(history, lengths)
    torch.testing.assert_close(user[0], torch.tensor([1.25, 0.5]) / math.hypot(1.25, 0.5))


def test_tfidf_is_a_row_like_any_other(project: Project) -> None:
    (project.root / "dataset" / "tiny_item_embeddings.safetensors").unlink()
    config = (
        "--config_file",
        f"{ROOT}/code/overall/LLM_ddp.yaml",
        f"{ROOT}/code/baselines/tfidf.yaml",
    )
    code, _, err = project.run(*config, "--check", "True")
    assert code == 0, err
    code, out, err = project.run(*config, "--run_name", "run")
    assert code == 0, err
    assert "tfidf" in out
    run = open_run("saved/run")
    scorer = run.build("tfidf")
    assert scorer.num_items == 20
    _, ranks = read_ranks("saved/run", "tfidf")
    assert len(ranks) == 30
    assert run.recommend(scorer, [run.history("u1")], 3).items.shape == (1, 3)
    code, _, err = project.run(*config, "--text_path", "nowhere")
    assert code == 2
    assert "nowhere/tiny.csv does not exist" in err
    assert not Path("saved/tiny-tfidf").exists()
    # Columns of other names, and texts of other items: the check finds what the run refuses.
    information = project.root / "information" / "tiny.csv"
    for content, words in (
        ("item_id,name\ni1,item\n", "lacks the columns title, tag, description"),
        ("item_id,title,tag,description\nx1,item,1,1\n", "none of the 20 items of the catalogue"),
    ):
        information.write_text(content)
        for more in ((), ("--check", "True")):
            code, _, err = project.run(*config, *more)
            assert code == 2
            assert words in err


@pytest.mark.parametrize("value", ["0", "1.5"])
def test_a_decay_is_between_zero_and_one(project: Project, value: str) -> None:
    code, _, err = project.run("--model", "tfidf", "--knn_decay", value)
    assert code == 2
    assert "knn_decay" in err

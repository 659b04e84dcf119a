"""Opening a finished run: its models rank as they did, and recommend what they rank first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cold_start import main as cold_start_main
from export import main as export_main
from hsft.evaluator.recommend import recommend
from hsft.finished.open_run import open_run
from hsft.finished.serve import make_server
from hsft.model.reference import ItemKNN
from hsft.report.result import read_ranks
from hsft.utils.errors import InputError
from recommend import main as recommend_main
from report import main as report_main
from tests.conftest import Project
from tests.helpers import ROOT, make_llama

TRAIN = ("--use_qlora", "True", "--epochs", "2", "--optim_args.learning_rate", "1e-2")


def knn() -> ItemKNN:
    # Items 1..4; the padding item's row is zero.
    table = torch.tensor([[0.0, 0], [1, 0], [0.8, 0.6], [0, 1], [-1, 0]])
    return ItemKNN(table, "last")


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_the_best_items_by_hand(budget: int) -> None:
    histories = [np.array([3, 1]), np.array([4])]
    actual = recommend(
        knn(), histories, topk=3, max_length=8, device=torch.device("cpu"), budget_bytes=budget
    )
    # Cosines to item 1: 0.8 (2), 0 (3, seen), -1 (4). To item 4: 0 (3), -0.8 (2), -1 (1).
    assert actual.items.tolist() == [[2, 4, 0], [3, 2, 1]]
    assert actual.scores[1].tolist() == pytest.approx([0, -0.8, -1])
    assert actual.scores[0, 2] == -np.inf


def test_seen_items_stay_when_asked() -> None:
    actual = recommend(
        knn(),
        [np.array([3, 1])],
        topk=2,
        max_length=8,
        device=torch.device("cpu"),
        exclude_seen=False,
    )
    assert actual.items.tolist() == [[1, 2]]


def test_only_the_last_items_are_read() -> None:
    long, short = (
        recommend(ItemKNN(knn()._table, "mean"), [np.array(items)], topk=4, max_length=2,
                  device=torch.device("cpu"), exclude_seen=False)
        for items in ([4, 4, 4, 1, 2], [1, 2])
    )  # fmt: skip
    assert long.scores.tolist() == short.scores.tolist()


@pytest.mark.parametrize(
    "more",
    [
        (*TRAIN, "--item_adapter", "linear"),
        ("--use_qlora", "False", "--epochs", "1", "--loss", "bce"),
        ("--val_only", "True", "--item_embedding_transform", "whiten"),
        ("--config_file", f"{ROOT}/code/baselines/sasrec.yaml", "--epochs", "3"),
        ("--model", "hstu", "--hstu.hidden_size", "8", "--epochs", "3"),
        ("--model", "llm_id", "--llm_id.item_width", "8", "--epochs", "1"),
        ("--model", "pop"),
    ],
    ids=["qlora", "full", "baseline", "sasrec", "hstu", "llm_id", "pop"],
)
def test_every_model_ranks_as_in_the_run(project: Project, more: tuple[str, ...]) -> None:
    code, _, err = project.run(*more, "--run_name", "run")
    assert code == 0, err
    run = open_run(project.root / "saved" / "run")
    segments = run.data.split.eval_segments("test")
    items = run.data.interactions.items
    histories = [
        items[start : end - 1] for start, end in zip(segments.starts, segments.ends, strict=True)
    ]
    targets = items[segments.ends - 1]
    for name in run.models:
        actual = run.recommend(run.build(name), histories, topk=20)
        users, ranks = read_ranks(run.folder, name)
        assert users.tolist() == segments.users.tolist()
        at = actual.items == targets[:, None]
        assert at.sum() > 0
        # Ties count against the model, so a place may be better than the rank but never worse.
        places = np.where(at.any(axis=1), at.argmax(axis=1) + 1, np.iinfo(np.int64).max)
        same = places == ranks if name != "pop" else places <= ranks
        assert same[at.any(axis=1)].all()


def test_keys_that_an_earlier_version_took_and_ignored(project: Project) -> None:
    assert project.run("--model", "pop", "--run_name", "run")[0] == 0
    file = Path("saved/run/config.yaml")
    settings = yaml.safe_load(file.read_text())
    early = {"model": "sasrec", "use_qlora": True, "gradient_checkpointing": True}
    file.write_text(yaml.safe_dump(settings | early))
    config = open_run("saved/run").config
    assert not config.use_qlora
    assert not config.gradient_checkpointing
    early |= {"temperature": 0.1, "fix_temp": True, "eval_protocol": "sampled"}
    file.write_text(yaml.safe_dump(settings | early | {"metrics": ["NDCG", "Coverage"]}))
    config = open_run("saved/run", {"eval_neg_sample_num": 5}).config
    assert (config.temperature, config.fix_temp, config.metrics) == (None, False, ["NDCG"])
    with pytest.raises(InputError, match="use_qlora adapts the weights of an LLM"):
        open_run("saved/run", {"use_qlora": True})


def test_what_is_asked_for_and_is_not_there(project: Project) -> None:
    with pytest.raises(InputError, match=r"no run: it has no config\.yaml"):
        open_run(project.root)
    assert project.run("--val_only", "True", "--run_name", "run")[0] == 0
    run = open_run("saved/run")
    with pytest.raises(InputError, match="no model 'fine-tuned'; it has untrained"):
        run.build("fine-tuned")
    with pytest.raises(InputError, match="no user 'u99'"):
        run.history("u99")
    with pytest.raises(InputError, match="no item 'x'"):
        run.item_numbers(["i1", "x"])
    assert run.data.interactions.item_ids[run.item_numbers(["i3"])[0]] == "i3"
    assert run.titles["i3"] == "item 3"


def test_another_user_llm_in_the_folder_is_refused_by_every_program(project: Project) -> None:
    base = make_llama(project.root / "base", seed=1)
    lines = Path("dataset/tiny.csv").read_text().splitlines()
    warm = [line for line in lines if line.split(",")[0] not in ("i17", "i18", "i3")]
    Path("dataset/warm.csv").write_text("\n".join(warm) + "\n")
    cache = ("--item_cache_path", "dataset/tiny_item_embeddings.safetensors")
    data = ("--dataset", "warm", "--run_name", "run", *cache)
    assert project.run(*TRAIN, *data, "--user_pretrain_dir", str(base))[0] == 0
    kept = base.rename(project.root / "kept")
    make_llama(base, seed=2)
    programs = {
        recommend_main: ["--run", "saved/run", "--user", "u0"],
        cold_start_main: ["--run", "saved/run", "--dataset", "tiny", *cache],
        export_main: ["--run", "saved/run", "--out", "out"],
    }
    for program, argv in programs.items():
        code, out, err = project.call(program, argv)
        assert (code, out) == (2, ""), err
        assert f"the UserLLM in {base} is not the one that saved/run was made with" in err
        assert not Path("out").exists()
        # The same model in a folder of another name is no other model.
        code, _, err = project.call(program, [*argv, "--user_pretrain_dir", str(kept)])
        assert code == 0, err
    with pytest.raises(InputError, match="is not the one that saved/run was made with"):
        make_server(open_run("saved/run"), 0)
    code, _, err = project.call(report_main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    assert Path("page.html").read_text().count("is not the one that saved/run was made with") == 2


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--model", "sasrec"), "item order"),
        (("--item_id_embedding", "True", "--use_qlora", "True"), "item order"),
        (("--item_embedding_transform", "standardize", "--use_qlora", "True"), "set of items"),
    ],
    ids=["sasrec", "id vectors", "fixed map"],
)
def test_weights_do_not_go_to_other_items(
    project: Project, more: tuple[str, ...], what: str
) -> None:
    """The same interactions in another order number the items otherwise."""
    code, _, err = project.run(*more, "--epochs", "1", "--run_name", "run")
    assert code == 0, err
    path = project.root / "dataset" / "tiny.csv"
    head, *rows = path.read_text().splitlines()
    users = [[row for row in rows if f",u{user}," in row] for user in range(30)]
    reordered = [row for user in users for row in reversed(user)]
    argv = ["--run", "saved/run", "--user", "u1", "--json"]
    before = project.call(recommend_main, argv)[1]
    path.write_text("\n".join([head, *reordered]) + "\n")
    code, out, err = project.call(recommend_main, argv)
    if what == "item order":
        assert (code, out) == (2, "")
        assert "saved/run/best was trained on a catalogue with another item order: " in err
        if "--item_id_embedding" in more:
            code, _, err = project.call(export_main, ["--run", "saved/run"])
            assert code == 2
            assert "another item order: " in err
            assert not (project.root / "saved/run/export").exists()
        code, _, err = project.run("--model", "pop")
        assert code == 0, err
        runs = ("--model", "ensemble", "--runs", "saved/run", "saved/tiny-pop")
        code, _, err = project.run(*runs)
        assert code == 2
        assert "another item order: " in err
    else:
        one, other = (json.loads(answer)["recommendations"] for answer in (before, out))
        assert [entry["item_id"] for entry in one] == [entry["item_id"] for entry in other]
    # Without the items of one user the others' numbers and the fixed map are others as well.
    path.write_text("\n".join([head, *(row for row in rows if not row.startswith("i7,"))]) + "\n")
    code, _, err = project.call(recommend_main, argv)
    assert code == 2
    assert f"saved/run/best was trained on a catalogue with another {what}: " in err

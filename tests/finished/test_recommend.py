"""recommend.py: a user, a history, and items that the data never had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hsft.config import Config
from hsft.data.cache import ItemCache, open_cache, save_cache
from hsft.data.item_text import title_column
from hsft.finished.new_items import add_items
from hsft.finished.open_run import OpenRun, items_read, open_run
from hsft.finished.recommend import _about_history, _about_new
from hsft.model.item_table import table_from_cache
from hsft.utils.errors import InputError
from item_caching import main as cache_main
from recommend import main as recommend_main
from tests.conftest import Project
from tests.helpers import ROOT, make_llama

RUN = "saved/run"
PROMPT = "Compress the following sentence into embedding: "
NEW = "item_id,title,tag,description\nn1,item 31,2,5\nn2,item 7 item 8,1,\n"


@pytest.fixture
def encoded(project: Project) -> Project:
    """The project with a cache that its tiny Llama made, and new.csv."""
    cache = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache.unlink()
    more = ("--item_pretrain_dir", str(project.llama), "--item_cache_dtype", "float32")
    code, _, err = project.call(cache_main, [*project.arguments, *more])
    assert code == 0, err
    (project.root / "new.csv").write_text(NEW)
    return project


def train(project: Project, *more: str) -> None:
    # The tiny Llama's item embeddings are nearly parallel; at 1.01 no negative is masked for that.
    where = ("--item_pretrain_dir", str(project.llama), "--nce_thres", "1.01")
    code, _, err = project.run(*where, "--run_name", "run", *more)
    assert code == 0, err


def ask(project: Project, *more: str) -> dict:
    code, out, err = project.call(recommend_main, ["--run", RUN, *more, "--json"])
    assert code == 0, err
    return json.loads(out)


def by_hand(folder: Path, text: str) -> np.ndarray:
    """Encode one text with plain transformers: the mean of its last hidden states."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(tokens).last_hidden_state[0].mean(dim=0).numpy()


def test_a_user_and_the_same_history(project: Project) -> None:
    train(project, "--val_only", "True")
    actual = ask(project, "--user", "u3", "--topk", "4")
    assert (actual["run"], actual["model"], actual["user"]) == (RUN, "untrained", "u3")
    rows = (project.root / "dataset" / "tiny.csv").read_text().splitlines()[1:]
    ids = [row.split(",")[0] for row in rows if row.split(",")[1] == "u3"]
    assert actual["history"] == [{"item_id": i, "title": f"item {i[1:]}"} for i in ids]
    run = open_run(RUN)
    expected = run.recommend(run.build("untrained"), [run.history("u3")], 4)
    best = actual["recommendations"]
    known = run.data.interactions.item_ids
    assert [entry["item_id"] for entry in best] == known[expected.items[0]].tolist()
    assert [entry["score"] for entry in best] == pytest.approx(expected.scores[0].tolist())
    assert [entry["rank"] for entry in best] == [1, 2, 3, 4]
    assert not any(entry["new"] for entry in best)
    assert not {entry["item_id"] for entry in best} & set(ids)
    again = ask(project, "--history", " , ".join(ids), "--topk", "4")
    assert again["user"] is None
    assert again["recommendations"] == best


def test_seen_items_and_the_end_of_the_catalogue(project: Project) -> None:
    train(project, "--model", "item_knn")
    everything = ask(project, "--history", "i4,i2", "--topk", "99", "--exclude_seen", "False")
    best = everything["recommendations"]
    assert (len(best), best[0]["item_id"]) == (20, "i2")
    assert best[0]["score"] == pytest.approx(1.0)
    assert len(ask(project, "--history", "i4,i2", "--topk", "99")["recommendations"]) == 18
    whole = ",".join(f"i{n}" for n in range(20))
    code, out, _ = project.call(recommend_main, ["--run", RUN, "--history", whole])
    assert code == 0
    assert "no item is left to recommend" in out


def test_titles_of_a_run_whose_text_keys_the_file_lacks(project: Project) -> None:
    """A model that reads no texts runs with any columns; its recommendations show the first one."""
    information = project.root / "information" / "tiny.csv"
    rows = [f"{n % 7},i{n},name {n}" for n in range(20)]
    information.write_text("\n".join(["shelf,item_id,name", *rows]) + "\n")
    train(project, "--model", "pop")
    [first] = ask(project, "--history", "i9", "--topk", "1")["history"]
    assert first == {"item_id": "i9", "title": "2"}
    assert title_column(information, ["title", "name"]) == "name"
    information.write_text("item_id\ni1\n")
    assert title_column(information, ["title"]) is None
    assert ask(project, "--history", "i1", "--topk", "1")["history"][0]["title"] == ""


def test_the_text_has_titles_and_no_control_codes(encoded: Project) -> None:
    train(encoded, "--model", "item_knn")
    (encoded.root / "new.csv").write_text(NEW.replace("item 31", "item \x1b[2J 31"))
    history = ["--history", "i1,i2,i3,i4,i5,i6", "--add_items", "new.csv", "--topk", "99"]
    code, out, err = encoded.call(recommend_main, ["--run", RUN, *history])
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == f"{RUN}, item_knn, the history given"
    assert "history: 6 items; the model reads the last one. The last 5, oldest first:" in lines
    assert "  i2  item 2" in lines
    assert "  i1  item 1" not in lines
    header = next(line for line in lines if line.startswith("rank"))
    assert header.split() == ["rank", "score", "item_id", "title"]
    new = [line.split() for line in lines if " new " in line]
    assert sorted(words[3] for words in new) == ["n1", "n2"]
    ranks = {words[3]: words[0] for words in new}
    summary = next(line for line in lines if line.startswith("new items: "))
    # 20 items and 2 new ones without the 6 of the history.
    assert " of 16; " in summary
    assert f"n2 item 7 item 8, rank {ranks['n2']}" in summary
    assert "\x1b" not in out
    assert "\\x1b" in out


def test_new_items_are_scored_by_hand(encoded: Project) -> None:
    train(encoded, "--model", "item_knn")
    actual = ask(encoded, "--history", "n2,i3", "--add_items", "new.csv", "--topk", "99")
    scores = {entry["item_id"]: entry for entry in actual["recommendations"]}
    assert actual["history"][0] == {"item_id": "n2", "title": "item 7 item 8"}
    new = by_hand(encoded.llama, f"{PROMPT}title: item 31tag: 2description: 5")
    last = by_hand(encoded.llama, f"{PROMPT}title: item 3tag: 3description: 3")
    cosine = new @ last / np.linalg.norm(new) / np.linalg.norm(last)
    assert scores["n1"]["score"] == pytest.approx(cosine, abs=1e-5)
    assert scores["n1"]["new"]
    assert not scores["i5"]["new"]
    assert "n2" not in scores
    added = scores["n1"]
    assert actual["new_items"] == [
        {key: added[key] for key in ("item_id", "title", "rank", "score")},
        {"item_id": "n2", "title": "item 7 item 8", "rank": None, "score": None},
    ]
    assert actual["candidates"] == len(scores) == 20
    short = ask(encoded, "--history", "n2,i3", "--add_items", "new.csv", "--topk", "1")
    assert len(short["recommendations"]) == 1
    assert short["new_items"] == actual["new_items"]
    first = ask(encoded, "--history", "i3,n2", "--add_items", "new.csv", "--topk", "99")
    empty_field = by_hand(encoded.llama, f"{PROMPT}title: item 7 item 8tag: 1")
    cosine = new @ empty_field / np.linalg.norm(new) / np.linalg.norm(empty_field)
    scores = {entry["item_id"]: entry for entry in first["recommendations"]}
    assert scores["n1"]["score"] == pytest.approx(cosine, abs=1e-5)


def test_the_head_line_says_what_the_model_reads() -> None:
    config = Config.model_validate({"MAX_ITEM_LIST_LENGTH": 20})
    other = {"model": "pop"}, {"model": "item_knn"}, {"model": "item_knn", "knn_history": "mean"}
    read = [items_read(config.model_copy(update=more), 175) for more in ({}, *other)]
    assert read == [20, 0, 1, 20]
    lines = [_about_history(length, read, min(5, length)) for length, read in
             ((175, 20), (175, 0), (3, 3), (3, 1), (1, 1))]  # fmt: skip
    assert lines == [
        "history: 175 items; the model reads the last 20. The last 5, oldest first:",
        "history: 175 items. The last 5, oldest first:",
        "history: 3 items, oldest first:",
        "history: 3 items; the model reads the last one. Oldest first:",
        "history: 1 item, oldest first:",
    ]


def test_many_new_items_are_cut_short() -> None:
    new = [{"item_id": f"n{n}", "title": "", "rank": n, "score": 0.5} for n in range(1, 13)]
    line = _about_new(new, 1684)
    assert line.startswith("new items: n1, rank 1 of 1,684; n2, rank 2; ")
    assert line.endswith("n10, rank 10; and 2 more")


@pytest.mark.parametrize("transform", ["none", "standardize", "whiten"])
def test_old_items_score_as_before(encoded: Project, transform: str) -> None:
    more = ("--item_embedding_transform", transform, "--item_adapter", "linear")
    train(encoded, *more, "--use_qlora", "True", "--epochs", "1")
    history = ("--history", "i1,i2,i3", "--topk", "99")
    before = ask(encoded, *history)
    after = ask(encoded, *history, "--add_items", "new.csv")
    assert before["model"] == after["model"] == "fine-tuned"
    old, new = (
        {entry["item_id"]: entry["score"] for entry in actual["recommendations"]}
        for actual in (before, after)
    )
    assert new.keys() - old.keys() == {"n1", "n2"}
    assert [new[item] for item in old] == pytest.approx(list(old.values()), abs=1e-6)


def test_a_transform_is_fitted_on_the_own_items() -> None:
    vectors = torch.tensor([[1.0, 2.0], [3.0, 2.0], [6.0, 5.0]])
    cache = ItemCache(["a", "b", "c"], vectors)
    ids = np.array(["[PAD]", "a", "b", "c"], dtype=object)
    # Mean (2, 2), deviation (1, 0) over a and b.
    table = table_from_cache(cache, ids, "standardize", own_items=2)
    assert table.tolist() == [[0, 0], [-1, 0], [1, 0], [4, 0]]
    # The one direction that varies has variance 1; the floor adds a thousandth of the mean, 1/2.
    table = table_from_cache(cache, ids, "whiten", own_items=2)
    scale = 1 / np.sqrt(1.0005)
    assert table[:3].abs().max(dim=1).values.tolist() == pytest.approx([0, scale, scale])
    assert table[3].abs().max() == pytest.approx(3 / np.sqrt(0.0005), rel=1e-4)


def test_the_cache_s_settings_rule(encoded: Project) -> None:
    cache = encoded.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache.unlink()
    made = ("--item_prompt", "item: ", "--text_keys", "[tag, title]", "--MAX_TEXT_LENGTH", "7")
    where = ("--item_pretrain_dir", str(encoded.llama), "--item_cache_dtype", "bfloat16")
    assert encoded.call(cache_main, [*encoded.arguments, *where, *made])[0] == 0
    train(encoded, "--val_only", "True")
    # The text of item i5.
    (encoded.root / "new.csv").write_text("item_id,title,tag\nn1,item 5,1\n")
    run = add_items(open_run(RUN), "new.csv")
    assert run.data.cache is not None
    new, old = run.data.cache.embeddings[run.data.cache.rows_of(["n1", "i5"])]
    assert run.data.cache.embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(new, old, rtol=0, atol=0.02)
    assert run.titles["i5"] == "item 5"


def test_items_that_the_cache_has_but_the_data_has_not_can_be_added(encoded: Project) -> None:
    cache_file = encoded.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache = open_cache(cache_file)
    more = torch.cat([cache.embeddings, torch.ones(1, 64)])
    save_cache(cache_file, [*cache.item_ids, "n1"], more, cache.metadata)
    train(encoded, "--val_only", "True")
    run = add_items(open_run(RUN), "new.csv")
    assert run.data.cache is not None
    assert run.data.cache.item_ids[-2:] == ["n1", "n2"]
    assert len(set(run.data.cache.item_ids)) == 22
    row = run.data.cache.embeddings[run.data.cache.rows_of(["n1"])[0]]
    expected = by_hand(encoded.llama, f"{PROMPT}title: item 31tag: 2description: 5")
    assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def run_with_cache(project: Project, metadata: dict[str, str]) -> OpenRun:
    cache_file = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache = open_cache(cache_file)
    vectors, ids = cache.embeddings.clone(), cache.item_ids
    save_cache(cache_file, ids, vectors, metadata)
    train(project, "--val_only", "True")
    return open_run(RUN)


def test_a_cache_that_says_nothing_gives_a_warning(encoded: Project) -> None:
    run = add_items(run_with_cache(encoded, {}), "new.csv")
    assert run.data.interactions.num_items == 22
    assert "does not say which ItemLLM made it" in encoded.capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"max_text_length": "many"}, "unreadable metadata"),
        ({"text_keys": "[1"}, "unreadable metadata"),
        ({"pooling": "emb_token"}, "was made with emb_token pooling"),
    ],
)
def test_a_cache_made_otherwise(encoded: Project, metadata: dict[str, str], words: str) -> None:
    run = run_with_cache(encoded, metadata)
    with pytest.raises(InputError, match=words):
        add_items(run, "new.csv")


ADD = ("--history", "i1", "--add_items", "new.csv")
BAD = {
    "nothing asked": ((), "", ["name either a user", "--history"]),
    "both asked": (("--user", "u1", "--history", "i1"), "", ["not both"]),
    "page and answer": (
        ("--serve", "0", "--user", "u1"),
        "",
        ["--user has no meaning with --serve"],
    ),
    "page and JSON": (("--serve", "0", "--json"), "", ["--json has no meaning with --serve"]),
    "port": (("--serve", "70000"), "", ["--serve 70000 is no port"]),
    "user": (("--user", "u99"), "", ["no user 'u99'", "u0"]),
    "item": (("--history", "i1,x9"), "", ["no item 'x9'"]),
    "empty history": (("--history", " "), "", ["--history is empty"]),
    "gap in the history": (("--history", "i1,,i2"), "", ["empty id at position 2"]),
    "topk": (("--user", "u1", "--topk", "0"), "", ["'0' is not a whole number of at least 1"]),
    "topk text": (("--user", "u1", "--topk", "ten"), "", ["'ten' is not a whole number"]),
    "exclude_seen": (
        ("--user", "u1", "--exclude_seen", "maybe"),
        "",
        ["unrecognized arguments: maybe"],
    ),
    "model": (("--user", "u1", "--model", "best"), "", ["no model 'best'; it has untrained"]),
    "option": (("--user", "u1", "--top", "3"), "", ["--top", "--help"]),
    "run": (
        ("--run", "saved/none", "--user", "u1"),
        "",
        ["saved/none does not exist; the runs in saved are run: name one"],
    ),
    "a folder of runs": (
        ("--run", "saved", "--user", "u1"),
        "",
        ["saved is no run: it has no config.yaml; the runs in saved are run: name one"],
    ),
    "elsewhere": (
        ("--run", "moved", "--user", "u1"),
        "",
        ["/gone/tiny.csv, the data of moved, does not exist", "--data_path"],
    ),
    "unfinished": (
        ("--run", "stopped", "--user", "u1"),
        "",
        ["stopped", "continue it with", "--config_file stopped/config.yaml --auto_resume True"],
    ),
    "no file": (("--history", "i1", "--add_items", "none.csv"), "", ["none.csv"]),
    "column": (
        ADD,
        "item_id,title,tag\nn1,a,b\n",
        ["new.csv lacks the column description", "title,tag,description; change the file."],
    ),
    "columns": (ADD, "item_id,title\nn1,a\n", ["lacks the columns tag, description: "]),
    "known": (ADD, NEW.replace("n2", "i7"), ["1 of 2 new items", "'i7'", "already"]),
    "twice": (ADD, NEW.replace("n2", "n1"), ["'n1' is described a second time"]),
    "no items": (ADD, "item_id,title,tag,description\n", ["no items below"]),
    "other ItemLLM": (
        (*ADD, "--item_pretrain_dir", "other"),
        NEW,
        ["other is not the one that made the item cache", "--item_pretrain_dir"],
    ),
    "no ItemLLM": ((*ADD, "--item_pretrain_dir", "gone"), NEW, ["gone does not exist"]),
}


def test_bad_input_is_one_clear_line(encoded: Project) -> None:
    # One run for all cases, since each case only reads it.
    train(encoded, "--val_only", "True")
    make_llama(encoded.root / "other", seed=1)
    config = Path(RUN, "config.yaml").read_text()
    for name, changed in {
        "moved": config.replace("data_path: dataset", "data_path: gone"),
        "stopped": config.replace("val_only: true", "val_only: false"),
    }.items():
        assert changed != config
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(changed)
    for case, (flags, csv, words) in BAD.items():
        (encoded.root / "new.csv").write_text(csv or NEW)
        code, out, err = encoded.call(recommend_main, ["--run", RUN, *flags])
        assert (code, out) == (2, ""), case
        line = err.splitlines()[-1]
        assert line.startswith("error: "), case
        for word in words:
            assert word in line, case
        assert "Traceback" not in err


def test_models_on_ids_cannot_take_new_items(encoded: Project) -> None:
    config = ("--config_file", f"{ROOT}/code/baselines/sasrec.yaml")
    train(encoded, *config, "--epochs", "1")
    assert ask(encoded, "--user", "u1")["model"] == "sasrec"
    code, out, err = encoded.call(recommend_main, ["--run", RUN, *ADD])
    assert (code, out) == (2, "")
    assert "is a run of sasrec, which knows items by their ids" in err


def test_no_itemllm_is_named(encoded: Project) -> None:
    code, _, err = encoded.run("--val_only", "True", "--run_name", "run")
    assert code == 0, err
    # The folder is named by the cache, which it made.
    code, out, err = encoded.call(recommend_main, ["--run", RUN, *ADD, "--json"])
    assert code == 0, err
    assert "which made the item cache" in err
    named = ["--run", RUN, *ADD, "--json", "--item_pretrain_dir", str(encoded.llama)]
    assert encoded.call(recommend_main, named)[:2] == (0, out)
    sentence = "no ItemLLM is named to encode the new items"
    path = encoded.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache = open_cache(path)
    vectors = cache.embeddings.clone()
    other = make_llama(encoded.root / "other", seed=1)
    for folder in (None, "gone", str(other)):
        stated = {k: v for k, v in cache.metadata.items() if k != "model_folder"}
        stated |= {"model_folder": folder} if folder else {}
        save_cache(path, cache.item_ids, vectors, stated)
        code, _, err = encoded.call(recommend_main, ["--run", RUN, *ADD])
        assert code == 2
        assert sentence in err

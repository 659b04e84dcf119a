"""`text_format: hllm` against pandas, tokenizers and transformers; `plain` beside it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoModel, AutoTokenizer

from hsft.config import Config
from hsft.data import blocks
from hsft.data.blocks import MappedTexts
from hsft.data.cache import open_cache, save_cache
from hsft.data.item_text import read_item_texts
from hsft.encoding.item_llm import load_tokenizer
from hsft.finished.new_items import encoding_config
from item_caching import main as cache_main
from tests.bad_input import CACHE, CSV, INFORMATION
from tests.conftest import Project
from tests.helpers import make_llama

PROMPT = "Compress the following sentence into embedding: "
KEYS = ["title", "tag", "description"]
HEADER = "item_id,title,tag,description"


def as_hllm(path: Path, keys: list[str], prompt: str, items: list[str]) -> list[str]:
    """What HLLM's code does with an information file, in pandas' own calls."""
    table = pd.read_csv(path, delimiter=",", dtype={"item_id": str})
    cells = table[[*keys, "item_id"]].set_index("item_id").T.to_dict()
    texts = []
    for item in items:
        text = ""
        if item in cells:
            values = ((key, cells[item][key]) for key in keys)
            text = prompt + "".join(f"{k}: {v}" for k, v in values if v and str(v) != "nan")
        texts.append(text)
    return texts


FILES = {
    "words": ["1,a film,x,y", "2,b,,", "3,,,", '4,\'q,"a, b",z'],
    "missing": ["1,NA,N/A,None", "2,null,n/a,nan", "3,NaN,NULL,<NA>", "4,none,Null,-"],
    "whole years": ["1,a,1990,x", "2,b,1991,0", "3,c,0,y"],
    "years and a blank": ["1,a,1990,x", "2,b,,y", "3,c,0,z"],
    "only numbers": ["1,7,1990,3", "2,0,1991,4"],
    "numbers of two kinds": ["1,7,1990,3.5", "2,0,1991,0.0"],
    "zeros in front": ["1,007,00,x", "2,011,01,y"],
    "truths": ["1,True,a,x", "2,False,b,y"],
    "long decimals": ["1,0.1234567890123456789,a,x", "2,1e5,b,1E400"],
    "line breaks": ['1,"a\nb",x,', '2,"c ""d""",,y'],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keys", [KEYS, ["tag", "title"], ["tag"]], ids="-".join)
def test_texts_are_those_of_pandas(tmp_path: Path, name: str, keys: list[str]) -> None:
    path = tmp_path / "items.csv"
    path.write_text("\n".join([HEADER, *FILES[name], ""]))
    actual = read_item_texts(path, keys, PROMPT, "hllm")
    assert actual.texts == as_hllm(path, keys, PROMPT, actual.item_ids)


# Cells of three pieces of a file, in each of which pandas guesses the types of columns anew.
PIECES = {
    "a blank in the last piece": ("7", "8", ""),
    "decimals in the middle": ("7", "8.5", "9"),
    "a word after numbers": ("007", "word", "08"),
    "truths and numbers": ("True", "1", "False"),
    "blank before words": ("", "word", "7"),
    "large numbers": ("1", "99999999999999999999", "-1"),
}


@pytest.mark.parametrize("large", [False, True])
def test_texts_of_a_long_file_have_the_types_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    names = [name.replace(" ", "_") for name in PIECES]
    rest = [f"c{number}" for number in range(512 - len(names) - 1)]
    lines = [",".join(["item_id", *names, *rest])]
    # Of 512 columns a piece has 1,024 rows.
    for row in range(2100):
        cells = [cells[row // 1024] for cells in PIECES.values()]
        lines.append(",".join([f"i{row}", *cells, *[""] * len(rest)]))
    path = tmp_path / "items.csv"
    path.write_text("\n".join([*lines, ""]))
    if large:
        monkeypatch.setattr(blocks, "LARGE_BYTES", 1)
    with warnings.catch_warnings():
        # pandas warns of mixed types.
        warnings.simplefilter("ignore")
        for keys in (names, names[:2], names[2:3], [names[0], names[0]]):
            actual = read_item_texts(path, keys, PROMPT, "hllm")
            assert isinstance(actual.texts, MappedTexts if large else list)
            if len(set(keys)) == len(keys):
                assert list(actual.texts) == as_hllm(path, keys, PROMPT, actual.item_ids)
    assert actual.texts[0] == f"{PROMPT}{names[0]}: 7.0{names[0]}: 7.0"


def test_plain_texts_are_the_cells(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("\n".join([HEADER, "1,None,1990,0", "2,,,", "3,nan,,007", "4,NA,,", ""]))
    assert read_item_texts(path, KEYS, "P ").texts == [
        "P title: Nonetag: 1990description: 0",
        "",
        "P description: 007",
        "P title: NA",
    ]
    hllm = read_item_texts(path, KEYS, "P ", "hllm")
    assert hllm.texts == ["P tag: 1990.0", "P ", "P description: 7.0", "P "]
    assert hllm.has_text() == [True, False, True, False]


def llama_tokenizer(folder: Path) -> Tokenizer:
    """Write a tokenizer whose steps are Llama's in transformers 4, with a begin-of-text token."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz012349:.", "▁a", "▁▁"]
    merges = [("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(
        BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


@pytest.mark.parametrize("text", ["ab c", " ab", "  a", "a <s>b", "a</s> b", ""])
def test_tokens_are_those_of_the_saved_steps(tmp_path: Path, text: str) -> None:
    steps = llama_tokenizer(make_llama(tmp_path))
    saved = load_tokenizer(tmp_path, as_saved=True)
    assert saved(text)["input_ids"] == steps.encode(text).ids
    # Elsewhere the two tokenizers are one.
    if not text.startswith(" ") and "s>" not in text:
        assert load_tokenizer(tmp_path)(text)["input_ids"] == steps.encode(text).ids


def state(folder: Path, text: str, as_saved: bool) -> torch.Tensor:
    """A text's embedding by plain transformers: the emb token's last state, or the tokens' mean."""
    if as_saved:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    else:
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    model = AutoModel.from_pretrained(folder).eval()
    inputs = model.get_input_embeddings()(torch.tensor([ids], dtype=torch.int64))
    extra = folder / "hllm_extra.safetensors"
    if extra.is_file():
        token = load_file(extra)["item_emb_tokens"].reshape(1, 1, -1)
        inputs = torch.cat([inputs, token], dim=1)
    with torch.no_grad():
        states = model(inputs_embeds=inputs).last_hidden_state[0]
    return states[-1] if extra.is_file() else states.mean(dim=0)


def encode(project: Project, folder: Path, *more: str) -> tuple[dict[str, torch.Tensor], str]:
    """Run item_caching.py: each item's embedding, and what it said."""
    code, _, err = project.call(
        cache_main,
        [
            *project.arguments,
            *("--item_pretrain_dir", str(folder), "--item_cache_path", "new.safetensors"),
            *("--item_cache_dtype", "float32", *more),
        ],
    )
    assert code == 0, err
    cache = open_cache("new.safetensors")
    return dict(zip(cache.item_ids, cache.embeddings, strict=True)), err


@pytest.mark.parametrize("pooling", ["emb_token", "mean"])
@pytest.mark.parametrize("begin", [True, False], ids=["begin-of-text", "no begin-of-text"])
def test_a_cache_as_hllm_makes_it(
    project: Project, tmp_path: Path, pooling: str, begin: bool
) -> None:
    folder = make_llama(tmp_path / "itemllm", seed=1)
    if begin:
        llama_tokenizer(folder)
    if pooling == "emb_token":
        token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(5))
        save_file({"item_emb_tokens": token}, folder / "hllm_extra.safetensors")
    rows = ["i0,item 1,1990,x", "i1,None,,NA", "i2,a</s> b,0,y", "i3,item 2,,z", "i4,,,"]
    (project.root / INFORMATION).write_text("\n".join([HEADER, *rows, ""]))
    interactions = [f"i{n},u{u},{u + n}" for u in range(3) for n in range(6)]
    (project.root / CSV).write_text("\n".join(["item_id,user_id,timestamp", *interactions, ""]))
    actual, err = encode(project, folder, "--text_format", "hllm", "--item_prompt", "title : ")
    items = [f"i{n}" for n in range(6)]
    texts = as_hllm(project.root / INFORMATION, KEYS, "title : ", items)
    assert texts[1] == texts[4] == "title : "
    assert texts[0] == "title : title: item 1tag: 1990.0description: x"
    assert texts[5] == ""
    empty = begin or pooling == "emb_token"
    for item, text in zip(items[: 5 + empty], texts, strict=False):
        expected = state(folder, text, as_saved=True)
        torch.testing.assert_close(actual[item], expected, rtol=1e-4, atol=1e-5)
    # What the log says of items without text is what they get.
    if not empty:
        assert not actual["i5"].any()
    given = {
        (True, "mean"): "the embedding of the tokenizer's begin-of-text token",
        (True, "emb_token"): "the embedding of the tokenizer's begin-of-text token",
        (False, "emb_token"): "the bare emb token's embedding",
        (False, "mean"): "zeros",
    }[begin, pooling]
    assert f"1 of 6 items have no text and get {given}." in err
    assert open_cache("new.safetensors").metadata["text_format"] == "hllm"

    plain, err = encode(project, folder, "--item_prompt", "title : ")
    assert f"2 of 6 items have no text and get {given}." in err
    expected = state(folder, "title : title: Nonedescription: NA", as_saved=False)
    torch.testing.assert_close(plain["i1"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain["i4"], plain["i5"])


def test_a_cache_of_before_the_key_is_a_plain_one(project: Project) -> None:
    folder = project.llama
    encode(project, folder)
    cache = open_cache("new.safetensors")
    stated = {name: text for name, text in cache.metadata.items() if name != "text_format"}
    save_cache("new.safetensors", cache.item_ids, cache.embeddings.clone(), stated)
    _, err = encode(project, folder)
    assert "holds these items encoded by this model already" in err
    run = ("--model", "item_knn", "--item_cache_path", "new.safetensors", "--check", "True")
    code, out, err = project.run(*run)
    assert (code, out.splitlines()[-1]) == (0, "no problem found"), err
    code, out, err = project.run(*run, "--text_format", "hllm")
    assert code == 0, err
    assert "was not made with this configuration's text_format" in out
    # An old cache without any statement, such as another program's, says nothing of texts.
    code, out, err = project.run("--model", "item_knn", "--text_format", "hllm", "--check", "True")
    assert (code, out.splitlines()[-1]) == (0, "no problem found"), err
    assert (project.root / CACHE).is_file()


def test_new_items_are_written_in_the_cache_s_format(project: Project) -> None:
    encode(project, project.llama, "--text_format", "hllm")
    config = Config()
    assert config.text_format == "plain"
    assert encoding_config(config, open_cache("new.safetensors")).text_format == "hllm"
    assert encoding_config(config, open_cache(CACHE)).text_format == "plain"

"""The texts of a large item information are kept in a mapped file, and are those of a small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsft.config import Config
from hsft.data import blocks
from hsft.data.blocks import MappedTexts, keep_texts
from hsft.data.item_text import TextFormat, read_item_texts, select_items, with_items
from hsft.inputs.cache_items import encode_in_memory
from hsft.utils.errors import InputError
from tests.bad_input import INFORMATION
from tests.conftest import Project

KEYS = ["title", "tag"]
ROWS = ["i1,Äpfel,1990", "i2,,", 'i3,"a\nb",', "i4,nan,7", "i5,猫 and dog,0"]


def make_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file count as large, and few texts be in memory at a time."""
    monkeypatch.setattr(blocks, "LARGE_BYTES", 1)
    monkeypatch.setattr(blocks, "TEXTS_AT_A_TIME", 2)


@pytest.mark.parametrize("text_format", ["plain", "hllm", "sentences"])
def test_texts_of_a_large_file_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_format: TextFormat
) -> None:
    path = tmp_path / "items.csv"
    path.write_text("\n".join(["item_id,title,tag", *ROWS, ""]), encoding="utf-8")
    small = read_item_texts(path, KEYS, "P ", text_format)
    make_large(monkeypatch)
    large = read_item_texts(path, KEYS, "P ", text_format)
    assert isinstance(small.texts, list)
    assert isinstance(large.texts, MappedTexts)
    # The file of the texts has no name.
    assert [file.name for file in tmp_path.iterdir()] == ["items.csv"]
    for change in (
        lambda items: items,
        lambda items: with_items(items, ["i3", "new", "newer"]),
        lambda items: select_items(items, ["i5", "none", "i1", "i5"]),
    ):
        expected, actual = change(small), change(large)
        assert list(actual.texts) == expected.texts
        assert [actual.texts[n] for n in range(len(actual))] == expected.texts
        assert actual.texts[1:9] == expected.texts[1:9]
        assert actual.texts[-1] == expected.texts[-1]
        assert actual.item_ids == expected.item_ids
        assert (actual.fingerprint, actual.has_text()) == (
            expected.fingerprint,
            expected.has_text(),
        )


def test_items_of_a_large_file_are_encoded_to_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(dataset="tiny", item_pretrain_dir=str(project.llama), device="cpu")
    small = encode_in_memory(config)
    make_large(monkeypatch)
    large = encode_in_memory(config)
    assert large.item_ids == small.item_ids
    assert np.array_equal(large.embeddings.numpy(), small.embeddings.numpy())


def test_what_is_wrong_with_a_large_file_is_said_alike(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project.root / INFORMATION
    path.write_text("item_id,title,tag\ni1,a,b\ni2,a\ni1,c,d\n")
    sentences = []
    for large in (False, True):
        if large:
            make_large(monkeypatch)
        with pytest.raises(InputError) as refusal:
            read_item_texts(path, KEYS, "")
        sentences.append(str(refusal.value))
    assert sentences[0] == sentences[1]
    assert "row 3: has 2 fields" in sentences[0]
    assert "row 4: item 'i1' is described a second time" in sentences[0]


def test_texts_that_are_all_empty_are_mapped(tmp_path: Path) -> None:
    assert list(keep_texts(["", ""], tmp_path)) == ["", ""]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*; free some space"):
        keep_texts(["a"], tmp_path / "missing")

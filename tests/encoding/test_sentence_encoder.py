"""Sentence encoders: their folders' settings, their vectors, and what the programs do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertModel

from hsft.data.cache import open_cache, save_cache
from hsft.encoding.sentence_encoder import load_sentence_encoder, read_sentence_folder
from hsft.finished.new_items import add_items
from hsft.finished.open_run import open_run
from hsft.utils.errors import InputError
from item_caching import main as caching_main
from tests.conftest import Project
from tests.encoders import make_bert, make_sentence_folder
from tests.helpers import make_cache

TEXTS = ["item 3. 2. 4", "item", "", "title 7 item 8 item 9 item 1 item 2", "item 3. 2"]
ALL = {
    "pooling_mode_cls_token": True,
    "pooling_mode_max_tokens": True,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_mean_sqrt_len_tokens": True,
    "pooling_mode_weightedmean_tokens": True,
    "pooling_mode_lasttoken": True,
}


def load(folder: Path, longest: int = 64) -> Any:
    return load_sentence_encoder(
        folder, max_text_length=longest, device=torch.device("cpu"), dtype=torch.float32
    )


@pytest.mark.parametrize("dense", [False, True])
def test_vectors_equal_a_float64_reference_text_by_text(tmp_path: Path, dense: bool) -> None:
    folder = make_sentence_folder(tmp_path / "encoder", ALL, dense=dense)
    encoder = load(folder)
    tokens = encoder.tokenize(TEXTS)
    # [CLS] and [SEP] count; the longest text is cut to the folder's 7 tokens and keeps [SEP].
    assert [len(ids) for ids in tokens] == [7, 3, 0, 7, 6]
    assert tokens[3][-1] == 3
    actual = encoder.encode(tokens)
    assert actual.shape == (5, encoder.dim) == (5, 5 if dense else 6 * 24)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    for ids, vector in zip(tokens, actual, strict=True):
        if not len(ids):
            assert torch.equal(vector, torch.zeros(encoder.dim))
            continue
        with torch.no_grad():
            states = model(torch.from_numpy(ids).unsqueeze(0)).last_hidden_state[0]
        position = torch.arange(1, len(ids) + 1, dtype=torch.float64).unsqueeze(1)
        pooled = torch.cat(
            [
                states[0],
                states.max(dim=0).values,
                states.mean(dim=0),
                states.sum(dim=0) / len(ids) ** 0.5,
                (states * position).sum(dim=0) / position.sum(),
                states[-1],
            ]
        )
        if dense:
            layer = load_file(folder / "2_Dense" / "model.safetensors")
            pooled = torch.tanh(
                layer["linear.weight"].double() @ pooled + layer["linear.bias"].double()
            )
        expected = F.normalize(pooled, dim=0)
        torch.testing.assert_close(vector.double(), expected, rtol=0, atol=1e-5)


def test_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = make_sentence_folder(
        tmp_path / "encoder",
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        prompts={"query": "find: ", "document": "item: "},
        default_prompt_name="query",
    )
    settings = read_sentence_folder(folder)
    assert settings.poolings == ("mean",)
    assert settings.normalize
    assert settings.prompt == "item: "
    assert load(folder, 5).max_text_length == 5
    assert load(folder).max_text_length == 7
    plain = read_sentence_folder(make_bert(tmp_path / "bert"))
    assert (plain.poolings, plain.normalize, plain.prompt) == (("mean",), False, "")


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    folder = make_sentence_folder(tmp_path / "encoder", {"pooling_mode_mean_tokens": True})
    modules = json.loads((folder / "modules.json").read_text())
    for change, sentence in (
        ({"type": "sentence_transformers.models.LSTM"}, "a step of the kind 'LSTM'"),
        ({"path": "../outside"}, "names a path outside of it"),
    ):
        broken = [*modules[:1], {**modules[1], **change}, *modules[2:]]
        (folder / "modules.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=sentence):
            read_sentence_folder(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    for pooling, sentence in (
        ({}, "names no pooling"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt: false"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        with pytest.raises(InputError, match=sentence):
            read_sentence_folder(folder)


def test_a_cache_may_say_its_pooling_alone(project: Project) -> None:
    make_cache(project.root / "dataset" / "tiny_item_embeddings.safetensors", pooling="sentence")
    code, _, err = project.run("--val_only", "True")
    assert code == 0, err
    assert "was not made with" not in err


def test_a_run_on_a_sentence_encoders_cache(project: Project) -> None:
    folder = make_sentence_folder(
        project.root / "encoder",
        {"pooling_mode_mean_tokens": True},
        prompts={"document": "item "},
    )
    where = ("--dataset", "tiny", "--show_progress", "False", "--precision", "32-true")
    caching = [*where, "--encoder", str(folder)]
    code, out, err = project.call(caching_main, [*caching, "--check", "True"])
    assert code == 0, err
    assert "20 items of 24 dimensions" in out
    cache = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    cache.unlink()
    code, out, err = project.call(caching_main, caching)
    assert code == 0, err
    assert f"--encoder {folder}" in out
    made = open_cache(cache)
    assert made.metadata["prompt"] == "item "
    assert made.metadata["text_format"] == "sentences"
    encoder = load(folder)
    expected = encoder.encode(encoder.tokenize(["item item 5. 1. 5"]))[0]
    row = int(made.rows_of(["i5"])[0])
    torch.testing.assert_close(made.embeddings[row].float(), expected, rtol=0, atol=1e-3)

    # No other_cache warning, whether or not the run names the encoder.
    for more in ((), ("--encoder", str(folder))):
        code, _, err = project.run("--item_adapter", "linear", "--val_only", "True", *more)
        assert code == 0, err
        assert "was not made with" not in err
    code, _, err = project.run(
        *("--item_adapter", "linear", "--use_qlora", "True", "--qlora_quant_type", "none"),
        *("--epochs", "1", "--eval_baseline", "False", "--run_name", "run"),
    )
    assert code == 0, err
    new = project.root / "new.csv"
    new.write_text("item_id,title,tag,description\nnew,item 5,1,5\n")
    run = add_items(open_run("saved/run"), new)
    added = run.data.cache
    assert added is not None
    torch.testing.assert_close(added.embeddings[-1].float(), expected, rtol=0, atol=1e-3)
    code, _, err = project.call(caching_main, [*caching, "--item_pretrain_dir", str(project.llama)])
    assert code == 2
    assert "encoder stands in place of item_pretrain_dir" in err


def test_a_run_reads_a_sentence_cache_that_states_little(project: Project) -> None:
    save_cache(
        project.root / "dataset" / "tiny_item_embeddings.safetensors",
        [f"i{number}" for number in range(20)],
        torch.randn(20, 24, generator=torch.Generator().manual_seed(0)),
        {"pooling": "sentence", "model": "made elsewhere"},
    )
    code, _, err = project.run("--item_adapter", "linear", "--val_only", "True")
    assert code == 0, err
    assert "was not made with" not in err


def test_a_sentence_encoder_is_trained_along(project: Project) -> None:
    make_sentence_folder(project.root / "encoder", {"pooling_mode_mean_tokens": True}, dense=True)
    code, _, err = project.run(
        *("--encoder", "encoder", "--use_item_cache", "False", "--train_item_llm", "lora"),
        *("--item_lora_target_modules", "[query,value]", "--item_adapter", "linear"),
        *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
        *("--epochs", "1", "--optim_args.learning_rate", "1e-2", "--nce_thres", "1.01"),
        *("--item_gradient_checkpointing", "True", "--item_pretrain_epochs", "1"),
        *("--run_name", "run"),
    )
    assert code == 0, err
    run = open_run("saved/run")
    cache = run.data.cache
    assert cache is not None
    weights = load_file("saved/run/best/item_llm.safetensors")
    trained = [name for name in weights if "lora_B" in name]
    assert len(trained) == 4
    assert all(weights[name].abs().max() > 0 for name in trained)
    Path("new.csv").write_text("item_id,title,tag,description\nn1,item 19,3,5\n")
    extended = add_items(run, "new.csv").data.cache
    assert extended is not None
    row = extended.item_ids.index("i19")
    torch.testing.assert_close(
        extended.embeddings[-1], extended.embeddings[row], rtol=1e-3, atol=1e-3
    )

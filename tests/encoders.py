"""Small random sentence encoders as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.helpers import WORDS


def make_bert(folder: Path) -> Path:
    """Save a random BERT of hidden size 24 with a word tokenizer that adds [CLS] and [SEP]."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    return folder


def make_sentence_folder(
    folder: Path, pooling: dict[str, Any], *, dense: bool = False, **settings: Any
) -> Path:
    """Save a sentence encoder in sentence-transformers' layout."""
    make_bert(folder)
    kinds = ["Transformer", "Pooling", *["Dense"] * dense, "Normalize"]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    modules = [
        {"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    if dense:
        (folder / "2_Dense").mkdir()
        stated = {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(stated))
        weight = torch.randn(5, 24 * sum(map(bool, pooling.values())))
        save_file(
            {"linear.weight": weight, "linear.bias": torch.randn(5)},
            folder / "2_Dense" / "model.safetensors",
        )
    if settings:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder

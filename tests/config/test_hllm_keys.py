"""Every key of HLLM's YAML files, scripts and code works as there or is refused with what to use."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hsft.config import Config, load_config
from hsft.config.hllm_keys import HLLM_KEYS, HLLM_MODELS, SHAPES
from hsft.config.loader import flat_fields
from hsft.report.result import read_ranks
from hsft.utils.errors import InputError, problems_of
from tests.bad_input import expect_refusal
from tests.conftest import Project

# The keys of HLLM's eight YAML files at commit 2deed17, with the values that they have there, and those
# of its scripts in reproduce/. Keys that take a path or name have a value of their kind.
IN_FILES: dict[str, Any] = {
    # overall/*.yaml
    **{"seed": 2020, "state": "INFO", "use_text": True, "reproducibility": True},
    **{"checkpoint_dir": "saved", "show_progress": True, "log_wandb": False},
    **{"wandb_project": "REC", "MAX_ITEM_LIST_LENGTH": 50, "MAX_TEXT_LENGTH": 64},
    **{"data_path": "../dataset/", "dataset": "Pixel200K", "test_dataset": "Pixel200K"},
    **{"text_path": "text_path", "text_keys": ["title", "tag", "description"]},
    "item_prompt": "Compress the following sentence into embedding: ",
    **{"item_emb_token_n": 1, "epochs": 10, "train_batch_size": 8},
    **{"optim_args.learning_rate": 1e-4, "optim_args.weight_decay": 0.01},
    **{"scheduler_args.type": "cosine", "scheduler_args.warmup": 0.1, "loss": "nce"},
    **{"eval_batch_size": 256, "topk": [5, 10, 50, 200], "metrics": ["Recall", "NDCG"]},
    **{"valid_metric": "NDCG@200", "metric_decimal_place": 7, "eval_step": 1, "stopping_step": 5},
    **{"strategy": "deepspeed", "precision": "bf16-mixed", "stage": 2},
    # HLLM/HLLM.yaml
    **{"model": "HLLM", "item_pretrain_dir": "item_pretrain_dir", "item_llm_init": True},
    **{"user_pretrain_dir": "user_pretrain_dir", "user_llm_init": True},
    "use_ft_flash_attn": True,
    # reproduce/*.sh
    **{"gradient_checkpointing": True, "num_negatives": 512, "fix_temp": True},
    **{"MAX_ITEM_LIST_LENGTH_TEST": 50, "data_split": False, "update_interval": 100},
    "val_only": True,
}
# The other keys that HLLM's code reads, as they stand where they are not set.
IN_CODE: dict[str, Any] = {
    **{"item_data": None, "nce_thres": 0.99, "item_emb_pretrain": None, "load_pretrain": None},
    **{"auto_resume": False, "clip_grad_norm": None, "use_time": False, "log_path": None},
    **{"freeze_prefix": [], "freeze_ad": False, "ft_item": None, "decay_check_name": None},
    **{"lr_mult_prefix": None, "lr_mult_rate": None, "optimizer_kwargs": None},
    **{"loss_decimal_place": 4, "debug": False, "need_training": True, "use_gpu": True},
    **{"device": "cuda", "use_modality": False, "train_path": None},
    # Of its argument_list.py, and what its configurator.py sets itself.
    **{"repeatable": False, "eval_type": "RANKING", "valid_metric_bigger": True},
    **{"tail_ratio": None},
}
# IDNet/{sasrec,hstu,llama_id}.yaml: the shapes of models that have sections here.
IN_ID_FILES: dict[str, Any] = {
    **{"n_layers": 2, "n_heads": 4, "embedding_size": 512, "inner_size": 1},
    **{"hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1, "hidden_act": "gelu"},
    **{"layer_norm_eps": 1e-12, "initializer_range": 0.02, "item_embedding_size": 512},
    **{"hstu_embedding_size": 512, "enable_relative_attention_bias": True, "item_embed_dim": 512},
}


@pytest.mark.parametrize("key", IN_FILES | IN_CODE)
def test_what_hllm_s_files_say_is_taken(key: str) -> None:
    value = (IN_FILES | IN_CODE)[key]
    if key == "clip_grad_norm":
        value = 1.0  # HLLM passes it to nothing
    others = {"topk": [200]} if key == "valid_metric" else {}
    config, warnings = load_config([], {**others, key: value})
    if key in flat_fields():
        assert warnings == []
        actual: Any = config
        for part in key.split("."):
            actual = getattr(actual, part)
        # HLLM's null where nothing is named.
        assert actual == ([] if value is None and isinstance(actual, list) else value)
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(
            f"{key} (from the command line) is a key of HLLM that has no effect"
        )


@pytest.mark.parametrize("key", IN_ID_FILES)
def test_shapes_have_other_keys(key: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_config([], {key: IN_ID_FILES[key]})
    (sentence,) = problems_of(refusal.value)
    assert sentence.startswith(f"key '{key}' in the command line is one of HLLM's")
    named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", sentence)
    assert set(named) <= set(flat_fields())
    assert bool(named) == bool(SHAPES[key])


# Other values of keys that are accepted with some -> what the sentence names.
REFUSED: dict[str, tuple[Any, str]] = {
    "state": ("DEBUG", "INFO"),
    "use_gpu": (False, "device"),
    "log_path": ("log.txt", "run_name"),
    "debug": (True, "check"),
    "need_training": (False, "val_only"),
    "train_path": ("train.csv", "data_path"),
    "valid_metric_bigger": (False, "valid_metric"),
    "tail_ratio": (0.1, "TailPercentage"),
    "use_modality": (True, "ids"),
    "use_time": (True, "use_timestamps"),
    "item_emb_pretrain": ("token.bin", "download_itemllm.py"),
    "freeze_ad": (True, "train_item_llm"),
    "ft_item": (False, "train_item_llm"),
    "optimizer_kwargs": ({"optimizer": {}}, "optimizer"),
    "learning_rate": (1e-4, "optim_args.learning_rate"),
    "weight_decay": (0.1, "optim_args.weight_decay"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_here_is_refused_with_what_to_use(key: str) -> None:
    value, word = REFUSED[key]
    with pytest.raises(InputError) as refusal:
        load_config([], {key: value})
    (sentence,) = problems_of(refusal.value)
    assert sentence.startswith(f"key '{key}' in the command line is one of HLLM's and cannot be ")
    assert word in sentence.rpartition("here: ")[2]


def test_no_key_is_left_out() -> None:
    taken_as_they_are = {key for key, known in HLLM_KEYS.items() if known.accepted is None}
    assert set(HLLM_KEYS) == set(REFUSED) | taken_as_they_are
    assert set(SHAPES) == set(IN_ID_FILES)
    # A key is here or refused, not both.
    assert not (set(HLLM_KEYS) | set(SHAPES)) & set(flat_fields())
    known = set(flat_fields()) | set(HLLM_KEYS) | set(SHAPES)
    assert set(IN_FILES | IN_CODE | IN_ID_FILES) <= known


@pytest.mark.parametrize("model", HLLM_MODELS)
def test_models_have_other_names(model: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_config([], {"model": model})
    (sentence,) = problems_of(refusal.value)
    assert sentence.startswith(f"model: {model} in the command line is HLLM's name: ")
    (own,) = re.findall(r"use model: ([a-z_]+)", sentence)
    assert load_config([], {"model": own})[0].model == own


def test_all_problems_are_named_at_once(project: Project) -> None:
    (project.root / "id.yaml").write_text("model: SASRec\nn_layers: 2\nepohcs: 3\n")
    with pytest.raises(InputError) as refusal:
        load_config(["id.yaml"])
    sentences = problems_of(refusal.value)
    assert [sentence.split()[1].strip("'") for sentence in sentences] == [
        "n_layers",
        "SASRec",
        "key",
    ]
    assert "here: use sasrec.layers or hstu.layers" in sentences[0]
    argv = ("--freeze_ad", "True")
    expect_refusal(project, lambda: project.run(*argv), ["train_item_llm"])


def test_hllm_s_files_are_read_as_they_are(project: Project) -> None:
    """The two files of the fine-tuning of HLLM's README, written from the facts above."""
    id_keys = {"loss", "num_negatives", "fix_temp", "update_interval", "data_split", "val_only"}
    lines = [
        f"{key}: {value!r}" if isinstance(value, str | list) else f"{key}: {str(value).lower()}"
        for key, value in IN_FILES.items()
        if "." not in key and key not in id_keys
    ]
    lines += ["optim_args: {learning_rate: 1e-4, weight_decay: 0.01}"]
    (project.root / "hllm.yaml").write_text("\n".join(lines))
    config, warnings = load_config(["hllm.yaml"])
    assert (config.strategy, config.stage, config.topk[-1]) == ("deepspeed", 2, 200)
    assert [line.split()[0] for line in warnings] == [
        *("state", "reproducibility", "test_dataset", "use_text"),
    ]


@pytest.mark.parametrize(
    "model",
    [
        ("--model", "item_knn", "--knn_history", "mean"),
        ("--val_only", "True"),
    ],
)
@pytest.mark.parametrize("length", [2, 11])
def test_evaluation_reads_histories_of_another_length(
    project: Project, model: tuple[str, ...], length: int
) -> None:
    ranks = []
    trained = "5" if length < 5 else "1"
    for name, keys in (
        ("plain", ("--MAX_ITEM_LIST_LENGTH", str(length))),
        ("test", ("--MAX_ITEM_LIST_LENGTH", trained, "--MAX_ITEM_LIST_LENGTH_TEST", str(length))),
        ("other", ("--MAX_ITEM_LIST_LENGTH", trained)),
    ):
        code, _, err = project.run(*model, *keys, "--run_name", name)
        assert code == 0, err
        row = "item_knn" if "item_knn" in model else "untrained"
        ranks.append(read_ranks(project.root / "saved" / name, row)[1])
    assert np.array_equal(ranks[0], ranks[1])
    assert not np.array_equal(ranks[0], ranks[2])


def test_an_id_model_has_no_longer_positions(project: Project) -> None:
    argv = ("--model", "sasrec", "--MAX_ITEM_LIST_LENGTH_TEST", "9")
    expect_refusal(project, lambda: project.run(*argv), ["raise MAX_ITEM_LIST_LENGTH"])
    assert Config(MAX_ITEM_LIST_LENGTH=8, MAX_ITEM_LIST_LENGTH_TEST=9).longest_list_length == 9


def test_the_table_has_as_many_decimals(project: Project) -> None:
    for decimals, pattern in (("3", r"0\.\d{3}\b"), ("7", r"0\.\d{7}\b")):
        code, out, err = project.run("--model", "pop", "--metric_decimal_place", decimals)
        assert code == 0, err
        (line,) = [line for line in out.splitlines() if line.startswith("NDCG@10")]
        assert re.fullmatch(rf"NDCG@10 +{pattern}", line.strip())

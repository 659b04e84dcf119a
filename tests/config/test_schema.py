"""What `negatives: auto` becomes when a configuration is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsft.config import Config, load_config
from hsft.config.help import dump_config
from tests.conftest import Project
from tests.helpers import ROOT

# negatives, num_negatives, negatives_logq, and where negatives then come from.
DRAWN = ("sampled", 512, True, "sampled")
IN_BATCH = ("in_batch", None, False, "in_batch")
RESOLVED: dict[str, tuple[dict[str, Any], tuple[str, int | None, bool, str]]] = {
    "nothing given": ({}, DRAWN),
    "auto": ({"negatives": "auto"}, DRAWN),
    "no number": ({"num_negatives": None}, DRAWN),
    "not corrected": ({"negatives_logq": False}, ("sampled", 512, False, "sampled")),
    "corrected": ({"negatives_logq": True}, DRAWN),
    "a number": ({"num_negatives": 64}, ("sampled", 64, False, "sampled")),
    "a number, corrected": (
        {"num_negatives": 64, "negatives_logq": True},
        ("sampled", 64, True, "sampled"),
    ),
    "a number beside in_batch": (
        {"negatives": "in_batch", "num_negatives": 64},
        ("sampled", 64, False, "sampled"),
    ),
    "the items along": ({"train_item_llm": "lora", "item_pretrain_dir": "llama"}, DRAWN),
    "unseen items are ranked": ({"split": "global_time", "split_cold": "rank"}, DRAWN),
    "bce": ({"loss": "bce"}, IN_BATCH),
    "bce, auto": ({"loss": "bce", "negatives": "auto"}, IN_BATCH),
    "bce, a number": ({"loss": "bce", "num_negatives": 64}, ("sampled", 64, False, "sampled")),
    "sasrec": ({"model": "sasrec"}, IN_BATCH),
    "hstu": ({"model": "hstu"}, IN_BATCH),
    "llm_id": ({"model": "llm_id"}, IN_BATCH),
    "sasrec, a number": (
        {"model": "sasrec", "num_negatives": 64},
        ("sampled", 64, False, "sampled"),
    ),
    "pop": ({"model": "pop"}, IN_BATCH),
    "item_knn": ({"model": "item_knn"}, IN_BATCH),
    "ensemble": ({"model": "ensemble", "runs": ["a", "b"]}, IN_BATCH),
    "in_batch": ({"negatives": "in_batch"}, IN_BATCH),
    "in_batch, corrected": (
        {"negatives": "in_batch", "negatives_logq": True},
        ("in_batch", None, True, "in_batch"),
    ),
    "sampled": (
        {"negatives": "sampled", "num_negatives": 64},
        ("sampled", 64, False, "sampled"),
    ),
    "per_sequence": ({"negatives": "per_sequence"}, ("per_sequence", None, False, "sampled")),
    "catalogue": ({"negatives": "catalogue"}, ("catalogue", None, False, "catalogue")),
}


def negatives(config: Config) -> tuple[str, int | None, bool, str]:
    drawn = (config.negatives, config.num_negatives, config.negatives_logq)
    return *drawn, config.effective_negatives


@pytest.mark.parametrize("case", RESOLVED)
def test_auto_becomes_what_the_other_keys_say(case: str) -> None:
    given, expected = RESOLVED[case]
    config = Config(**given)
    assert negatives(config) == expected
    assert negatives(load_config([], given)[0]) == expected
    # What is made of a resolved configuration is the same.
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


SHIPPED = {
    "HLLM/plain_llm": ("catalogue", None, False, "catalogue"),
    "HLLM/hllm_original": ("per_sequence", None, False, "sampled"),
    "HLLM/train_item_llm": ("sampled", 512, False, "sampled"),
    "IDNet/sasrec": ("per_sequence", None, False, "sampled"),
    "IDNet/llama_id": ("sampled", 512, False, "sampled"),
    "baselines/sasrec": IN_BATCH,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_keep_their_negatives(name: str) -> None:
    files = [f"{ROOT}/code/{file}.yaml" for file in ("overall/LLM_ddp", "HLLM/HLLM", name)]
    more = {"item_pretrain_dir": "llama"}
    assert negatives(load_config(files, more)[0]) == SHIPPED[name]


def test_later_files_decide_before_auto_is_resolved(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("num_negatives: 64\n")
    later = tmp_path / "later.yaml"
    later.write_text("loss: bce\nnum_negatives: null\n")
    assert negatives(load_config([first])[0]) == ("sampled", 64, False, "sampled")
    assert negatives(load_config([first, later])[0]) == IN_BATCH
    assert negatives(load_config([first, later], {"loss": "nce"})[0]) == DRAWN
    plain = f"{ROOT}/code/HLLM/plain_llm.yaml"
    assert negatives(load_config([plain], {"negatives": "auto"})[0]) == DRAWN


def test_in_batch_beside_the_number_of_another_file_is_said(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("num_negatives: 64\n")
    config, warnings = load_config([first], {"negatives": "in_batch"})
    assert config.effective_negatives == "sampled"
    (warning,) = warnings
    assert warning.startswith("negatives: in_batch (from the command line) has no effect beside")
    config, warnings = load_config([first], {"negatives": "in_batch", "num_negatives": None})
    assert (negatives(config), warnings) == (IN_BATCH, [])
    # As runs stored it where num_negatives alone was given.
    first.write_text("negatives: in_batch\nnum_negatives: 64\n")
    assert load_config([first])[1] == []


def test_the_usual_command_trains_with_drawn_negatives(project: Project) -> None:
    # Fewer items than are drawn: an item comes up several times.
    more = (
        *("--use_qlora", "True", "--epochs", "2", "--run_name", "run"),
        *("--optim_args.learning_rate", "1e-2"),
    )
    code, _, err = project.run(*more, "--checkpoint_every", "3")
    assert code == 0, err
    result = json.loads((project.root / "saved/run/result.json").read_text())
    stored, _ = load_config([project.root / "saved/run/config.yaml"])
    assert negatives(stored) == DRAWN
    assert result["config"]["negatives"] == "sampled"
    first, last = result["training"]["history"][0], result["training"]["history"][-1]
    assert last["loss"] < first["loss"]
    # An unfinished run of before, with in_batch stored, is not continued with other negatives.
    (project.root / "saved/run/result.json").unlink()
    stored_file = project.root / "saved/run/config.yaml"
    text = stored_file.read_text().replace("negatives: sampled", "negatives: in_batch")
    text = text.replace("num_negatives: 512", "num_negatives: null")
    stored_file.write_text(text.replace("negatives_logq: true", "negatives_logq: false"))
    code, _, err = project.run(*more, "--auto_resume", "True")
    assert code == 2
    assert "has negatives 'in_batch', now it is 'sampled'; give --negatives its old value" in err

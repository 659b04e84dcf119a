"""The command line from end to end on a tiny Llama: runs, results, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hsft.report.result import read_ranks
from item_caching import main as cache_main
from tests.conftest import Project
from tests.helpers import ROOT, make_cache, make_llama

TRAIN = ("--use_qlora", "True", "--epochs", "2", "--optim_args.learning_rate", "1e-2")


def result(project: Project, run: str) -> dict:
    return json.loads((project.root / "saved" / run / "result.json").read_text())


def metrics(project: Project, run: str, row: int = -1) -> dict[str, float]:
    return result(project, run)["rows"][row]["metrics"]


def test_baseline_leaves_a_complete_result(project: Project) -> None:
    code, out, err = project.run("--val_only", "True")
    assert code == 0, err
    assert "running on the CPU" in err or torch.cuda.is_available()
    assert "too short to train (which needs 4 items), 0 to validate (3), 0 to test (2)." in err
    actual = result(project, "tiny-baseline")
    assert actual["rows"][0]["users"] == 30
    assert set(actual["rows"][0]["metrics"]) == {
        f"{name}@{k}" for name in ("Recall", "NDCG") for k in (5, 10, 20)
    }
    assert actual["config"]["MAX_ITEM_LIST_LENGTH"] == 8
    assert actual["seed"] == 2020
    assert actual["environment"]["versions"]["torch"] == torch.__version__
    assert actual["peak_memory"]["host_bytes"] > 0
    assert f"{actual['rows'][0]['metrics']['NDCG@10']:.6f}" in out
    users, ranks = read_ranks(project.root / "saved" / "tiny-baseline", "untrained")
    assert len(users) == 30
    assert np.mean(ranks <= 10) == pytest.approx(actual["rows"][0]["metrics"]["Recall@10"])


def test_fine_tuning_learns_and_reports_the_gain(project: Project) -> None:
    # Users walk along the items, so that the next item follows from the last one.
    code, out, err = project.run(*TRAIN, "--epochs", "12", "--item_adapter", "linear")
    assert code == 0, err
    before, after = metrics(project, "tiny-qlora", 0), metrics(project, "tiny-qlora", 1)
    assert after["NDCG@5"] > before["NDCG@5"] + 0.2
    assert "untrained" in out
    assert "gain" in out
    folder = project.root / "saved" / "tiny-qlora"
    assert (folder / "best" / "adapter" / "adapter_model.safetensors").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    assert len(result(project, "tiny-qlora")["training"]["history"]) <= 12
    assert "python code/report.py saved/tiny-qlora\n" in out
    assert out.endswith("python code/recommend.py --run saved/tiny-qlora --serve 8000\n")


def test_plain_items_are_warned_of_and_the_shipped_settings_mend_it(project: Project) -> None:
    path = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    make_cache(path, pooling="mean")
    code, _, err = project.run(*TRAIN, "--epochs", "1")
    assert code == 0, err
    assert "the item cache is mean-pooled" in err
    files = [f"{ROOT}/code/{name}" for name in ("overall/LLM_ddp.yaml", "HLLM/HLLM.yaml")]
    files.append(f"{ROOT}/code/HLLM/plain_llm.yaml")
    code, _, err = project.run("--config_file", *files, "--use_qlora", "True", "--epochs", "1")
    assert code == 0, err
    assert "the item cache is mean-pooled" not in err
    assert result(project, "tiny-qlora-2")["config"]["item_adapter"] == "linear"


def test_the_untrained_row_is_the_baseline_run(project: Project) -> None:
    project.run("--val_only", "True")
    project.run(*TRAIN, "--epochs", "1")
    assert metrics(project, "tiny-qlora", 0) == metrics(project, "tiny-baseline")


def test_the_same_seed_gives_the_same_numbers(project: Project) -> None:
    for _ in range(2):
        assert project.run(*TRAIN, "--num_negatives", "64", "--num_workers", "0")[0] == 0
    assert project.run(*TRAIN, "--num_negatives", "64", "--num_workers", "2")[0] == 0
    states = [
        load_file(project.root / "saved" / run / "best" / "adapter" / "adapter_model.safetensors")
        for run in ("tiny-qlora", "tiny-qlora-2", "tiny-qlora-3")
    ]
    assert states[0]
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert metrics(project, "tiny-qlora") == metrics(project, "tiny-qlora-2")


@pytest.mark.parametrize(
    "more",
    [
        ("--loss", "bce"),
        ("--loss", "bce", "--num_negatives", "16", "--train_positions", "random_split"),
        ("--negatives", "catalogue", "--item_embedding_transform", "whiten"),
        ("--qlora_quant_type", "none", "--gradient_checkpointing", "True"),
        ("--use_qlora", "False", "--group_by_length", "True"),
        ("--precision", "bf16-mixed", "--gradient_accumulation_steps", "3"),
        ("--user_llm_layers", "1", "--attn_implementation", "eager"),
        ("--eval_protocol", "sampled", "--eval_neg_sample_num", "7"),
    ],
    ids=" ".join,
)
def test_each_way_of_training_runs(project: Project, more: tuple[str, ...]) -> None:
    code, _, err = project.run(*TRAIN, "--run_name", "run", *more)
    assert code == 0, err
    actual = result(project, "run")
    assert [row["name"] for row in actual["rows"]] == ["untrained", "fine-tuned"]
    assert all(np.isfinite(record["loss"]) for record in actual["training"]["history"])


@pytest.mark.parametrize("model", ["pop", "random", "item_knn"])
def test_reference_models_run(project: Project, model: str) -> None:
    code, _, err = project.run("--model", model)
    assert code == 0, err
    assert result(project, f"tiny-{model}")["rows"][0]["name"] == model


def test_sasrec_learns_the_walk(project: Project) -> None:
    config = ["--config_file", f"{ROOT}/code/baselines/sasrec.yaml"]
    more = (
        *config,
        "--epochs",
        "60",
        "--train_batch_size",
        "8",
        "--optim_args.learning_rate",
        "1e-2",
    )
    code, _, err = project.run(*more)
    assert code == 0, err
    project.run("--model", "pop")
    assert metrics(project, "tiny-sasrec")["NDCG@5"] > metrics(project, "tiny-pop")["NDCG@5"] + 0.3


def test_items_are_encoded_to_the_default_path_and_in_memory_alike(project: Project) -> None:
    (project.root / "dataset" / "tiny_item_embeddings.safetensors").unlink()
    where = ("--item_pretrain_dir", str(project.llama))
    code, _, err = project.call(cache_main, [*project.arguments, *where])
    assert code == 0, err
    assert (project.root / "dataset" / "tiny_item_embeddings.safetensors").is_file()
    assert not list((project.root / "dataset").glob("*.parts"))
    assert project.run("--val_only", "True", "--run_name", "cached")[0] == 0
    code, _, err = project.run(
        *("--val_only", "True", "--run_name", "fresh", "--use_item_cache", "False", *where),
        *("--item_cache_path", "none.pt"),
    )
    assert code == 0, err
    assert metrics(project, "cached") == metrics(project, "fresh")


def test_missing_items_can_be_dropped(project: Project) -> None:
    make_cache(project.root / "dataset" / "part.safetensors", items=15)
    more = ("--val_only", "True", "--item_cache_path", "dataset/part.safetensors")
    code, _, err = project.run(*more)
    assert code == 2
    assert "5 of 20 items" in err
    assert "i15" in err
    code, _, err = project.run(*more, "--missing_items", "drop")
    assert code == 0, err
    assert result(project, "tiny-baseline")["data"]["dropped_interactions"] > 0


def test_print_config_merges_files_and_flags(project: Project) -> None:
    code, out, _ = project.run("--optim_args.learning_rate", "3e-4", "--print_config", "True")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["optim_args"] == {
        "learning_rate": 3e-4,
        "weight_decay": 0.01,
        "weight_decay_on": "matrices",
        **dict.fromkeys(("modal_lr", "modal_decay", "rec_lr", "rec_decay")),
    }
    assert shown["dataset"] == "tiny"


def test_help_lists_every_key(project: Project) -> None:
    _, out, _ = project.run("--help")
    assert "--optim_args.learning_rate" in out
    assert "--MAX_ITEM_LIST_LENGTH" in out


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


HEADER = "item_id,user_id,timestamp\n"
CSV = "dataset/tiny.csv"
CACHE = "dataset/tiny_item_embeddings.safetensors"


def foreign_cache(root: Path) -> None:
    content = load_file(root / CACHE)
    ids = json.dumps([f"other{n}" for n in range(20)]).encode()
    content["item_ids"] = torch.frombuffer(bytearray(ids), dtype=torch.uint8)
    save_file(content, root / CACHE)


BAD = {
    "missing file": (lambda root: (root / CSV).unlink(), (), ["unknown dataset 'tiny'"]),
    "unknown dataset": (None, ("--dataset", "Nowhere"), ["unknown dataset 'Nowhere'", "tiny"]),
    "wrong columns": (
        write(CSV, "item,user,time\n1,1,1\n"),
        (),
        ["lacks the columns item_id", CSV],
    ),
    "empty csv": (write(CSV, ""), (), ["is empty", CSV]),
    "header only": (write(CSV, HEADER), (), ["no interactions", CSV]),
    "timestamp": (write(CSV, f"{HEADER}i1,u1,1\ni2,u1,noon\n"), (), ["row 3", "noon", CSV]),
    "unknown key": (None, ("--qlora_rr", "8"), ["unknown key 'qlora_rr'", "'qlora_r'"]),
    "wrong type": (None, ("--epochs", "many"), ["epochs", "many"]),
    "out of range": (None, ("--qlora_dropout", "1.5"), ["qlora_dropout"]),
    "cache missing": (
        lambda root: (root / CACHE).unlink(),
        (),
        ["does not exist", "item_caching.py"],
    ),
    "cache foreign": (foreign_cache, (), ["20 of 20 items", "i1"]),
    "cache garbage": (write(CACHE, "not a cache"), (), [CACHE, "no cache at all"]),
    "cache dimension": (
        lambda root: make_cache(root / CACHE, dim=48),
        (),
        ["48 dimensions", "hidden size 64"],
    ),
    "model folder": (None, ("--user_pretrain_dir", "nowhere"), ["nowhere does not exist"]),
    "layers": (None, ("--user_llm_layers", "9"), ["has only 2 layers"]),
    "lora target": (None, ("--qlora_target_modules", "[qq]"), ["qq", "q_proj"]),
    "one-item users": (write(CSV, f"{HEADER}i1,u1,1\ni2,u2,1\n"), (), ["no user has a history"]),
    "cut-off": (None, ("--valid_metric", "NDCG@7"), ["valid_metric is NDCG@7"]),
    "run exists": (
        lambda root: (root / "saved/x").mkdir(parents=True),
        ("--run_name", "x"),
        ["exists"],
    ),
    "yaml": (write("bad.yaml", "epochs: [1\n"), ("--config_file", "bad.yaml"), ["bad.yaml, line"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(project: Project, case: str) -> None:
    spoil, flags, words = BAD[case]
    if spoil is not None:
        spoil(project.root)
    before = {path for path in project.root.rglob("*") if path != project.root}
    code, out, err = project.run(*TRAIN, *flags)
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in err
    assert {path for path in project.root.rglob("*") if path.name != "saved"} <= before


def test_exit_code_and_message_reach_the_shell(project: Project) -> None:
    command = [sys.executable, str(ROOT / "code" / "main.py"), "--dataset", "Nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=project.root)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line[:30] for line in lines if line.startswith("error: ")] == [
        "error: unknown dataset 'Nowhere'"[:30],
        "error: no UserLLM is named; give"[:30],
    ]


def test_a_missing_shard_is_named(project: Project, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "broken")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = project.run("--val_only", "True", "--user_pretrain_dir", str(folder))
    assert code == 2
    assert "lacks the shard model-00002-of-00002.safetensors" in err

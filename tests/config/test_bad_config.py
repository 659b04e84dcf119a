"""Configuration files and command lines as they should not be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from compare import main as compare_main
from hsft.config import load_config
from item_caching import main as cache_main
from main import main
from tests.bad_input import CANARY, expect_refusal
from tests.conftest import Project

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# name -> (file, words of the line)
BAD_YAML: dict[str, tuple[str | bytes, list[str]]] = {
    "list": ("- epochs\n", ["must hold 'key: value' lines", "list"]),
    "text": ("epochs\n", ["must hold 'key: value' lines", "text"]),
    "number": ("3\n", ["must hold 'key: value' lines"]),
    "two documents": ("epochs: 1\n---\nepochs: 2\n", ["line 2"]),
    "unclosed": ("topk: [1\n", ["line 2", "correct the YAML"]),
    "tab": ("optim_args:\n\tlearning_rate: 1\n", ["line 2", "'\\t'"]),
    "indentation": ("epochs: 1\n  seed: 2\n", ["line 2"]),
    "latin-1": ("dataset: é\n".encode("latin-1"), ["not UTF-8"]),
    "utf-16 without mark": ("epochs: 1\n".encode("utf-16-le"), ["bad.yaml"]),
    "binary": (bytes(range(256)), ["bad.yaml", "UTF-8"]),
    "NUL": (b"epochs: 1\0\n", ["bad.yaml"]),
    "NUL in a path": ('checkpoint_dir: "a\\0b"\n', ["checkpoint_dir", "NUL"]),
    "half a character": ('dataset: "\\ud800"\n', ["dataset"]),
    "key twice": ("epochs: 1\nepochs: 2\n", ["line 2", "'epochs' is given twice"]),
    "nested key twice": (
        "optim_args: {learning_rate: 1, learning_rate: 2}\n",
        ["'learning_rate' is given twice"],
    ),
    "anchor and alias": ("epochs: &a 1\nseed: *a\n", ["line 2", "anchors and aliases"]),
    "endless alias": ("a: &a [*a]\n", ["anchors and aliases"]),
    "merge key": ("a: &a {epochs: 1}\n<<: *a\n", ["anchors and aliases"]),
    "billion laughs": (LAUGHS, ["anchors and aliases"]),
    "deep list": (f"topk: {'[' * 10_000}{']' * 10_000}\n", ["nested deeper than 20"]),
    "deep mapping": ("{a: " * 10_000 + "1" + "}" * 10_000 + "\n", ["nested deeper than 20"]),
    "python object": (f"a: !!python/object/apply:os.mknod ['{CANARY}']\n", ["line 1", "tag"]),
    "python name": ("a: !!python/name:os.system\n", ["tag"]),
    "python module": ("a: !!python/module:os\n", ["tag"]),
    "own tag": ("epochs: !epochs 1\n", ["tag !epochs"]),
    "standard tag": ("epochs: !!int 1\n", ["tag"]),
    "bad timestamp tag": ("dataset: !!timestamp x\n", ["tag"]),
    "bad boolean tag": ("val_only: !!bool x\n", ["tag"]),
    "list as key": ("? [a, b]\n: 1\n", ["a key must be plain text"]),
    "mapping as key": ("? {a: b}\n: 1\n", ["a key must be plain text"]),
    "number as key": ("1: epochs\n", ["key 1 must be text"]),
    "nothing as key": ("null: epochs\n", ["key None must be text"]),
    "huge file": ("#" * (300 << 10), ["larger than 256 KiB"]),
    "long number": (f"epochs: {'9' * 5000}\n", ["too long"]),
    "unknown key": ("epoch: 1\n", ["unknown key 'epoch'", "'epochs'"]),
    "unknown nested key": ("optim_args: {lr: 1}\n", ["unknown key 'optim_args.lr'"]),
    "unknown section": ("optimizer_args: {learning_rate: 1}\n", ["optimizer_args"]),
    "mapping for a number": ("epochs: {a: 1}\n", ["'epochs", "bad.yaml"]),
    "number for a mapping": ("optim_args: 3\n", ["'optim_args'"]),
    "list for a text": ("dataset: [a]\n", ["'dataset'"]),
    "text for a list": ("topk: ten\n", ["'topk'"]),
    "text in a list": ("topk: [ten]\n", ["topk", "'ten'"]),
    "empty list": ("topk: []\n", ["'topk'"]),
    "repeated entry": ("topk: [5, 5, 10]\n", ["topk", "repeated entry"]),
    "text for a number": ("epochs: ten\n", ["'epochs'", "'ten'"]),
    "fraction": ("epochs: 1.5\n", ["'epochs'", "1.5"]),
    "yes": ("val_only: yes\n", ["'val_only'", "'yes'"]),
    "one for true": ("val_only: 1\n", ["'val_only'"]),
    "true for a number": ("epochs: true\n", ["'epochs'", "True"]),
    "true for a rate": (
        "optim_args: {learning_rate: true}\n",
        ["learning_rate", "must be a number"],
    ),
    "octal": ("epochs: 0o10\n", ["'epochs'"]),
    "leading zero": ("epochs: 010\n", ["'epochs'", "'010'"]),
    "nothing for a number": ("epochs: null\n", ["'epochs'"]),
    "nan": ("clip_grad_norm: .nan\n", ["clip_grad_norm", "nan"]),
    "infinity": ("optim_args: {learning_rate: .inf}\n", ["learning_rate"]),
    "huge number": ("epochs: 99999999999999999999\n", ["'epochs'"]),
    "huge rank": ("item_adapter_rank: 1000000000000\n", ["'item_adapter_rank'"]),
    "huge layer": ("sasrec: {hidden_size: 1000000000000}\n", ["sasrec.hidden_size"]),
    "zero": ("train_batch_size: 0\n", ["'train_batch_size'", "0"]),
    "negative": ("MAX_ITEM_LIST_LENGTH: -1\n", ["'MAX_ITEM_LIST_LENGTH'"]),
    "negative seed": ("seed: -1\n", ["'seed'"]),
    "rate of zero": ("optim_args: {learning_rate: 0}\n", ["learning_rate"]),
    "warm-up of two": ("scheduler_args: {warmup: 2}\n", ["warmup"]),
    "dropout of one": ("qlora_dropout: 1\n", ["'qlora_dropout'"]),
    "threshold": ("nce_thres: 2\n", ["'nce_thres'"]),
    "no such choice": ("loss: hinge\n", ["'loss'", "'bce'", "'hinge'"]),
    "no such metric": ("metrics: [AUC]\n", ["metrics", "'AUC'"]),
    "folder in the dataset": ("dataset: ../../etc/passwd\n", ["dataset", "plain name"]),
    "heads": ("sasrec: {heads: 7}\n", ["must divide"]),
    "heads of HSTU": ("hstu: {heads: 7}\n", ["hstu.heads (7)", "must divide"]),
    "bce of ids": ("model: sasrec\nloss: bce\n", ["trained with loss: nce"]),
    "QLoRA of ids": ("model: sasrec\nuse_qlora: True\n", ["model: sasrec has none"]),
    "QLoRA of random weights": (
        "model: llm_id\nuse_qlora: True\n",
        ["use_qlora", "user_llm_init: True"],
    ),
    "metric not reported": ("valid_metric: NDCG@7\n", ["valid_metric is NDCG@7"]),
    "metric of nothing": ("valid_metric: '@'\n", ["valid_metric", "NAME@K"]),
    "softmax of bce": ("negatives: catalogue\nloss: bce\n", ["needs loss: nce"]),
    "negatives of a softmax": (
        "negatives: catalogue\nnum_negatives: 5\n",
        ["num_negatives has no meaning"],
    ),
    "negatives per sequence": (
        "negatives: per_sequence\nnum_negatives: 5\n",
        ["num_negatives has no meaning with negatives: per_sequence"],
    ),
    "how many": ("negatives: sampled\n", ["needs num_negatives"]),
    "dot product of nce": ("similarity: dot\n", ["needs loss: bce"]),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_is_one_line(project: Project, case: str) -> None:
    content, words = BAD_YAML[case]
    path = project.root / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    expect_refusal(project, lambda: project.call(main, ["--config_file", "bad.yaml"]), words)


GOOD_YAML: dict[str, tuple[str | bytes, dict[str, object]]] = {
    "empty": ("", {"epochs": 10}),
    "comment only": ("# nothing\n", {"epochs": 10}),
    "bom": (b"\xef\xbb\xbfepochs: 3\n", {"epochs": 3}),
    "crlf": ("epochs: 3\r\nseed: 4\r\n", {"epochs": 3, "seed": 4}),
    "scientific": ("optim_args: {learning_rate: 1e-4}\n", {"optim_args.learning_rate": 1e-4}),
    "whole number for a rate": ("clip_grad_norm: 2\n", {"clip_grad_norm": 2.0}),
    "number as a name": ("dataset: 2024\n", {"dataset": "2024"}),
    "quoted name": ("dataset: '010'\n", {"dataset": "010"}),
    "explicit nothing": ("temperature: null\n", {"temperature": None}),
    "no as a word": ("dataset: no\n", {"dataset": "no"}),
    "date as a word": ("dataset: 2024-01-01\n", {"dataset": "2024-01-01"}),
    "HLLM's own keys": ("state: INFO\nuse_text: true\n", {"epochs": 10}),
}


def shown(project: Project, argv: list[str]) -> dict[str, object]:
    code, out, err = project.call(main, [*argv, "--print_config", "True"])
    assert code == 0, err
    values = yaml.safe_load(out)
    nested = {
        f"{section}.{key}": value
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    return values | nested


@pytest.mark.parametrize("case", GOOD_YAML)
def test_good_yaml_means_what_it_says(project: Project, case: str) -> None:
    content, expected = GOOD_YAML[case]
    path = project.root / "good.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    values = shown(project, ["--config_file", "good.yaml"])
    assert {key: values[key] for key in expected} == expected


BAD_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no dataset": ([], ["no dataset is named"]),
    "value before a key": (["tiny"], ["'tiny' stands before any --key"]),
    "one dash": (["-epochs", "3"], ["-epochs"]),
    "key twice": (["--epochs", "1", "--epochs", "2"], ["--epochs is given twice"]),
    "unknown": (["--epohcs", "1"], ["unknown key 'epohcs'", "'epochs'"]),
    "unknown nested": (["--optim_args.lr", "1"], ["optim_args.lr"]),
    "nested under a number": (["--epochs.x", "1"], ["epochs"]),
    "no name": (["--=3"], ["unknown key"]),
    "dots": (["--..", "3"], ["unknown key"]),
    "ten thousand dots": ([f"--{'a.' * 10_000}b", "1"], ["unknown key"]),
    "no value": (["--epochs"], ["epochs", "True"]),
    "two values": (["--epochs", "1", "2"], ["epochs", "[1, 2]"]),
    "unclosed list": (["--topk", "[1"], ["--topk", "quotes", "--topk '[a, b]'"]),
    "list that is split": (["--text_keys", "[name,", "genres]"], ["'[name,'", "quotes"]),
    "list without brackets": (["--text_keys", "a,b"], ["must be a list, written as '[a, b]'"]),
    "dash in a flag": (["--config-file", "a.yaml"], ["did you mean 'config_file'?"]),
    "dash in a key": (["--use-qlora", "True"], ["did you mean 'use_qlora'?"]),
    "alias": (["--topk", "[&a 1, *a]"], ["--topk", "anchors and aliases"]),
    "tag": (["--topk", "[!!python/name:os.system 1]"], ["--topk", "tag"]),
    "not UTF-8": (["--dataset", "\udcff"], ["dataset", "UTF-8"]),
    "control code": (["--dataset", "\x1b[2J"], ["\\x1b[2J"]),
    "long name": (["--dataset", "x" * 5000, "--run_name", "r"], ["unknown dataset 'xxx"]),
    "very long name": (["--dataset", "x" * 50_000], ["dataset"]),
    "config file without a name": (["--config_file"], ["--config_file needs"]),
    "config file missing": (["--config_file", "none.yaml"], ["none.yaml does not exist"]),
    "config file a folder": (["--config_file", "dataset"], ["dataset is a folder"]),
    "config file a pipe": (["--config_file", "pipe"], ["pipe is a pipe or device"]),
    "config file a device": (["--config_file", "/dev/zero"], ["a pipe or device"]),
    "config file of a long name": (["--config_file", "x" * 5000], ["cannot be read"]),
    "print what": (["--print_config", "3"], ["--print_config must be True or False"]),
    "check what": (["--check", "3"], ["check"]),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command_line_is_one_line(project: Project, case: str) -> None:
    argv, words = BAD_COMMANDS[case]
    os.mkfifo(project.root / "pipe")

    def run() -> tuple[int, str, str]:
        from hsft.utils.program import run_program

        project.capsys.readouterr()
        more = [] if case == "no dataset" else ["--data_path", "dataset"]
        code = run_program(main, [*argv, *more, "--model", "pop"])
        out, err = project.capsys.readouterr()
        return code, out, err

    expect_refusal(project, run, words)


def test_a_name_on_the_command_line_is_no_number(project: Project) -> None:
    for name in ("010", "1e5", "True", "1.0"):
        assert shown(project, ["--dataset", name])["dataset"] == name


def test_several_bad_keys_are_a_line_each(project: Project) -> None:
    code, out, err = project.run("--epochs", "0", "--qlora_rr", "1", "--loss", "hinge")
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


RUN_DIRS: dict[str, tuple[list[str], list[str]]] = {
    "name with a folder": (["--run_name", "a/b"], ["run_name 'a/b'"]),
    "name above": (["--run_name", ".."], ["run_name '..'"]),
    "long name": (["--run_name", "x" * 300], ["cannot be"]),
    "checkpoint_dir a file": (
        ["--checkpoint_dir", "file"],
        ["file is no folder", "checkpoint_dir"],
    ),
    "checkpoint_dir below a file": (["--checkpoint_dir", "file/saved"], ["is no folder"]),
    "another's folder": (
        ["--checkpoint_dir", ".", "--run_name", "dataset", "--overwrite", "True"],
        ["dataset is no run of this program"],
    ),
    "device": (["--device", "cuda"], ["CUDA"]),
    "device xpu": (["--device", "xpu"], ["torch finds no XPU device", "Intel"]),
    "device mps": (["--device", "mps"], ["torch finds no MPS device", "Apple silicon"]),
    "device of no kind": (["--device", "tpu"], ["device", "tpu"]),
    "8-bit optimizer": (
        ["--model", "HLLM", "--optimizer", "paged_adamw8bit"],
        ["paged_adamw8bit needs a CUDA device"],
    ),
    "precision": (["--precision", "16-mixed"], ["16-mixed needs CUDA"]),
    "candidates": (
        ["--eval_protocol", "sampled", "--eval_neg_sample_num", "19"],
        ["eval_neg_sample_num is 19", "lower it"],
    ),
}


@pytest.mark.parametrize("case", RUN_DIRS)
def test_settings_that_cannot_work_are_one_line(project: Project, case: str) -> None:
    import torch

    there = {
        "device": torch.cuda.is_available(),
        "precision": torch.cuda.is_available(),
        "8-bit optimizer": torch.cuda.is_available(),
        "device xpu": torch.xpu.is_available(),
        "device mps": torch.backends.mps.is_available(),
    }
    if there.get(case):
        pytest.skip("there is such a device here")
    argv, words = RUN_DIRS[case]
    (project.root / "file").write_text("")
    expect_refusal(project, lambda: project.run("--model", "pop", *argv), words)


def test_cache_target_that_cannot_be_written(project: Project) -> None:
    (project.root / "file").write_text("")
    more = ["--item_pretrain_dir", str(project.llama), "--item_cache_path", "file/c.safetensors"]
    expect_refusal(
        project,
        lambda: project.call(cache_main, [*project.arguments, *more]),
        ["file is no folder", "--item_cache_path"],
    )


COMPARISONS: dict[str, tuple[str | bytes | None, str | None, list[str]]] = {
    # name -> (result.json: text instead, or None to keep it), (ranks: likewise), words
    "no folder": (None, None, ["nowhere does not exist; name"]),
    "empty": ("", None, ["not a readable JSON file"]),
    "damaged": ("{", None, ["not a readable JSON file"]),
    "deep": ("[" * 100_000, None, ["not a readable JSON file"]),
    "not UTF-8": (b"\xff", None, ["not a readable JSON file"]),
    "list": ("[]", None, ["no mapping"]),
    "nothing in it": ("{}", None, ["its dataset is no text"]),
    "no rows": ('{"rows": []', None, ["no rows"]),
    "row without a name": ('{"rows": [{}]', None, ["row has no name"]),
    "row is a number": ('{"rows": [1]', None, ["row has no name"]),
    "unknown row": ('{"rows": [{"name": "x\\ny"}]', None, ["lacks the row 'x\\ny'"]),
    "no config": ('{"config": 1', None, ["no config"]),
    "no metrics": ('{"config": {"topk": [5]}', None, ["no metrics"]),
    "odd metrics": ('{"config": {"topk": [5], "metrics": [{}]}', None, ["no metrics"]),
    "odd cut-off": ('{"config": {"topk": [0], "metrics": ["NDCG"]}', None, ["no topk"]),
    "ranks missing": (None, "missing", ["ranks.safetensors does not exist"]),
    "ranks damaged": (None, "damaged", ["cannot be read or lacks the row 'pop'"]),
    "ranks a pipe": (None, "pipe", ["a pipe or device"]),
    "ranks of zero": (None, "zero", ["not a list of users and their ranks"]),
    "ranks as fractions": (None, "float", ["not a list of users and their ranks"]),
    "fewer users than ranks": (None, "short", ["not a list of users and their ranks"]),
    "nobody": (None, "nobody", ["not a list of users and their ranks"]),
    "other users": (None, "others", ["scored other users"]),
}


@pytest.fixture
def two_runs(project: Project) -> Project:
    for name in ("one", "two"):
        assert project.run("--model", "pop", "--run_name", name)[0] == 0
    return project


@pytest.mark.parametrize("case", COMPARISONS)
def test_bad_run_folders_are_one_line(two_runs: Project, case: str) -> None:
    result, ranks, words = COMPARISONS[case]
    folder = two_runs.root / "saved" / "two"
    if result is not None:
        _spoil_result(folder / "result.json", result)
    if ranks is not None:
        _spoil_ranks(folder / "ranks.safetensors", ranks)
    second = "nowhere" if case == "no folder" else "saved/two"
    expect_refusal(two_runs, lambda: two_runs.call(compare_main, ["saved/one", second]), words)


def _spoil_result(path: Path, content: str | bytes) -> None:
    import json

    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.startswith('{"'):
        # An unclosed mapping stands for keys to replace in the file.
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(content + "}")))
    else:
        path.write_text(content)


def _spoil_ranks(path: Path, how: str) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    arrays = load_file(path)
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "damaged":
        path.write_bytes(b"\xff" * 100)
    elif how != "missing":
        users, ranks = arrays["pop.users"], arrays["pop.ranks"]
        changed = {
            "zero": (users, ranks * 0),
            "float": (users, ranks.astype(np.float32)),
            "short": (users[:-1], ranks),
            "nobody": (users[:0], ranks[:0]),
            "others": (users + 1, ranks),
        }
        save_file(dict(zip(("pop.users", "pop.ranks"), changed[how], strict=True)), path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [([], ["required: runs"]), (["saved/one", "--what"], ["--what"])],
    ids=["no runs", "unknown flag"],
)
def test_bad_command_line_of_compare(project: Project, argv: list[str], words: list[str]) -> None:
    from hsft.utils.program import run_program

    def run() -> tuple[int, str, str]:
        project.capsys.readouterr()
        code = run_program(compare_main, argv)
        out, err = project.capsys.readouterr()
        return code, out, err

    expect_refusal(project, run, words)


def test_a_run_named_like_a_formula_is_drawn(two_runs: Project) -> None:
    (two_runs.root / "saved" / "one").rename(two_runs.root / "saved" / "$\\frac{|$")
    code, out, err = two_runs.call(compare_main, ["saved/$\\frac{|$", "saved/two"])
    assert code == 0, err
    assert "| $\\frac{\\|$ |" in out
    assert (two_runs.root / "saved" / "two" / "comparison.png").is_file()


def test_a_key_that_earlier_runs_wrote_has_its_present_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: llm_id\nuser_pretrain_dir: x\nllm_id: {item_width: 8, pretrained: true}\n"
    )
    config, warnings = load_config([path])
    assert config.user_llm_init is True
    assert config.llm_id.item_width == 8
    assert not warnings


def test_that_key_of_another_model_says_nothing_of_its_llm(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: HLLM\nuse_qlora: true\nllm_id: {item_width: 8, pretrained: false}\n")
    config, _ = load_config([path])
    assert config.user_llm_init is None

"""A model folder's fingerprint: the same for the same content, another for any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hsft.model.folder import fingerprint
from hsft.utils.errors import InputError
from tests.conftest import Project
from tests.helpers import make_llama


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are larger than what is read whole."""
    return make_llama(tmp_path_factory.mktemp("wide"), hidden=256)


def change_weight(name: str, at: tuple[int, ...] = ()) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights[name].clone()
        weights[name][at] += 1.0
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def set_key(name: str, value: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, name: value}))

    return apply


def to_half(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})


def add_extra(folder: Path) -> None:
    save_file({"logit_scale": torch.tensor(2.5)}, folder / "hllm_extra.safetensors")


LAYER = "model.layers.1."
OTHERS: dict[str, Callable[[Path], None]] = {
    "a trained matrix": change_weight(f"{LAYER}self_attn.q_proj.weight"),
    "one number of a norm": change_weight(f"{LAYER}input_layernorm.weight", (100,)),
    "a key of config.json": set_key("rope_theta", 20_000.0),
    "half precision": to_half,
    "an item adapter or scale beside it": add_extra,
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_content_has_another_fingerprint(wide: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "copy"))
    OTHERS[case](folder)
    assert fingerprint(folder) != fingerprint(wide)


def shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def add_files(folder: Path) -> None:
    (folder / "README.md").write_text("notes")
    (folder / "export.json").write_text("{}")
    (folder / "left-over.safetensors").write_bytes(b"")


SAME: dict[str, Callable[[Path], None]] = {
    "the copy itself": lambda folder: None,
    "other shards": shard,
    "another version of transformers": set_key("transformers_version", "4.0.0"),
    "another name": set_key("_name_or_path", "elsewhere"),
    "files beside the model": add_files,
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_content_has_the_same_fingerprint(wide: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "copy"))
    SAME[case](folder)
    assert fingerprint(folder) == fingerprint(wide)


def test_bin_files_count(wide: Path, tmp_path: Path) -> None:
    folders = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(wide / "config.json", folder)
        torch.save({"weight": torch.full((1 << 16,), number)}, folder / "pytorch_model.bin")
        folders.append(folder)
    assert fingerprint(folders[0]) != fingerprint(folders[1])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_damaged_weights_are_refused(wide: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        fingerprint(folder)


def test_a_result_records_its_user_llm(project: Project) -> None:
    for model, expected in (("HLLM", fingerprint(project.llama)), ("pop", None)):
        code, _, err = project.run("--model", model, "--val_only", "True", "--run_name", model)
        assert code == 0, err
        result = json.loads((project.root / "saved" / model / "result.json").read_text())
        assert result["user_llm_fingerprint"] == expected

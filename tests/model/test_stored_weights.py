"""Model folders whose weights are not their model's: left over, lacking, misshapen, quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen2Config

from export import main as export_main
from hsft.model.backbone import check_weights, load_decoder
from hsft.utils.errors import InputError
from item_caching import main as cache_main
from recommend import main as recommend_main
from tests.bad_input import expect_refusal
from tests.conftest import Project
from tests.helpers import WORDS, make_llama, make_model

WEIGHTS = "model.safetensors"


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(*names: str, shape: tuple[int, ...] = (64,)) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        more = {name: torch.ones(shape) for name in names}
        save_file({**weights, **more}, folder / WEIGHTS, {"format": "pt"})

    return apply


def drop(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        del weights[name]
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return apply


LAYER = "model.layers.1"
UNFIT: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "biases": (
        add(*(f"{LAYER}.self_attn.{name}_proj.bias" for name in "qkv")),
        [f"{LAYER}.self_attn.k_proj.bias", "3 such in all", "type llama does not use"],
    ),
    "a vision tower": (add("vision_tower.patch.weight"), ["vision_tower.patch.weight", "llama"]),
    "fewer layers than weights": (
        lambda folder: set_config(folder, num_hidden_layers=1),
        [f"{LAYER}.input_layernorm.weight", "does not use"],
    ),
    "a weight missing": (drop(f"{LAYER}.mlp.up_proj.weight"), ["lacks the weight", "1 in all"]),
    "feed-forward of others": (
        lambda folder: set_config(folder, intermediate_size=256),
        ["does not have the shape"],
    ),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("check", [(), ("--check", "True")], ids=["run", "check"])
def test_unfit_user_llms_are_refused(project: Project, case: str, check: tuple[str, ...]) -> None:
    spoil, words = UNFIT[case]
    spoil(Path(shutil.copytree(project.llama, "model")))
    where = ("--user_pretrain_dir", "model", "--val_only", "True")
    expect_refusal(project, lambda: project.run(*where, *check), words)


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("check", [(), ("--check", "True")], ids=["run", "check"])
def test_unfit_item_llms_are_refused(project: Project, case: str, check: tuple[str, ...]) -> None:
    spoil, words = UNFIT[case]
    spoil(Path(shutil.copytree(project.llama, "model")))
    more = [*project.arguments, "--item_pretrain_dir", "model", "--item_cache_path", "new"]
    expect_refusal(project, lambda: project.call(cache_main, [*more, *check]), words)


def as_llama(folder: Path) -> None:
    set_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def test_a_qwen2_under_the_name_of_llama_is_refused(project: Project) -> None:
    config = Qwen2Config(
        vocab_size=len(WORDS) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = make_model(project.root / "model", config)
    where = ("--user_pretrain_dir", "model", "--val_only", "True")
    assert project.run(*where)[0] == 0
    as_llama(folder)
    words = ["self_attn.k_proj.bias", "6 such in all", "type llama does not use"]
    expect_refusal(project, lambda: project.run(*where, "--run_name", "other"), words)


LEFT_OUT: dict[str, Callable[[Path], None]] = {
    "an output head": lambda folder: None,
    "a classifier": add("score.weight"),
    "rotary frequencies": add(f"{LAYER}.self_attn.rotary_emb.inv_freq", shape=(8,)),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_weights_left_out_on_purpose_are_allowed(llama: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    assert "lm_head.weight" in load_file(folder / WEIGHTS)
    LEFT_OUT[case](folder)
    for layers in (None, 1):
        check_weights(folder, layers=layers)
        model = load_decoder(folder, dtype=torch.float32, attention="eager", layers=layers)
        assert len(model.layers) == (layers or 2)


def test_gpt2_s_causal_masks_are_allowed(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(WORDS) + 1, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    folder = make_model(tmp_path / "model", config)
    names = [f"transformer.h.{layer}.attn" for layer in (0, 1)]
    add(*(f"{name}.bias" for name in names), shape=(1, 1, 64, 64))(folder)
    add(*(f"{name}.masked_bias" for name in names), shape=())(folder)
    check_weights(folder)
    load_decoder(folder, dtype=torch.float32, attention="eager")


def test_headers_are_compared_without_reading_the_weights(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    content = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    # NaN everywhere, which a loaded model would show.
    (folder / WEIGHTS).write_bytes(content[:start] + b"\xff" * (len(content) - start))
    check_weights(folder, keep_token_embedding=True)


# --- quantised folders

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
CONFIGURED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "mxfp4": {"quant_method": "mxfp4"},
    "unknown": {},
}


@pytest.mark.parametrize("kind", CONFIGURED)
def test_quantised_folders_are_refused(project: Project, kind: str) -> None:
    folder = Path(shutil.copytree(project.llama, "model"))
    set_config(folder, quantization_config=CONFIGURED[kind])
    words = [f"quantised already ({kind})", "original, unquantised model"]
    user = ("--user_pretrain_dir", "model", "--use_qlora", "True")
    for command in ((), ("--check", "True"), ("--dry_run", "True")):
        expect_refusal(project, lambda command=command: project.run(*user, *command), words)  # type: ignore[misc]
    more = [*project.arguments, "--item_pretrain_dir", "model", "--item_cache_path", "new"]
    for command in ((), ("--check", "True")):
        expect_refusal(
            project,
            lambda command=command: project.call(cache_main, [*more, *command]),  # type: ignore[misc]
            words,
        )


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_bitsandbytes_folder_is_refused_and_its_remedy_works(project: Project, kind: str) -> None:
    settings = BitsAndBytesConfig(**BITSANDBYTES[kind])
    quantised = AutoModelForCausalLM.from_pretrained(
        project.llama, quantization_config=settings, device_map={"": "cpu"}
    )
    quantised.save_pretrained("model")
    bits = "8-bit" if kind == "int8" else "4-bit"
    remedy = "from_pretrained('model').dequantize().save_pretrained('NEW_FOLDER')"
    words = [f"quantised already (bitsandbytes {bits})", f"AutoModelForCausalLM.{remedy}"]
    user = ("--user_pretrain_dir", "model", "--use_qlora", "True", "--qlora_quant_type", kind)
    for command in ((), ("--check", "True")):
        expect_refusal(project, lambda command=command: project.run(*user, *command), words)  # type: ignore[misc]
    AutoModelForCausalLM.from_pretrained("model").dequantize().save_pretrained("plain")
    # Trained, resumed, exported, loaded again and scored.
    train = (*user, "--user_pretrain_dir", "plain", "--run_name", "r", "--checkpoint_every", "1")
    code, _, err = project.run(*train, "--epochs", "1", "--eval_baseline", "False")
    assert code == 0, err
    code, _, err = project.call(
        export_main, ["--run", "saved/r", "--out", "out", "--evaluate", "True"]
    )
    assert code == 0, err
    where = ("--user_pretrain_dir", "out", "--val_only", "True", "--run_name", "exported")
    code, _, err = project.run(*where)
    assert code == 0, err
    code, out, err = project.call(recommend_main, ["--run", "saved/r", "--user", "u1"])
    assert code == 0, err
    assert out


def test_weights_of_a_quantised_folder_without_its_configuration_are_refused(
    tmp_path: Path,
) -> None:
    folder = make_llama(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**BITSANDBYTES["nf4"]),
        device_map={"": "cpu"},
    )
    model.save_pretrained(tmp_path / "model")
    content = json.loads((tmp_path / "model/config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="shape"):
        check_weights(tmp_path / "model")

"""What is read off plain decoders equals what transformers and the count with fake tensors say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from hsft.model import meta
from hsft.model.activations import count_saved_bytes
from hsft.model.backbone import load_model_config, model_kind
from hsft.model.folder import check_files
from hsft.model.plain_decoder import PlainDecoder, read_plain
from hsft.model.structure import DecoderSource, DecoderStructure, DecoderTraining
from hsft.run.dry_run import TINYLLAMA
from tests.conftest import Project
from tests.helpers import ROOT, WORDS, make_model

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + 1,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "narrow heads": LlamaConfig(**SIZES, head_dim=4),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    return {name: make_model(root / name, config) for name, config in CONFIGS.items()}


def plain(source: DecoderSource) -> PlainDecoder:
    decoder = read_plain(source)
    assert decoder is not None
    return decoder


def built(source: DecoderSource) -> DecoderStructure:
    """Read a structure off the model that transformers builds."""
    record = meta._read_off(source)
    others = tuple(record.pop("other_sizes"))
    return DecoderStructure(**record, other_sizes=others, source=source)


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_says_the_same(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    whole = DecoderSource(folder)
    assert plain(whole).kind == model_kind(load_model_config(folder))
    for source in (whole, DecoderSource(folder, 2), DecoderSource(folder, 1, True)):
        assert plain(source).structure(source) == built(source)


def test_tinyllamas_shape_without_a_folder() -> None:
    source = DecoderSource(Path("none"), 2, llama=TINYLLAMA)
    assert plain(source).structure(source) == built(source)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    ("quant_type", "rank", "targets"),
    [
        ("nf4", 8, ("q_proj", "v_proj")),
        ("none", 8, ("q_proj", "v_proj")),
        ("nf4", 5, ("all-linear",)),
        ("none", 3, ("o_proj", "down_proj")),
    ],
)
def test_saved_bytes_are_those_counted(
    folders: dict[str, Path], family: str, quant_type: Any, rank: int, targets: tuple[str, ...]
) -> None:
    source = DecoderSource(folders[family])
    training = DecoderTraining(
        quant_type=quant_type,
        lora_rank=rank,
        lora_targets=targets,
        dtype="bfloat16",
        residual_dtype="bfloat16",
        autocast=False,
        attention="sdpa",
        row_length=40,
        masked=False,
    )
    # The count spreads what is saved once a step over its positions: LoRA's matrices, rotary angles.
    expected = pytest.approx(count_saved_bytes(source, training), rel=4e-3)
    assert plain(source).saved_bytes(training) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_rank": None, "quant_type": "none"},
        {"quant_type": "int8"},
        {"lora_targets": ("lm_head",)},
        {"dtype": "float32"},
        {"residual_dtype": "float32"},
        {"autocast": True},
        {"attention": "eager"},
        {"masked": True},
    ],
    ids=str,
)
def test_other_training_is_counted(folders: dict[str, Path], changed: dict[str, Any]) -> None:
    usual: dict[str, Any] = {
        "quant_type": "nf4",
        "lora_rank": 8,
        "lora_targets": ("q_proj",),
        "dtype": "bfloat16",
        "residual_dtype": "bfloat16",
        "autocast": False,
        "attention": "sdpa",
        "row_length": 40,
        "masked": False,
    }
    decoder = plain(DecoderSource(folders["llama"]))
    assert decoder.saved_bytes(DecoderTraining(**usual)) is not None
    assert decoder.saved_bytes(DecoderTraining(**{**usual, **changed})) is None


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "unknown key": {"partial_rotary_factor": 0.5},
    "code": {"auto_map": {"AutoModel": "m.Model"}},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "encoder": {"model_type": "bert"},
    "looks ahead": {"is_causal": False},
    "biases": {"attention_bias": True},
    "0 for False": {"attention_bias": 0},
    "text for a number": {"hidden_size": "96"},
    "True for a number": {"num_hidden_layers": True},
    "no heads": {"num_attention_heads": 0},
    "heads do not divide": {"num_attention_heads": 7},
    "groups do not divide": {"num_key_value_heads": 4},
    "odd heads": {"head_dim": 15},
    "millions of layers": {"num_hidden_layers": 1 << 19},
    "rates above 1": {"initializer_range": 2.0},
    "padding out of the vocabulary": {"pad_token_id": 1 << 19},
    "other activation": {"hidden_act": "gelu"},
    "window": {"sliding_window": 8},
    "other rotary positions": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "Llama 3's without a factor": {"rope_parameters": {"rope_type": "llama3"}},
    "list for rotary positions": {"rope_parameters": []},
    "Mistral's own window": {"model_type": "mistral"},
    "Qwen2's windows": {"model_type": "qwen2", "use_sliding_window": True},
    "fewer kinds than layers": {"model_type": "qwen2", "layer_types": ["full_attention"]},
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_of_others_transformers_is_asked(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **NOT_PLAIN[case]}))
    assert read_plain(DecoderSource(tmp_path)) is None


@pytest.mark.parametrize("size", ["hidden_size", "num_key_value_heads", "model_type"])
def test_of_incomplete_ones_transformers_is_asked(
    folders: dict[str, Path], tmp_path: Path, size: str
) -> None:
    assert read_plain(DecoderSource(tmp_path)) is None
    config = json.loads((folders["llama"] / "config.json").read_text())
    del config[size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_plain(DecoderSource(tmp_path)) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_whole_folders_fit(folders: dict[str, Path], family: str) -> None:
    stored = check_files(folders[family]).shapes
    decoder = plain(DecoderSource(folders[family]))
    bare = {name.removeprefix("model."): shape for name, shape in stored.items()}
    embedding = "model.embed_tokens.weight"
    headless = {name: shape for name, shape in stored.items() if name != embedding}
    assert decoder.fits(stored, True)
    assert decoder.fits(bare, True)
    assert decoder.fits(headless, False)
    assert not decoder.fits(headless, True)
    for other in (
        {**stored, "model.layers.0.mlp.up_proj.bias": (160,)},
        {**stored, "model.layers.3.mlp.up_proj.weight": (160, 96)},
        {**stored, "model.norm.weight": (95,)},
        {name: shape for name, shape in stored.items() if name != "model.norm.weight"},
        {name.removeprefix("model.layers.0."): shape for name, shape in stored.items()},
    ):
        assert not decoder.fits(other, False)


def test_checks_and_estimates_need_no_transformers(project: Project) -> None:
    code = (
        "import sys\n"
        "from hsft.programs.train import main\n"
        "words, lora = sys.argv[1:], ['--use_qlora', 'True']\n"
        "assert main([*words, *lora, '--check', 'True']) == 0\n"
        "assert main([*words[:7], *lora, '--dry_run', 'True']) == 0\n"
        "assert main([*words[:3], *lora, '--dry_run', 'True']) == 0\n"
        "slow = {'transformers', 'peft', 'bitsandbytes', 'lightning', 'huggingface_hub'}\n"
        "loaded = slow & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *project.arguments],
        env={"PYTHONPATH": str(ROOT / "code"), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

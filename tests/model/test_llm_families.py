"""Decoders of several families, tiny and random: as UserLLM, as ItemLLM, and in the memory estimate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AutoModel,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from hsft.data.cache import open_cache
from hsft.model.attention import choose_attention
from hsft.model.backbone import (
    LoraSettings,
    add_lora,
    load_decoder,
    load_model_config,
    model_kind,
)
from hsft.model.folder import check_files
from hsft.model.item_table import ItemTable
from hsft.model.user_llm import UserLLM
from hsft.report import memory
from hsft.utils.errors import InputError
from item_caching import main as cache_main
from tests.bad_input import expect_refusal
from tests.conftest import Project
from tests.decoders import real_model, real_weight_bytes, saved_by_autograd, shape
from tests.helpers import WORDS, make_model

CPU = torch.device("cpu")


def usual(kind: Callable[..., PretrainedConfig], **more: Any) -> Callable[[int], PretrainedConfig]:
    """Sizes by the names that most families give them."""
    return lambda hidden: kind(
        vocab_size=len(WORDS) + 1,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **{"intermediate_size": 2 * hidden, **more},
    )


GROUPED = {"num_key_value_heads": 2}
GPT2 = usual(GPT2Config, n_inner=128, bos_token_id=0, eos_token_id=0)
FAMILIES: dict[str, tuple[Callable[[int], PretrainedConfig], str]] = {
    "gpt2": (GPT2, "c_attn"),
    "gpt_neox": (usual(GPTNeoXConfig), "query_key_value"),
    "opt": (
        lambda hidden: usual(OPTConfig, ffn_dim=128, word_embed_proj_dim=hidden)(hidden),
        "q_proj",
    ),
    "qwen2": (usual(Qwen2Config, **GROUPED), "q_proj"),
    "qwen3": (usual(Qwen3Config, head_dim=16, **GROUPED), "q_proj"),
    "mistral": (usual(MistralConfig, **GROUPED), "q_proj"),
    "gemma2": (usual(Gemma2Config, head_dim=16, **GROUPED), "q_proj"),
    "llama": (usual(LlamaConfig, **GROUPED), "q_proj"),
    "bloom": (
        lambda hidden: BloomConfig(
            vocab_size=len(WORDS) + 1, hidden_size=hidden, n_layer=2, n_head=4
        ),
        "query_key_value",
    ),
}
# transformers attends over the whole row in these, whatever the positions are.
ONE_SEQUENCE_A_ROW = ("opt", "bloom")
WITHOUT_SDPA = ("gemma2", "bloom")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family, 64 wide."""
    root = tmp_path_factory.mktemp("families")
    return {name: make_model(root / name, make(64)) for name, (make, _) in FAMILIES.items()}


def load(folder: Path, lora: LoraSettings | None = None, **more: Any) -> Any:
    kind = model_kind(load_model_config(folder))
    kernel = choose_attention("auto", True, CPU, False, kind)
    return load_decoder(folder, dtype=torch.float32, attention=kernel, lora=lora, **more)


def user_llm(decoder: Any) -> UserLLM:
    table = torch.randn(21, 64, generator=torch.Generator().manual_seed(2))
    return UserLLM(decoder, ItemTable(table)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_plain_transformers_and_do_not_look_ahead(
    folders: dict[str, Path], family: str
) -> None:
    model = user_llm(load(folders[family]))
    history = torch.tensor([[3, 1, 2, 7], [3, 1, 9, 8]])
    plain = AutoModel.from_pretrained(folders[family]).eval()
    with torch.no_grad():
        actual = model(history)
        expected = plain(inputs_embeds=model.items(history)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[0, :2], actual[1, :2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual[0, 2], actual[1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_whether_a_row_may_hold_several_sequences(folders: dict[str, Path], family: str) -> None:
    model = user_llm(load(folders[family]))
    assert model.separates_sequences() == (family not in ONE_SEQUENCE_A_ROW)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with torch.no_grad():
        packed = model(torch.tensor([[4, 5, 6, 7, 8]]), positions)[:, 3:]
        alone = model(torch.tensor([[7, 8]]))
    assert torch.allclose(packed, alone, rtol=1e-3, atol=1e-4) == model.separates_sequences()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("none", torch.bfloat16), ("nf4", torch.bfloat16), ("int8", torch.bfloat16)],
)
def test_vectors_have_the_number_type_of_the_residual_stream(
    folders: dict[str, Path], family: str, kind: str, expected: torch.dtype
) -> None:
    lora = LoraSettings(4, 8, 0.0, ("all-linear",), kind)
    decoder = load_decoder(folders[family], dtype=torch.bfloat16, attention="sdpa", lora=lora)
    model = user_llm(add_lora(decoder, lora, False))
    norm = next(part for part in decoder.modules() if "Norm" in type(part).__name__)
    seen: list[torch.dtype] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad():
        states = model(torch.tensor([[1, 2]]))
    # peft's own preparation would cast the norms of a quantised model to float32.
    assert norm.weight.dtype == expected
    assert seen == [expected]
    assert states.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_and_evaluates_and_is_estimated(
    project: Project, folders: dict[str, Path], family: str
) -> None:
    nf4 = family in ("gpt2", "gemma2")
    lora = ("--use_qlora", "True", "--qlora_target_modules", f"[{FAMILIES[family][1]}]")
    where = ("--user_pretrain_dir", str(folders[family]))
    code, out, err = project.run(
        *(*where, *lora, "--qlora_quant_type", "nf4" if nf4 else "none", "--run_name", "r"),
        *("--epochs", "1", "--train_batch_size", "32", "--checkpoint_minutes", "0"),
    )
    assert code == 0, err
    result = json.loads((project.root / "saved/r/result.json").read_text())
    assert [row["users"] for row in result["rows"]] == [30, 30]
    assert 0 < result["training"]["history"][0]["loss"] < 100
    assert ("mix the sequences of a row" in err) == (family in ONE_SEQUENCE_A_ROW)
    code, out, err = project.run(*where, *lora, "--dry_run", "True")
    assert code == 0, err
    assert "Assumed" not in out


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_estimates_hold_for_other_families(tmp_path: Path, family: str, kind: Any) -> None:
    make, target = FAMILIES[family]
    folder = make_model(tmp_path / family, make(192))
    attention: Literal["sdpa", "eager"] = "eager" if family in WITHOUT_SDPA else "sdpa"
    expected = replace(
        shape(folder, quant_type=kind, lora_targets=(target,), masked_row=40), attention=attention
    )
    model = real_model(folder, expected)
    assert memory.weight_bytes(expected) == real_weight_bytes(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # And the logit scale.
    assert memory.estimate(expected, 4).adapters == 4 * (trained + 1)
    layer, rest = memory.saved_bytes_per_token(expected)
    real = saved_by_autograd(model.train(), mixed=False, packed=True)
    assert 6 * 40 * (2 * layer + rest) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("command", ["", "--check", "--dry_run"])
def test_llamas_target_names_are_refused(
    project: Project, folders: dict[str, Path], family: str, command: str
) -> None:
    more = ["--user_pretrain_dir", str(folders[family]), "--use_qlora", "True"]
    if command:
        more += [command, "True"]
    names = {"gpt2": "c_attn, c_fc, c_proj", "gpt_neox": "dense, dense_4h_to_h"}[family]
    expect_refusal(project, lambda: project.run(*more), ["['q_proj', 'v_proj']", names])


def test_targets_are_matched_as_peft_does(folders: dict[str, Path]) -> None:
    for expected in (("all-linear",), ("attn.c_proj",), ("c_proj",), ("h.1.mlp.c_fc", "c_attn")):
        settings = LoraSettings(4, 8, 0.0, expected, "none")
        adapted = add_lora(load(folders["gpt2"]), settings, False)
        real = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        counted = shape(folders["gpt2"], lora_targets=expected)
        assert sum(memory.trained_sizes(counted)) == real + 1


def test_a_target_may_name_its_layer(project: Project, folders: dict[str, Path]) -> None:
    more = ("--user_pretrain_dir", str(folders["gpt2"]), "--use_qlora", "True", "--check", "True")
    assert project.run(*more, "--qlora_target_modules", "[h.1.attn.c_attn]")[0] == 0
    code, _, err = project.run(*more, "--qlora_target_modules", "[h.2.attn.c_attn]")
    assert code == 2
    assert "c_attn, c_fc, c_proj" in err


def test_attention_follows_what_the_model_has(project: Project, folders: dict[str, Path]) -> None:
    for family, folder in folders.items():
        kind = model_kind(load_model_config(folder))
        expected = "eager" if family in WITHOUT_SDPA else "sdpa"
        assert choose_attention("auto", True, CPU, False, kind) == expected
    where = ("--user_pretrain_dir", str(folders["gemma2"]), "--val_only", "True")
    code, _, err = project.run(*where)
    assert code == 0
    assert "runs with eager attention" in err
    words = ["attn_implementation", "gemma2", "auto or eager"]
    expect_refusal(project, lambda: project.run(*where, "--attn_implementation", "sdpa"), words)
    with pytest.raises(InputError, match="set --attn_implementation eager"):
        load_decoder(folders["gemma2"], dtype=torch.float32, attention="sdpa")


def test_learned_positions_end(project: Project, folders: dict[str, Path]) -> None:
    long = ("--MAX_ITEM_LIST_LENGTH", "65", "--val_only", "True", "--user_pretrain_dir")
    for family in ("gpt2", "opt"):
        run = [*long, str(folders[family])]
        expect_refusal(project, lambda run=run: project.run(*run), ["learned 64 positions"])  # type: ignore[misc]
    assert project.run(*long, str(folders["llama"]))[0] == 0
    items = [*project.arguments, "--item_pretrain_dir", str(folders["gpt2"])]
    items += ["--MAX_TEXT_LENGTH", "65", "--item_cache_path", "new.safetensors"]
    expect_refusal(
        project, lambda: project.call(cache_main, items), ["MAX_TEXT_LENGTH asks for 65"]
    )
    assert project.call(cache_main, [*items, "--MAX_TEXT_LENGTH", "64"])[0] == 0


def test_vectors_narrower_than_the_layers_are_refused(project: Project, tmp_path: Path) -> None:
    config = usual(OPTConfig, ffn_dim=128, word_embed_proj_dim=32)(64)
    folder = make_model(tmp_path / "opt-350m", config)
    more = ("--user_pretrain_dir", str(folder), "--val_only", "True")
    expect_refusal(project, lambda: project.run(*more), ["reads vectors of 32", "layers of 64"])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_items_are_encoded(project: Project, folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    code, _, err = project.call(
        cache_main,
        [
            *(*project.arguments, "--item_pretrain_dir", str(folder), "--MAX_TEXT_LENGTH", "32"),
            *("--item_cache_path", "new.safetensors", "--item_cache_dtype", "float32"),
            *("--item_prompt", "item item item item : "),
        ],
    )
    assert code == 0, err
    cache = open_cache("new.safetensors")
    assert (len(cache), cache.dim) == (20, 64)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(
        "item item item item : title: item 3tag: 3description: 3", return_tensors="pt"
    )["input_ids"]
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = plain(input_ids=ids).last_hidden_state.mean(dim=1)[0]
    actual = cache.embeddings[cache.item_ids.index("i3")]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_layers_and_vocabulary_are_counted(folders: dict[str, Path]) -> None:
    for family in ("gpt2", "gpt_neox", "llama"):
        weights = check_files(folders[family])
        decoder = load(folders[family], layers=1)
        kept = sum(p.numel() for p in decoder.parameters()) - 64
        assert weights.count(1, vocabulary=False) == kept, family

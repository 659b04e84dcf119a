"""HLLM's keys that take names of parameters: what is frozen, and what has a learning rate of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export import main as export_main
from hsft.config import Config
from hsft.finished.open_run import open_run
from hsft.inputs.load_tower import load_item_tower, read_catalogue
from hsft.model.parameter_names import check_prefixes, hllm_name
from hsft.model.recommender import Recommender
from hsft.run.setup import build_id_model, build_user_llm, load_data
from hsft.trainer.fabric import make_fabric
from hsft.trainer.optim import build_optimizer
from hsft.utils.errors import InputError
from tests.conftest import Project
from tests.training_runs import folder

CPU = torch.device("cpu")
TRAIN = (
    *("--epochs", "1", "--num_threads", "1", "--eval_baseline", "False", "--run_name", "run"),
    *("--optim_args.learning_rate", "1e-2"),
)


def config_of(project: Project, **values: object) -> Config:
    return Config.model_validate(
        {
            "dataset": "tiny",
            "user_pretrain_dir": str(project.llama),
            "item_pretrain_dir": str(project.llama),
            "precision": "32-true",
            "device": "cpu",
            "MAX_ITEM_LIST_LENGTH": 8,
            **values,
        }
    )


def build(config: Config) -> Recommender:
    """Build the model that a run trains, with its ItemLLM."""
    fabric = make_fabric(config)
    data = load_data(config, need_cache=config.reads_embeddings)
    if config.model != "HLLM":
        return build_id_model(config, data, fabric)
    model = build_user_llm(config, data, fabric, train=True)
    if config.trains_items:
        texts, _ = read_catalogue(config, data.interactions.item_ids[1:])
        model.item_llm, _ = load_item_tower(config, texts, CPU)
    return model


def settings_by_name(model: Recommender, config: Config) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of each trained parameter by its name in HLLM."""
    groups = build_optimizer(model, config, CPU).param_groups
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {hllm_name(name): weight for name, weight in model.named_parameters()}
    return {name: of[id(weight)] for name, weight in named.items() if weight.requires_grad}


def test_parameters_have_hllm_s_names(project: Project) -> None:
    lora = {"use_qlora": True, "qlora_quant_type": "none", "item_adapter": "linear"}
    names = {hllm_name(name) for name, _ in build(config_of(project, **lora)).named_parameters()}
    assert {"logit_scale", "user_llm.model.norm.weight", "items.adapter.weight"} <= names
    assert "user_llm.model.layers.1.self_attn.q_proj.lora_A.default.weight" in names
    ids = {"model": "llm_id", "llm_id": {"item_width": 8}}
    names = {hllm_name(name) for name, _ in build(config_of(project, **ids)).named_parameters()}
    assert {"item_embedding.weight", "item_id_proj_tower.weight"} <= names
    assert "user_llm.model.layers.0.mlp.up_proj.weight" in names
    names = {
        hllm_name(name) for name, _ in build(config_of(project, model="hstu")).named_parameters()
    }
    assert {"item_embedding.weight", "position_embedding.weight", "layers.1.read.weight"} <= names
    assert hllm_name("item_llm.emb_token") == "item_emb_tokens"
    lora_name = "item_llm.model.base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert hllm_name(lora_name) == "item_llm.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def test_named_parameters_have_a_multiple_of_the_rate(project: Project) -> None:
    config = config_of(
        project,
        train_item_llm="full",
        item_lr_mult=0.1,
        optim_args={"learning_rate": 0.01, "weight_decay": 0.3},
        lr_mult_prefix=["item_llm.model.layers.1", "logit_scale"],
        lr_mult_rate=5,
    )
    actual = settings_by_name(build(config), config)
    expected = {
        "user_llm.model.layers.1.mlp.up_proj.weight": (0.01, 0.3),
        "user_llm.model.norm.weight": (0.01, 0.0),
        "logit_scale": (0.05, 0.0),
        "item_llm.model.layers.0.mlp.up_proj.weight": (0.001, 0.3),
        "item_llm.model.layers.1.mlp.up_proj.weight": (0.005, 0.3),
        "item_llm.model.layers.1.input_layernorm.weight": (0.005, 0.0),
    }
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values), name
    first = build_optimizer(build(config), config, CPU).param_groups[0]
    assert first["lr"] == 0.01


def test_two_kinds_of_weights_have_rate_and_decay(project: Project) -> None:
    args = {"modal_lr": 0.02, "modal_decay": 0.2, "rec_lr": 0.03, "rec_decay": 0.4}
    config = config_of(
        project, decay_check_name="mlp", optim_args={**args, "weight_decay_on": "all"}
    )
    actual = settings_by_name(build(config), config)
    assert set(actual.values()) == {(0.02, 0.2), (0.03, 0.4)}
    assert all((values == (0.02, 0.2)) == ("mlp" in name) for name, values in actual.items())


def test_frozen_parameters_stay_as_they_were(project: Project) -> None:
    words = ("--freeze_prefix", "[user_llm.model.layers.0., item_llm]")
    code, _, err = project.run(*words, *TRAIN)
    assert code == 0, err
    trained = load_file(folder(project) / "best/trained.safetensors")
    start = build(config_of(project))
    names = [name for name, weight in start.named_parameters() if weight.requires_grad]
    frozen = [name for name in names if "layers.0." in name]
    assert len(frozen) == 9
    # What is not there is the model folder's.
    assert set(trained) == set(names) - set(frozen)
    for name, value in trained.items():
        assert not torch.equal(value, start.get_parameter(name)), name
    actual = open_run("saved/run").build("fine-tuned")
    assert isinstance(actual, Recommender)
    for name in names:
        same = torch.equal(actual.get_parameter(name), start.get_parameter(name))
        assert same == (name in frozen), name
    code, _, err = project.call(
        export_main, ["--run", "saved/run", "--dtype", "float32", "--evaluate", "True"]
    )
    assert code == 0, err
    assert '"other_ranks": 0' in (folder(project) / "export/export.json").read_text()


def test_a_part_of_the_item_llm_is_frozen(project: Project) -> None:
    freeze = ["item_llm.model.layers.0", "item_llm.model.embed_tokens", "user_llm"]
    config = config_of(project, train_item_llm="full", freeze_prefix=freeze)
    model = build(config)
    trained = {hllm_name(name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(
        name.startswith(("item_llm.model.layers.1", "item_llm.model.norm"))
        for name in trained - {"logit_scale"}
    )
    assert len(trained) == 9 + 1 + 1
    code, _, err = project.run(
        *("--train_item_llm", "full", "--item_pretrain_dir", str(project.llama), *TRAIN),
        *("--use_item_cache", "False", "--nce_thres", "1.01", "--num_negatives", "6"),
        *("--freeze_prefix", f"[{', '.join(freeze)}]"),
    )
    assert code == 0, err
    stored = load_file(folder(project) / "best/item_llm.safetensors")
    assert {f"item_llm.{name}" for name in stored} == trained - {"logit_scale"}
    assert set(load_file(folder(project) / "best/trained.safetensors")) == {"logit_scale"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"freeze_prefix": ["user_llm.model.layers.2"]}, "names begin with logit_scale, user_llm"),
        (
            {"lr_mult_prefix": ["item_llm"], "lr_mult_rate": 2},
            "no parameter that is trained begins",
        ),
        (
            {"lr_mult_prefix": ["logit_scale"], "lr_mult_rate": 2, "freeze_prefix": ["logit"]},
            "no parameter that is trained begins with 'logit_scale'",
        ),
        ({"model": "sasrec", "freeze_prefix": ["item_embedding"]}, "begins untrained"),
        ({"user_llm_init": False, "freeze_prefix": ["user_llm"]}, "begins untrained in this run"),
        (
            {"train_item_llm": "full", "freeze_prefix": ["item_llm", "item_emb_tokens"]},
            "use train_item_llm: none",
        ),
        (
            {
                "decay_check_name": "visual_encoder",
                "optim_args": {"modal_lr": 1, "modal_decay": 0, "rec_lr": 1, "rec_decay": 0},
            },
            "no parameter that is trained has 'visual_encoder' in its name",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_names_that_fit_nothing_are_refused(
    project: Project, values: dict[str, object], words: str
) -> None:
    config = config_of(project, **values)
    with pytest.raises(InputError) as refusal:
        check_prefixes(build(config), config)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--freeze_prefix", "user_lm"), "names begin with user_llm, item_llm"),
        (("--lr_mult_prefix", "user_llm"), "lr_mult_prefix and lr_mult_rate go together"),
        (("--lr_mult_rate", "2"), "lr_mult_prefix and lr_mult_rate go together"),
        (("--decay_check_name", "mlp"), "set all five or none"),
        (("--optim_args.modal_lr", "1e-3"), "set all five or none"),
        (("--freeze_prefix", "user_llm.model.layers.7."), "no parameter begins with"),
    ],
)
def test_keys_that_do_not_go_together(project: Project, more: tuple[str, ...], words: str) -> None:
    code, _, err = project.run(*TRAIN, *more)
    assert code == 2
    assert words in err.splitlines()[-1]
    assert not Path("saved/run/best").exists()

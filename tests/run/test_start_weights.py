"""What training begins with: random weights of either LLM, or a checkpoint of HLLM (`load_pretrain`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from export import main as export_main
from hsft.finished.open_run import open_run
from hsft.inputs.import_hllm import import_pretrained
from hsft.model.backbone import load_decoder, make_decoder
from hsft.report.result import read_ranks
from hsft.trainer import loop
from item_caching import main as cache_main
from tests.conftest import Project
from tests.hllm_checkpoint import TinyHllm, make_hllm
from tests.training_runs import RESUME, Crash, at_step, crash, folder, result

TRAIN = (
    *("--num_negatives", "6", "--nce_thres", "1.01", "--epochs", "2", "--num_threads", "1"),
    *("--optim_args.learning_rate", "1e-2", "--eval_baseline", "False", "--run_name", "run"),
)
RANDOM_USER = ("--user_pretrain_dir", "shape", "--user_llm_init", "False")
RANDOM_BOTH = (
    *("--item_pretrain_dir", "shape", "--item_llm_init", "False", "--train_item_llm", "full"),
    *("--use_item_cache", "False", *RANDOM_USER),
)
CPU = torch.device("cpu")


@pytest.fixture
def shape(project: Project) -> Path:
    """A folder with config.json and tokenizer, and no weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(project.llama, project.root / "shape", ignore=ignored))


@pytest.fixture(scope="module")
def hllm(tmp_path_factory: pytest.TempPathFactory) -> TinyHllm:
    return make_hllm(tmp_path_factory.mktemp("hllm"))


def weights_of(project: Project, run: str, file: str = "trained.safetensors") -> dict[str, Tensor]:
    return load_file(folder(project, run) / "best" / file)


def test_random_weights_follow_from_the_seed_alone(shape: Path) -> None:
    config = json.loads((shape / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps({**config, "initializer_range": 0.05}))
    made = []
    for seed, dtype in ((7, torch.float32), (7, torch.float32), (7, torch.bfloat16), (8, None)):
        torch.rand(3)  # whatever was drawn before
        state = torch.random.get_rng_state()
        kind = torch.float32 if dtype is None else dtype
        model = make_decoder(shape, dtype=kind, attention="sdpa", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        made.append(dict(model.named_parameters()))
    first, again, rounded, other = made
    matrices = [name for name, weight in first.items() if weight.ndim == 2 and len(weight) > 1]
    assert len(matrices) == 14
    for name in matrices:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name].bfloat16(), rounded[name])
        assert not torch.equal(first[name], other[name])
    values = torch.cat([first[name].detach().flatten() for name in matrices])
    # 73,728 draws: the standard error of their deviation is 0.05 / sqrt(2 n) = 0.00013.
    assert values.std().item() == pytest.approx(0.05, abs=0.0006)
    assert values.mean().item() == pytest.approx(0, abs=0.0008)


def test_a_random_user_llm_is_trained_evaluated_resumed_and_exported(
    project: Project, shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = project.run(*RANDOM_USER, *TRAIN, "--run_name", "whole")
    assert code == 0, err
    trained = weights_of(project, "whole")
    start = make_decoder(shape, dtype=torch.float32, attention="sdpa", seed=2020)
    for name, weight in start.named_parameters():
        if weight.requires_grad:
            assert not torch.equal(trained[f"encoder.decoder.{name}"], weight.detach()), name
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(5, crash))
        with pytest.raises(Crash):
            project.run(*RANDOM_USER, *TRAIN, "--checkpoint_every", "2")
    code, _, err = project.run(*RANDOM_USER, *TRAIN, "--checkpoint_every", "2", *RESUME)
    assert code == 0, err
    assert result(project)["training"]["resumed_from"] == [4]
    again = weights_of(project, "run")
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)

    code, _, err = project.run(*RANDOM_USER, "--val_only", "True", "--run_name", "untrained")
    assert code == 0, err
    assert result(project, "untrained")["user_llm"] is None
    assert open_run("saved/run").build("untrained").num_items == 20

    code, _, err = project.call(
        export_main, ["--run", "saved/run", "--dtype", "float32", "--evaluate", "True"]
    )
    assert code == 0, err
    exported = folder(project) / "export"
    assert json.loads((exported / "export.json").read_text())["exported"]["other_ranks"] == 0
    code, _, err = project.run(
        *("--user_pretrain_dir", str(exported), "--val_only", "True", "--run_name", "reloaded")
    )
    assert code == 0, err
    tuned = read_ranks(folder(project), "fine-tuned")[1]
    assert (tuned == read_ranks(folder(project, "reloaded"), "untrained")[1]).all()


def test_both_llms_from_scratch(project: Project, shape: Path) -> None:
    code, _, err = project.run(*RANDOM_BOTH, *TRAIN)
    assert code == 0, err
    trained = weights_of(project, "run", "item_llm.safetensors")
    start = make_decoder(
        shape, dtype=torch.float32, attention="sdpa", seed=2020, keep_token_embedding=True
    )
    for name, weight in start.named_parameters():
        assert not torch.equal(trained[f"model.{name}"], weight.detach()), name
    assert trained["emb_token"].shape == (64,)
    # The cache of the random ItemLLM may be made before, with the same seed.
    words = [
        *("--dataset", "tiny", "--item_cache_path", "random.safetensors", "--precision", "32-true"),
        *RANDOM_BOTH[:6],
    ]
    for seed, code in (("2020", 0), ("1", 2)):
        Path("random.safetensors").unlink(missing_ok=True)
        assert project.call(cache_main, [*words, "--seed", seed])[0] == 0
        more = ["--use_item_cache", "True", "--item_cache_path", "random.safetensors"]
        more += ["--check", "True", "--run_name", "other"]
        actual, _, err = project.run(*RANDOM_BOTH, *TRAIN, *more)
        assert actual == code, err
        assert (code == 0) != ("was not made by the ItemLLM in shape" in err)
    code, _, err = project.call(export_main, ["--run", "saved/run", "--dtype", "float32"])
    assert code == 0, err
    with safe_open(folder(project) / "export/item_llm/model.safetensors", "pt") as file:
        assert torch.equal(
            file.get_tensor("embed_tokens.weight"), trained["model.embed_tokens.weight"]
        )
    code, _, err = project.run(*RANDOM_BOTH, *TRAIN, "--dry_run", "True")
    assert code == 0, err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((*RANDOM_USER, "--use_qlora", "True"), "set user_llm_init: True or drop use_qlora"),
        (("--item_llm_init", "False"), "use train_item_llm: full"),
        ((*RANDOM_BOTH, "--train_item_llm", "lora"), "use train_item_llm: full"),
        ((*RANDOM_BOTH, "--item_freeze_layers", "1"), "item_freeze_embeddings would keep"),
        (("--user_pretrain_dir", "shape"), "holds no weights"),
        (("--load_pretrain", "nowhere.bin"), "nowhere.bin is not a file"),
        (("--load_pretrain", "x.bin", "--model", "pop"), "load_pretrain is a checkpoint of HLLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.usefixtures("shape")
def test_what_cannot_begin_is_refused(project: Project, more: tuple[str, ...], words: str) -> None:
    code, out, err = project.run(*more, "--check", "True")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_training_goes_on_from_a_checkpoint(project: Project, hllm: TinyHllm, shape: Path) -> None:
    del shape
    file = shutil.copy(hllm.file, project.root / "hllm.bin")
    words = (
        *("--load_pretrain", str(file), "--user_pretrain_dir", "shape", "--item_pretrain_dir"),
        *("shape", "--item_cache_path", "hllm.safetensors"),
    )
    common = ("--dataset", "tiny", "--precision", "32-true")
    code, _, err = project.call(cache_main, [*common, *words])
    assert code == 0, err
    # A check imports nothing and is satisfied with config.json alone.
    for side in ("User", "Item"):
        assert (project.root / f"hllm_{side}LLM" / "import.json").is_file()
    code, _, err = project.run(*words, *TRAIN, "--check", "True")
    assert code == 0, err
    assert "warning" not in err
    code, _, err = project.run(*words, *TRAIN, "--eval_baseline", "True")
    assert code == 0, err
    config = open_run("saved/run").config
    assert (config.load_pretrain, config.loads_user_llm) == (None, True)
    start = load_decoder(config.user_pretrain_dir or "", dtype=torch.float32, attention="sdpa")
    for name, weight in hllm.user.model.named_parameters():
        if name != "embed_tokens.weight":
            assert torch.equal(start.get_parameter(name), weight), name
    assert result(project)["user_llm"]["source"]["path"] == str(Path(file).resolve())
    # Another checkpoint under the same name is imported again.
    state = {**hllm.state, "logit_scale": torch.tensor(1.5)}
    torch.save(state, file)
    given = config.model_copy(
        update={"load_pretrain": str(file), "user_pretrain_dir": "shape", "item_pretrain_dir": None}
    )
    again = import_pretrained(given)
    extra = load_file(Path(again.user_pretrain_dir or "") / "hllm_extra.safetensors")
    assert extra["logit_scale"].item() == 1.5


def test_a_checkpoint_of_other_shapes_is_refused(
    project: Project, hllm: TinyHllm, shape: Path
) -> None:
    config = json.loads((shape / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    words = ("--load_pretrain", str(hllm.file), "--user_pretrain_dir", "shape")
    for more in ((), ("--check", "True")):
        code, _, err = project.run(*words, *more)
        assert code == 2
        assert (
            "lacks keys that the base model's config.json implies: user_llm.model.layers.2" in err
        )
    assert not list(hllm.file.parent.glob("*LLM"))

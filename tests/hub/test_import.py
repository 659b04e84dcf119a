"""Checkpoint import: from a hub or a file to a cache and an evaluation, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from download_itemllm import main as item_main
from download_userllm import main as user_main
from hsft.config.program import program_config
from hsft.data.interactions import read_interactions
from hsft.encoding.item_llm import load_item_encoder
from hsft.inputs import import_hllm
from hsft.model.backbone import load_decoder, read_extra
from hsft.report.result import read_ranks
from hsft.run.setup import build_user_llm, load_data
from hsft.trainer.fabric import make_fabric
from hsft.utils.program import run_program
from hsft.utils.records import records_folder
from item_caching import main as cache_main
from main import main as train_main
from tests.conftest import Project, last_wins
from tests.helpers import ROOT
from tests.hllm_checkpoint import TinyHllm, make_hllm
from tests.hub_server import COMMIT, Hub, running_hub

REPO, FILE = "ByteDance/HLLM", "1B_Pixel8M/pytorch_model.bin"
BASE = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
PROMPT = "Compress the following sentence into embedding: "
PROGRAMS: dict[str, Callable[..., int]] = {"item": item_main, "user": user_main}


@pytest.fixture(scope="module")
def hllm(tmp_path_factory: pytest.TempPathFactory) -> TinyHllm:
    return make_hllm(tmp_path_factory.mktemp("hllm"))


@pytest.fixture
def hub(hllm: TinyHllm) -> Iterator[Hub]:
    """A hub that has the checkpoint, and the base model's files under the default names."""
    with running_hub() as running:
        running.files[REPO, FILE] = hllm.file.read_bytes()
        running.large.add(FILE)
        for path in hllm.base.iterdir():
            if path.suffix == ".json":
                running.files[BASE, path.name] = path.read_bytes()
        yield running


def run_script(
    side: str, hub: Hub, cache: Path, *more: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a download script as a user would, with the hub's address in the environment."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"download_{side}llm.py"), *more],
        cwd=cwd,
        env=os.environ
        | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@dataclass
class NearHub:
    """Runs the programs against a hub in this process, which spares their start-up time."""

    hub: Hub
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    cache: Path

    def move_to(self, url: str) -> None:
        """Set the hub's address, which huggingface_hub reads when it is imported."""
        self.monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        self.monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def run(self, side: str, *more: str) -> tuple[int, str]:
        """Run a download program: exit code and last line of standard error."""
        self.capsys.readouterr()
        code = run_program(PROGRAMS[side], ["--cache_dir", str(self.cache), *more])
        return code, self.capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def near_hub(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> NearHub:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    actual = NearHub(hub, monkeypatch, capsys, tmp_path / "hub")
    actual.move_to(hub.url)
    return actual


def local(side: str, hllm: TinyHllm, out: Path, *more: str) -> int:
    """Import from local files, in this process."""
    argv = ["--from_file", str(hllm.file), "--base_dir", str(hllm.base), "--out", str(out)]
    return run_program(PROGRAMS[side], [*argv, *more])


def tree(folder: Path) -> dict[str, Any]:
    """Every path below a folder with content, inode and time of its files."""
    return {
        str(path.relative_to(folder)): (
            (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
            if path.is_file()
            else None
        )
        for path in sorted(folder.rglob("*"))
    }


def cached(cache: Path, repo: str, name: str) -> Path:
    """Where the user's own call finds a file without asking the hub."""
    return Path(huggingface_hub.hf_hub_download(repo, name, cache_dir=cache, local_files_only=True))


def flipped(content: bytes) -> bytes:
    """The content with its middle byte changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model folder, whatever its shards."""
    actual: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        actual |= load_file(path)
    return actual


# --- from the hub through to an evaluation -------------------------------------------------------


def original_ranks(hllm: TinyHllm, root: Path) -> dict[str, int]:
    """Rank every user's last item with the original modules, in plain transformers code."""
    tokenizer = AutoTokenizer.from_pretrained(hllm.base)
    vectors = []
    with torch.no_grad():
        for n in range(20):
            text = f"{PROMPT}title: item {n}tag: {n % 4}description: {n % 7}"
            ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
            inputs = torch.cat([hllm.item.model.embed_tokens(ids), hllm.emb_token], dim=1)
            vectors.append(hllm.item.model(inputs_embeds=inputs).last_hidden_state[0, -1])
        table = torch.stack(vectors)
        histories: dict[str, list[int]] = {}
        for line in (root / "dataset" / "tiny.csv").read_text().splitlines()[1:]:
            item, user, _ = line.split(",")
            histories.setdefault(user, []).append(int(item[1:]))
        ranks = {}
        for user, items in histories.items():
            read, target = items[:-1], items[-1]
            states = hllm.user.model(inputs_embeds=table[read[-8:]].unsqueeze(0)).last_hidden_state
            cosines = F.cosine_similarity(states[0, -1:], table)
            rivals = [n for n in range(20) if n not in read and n != target]
            ranks[user] = 1 + int((cosines[rivals] >= cosines[target]).sum())
    return ranks


def test_from_the_hub_to_an_evaluation(hllm: TinyHllm, hub: Hub, project: Project) -> None:
    root = project.root
    cache = root / "hub"
    (cache / "models--other--model" / "blobs").mkdir(parents=True)
    (cache / "models--other--model" / "blobs" / "abc").write_text("the user's own")
    (cache / "models--ByteDance--HLLM" / "blobs").mkdir(parents=True)
    (cache / "models--ByteDance--HLLM" / "blobs" / "older").write_text("another file of HLLM")
    before = tree(cache)
    for side in ("item", "user"):
        done = run_script(side, hub, cache, "--dtype", "float32", cwd=root)
        assert done.returncode == 0, done.stderr
        assert "disk space needed: " in done.stderr
    # One download serves both sides, and the user's cache has what it had and the new file.
    assert len(hub.downloads()) == 1
    after = tree(cache)
    assert {path: after.get(path) for path in before} == before
    assert cached(cache, REPO, FILE).read_bytes() == hllm.file.read_bytes()
    assert cached(cache, BASE, "config.json").is_file()
    assert not list(cache.rglob("*.incomplete"))

    models = root / "model_checkpoints"
    assert sorted(path.name for path in models.iterdir()) == [
        "ItemLLM_complete",
        "UserLLM_complete",
    ]
    manifest = json.loads((models / "UserLLM_complete" / "import.json").read_text())
    assert manifest["source"] == {
        "repo": REPO,
        "file": FILE,
        "revision": "main",
        "commit": COMMIT,
        "bytes": hllm.file.stat().st_size,
        "sha256": hashlib.sha256(hllm.file.read_bytes()).hexdigest(),
        "sha256_was_stated": True,
    }
    assert manifest["base"] == {"repo": BASE, "revision": "main", "commit": COMMIT}
    assert manifest["dtype"] == "float32"

    (root / "dataset" / "tiny_item_embeddings.safetensors").unlink()
    flags = [
        *project.arguments,
        *("--item_pretrain_dir", "model_checkpoints/ItemLLM_complete"),
        *("--user_pretrain_dir", "model_checkpoints/UserLLM_complete"),
        *("--item_cache_dtype", "float32"),
    ]
    code, _, err = project.call(cache_main, flags)
    assert code == 0, err
    assert "emb_token pooling" in err
    code, _, err = project.run(*flags[len(project.arguments) :], "--val_only", "True")
    assert code == 0, err

    expected = original_ranks(hllm, root)
    users, ranks = read_ranks(root / "saved" / "tiny-baseline", "untrained")
    names = read_interactions(root / "dataset" / "tiny.csv").user_ids
    assert {str(names[u]): int(rank) for u, rank in zip(users, ranks, strict=True)} == expected
    assert len(set(expected.values())) > 3
    result = json.loads((root / "saved" / "tiny-baseline" / "result.json").read_text())
    assert result["user_llm"]["source"] == manifest["source"]
    assert result["cache"]["model_source"] == manifest["source"]["sha256"]
    metrics = result["rows"][0]["metrics"]
    values = np.array(list(expected.values()))
    assert metrics["Recall@5"] == pytest.approx(np.mean(values <= 5))
    gains = np.where(values <= 10, 1 / np.log2(values + 1), 0.0)
    assert metrics["NDCG@10"] == pytest.approx(gains.mean())


# --- interrupted, damaged and offline downloads --------------------------------------------------


@pytest.fixture
def long_hub(hllm: TinyHllm, hub: Hub, tmp_path: Path) -> Hub:
    """The hub with a checkpoint of 25 MB: huggingface_hub writes in chunks of 10 MiB."""
    ballast = {"user_llm.lm_head.weight": torch.zeros(100_000, 64)}
    torch.save(hllm.state | ballast, tmp_path / "long.bin")
    hub.files[REPO, FILE] = (tmp_path / "long.bin").read_bytes()
    return hub


def test_a_broken_off_download_is_continued(long_hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    long_hub.cut_at, long_hub.fail_after_cut = 15_000_000, True
    done = run_script("item", long_hub, cache, cwd=tmp_path)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: cannot fetch {FILE} of {REPO}")
    assert "what was downloaded is kept" in line
    assert not (tmp_path / "model_checkpoints").exists()
    partial = next(cache.rglob("*.incomplete"))
    assert partial.stat().st_size == 10 << 20

    long_hub.failing = False
    long_hub.requests.clear()
    done = run_script("item", long_hub, cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing the download" in done.stderr
    assert long_hub.downloads() == [f"GET /cdn/{REPO}/{FILE} bytes={10 << 20}-"]
    assert cached(cache, REPO, FILE).read_bytes() == long_hub.files[REPO, FILE]


def test_a_connection_lost_once_is_made_up_for(long_hub: Hub, near_hub: NearHub) -> None:
    long_hub.cut_at = 12_000_000
    assert near_hub.run("user")[0] == 0
    assert long_hub.downloads()[1:] == [f"GET /cdn/{REPO}/{FILE} bytes={10 << 20}-"]


def test_a_finished_download_is_not_repeated_and_is_verified(
    hub: Hub, near_hub: NearHub, tmp_path: Path
) -> None:
    assert near_hub.run("item")[0] == 0
    assert len(hub.downloads()) == 1
    # The conversion failed or was stopped: it is done again, the download is not.
    assert near_hub.run("item", "--force")[0] == 0
    assert len(hub.downloads()) == 1
    # Out of reach, the cache is enough.
    near_hub.move_to("http://127.0.0.1:9")
    assert near_hub.run("user")[0] == 0
    assert near_hub.run("item", "--out", "again")[0] == 0
    assert (tmp_path / "again" / "tokenizer_config.json").is_file()
    blob = cached(near_hub.cache, REPO, FILE).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    before = tree(tmp_path)
    code, line = near_hub.run("user", "--out", "other")
    assert code == 2
    assert f"{blob} is damaged: its SHA-256 is" in line
    assert tree(tmp_path) == before


def test_a_partial_download_that_was_damaged_is_discarded(
    hub: Hub, near_hub: NearHub, hllm: TinyHllm
) -> None:
    content = hllm.file.read_bytes()
    name = hashlib.sha256(content).hexdigest()
    blobs = near_hub.cache / "models--ByteDance--HLLM" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{name}.incomplete").write_bytes(b"rubbish")
    code, line = near_hub.run("item")
    assert code == 2
    assert "it was discarded, run again" in line
    assert near_hub.run("item")[0] == 0
    assert (blobs / name).read_bytes() == content


def test_a_corrupted_download_is_refused(hub: Hub, near_hub: NearHub, tmp_path: Path) -> None:
    hub.corrupt = True
    code, line = near_hub.run("item")
    assert code == 2
    assert line.startswith("error: the download of")
    assert "is damaged: its SHA-256 is" in line
    assert list((near_hub.cache / "models--ByteDance--HLLM" / "blobs").iterdir()) == []
    assert not (tmp_path / "model_checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--repo", "No/Body"), ["pytorch_model.bin of No/Body", "no such repository"]),
        (("--file", "no.bin"), ["no.bin of ByteDance/HLLM", "no such file"]),
        (("--revision", "v9"), ["no revision 'v9'", "--revision"]),
        (("--base_repo", "No/Body"), ["config.json of No/Body", "no such repository"]),
        (("--repo", "a/b/c"), ["a/b/c", "OWNER/NAME"]),
        (("--sha256", "0" * 64), ["--sha256 says 0000"]),
    ],
    ids=str,
)
def test_what_the_hub_lacks_is_named(
    near_hub: NearHub, tmp_path: Path, flags: tuple[str, ...], words: list[str]
) -> None:
    code, line = near_hub.run("item", *flags)
    assert code == 2
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "model_checkpoints").exists()


def test_a_published_checkpoint_is_named(hub: Hub, near_hub: NearHub, tmp_path: Path) -> None:
    file = "1B_books/pytorch_model.bin"
    hub.files[REPO, file] = hub.files[REPO, FILE]
    hub.large.add(file)
    code, line = near_hub.run("user", "--checkpoint", "1B_books")
    assert code == 0, line
    manifest = json.loads((tmp_path / "model_checkpoints/UserLLM_complete/import.json").read_text())
    assert manifest["source"]["file"] == file
    code, line = near_hub.run("user")
    assert code == 2
    assert "you asked for 1B_Pixel8M/pytorch_model.bin" in line


def test_checks_of_an_import_need_not_look_at_it(
    hllm: TinyHllm, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("item", "user"):
        assert local(side, hllm, Path(side)) == 0
    folder = records_folder()
    assert folder is not None
    before = {path.name for path in folder.iterdir()}
    assert before
    words = ["--config_file", "overall/LLM_ddp.yaml", "HLLM/HLLM.yaml", "--dataset", "tiny"]
    words += ["--item_pretrain_dir", "item", "--user_pretrain_dir", "user", "--use_qlora", "True"]
    for program, flag in (
        (cache_main, "--check"),
        (train_main, "--check"),
        (train_main, "--dry_run"),
    ):
        code, _, err = project.call(program, [*words, flag, "True"])
        assert code in (0, 2), err
    assert {path.name for path in folder.iterdir()} == before


def test_a_hub_out_of_reach_is_named(near_hub: NearHub, hllm: TinyHllm, tmp_path: Path) -> None:
    near_hub.move_to("http://127.0.0.1:9")
    code, line = near_hub.run("item")
    assert code == 2
    assert "from http://127.0.0.1:9" in line
    assert "neither config.json nor tokenizer, which come from its base model" in line
    for way in ("--base_dir", "--from_file", "--item_pretrain_dir"):
        assert way in line
    base = tmp_path / "base"
    base.mkdir()
    for path in hllm.base.glob("*.json"):
        (base / path.name).write_bytes(path.read_bytes())
    code, line = near_hub.run("user", "--base_dir", str(base))
    assert code == 2
    assert line.startswith(f"error: cannot fetch {FILE} of {REPO} from http://127.0.0.1:9: ")
    assert line.endswith("or give a local file with --from_file.")


def test_offline_by_wish_is_one_whole_sentence(
    near_hub: NearHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, line = near_hub.run("user", "--from_file", str(near_hub.cache))
    assert (code, line) == (2, f"error: --from_file {near_hub.cache} is not a file.")
    code, line = near_hub.run("user")
    assert code == 2
    assert line == (
        f"error: HLLM's checkpoint has no config.json, which comes from its base model: cannot "
        f"fetch config.json of {BASE}: the cache does not have it, and HF_HUB_OFFLINE is set; "
        f"unset it, or name a local folder of that model with --base_dir (and the checkpoint with "
        f"--from_file); any other transformers folder can be used as it is with "
        f"--user_pretrain_dir."
    )


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b""])
def test_a_file_that_is_no_checkpoint_is_refused_before_the_hub_is_asked(
    hub: Hub, near_hub: NearHub, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "wrong.csv").write_bytes(content)
    code, line = near_hub.run("item", "--from_file", "wrong.csv")
    assert code == 2
    assert line.startswith("error: wrong.csv is no checkpoint in torch's zip format")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("a", "b")
    code, line = near_hub.run("item", "--from_file", "other.zip")
    assert code == 2
    assert line.startswith("error: other.zip is no checkpoint in torch's zip format")
    assert hub.requests == []


def test_the_disk_for_download_and_output_is_counted_together(
    hub: Hub, near_hub: NearHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_hllm, "free_bytes", lambda _: 17_000_000)
    hub.files[REPO, FILE] += bytes(2_000_000)
    code, line = near_hub.run("item")
    assert code == 2
    assert "17.0 MB free" in line
    assert "for the model folder" in line
    assert "for the download to" in line
    assert hub.downloads() == []


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("side", ["item", "user"])
def test_weights_are_the_originals_in_the_dtype(
    hllm: TinyHllm, tmp_path: Path, side: str, dtype: str
) -> None:
    out = tmp_path / "out"
    assert local(side, hllm, out, "--dtype", dtype, "--max_shard_size", "60KB") == 0
    original = getattr(hllm, side).model.state_dict()
    actual = weights(out)
    if side == "user":
        assert actual["embed_tokens.weight"].shape == (1, 64)
        original["embed_tokens.weight"] = torch.zeros(1, 64)
    assert actual.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(actual[name], value.to(getattr(torch, dtype)))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == original.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in actual.values())
    shards = [path.stat().st_size for path in out.glob("model-*.safetensors")]
    assert len(shards) > 2
    assert max(shards) < 60_000 + 4_000
    extra = read_extra(out)
    assert torch.equal(extra["item_emb_tokens"], hllm.emb_token)
    assert float(extra["logit_scale"]) == 2.5
    assert (out / "tokenizer.json").is_file() == (side == "item")


@pytest.mark.parametrize("side", ["item", "user"])
def test_transformers_loads_the_folder_with_no_weight_missing(
    hllm: TinyHllm, tmp_path: Path, side: str
) -> None:
    out = tmp_path / "out"
    assert local(side, hllm, out, "--dtype", "float32") == 0
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    expected = getattr(hllm, side).model(inputs_embeds=inputs).last_hidden_state
    torch.testing.assert_close(model.eval()(inputs_embeds=inputs).last_hidden_state, expected)
    decoder = load_decoder(
        out, dtype=torch.float32, attention="sdpa", keep_token_embedding=side == "item"
    )
    torch.testing.assert_close(decoder.eval()(inputs_embeds=inputs).last_hidden_state, expected)


@pytest.mark.parametrize(("stored", "used"), [(2.5, 2.5), (7.0, math.log(100)), (-1.0, 0.0)])
def test_the_stored_logit_scale_is_used_and_clamped(
    project: Project, tmp_path: Path, stored: float, used: float
) -> None:
    hllm = make_hllm(tmp_path / "checkpoint", logit_scale=stored)
    assert local("user", hllm, tmp_path / "user") == 0
    flags = last_wins([*project.arguments, "--user_pretrain_dir", str(tmp_path / "user")])
    config = program_config(flags, "main.py", "", ())
    assert config is not None
    data = load_data(config, need_cache=True)
    model = build_user_llm(config, data, make_fabric(config), train=True)
    assert model.scale().item() == pytest.approx(used)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[TinyHllm], Any]:
    """A checkpoint's content after a change to its state dict."""

    def make(hllm: TinyHllm) -> Any:
        state = dict(hllm.state)
        changed = change(state)
        return state if changed is None else changed

    return make


GOOD: dict[str, Callable[[TinyHllm], Any]] = {
    "module prefix": edited(lambda s: {f"module.{key}": value for key, value in s.items()}),
    "wrapped": edited(lambda s: {"module": s, "global_steps": 3}),
    "no lm_head": edited(lambda s: {k: v for k, v in s.items() if "lm_head" not in k}),
    "no user embedding": edited(
        lambda s: {k: v for k, v in s.items() if k != "user_llm.model.embed_tokens.weight"}
    ),
    "mean pooling": edited(lambda s: {k: v for k, v in s.items() if k != "item_emb_tokens"}),
    "rotary buffers": edited(
        lambda s: s | {"user_llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    ),
    "scale of one element": edited(lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)}),
    "half precision": edited(lambda s: {key: value.half() for key, value in s.items()}),
}


@pytest.mark.parametrize("case", GOOD)
def test_variants_of_the_layout_are_read(hllm: TinyHllm, tmp_path: Path, case: str) -> None:
    torch.save(GOOD[case](hllm), tmp_path / "variant.bin")
    more = ("--from_file", str(tmp_path / "variant.bin"), "--dtype", "float16")
    assert local("user", hllm, tmp_path / "variant", *more) == 0
    assert local("user", hllm, tmp_path / "plain", "--dtype", "float16") == 0
    actual, expected = weights(tmp_path / "variant"), weights(tmp_path / "plain")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_a_checkpoint_trained_with_mean_pooling_is_mean_pooled(
    hllm: TinyHllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: value for key, value in hllm.state.items() if key != "item_emb_tokens"}
    torch.save(state, tmp_path / "mean.bin")
    for side in ("user", "item"):
        capsys.readouterr()
        more = ("--from_file", str(tmp_path / "mean.bin"), "--dtype", "float32")
        assert local(side, hllm, tmp_path / side, *more) == 0
        assert ("has no item_emb_tokens" in capsys.readouterr().err) == (side == "item")
        extra = load_file(tmp_path / side / "hllm_extra.safetensors")
        assert extra.keys() == {"logit_scale"}
    encoder = load_item_encoder(
        tmp_path / "item",
        item_emb_token_n=1,
        max_text_length=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="eager",
    )
    assert encoder.pooling == "mean"
    # HLLM: the sum of the last hidden states over the number of tokens.
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        expected = hllm.item.model(tokens).last_hidden_state.sum(dim=1) / 3
    actual = encoder.encode([tokens[0].numpy()])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------


class Malicious:
    """A pickle that makes a folder where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


NORM = "item_llm.model.norm.weight"
BAD: dict[str, tuple[Callable[[TinyHllm], Any], list[str]]] = {
    "missing key": (edited(lambda s: {k: v for k, v in s.items() if k != NORM}), ["lacks", NORM]),
    "missing scale": (
        edited(lambda s: {k: v for k, v in s.items() if k != "logit_scale"}),
        ["lacks", "logit_scale"],
    ),
    "missing layer": (
        edited(lambda s: {k: v for k, v in s.items() if "layers.1." not in k}),
        ["lacks", "item_llm.model.layers.1.", "and 6 more"],
    ),
    "missing side": (
        edited(lambda s: {k: v for k, v in s.items() if not k.startswith("item_llm.")}),
        ["no weights item_llm.*"],
    ),
    "unexpected key": (
        edited(lambda s: s | {"item_llm.visual.weight": torch.zeros(2), "odd": torch.zeros(1)}),
        ["unexpected keys", "item_llm.visual.weight", "odd"],
    ),
    "one layer more": (
        edited(lambda s: s | {"item_llm.model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
        ["unexpected keys", "item_llm.model.layers.2.mlp.up_proj.weight"],
    ),
    "wrong shape": (
        edited(lambda s: s | {NORM: torch.zeros(32)}),
        [f"'{NORM}' has shape [32]", "implies [64]"],
    ),
    "wrong emb token": (
        edited(lambda s: s | {"item_emb_tokens": torch.zeros(1, 2, 64)}),
        ["'item_emb_tokens' has shape [1, 2, 64]", "implies [1, 1, 64]"],
    ),
    "integers": (
        edited(lambda s: s | {NORM: torch.zeros(64, dtype=torch.int64)}),
        [NORM, "torch.int64"],
    ),
    "not a tensor": (edited(lambda s: s | {NORM: [1.0]}), [NORM, "list"]),
    "NaN": (edited(lambda s: s | {NORM: torch.full((64,), torch.nan)}), [NORM, "NaN"]),
    "overflow": (
        edited(lambda s: s | {NORM: torch.full((64,), 1e6)}),
        [NORM, "float16", "bfloat16"],
    ),
    "not a dict": (lambda _: [torch.zeros(3)], ["no weights item_llm.*"]),
    "only a tensor": (lambda _: torch.zeros(3), ["no weights item_llm.*"]),
    "malicious": (edited(lambda s: s | {"item_llm.x": Malicious()}), ["could run code"]),
    "malicious alone": (lambda _: Malicious(), ["could run code"]),
}


def refused(hllm: TinyHllm, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Import into `folder`/out, expect a refusal that leaves no trace, return its line."""
    before = tree(folder)
    capsys.readouterr()
    assert local("item", hllm, folder / "out", *more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in err
    assert tree(folder) == before
    return lines[-1]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_clear_line(
    hllm: TinyHllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    make, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    torch.save(make(hllm), tmp_path / "bad.bin")
    line = refused(hllm, tmp_path, capsys, "--from_file", "bad.bin", "--dtype", "float16")
    for word in ["bad.bin", *words]:
        assert word in line


@pytest.mark.parametrize("keep", [0, 10, 5_000, -1])
def test_a_truncated_file_is_one_clear_line(
    hllm: TinyHllm, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: int
) -> None:
    (tmp_path / "cut.bin").write_bytes(hllm.file.read_bytes()[:keep])
    line = refused(hllm, tmp_path, capsys, "--from_file", str(tmp_path / "cut.bin"))
    assert "cut.bin" in line
    assert "cut short" in line


def test_an_old_style_pickle_with_code_is_not_run(
    hllm: TinyHllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    refused(hllm, tmp_path, capsys, "--from_file", "old.bin")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "int8"), ["--dtype", "int8", "bfloat16"]),
        (("--max_shard_size", "much"), ["'much' is no size"]),
        (("--sha256", "0" * 64), ["--sha256 says 0000"]),
        (("--from_file", "nowhere.bin"), ["nowhere.bin is not a file"]),
        (("--base_dir", "nowhere"), ["--base_dir nowhere is not a folder"]),
        (("--form_file", "x"), ["--form_file"]),
        (("--checkpoint", "2B"), ["'2B' is none of 1B_Pixel8M, 1B_books_neg512", "--file"]),
        (("--checkpoint", "7B_books"), ["Baichuan2-7B", "use 1B_books"]),
        (("--checkpoint", "1B_books", "--file", "x.bin"), ["--file", "--checkpoint"]),
    ],
    ids=str,
)
def test_a_bad_option_is_one_clear_line(
    hllm: TinyHllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: list[str],
) -> None:
    line = refused(hllm, tmp_path, capsys, *flags)
    for word in words:
        assert word in line


def test_a_base_model_of_other_size_is_refused(
    hllm: TinyHllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in hllm.base.glob("*.json"):
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    line = refused(hllm, tmp_path, capsys, "--base_dir", str(base))
    assert "k_proj.weight' has shape [32, 64]" in line
    (base / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "'gpt2'" in refused(hllm, tmp_path, capsys, "--base_dir", str(base))


def test_a_full_disk_is_said_before_the_start(
    hllm: TinyHllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_hllm, "free_bytes", lambda _: 1_000_000)
    line = refused(hllm, tmp_path, capsys)
    assert "1.0 MB free" in line
    assert "are needed" in line


def test_a_finished_import_is_left_alone(
    hllm: TinyHllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert local("item", hllm, out) == 0
    before = tree(tmp_path)
    assert local("item", hllm, out) == 0
    assert tree(tmp_path) == before
    assert "left alone" in capsys.readouterr().err
    # Another request, or a file of the user's, is not silently replaced.
    assert "bfloat16" in refused(hllm, tmp_path, capsys, "--dtype", "float32")
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(hllm, tmp_path, capsys, "--force")
    (out / "notes.txt").unlink()
    assert local("item", hllm, out, "--dtype", "float32", "--force") == 0
    assert weights(out)["norm.weight"].dtype == torch.float32
    # A damaged import is found.
    with (out / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    line = refused(hllm, tmp_path, capsys, "--dtype", "float32")
    assert "model.safetensors has changed" in line


def test_a_folder_of_the_users_is_not_touched(
    hllm: TinyHllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for more in ((), ("--force",)):
        assert "no import.json" in refused(hllm, tmp_path, capsys, *more)


# --- memory and interruption ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of two sides of 134 MB in float32, and its base model."""
    folder = tmp_path_factory.mktemp("medium")
    hllm = make_hllm(folder)
    config = json.loads((hllm.base / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    config["head_dim"] = 128
    (hllm.base / "config.json").write_text(json.dumps(config))
    from hsft.hub.layout import read_layout

    shapes = read_layout(hllm.base, "item").shapes
    side = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state = {f"{s}_llm.model.{name}": value for s in PROGRAMS for name, value in side.items()}
    # Sharing would make the file half as large.
    state = {name: value.clone() for name, value in state.items()}
    state |= {"item_emb_tokens": torch.zeros(1, 1, 512), "logit_scale": torch.tensor(2.0)}
    torch.save(state, hllm.file)
    return folder


def peak_bytes(argv: list[str]) -> int:
    """Run the item script and return its peak resident memory."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "download_itemllm.py"), *argv],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_checkpoint(
    hllm: TinyHllm, medium: Path, tmp_path: Path
) -> None:
    file = medium / "pytorch_model.bin"
    assert file.stat().st_size > 250e6
    plain = peak_bytes(
        ["--from_file", str(hllm.file), "--base_dir", str(hllm.base), "--out", f"{tmp_path}/tiny"]
    )
    where = ("--from_file", str(file), "--base_dir", str(medium / "base"))
    more = ("--dtype", "float32", "--max_shard_size", "12MB", "--out", f"{tmp_path}/medium")
    actual = peak_bytes([*where, *more])
    # One shard of at most 12 MB mapped and copied, against 134 MB of the side that is written.
    assert actual - plain < 60e6


def test_a_terminated_import_leaves_nothing(medium: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "download_itemllm.py"), "--out", str(tmp_path / "out")]
    command += ["--from_file", f"{medium}/pytorch_model.bin", "--base_dir", f"{medium}/base"]
    process = subprocess.Popen(
        [*command, "--max_shard_size", "1MB"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob(".out.*/model-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    last = err.splitlines()[-1]
    assert last.startswith("interrupted: stopped by SIGTERM")
    assert "no model folder was written" in last
    assert list(tmp_path.iterdir()) == []

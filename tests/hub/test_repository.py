"""A run on the hub: pushed by export.py, and read again as hf://OWNER/NAME."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import constants

import hsft
from cold_start import main as cold_start_main
from compare import main as compare_main
from export import main as export_main
from hsft.hub.repository import Address, output_folder, read_address, run_name
from hsft.utils.errors import InputError
from hsft.utils.files import read_json
from recommend import main as recommend_main
from report import main as report_main
from tests.conftest import Project
from tests.helpers import make_dataset
from tests.hub_server import TOKEN, Hub, running_hub

REPO = "me/run"
RUN = f"hf://{REPO}"
QLORA = (
    "--use_qlora",
    "True",
    "--qlora_quant_type",
    "none",
    "--epochs",
    "1",
    "--nce_thres",
    "1.01",
)


@dataclass
class OnHub:
    """A project and a hub that it may push to.

    Attributes:
        project: with finished runs in `saved/`.
        hub: the hub.
    """

    project: Project
    hub: Hub

    def push(self, run: str, *more: str, repo: str = REPO) -> tuple[int, str, str]:
        argv = ["--run", run, "--push_to_hub", repo, *more]
        return self.project.call(export_main, argv)

    def recommend(self, run: str, *more: str) -> dict[str, Any]:
        code, out, err = self.project.call(recommend_main, ["--run", run, *more, "--json"])
        assert code == 0, err
        return dict(json.loads(out))

    def move_away(self) -> None:
        """Leave nothing of the project where it was but the UserLLM."""
        for name in ("saved", "dataset", "information"):
            shutil.rmtree(self.project.root / name)


@pytest.fixture
def on_hub(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHub]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The server has no route of Xet's.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project.root / "hub"))
    with running_hub() as hub:
        move_to(hub.url, monkeypatch)
        yield OnHub(project, hub)


def move_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the hub's address, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def train(project: Project, *more: str, name: str = "run") -> Path:
    code, _, err = project.run("--run_name", name, "--num_threads", "1", *more)
    assert code == 0, err
    return Path("saved") / name


def test_a_pushed_run_recommends_as_before(on_hub: OnHub, tmp_path: Path) -> None:
    project, hub = on_hub.project, on_hub.hub
    run = train(project, *QLORA)
    asked = ("--user", "u3", "--topk", "5")
    before = on_hub.recommend(str(run), *asked)
    code, out, err = on_hub.push(str(run), "--format", "run")
    assert code == 0, err
    assert out.splitlines() == [f"exported: {run}/export-run", f"pushed: {hub.url}/{REPO}"]
    assert hub.private == {REPO: True}
    pushed = hub.repo(REPO)
    assert pushed.keys() == {
        ".gitattributes",
        *("README.md", "config.yaml", "export.json", "ranks.safetensors", "result.json"),
        *("best/trained.safetensors", "best/adapter/adapter_config.json"),
        "best/adapter/adapter_model.safetensors",
        *("dataset/tiny.csv", "dataset/tiny_item_embeddings.safetensors", "information/tiny.csv"),
    }
    # Neither a path of this machine nor a model that is not the user's.
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in pushed.items() if str(project.llama).encode() in content]
    measured = json.loads(pushed["result.json"])["rows"][-1]["metrics"]["NDCG@10"]
    rows = [
        line
        for line in pushed["README.md"].decode().splitlines()
        if line.startswith("| fine-tuned")
    ]
    assert f"| {measured:.4f}" in rows[0]
    on_hub.move_away()
    where = ("--user_pretrain_dir", str(project.llama))
    after = on_hub.recommend(RUN, *asked, *where)
    assert after.pop("run") == RUN
    before.pop("run")
    assert after == before
    code, _, err = project.call(recommend_main, ["--run", RUN, "--user", "u3"])
    assert code == 2
    assert "comes without the UserLLM that it was made with, llama0; say where yours is" in err
    # What was fetched is not fetched again, and does without the hub.
    downloads = len(hub.downloads())
    assert on_hub.recommend(f"{RUN}@main", *asked, *where)["recommendations"]
    assert len(hub.downloads()) == downloads


def test_every_program_reads_a_run_on_the_hub(on_hub: OnHub) -> None:
    project = on_hub.project
    other = train(project, "--model", "pop", name="other")
    make_dataset(project.root, "more", items=24)
    run = train(project, "--val_only", "True")
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    code, out, err = project.call(compare_main, [str(other), RUN])
    assert code == 0, err
    assert "run/comparison.md" in out
    table = (project.root / "run" / "comparison.md").read_text()
    assert "| run |" in table
    assert "snapshots" not in table
    where = ["--user_pretrain_dir", str(project.llama)]
    code, out, err = project.call(report_main, [RUN, "--examples", "1", *where])
    assert code == 0, err
    page = (project.root / "run" / "report.html").read_text()
    assert "snapshots" not in page
    code, _, err = project.call(cold_start_main, ["--run", RUN, "--dataset", "tiny", *where])
    assert code == 2
    assert "was trained on tiny itself" in err
    code, out, err = project.call(
        export_main, ["--run", RUN, "--format", "embeddings", "--index", "none", *where]
    )
    assert code == 0, err
    assert out == "exported: run/export-embeddings\n"
    opened = hsft.open_run(RUN)
    assert opened.metrics.equals(hsft.open_run(run).metrics)
    # Nothing is written into the hub's cache.
    (project.root / "run" / "report.html").unlink()
    assert opened.report(examples=0) == Path("run/report.html")
    assert not (opened.folder / "report.html").exists()


def test_a_run_in_public_has_no_data(on_hub: OnHub) -> None:
    project, hub = on_hub.project, on_hub.hub
    run = train(project, "--model", "pop")
    assert on_hub.push(str(run), "--format", "run", "--private", "False")[0] == 0
    assert hub.private == {REPO: False}
    assert not [name for name in hub.repo(REPO) if "tiny" in name]
    assert on_hub.recommend(RUN, "--user", "u3")["recommendations"]
    shutil.rmtree(project.root / "dataset")
    code, _, err = project.call(recommend_main, ["--run", RUN, "--user", "u3"])
    assert code == 2
    assert "say where things are with --data_path" in err
    # A run with data does not go where everybody reads it unless that is asked for.
    make_dataset(project.root)
    again = ("--format", "run", "--overwrite", "True")
    code, _, err = on_hub.push(str(run), *again)
    assert code == 2
    assert f"{REPO} is a public repository" in err
    assert on_hub.push(str(run), *again, "--private", "False", "--with_data", "True")[0] == 0
    assert "dataset/tiny.csv" in hub.repo(REPO)
    # What a later push does not have is gone.
    assert on_hub.push(str(run), *again, "--private", "False")[0] == 0
    assert "dataset/tiny.csv" not in hub.repo(REPO)


def test_another_export_is_pushed_and_is_no_run(on_hub: OnHub) -> None:
    run = train(on_hub.project, *QLORA)
    code, _, err = on_hub.push(str(run))
    assert code == 0, err
    pushed = on_hub.hub.repo(REPO)
    assert {"config.json", "model.safetensors"} <= pushed.keys()
    assert not [name for name, text in pushed.items() if str(on_hub.project.llama).encode() in text]
    code, _, err = on_hub.project.call(recommend_main, ["--run", RUN, "--user", "u3"])
    assert code == 2
    assert f"{RUN} holds an export of --format merged and not a run; push one with" in err


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "does not take the token (401); log in with `hf auth login` or set HF_TOKEN"),
        (None, "there is no token for"),
    ],
)
def test_a_wrong_token_is_said_before_the_export(
    on_hub: OnHub, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    run = train(on_hub.project, "--model", "pop")
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    shutil.rmtree(run / "export-run")
    code, out, err = on_hub.push(str(run), "--format", "run")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: cannot push to {REPO}: ")
    assert message in line
    assert not (run / "export-run").exists()
    code, _, err = on_hub.project.call(recommend_main, ["--run", RUN, "--user", "u3"])
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: cannot open {RUN}: {on_hub.hub.url} has no such repository, or it is private; check "
        f"the name, or log in with `hf auth login`."
    )


def test_a_repository_or_revision_that_is_not_there(on_hub: OnHub) -> None:
    code, _, err = on_hub.project.call(recommend_main, ["--run", "hf://me/no", "--user", "u3"])
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(
        f"error: cannot open hf://me/no: {on_hub.hub.url} has no such repository"
    )
    run = train(on_hub.project, "--model", "pop")
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    code, _, err = on_hub.project.call(recommend_main, ["--run", f"{RUN}@no", "--user", "u3"])
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: cannot open {RUN}@no: the repository has no such revision."
    )


def test_a_hub_that_cannot_take_it(on_hub: OnHub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(on_hub.project, "--model", "pop")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = on_hub.push(str(run), "--format", "run")
    assert (code, err) == (2, f"error: cannot push to {REPO}: HF_HUB_OFFLINE is set; unset it.\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    code, _, err = on_hub.push(str(run), "--format", "run")
    assert code == 2
    assert "has no Xet storage; set HF_HUB_DISABLE_XET=1 and run again; saved/run/export-run" in err


def test_a_hub_that_is_down(on_hub: OnHub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(on_hub.project, "--model", "pop")
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    before = on_hub.recommend(RUN, "--user", "u3")
    move_to("http://127.0.0.1:9", monkeypatch)
    # The cache has it.
    assert on_hub.recommend(RUN, "--user", "u3") == before
    code, _, err = on_hub.project.call(recommend_main, ["--run", "hf://me/no", "--user", "u3"])
    assert code == 2
    assert "cannot open hf://me/no: http://127.0.0.1:9 does not answer (" in err.splitlines()[-1]
    code, _, err = on_hub.push(str(run), "--format", "run", "--overwrite", "True")
    assert code == 2
    (line,) = err.splitlines()
    assert f"cannot push to {REPO}: http://127.0.0.1:9 does not answer (" in line


def test_a_broken_download_is_continued(on_hub: OnHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    project, hub = on_hub.project, on_hub.hub
    run = train(project, *QLORA)
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    hub.cut_at, hub.fail_after_cut = 1000, True
    where = ("--user_pretrain_dir", str(project.llama))
    argv = ["--run", RUN, "--user", "u3", *where]
    code, _, err = project.call(recommend_main, argv)
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "error: cannot fetch best/adapter/adapter_model.safetens"
    )
    assert err.endswith("(what was downloaded is kept).\n")
    hub.failing = False
    code, _, err = project.call(recommend_main, argv)
    assert code == 0, err
    assert any(line.endswith("bytes=1000-") for line in hub.downloads())


def test_a_repository_with_other_files_is_left_alone(on_hub: OnHub) -> None:
    on_hub.hub.files[REPO, "model.safetensors"] = b"mine"
    run = train(on_hub.project, "--model", "pop")
    code, _, err = on_hub.push(str(run), "--format", "run", "--private", "False")
    assert code == 2
    assert f"{REPO} holds files that are no export (it has no export.json)" in err
    assert on_hub.hub.repo(REPO) == {"model.safetensors": b"mine"}


def test_nothing_but_data_is_fetched_and_no_code_is_trusted(on_hub: OnHub) -> None:
    project, hub = on_hub.project, on_hub.hub
    run = train(project, "--val_only", "True", "--trust_remote_code", "True")
    assert hsft.open_run(run).push_to_hub(REPO) == f"{hub.url}/{REPO}"
    hub.files[REPO, "best/model.pt"] = hub.files[REPO, "evil.py"] = b"evil"
    config = hub.files[REPO, "config.yaml"].replace(
        b"trust_remote_code: false", b"trust_remote_code: true"
    )
    assert config != hub.files[REPO, "config.yaml"]
    hub.files[REPO, "config.yaml"] = config
    opened = hsft.open_run(RUN)
    names = {path.name for path in opened.folder.rglob("*") if path.is_file()}
    assert "config.yaml" in names
    assert not names & {"model.pt", "evil.py"}
    assert not opened.config.trust_remote_code


def test_an_exported_run_is_a_run_where_it_lies(project: Project, tmp_path: Path) -> None:
    run = train(project, "--model", "pop")
    code, _, err = project.call(export_main, ["--run", str(run), "--format", "run", "--out", "out"])
    assert code == 0, err
    manifest = read_json(tmp_path / "out" / "export.json")
    assert (manifest["format"], manifest["run"], manifest["with_data"]) == ("run", "run", True)
    shutil.rmtree(project.root / "dataset")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "moved")
    moved = str(tmp_path / "elsewhere" / "moved")
    code, out, err = project.call(recommend_main, ["--run", moved, "--user", "u3"])
    assert code == 0, err
    assert "item " in out


def test_a_run_on_parquet_files_is_pushed_and_read(on_hub: OnHub) -> None:
    project = on_hub.project
    for folder in ("dataset", "information"):
        table = project.root / folder / "tiny.csv"
        pd.read_csv(table, dtype=object).to_parquet(table.with_suffix(".parquet"))
        table.unlink()
    run = train(project, "--model", "pop")
    assert on_hub.push(str(run), "--format", "run")[0] == 0
    pushed = on_hub.hub.repo(REPO).keys()
    assert {"dataset/tiny.parquet", "information/tiny.parquet"} <= pushed
    assert not [name for name in pushed if name.endswith(".csv")]
    before = on_hub.recommend(str(run), "--user", "u3")
    on_hub.move_away()
    after = on_hub.recommend(RUN, "--user", "u3")
    assert after["recommendations"] == before["recommendations"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--push_to_hub", "me"], "'me' is no OWNER/NAME"),
        (["--private", "False"], "--private has no meaning without --push_to_hub"),
        (["--with_data", "True"], "--with_data has no meaning without --format run"),
        (["--format", "run", "--dtype", "float16"], "copies the weights as they are"),
        (["--format", "run", "--evaluate", "True"], "--evaluate scores a merged model"),
    ],
)
def test_contradictions_are_refused(project: Project, argv: list[str], message: str) -> None:
    code, _, err = project.call(export_main, ["--run", "saved/none", *argv])
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


def test_addresses() -> None:
    assert read_address("hf://me/run") == Address("me/run")
    assert read_address("hf://me/run@v1") == Address("me/run", "v1")
    assert read_address(Path("hf://me/run")) == Address("me/run")
    assert read_address("saved/run") is None
    assert output_folder("hf://me/run@v1") == Path("run")
    assert output_folder("hub/models--me--run/snapshots/0123") == Path("run")
    assert output_folder("saved/run") == Path("saved/run")
    assert run_name("hub/models--me--run/snapshots/0123") == "run"
    for name in ("hf://me", "hf://", "hf://me/run/more"):
        with pytest.raises(InputError, match="names no run on the hub"):
            read_address(name)

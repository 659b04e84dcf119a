"""Fixtures shared by the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.varlen_reference import reference_varlen_attn
from hsft.model import varlen
from hsft.utils.program import run_program
from main import main
from tests.helpers import ROOT, make_cache, make_dataset, make_llama


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep this program's records, of subprocesses too, out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers and hidden size 64 as a model folder."""
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def emulated_varlen() -> Iterator[None]:
    """Put the reference in the place of torch's variable-length kernel, which wants a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", reference_varlen_attn)
        patch.setattr(varlen, "_CAUSAL", {"window_size": (-1, 0)})
        patch.setattr(varlen, "_GROUPED", True)
        yield


@dataclass
class Project:
    """A folder laid out as the repo's root, with a tiny data set, its cache and a tiny Llama."""

    root: Path
    llama: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def arguments(self) -> list[str]:
        """What every command of a test needs."""
        return [
            *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/HLLM/HLLM.yaml"),
            *("--dataset", "tiny", "--user_pretrain_dir", str(self.llama)),
            *("--MAX_ITEM_LIST_LENGTH", "8", "--precision", "32-true", "--show_progress", "False"),
        ]

    def run(self, *more: str) -> tuple[int, str, str]:
        """Run main.py in this process; later values of a flag replace earlier ones."""
        return self.call(main, [*self.arguments, *more])

    def call(self, program: Callable[..., int], argv: list[str]) -> tuple[int, str, str]:
        """Run a program in this process: exit code, standard output, standard error."""
        self.capsys.readouterr()
        code = run_program(program, last_wins(argv))
        out, err = self.capsys.readouterr()
        return code, out, err


def last_wins(argv: list[str]) -> list[str]:
    """Keep the last occurrence of each flag, with its values."""
    flags: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            flags.pop(word, None)
            flags[word] = []
        elif flags:
            flags[list(flags)[-1]].append(word)
        else:
            return argv
    return [word for flag, values in flags.items() for word in (flag, *values)]


@pytest.fixture
def project(
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Project:
    """A project folder, the current directory for the test."""
    make_dataset(tmp_path)
    make_cache(tmp_path / "dataset" / "tiny_item_embeddings.safetensors")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, llama, capsys)


DEMO_FILES = (
    "dataset/ml-100k.csv",
    "information/ml-100k.csv",
    "model_checkpoints/SmolLM2-135M-Instruct/model.safetensors",
)


@pytest.fixture(scope="session")
def demo_files() -> Path:
    """The repo's root with the demo's data and LLM in place; the test command prepares them."""
    for name in DEMO_FILES:
        if not (ROOT / name).is_file():
            pytest.skip(f"{name} is not there; make test prepares it")
    return ROOT

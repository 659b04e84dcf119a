"""The package as users get it: built, installed into an empty environment, and used there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from hsft import __version__
from tests.encoders import make_sentence_folder
from tests.helpers import ROOT, make_cache, make_dataset

NEEDED = ("build", "setuptools")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="the packages build and setuptools are not installed (hsft[dev])",
    ),
]
PRESETS = sorted(
    path.relative_to(ROOT / "code").as_posix()
    for folder in ("HLLM", "IDNet", "baselines", "overall")
    for path in (ROOT / "code" / folder).glob("*.yaml")
)


def run(words: list[str], folder: Path) -> str:
    """Run a command outside the repository and return its standard output."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT")
    done = subprocess.run(
        words,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "code", source / "code", ignore=skipped)
    names = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
    for name in (*names, "CITATION.cff", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), "."], source)
    return out


def install_alone(source: str, folder: Path) -> Path:
    """Install a distribution into an empty environment and return the environment's `bin` folder.

    The packages that it needs are those of the tests' environment, at the end of its path: to
    download torch once more would take minutes.
    """
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "--quiet"]
    # An editable HSFT of the tests' environment does not count as installed here.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run([*pip, "install", *options, source], folder)
    return scripts


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with nothing but the wheel."""
    (wheel,) = built.glob("*.whl")
    return install_alone(str(wheel), tmp_path_factory.mktemp("environment"))


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None,
    reason="no git repository to install from",
)
def test_pip_installs_from_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # git refuses a repository of another user, such as one that is mounted into a container.
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
    scripts = install_alone(f"git+{ROOT.as_uri()}", tmp_path)
    assert run([str(scripts / "hsft"), "--version"], tmp_path).startswith("hsft ")
    where = "import hsft; print(hsft.__file__)"
    shown = run([str(scripts / "python"), "-c", where], tmp_path)
    assert Path(shown.strip()).is_relative_to(tmp_path)


@pytest.fixture
def pixel(tmp_path: Path, llama: Path) -> Path:
    """A folder with tiny data and a tiny Llama under the names of the README."""
    make_dataset(tmp_path, "Pixel200K")
    interactions = tmp_path / "dataset/Pixel200K.csv"
    interactions.write_text(interactions.read_text().replace(",u1,", ",1001,"))
    make_cache(tmp_path / "dataset/pixel200k_item_embeddings.safetensors")
    (tmp_path / "model_checkpoints").mkdir()
    (tmp_path / "model_checkpoints/UserLLM_complete").symlink_to(llama)
    return tmp_path


def test_pyproject_names_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(listed["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT / "code").parts)
        for path in (ROOT / "code/hsft").rglob("__init__.py")
    }
    assert {name for name in packages if not name.startswith("hsft.presets.")} == there


def test_wheel_and_sdist_hold_the_package_and_its_data(built: Path) -> None:
    code = ROOT / "code"
    ours = {
        path.relative_to(code).as_posix()
        for path in (code / "hsft").rglob("*")
        if path.suffix in (".py", ".html", ".j2") or path.name == "py.typed"
    }
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = ours | {f"hsft/presets/{name}" for name in PRESETS}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert f"hsft-{__version__}.dist-info/licenses/LICENSE" in names
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        inside = {name.partition("/")[2] for name in content.getnames()}
    assert {f"code/{name}" for name in ours} <= inside
    assert {f"code/{name}" for name in PRESETS} <= inside
    assert not any(name.startswith("tests") for name in inside)


def test_the_installed_command_runs_and_names_itself(environment: Path, pixel: Path) -> None:
    command = str(environment / "hsft")
    assert run([command, "--version"], pixel) == f"hsft {__version__}\n"
    shown = run([command, "train", "--help"], pixel)
    assert "hsft train --config_file overall/LLM_ddp.yaml HLLM/HLLM.yaml" in shown
    words = ["evaluate", "--config_file", "overall/LLM_ddp.yaml", "--dataset", "Pixel200K"]
    out = run([command, *words, "--model", "pop"], pixel)
    assert "intervals and paired tests: hsft compare saved/Pixel200K-pop" in out
    # The report needs the template that is in the wheel.
    run([command, "report", "saved/Pixel200K-pop", "--examples", "0"], pixel)
    assert (pixel / "saved/Pixel200K-pop/report.html").is_file()


@pytest.fixture
def small_demo(tmp_path: Path, llama: Path) -> Path:
    """The demo's configuration and paths, with tiny data and a tiny Llama behind them."""
    make_dataset(tmp_path, "ml-100k")
    interactions = tmp_path / "dataset/ml-100k.csv"
    interactions.write_text(interactions.read_text().replace(",u1,", ",196,"))
    (tmp_path / "model_checkpoints").mkdir()
    (tmp_path / "model_checkpoints/SmolLM2-135M-Instruct").symlink_to(llama)
    make_sentence_folder(
        tmp_path / "model_checkpoints/all-MiniLM-L6-v2", {"pooling_mode_mean_tokens": True}
    )
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo/demo.yaml", tmp_path / "demo")
    return tmp_path


def test_the_readmes_lines_run_in_the_environment(environment: Path, small_demo: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(ast.parse(lines).body) <= 5
    check = (
        "\nimport pathlib, sys\n"
        "assert pathlib.Path(hsft.__file__).is_relative_to(sys.prefix)\n"
        "assert list(run.metrics.index) == ['untrained', 'fine-tuned']\n"
        "assert run.folder.name == 'ml-100k-qlora'\n"
    )
    out = run([str(environment / "python"), "-c", lines + check], small_demo)
    assert "NDCG@10" in out
    assert "item_id" in out

"""`hsft`: every program as a sub-command, beside the scripts of the repository."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hsft import __version__
from hsft.cli import help_text, program, run_command
from hsft.config.options import Parser, add_flag
from hsft.utils.errors import InputError
from hsft.utils.program import PROGRAMS, command, command_line, install_command, run_program
from tests.conftest import Project
from tests.helpers import ROOT


def hsft(*words: str, cwd: Path = ROOT, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hsft", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "code"), "COLUMNS": str(columns)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_is_a_program_and_every_program_has_its_module() -> None:
    scripts = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.py")}
    scripts |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "code").glob("*.py")}
    assert {about.script for about in PROGRAMS.values()} - {""} == scripts
    modules = {path.stem for path in (ROOT / "code/hsft/programs").glob("*.py")} - {"__init__"}
    assert {about.module for about in PROGRAMS.values()} == modules


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_names_the_command_that_was_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hsft", name, "--help"])
    with contextlib.suppress(SystemExit):  # argparse ends so
        assert run_command([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: hsft {name}" in shown
    examples = shown[shown.index("examples:") :].splitlines()
    assert examples[1].startswith(f"  hsft {name}")
    assert "python " not in shown
    assert "code/overall" not in shown


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_tells_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # argparse ends so
        assert program(name)(["--version"]) == 0
    assert capsys.readouterr().out == f"hsft {__version__}\n"


def test_the_command_itself() -> None:
    assert hsft("--version").stdout == f"hsft {__version__}\n"
    done = hsft("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in PROGRAMS)
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name, message in {
        "": "error: no command is given; hsft --help lists them.\n",
        "trian": "error: hsft has no command 'trian'; did you mean train?\n",
        "x\n": "error: hsft has no command 'x\\n'; hsft --help lists them.\n",
    }.items():
        done = hsft(*filter(None, [name]))
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("columns", [72, 140])
def test_help_fits_the_terminal(columns: int) -> None:
    for name in ("train", "cache"):
        shown = hsft(name, "--help", columns=columns).stdout
        start, end = shown.index("examples:"), shown.index("flags:")
        text = shown[:start] + shown[end:]
        # A line of a key names its type and default and is not broken.
        wrapped = [line for line in text.splitlines() if not line.startswith("  --")]
        assert max(map(len, wrapped)) <= columns
        assert max(map(len, wrapped)) > columns - 15


def test_a_run_by_the_command(project: Project) -> None:
    words = [*("--config_file", "overall/LLM_ddp.yaml", "--dataset", "tiny", "--model", "pop")]
    done = hsft("evaluate", *words, "--run_name", "a", cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert "\nresult: saved/a/result.json" in done.stdout
    # What to do next is said in the same form.
    assert "intervals and paired tests: hsft compare saved/a\n" in done.stdout
    done = hsft("compare", "saved/a", cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert "saved: saved/a/comparison.md" in done.stdout


WITHOUT = """
import runpy, sys
sys.path.insert(0, {code!r})
sys.modules[{package!r}] = None  # any import of it now fails
sys.argv = ["hsft", *sys.argv[1:]]
runpy.run_module("hsft", run_name="__main__")
"""


def without(package: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `hsft` in a Python that cannot import a package."""
    program = WITHOUT.format(code=str(ROOT / "code"), package=package)
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["train"], ["no dataset is named", "no UserLLM is named"]),
        (["train", "--dataset", "x"], ["unknown dataset 'x'", "no UserLLM is named"]),
        (
            ["train", "--dataset", "tiny", "--user_pretrain_dir", "x"],
            ["model folder x does not exist", "item cache dataset/tiny_item"],
        ),
        (["train", "--dataset", "x", "--model", "pop"], ["unknown dataset 'x'"]),
        (["train", "--dataset", "tiny", "--model", "item_knn"], ["item cache dataset/tiny_item"]),
        (
            ["train", "--dataset", "tiny", "--model", "item_knn", "--use_item_cache", "False"],
            ["no ItemLLM is named"],
        ),
        (["evaluate", "--config_file", "x.yaml"], ["x.yaml does not exist"]),
        (["cache", "--dataset", "x"], ["information/x.csv does not exist", "no ItemLLM is named"]),
        (["compare", "saved/x"], ["saved/x does not exist"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_is_missing_is_said_without_torch(
    project: Project, words: list[str], messages: list[str]
) -> None:
    (project.root / "dataset/tiny_item_embeddings.safetensors").unlink()
    done = without("torch", *words, cwd=project.root)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line


def test_compare_works_without_torch(project: Project) -> None:
    for name in ("pop", "random"):
        assert project.run("--model", name)[0] == 0
    done = without("torch", "compare", "saved/tiny-pop", "saved/tiny-random", cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert "Recall@10" in done.stdout
    assert (project.root / "saved/tiny-random/comparison.png").is_file()


LOADED = """
import runpy, sys
sys.path.insert(0, {code!r})
sys.argv = ["hsft", *sys.argv[1:]]
try:
    runpy.run_module("hsft", run_name="__main__")
finally:
    sys.stderr.write(f"\\nloaded: {{sorted(sys.modules.keys() & set({packages!r}))}}\\n")
"""
SLOW = ("transformers", "peft", "bitsandbytes", "lightning")


@pytest.mark.parametrize("flag", ["--check", "--dry_run", "cache --check"])
def test_a_known_model_is_looked_at_without_the_slow_packages(project: Project, flag: str) -> None:
    words = [*project.arguments, "--use_qlora", flag]
    name = "train"
    if flag.startswith("cache"):
        name = "cache"
        words = [*project.arguments, "--item_pretrain_dir", str(project.llama), "--check"]
    # What is asked of the model's class is kept from this first time on.
    code, expected, err = project.call(program(name), words)
    assert code == 0, err
    source = LOADED.format(code=str(ROOT / "code"), packages=SLOW)
    done = subprocess.run(
        [sys.executable, "-c", source, name, *words],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    assert done.stderr.endswith("\nloaded: []\n")


def test_evaluate_trains_nothing(project: Project) -> None:
    code, out, err = project.call(program("evaluate"), [*project.arguments, "--use_qlora", "True"])
    assert code == 0, err
    assert "untrained" in out
    assert "fine-tuned" not in out


def test_commands_follow_how_the_program_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "train --config_file code/overall/LLM_ddp.yaml /my/code/HLLM/x.yaml"
    monkeypatch.setattr(sys, "argv", ["code/main.py"])
    assert command("cold-start") == "python code/cold_start.py"
    assert command("serve") == "hsft serve"
    assert command_line(line) == f"python code/main.py{line.removeprefix('train')}"
    for started in (
        "/venv/bin/hsft",
        "C:/venv/Scripts/hsft.exe",
        "/site-packages/hsft/__main__.py",
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert command("cold-start") == "hsft cold-start"
        expected = "hsft train --config_file overall/LLM_ddp.yaml /my/code/HLLM/x.yaml"
        assert command_line(line) == expected


@pytest.mark.parametrize(
    ("words", "value", "rest"),
    [
        ([], False, []),
        (["--json"], True, []),
        (["--json", "True"], True, []),
        (["--json", "false"], False, []),
        (["--json=False"], False, []),
        (["--json", "a"], True, ["a"]),
        (["a", "--json", "False"], False, ["a"]),
        (["--json", "--json", "False"], False, []),
    ],
)
def test_flags_have_one_dialect(words: list[str], value: bool, rest: list[str]) -> None:
    parser = Parser("compare", [])
    add_flag(parser, "--json", "print JSON")
    parser.add_argument("runs", nargs="*")
    options = parser.parse_args(words)
    assert options.json is value
    assert options.runs == rest


def test_a_flag_with_another_value_is_refused() -> None:
    parser = Parser("compare", [])
    add_flag(parser, "--json", "print JSON")
    with pytest.raises(InputError, match="'maybe' is neither True nor False"):
        parser.parse_args(["--json=maybe"])
    with pytest.raises(InputError, match="unrecognized arguments: maybe"):
        parser.parse_args(["--json", "maybe"])


def test_no_program_has_a_flag_of_another_dialect() -> None:
    sources = [*(ROOT / "code/hsft").rglob("*.py")]
    wrong = [path for path in sources if "store_true" in path.read_text(encoding="utf-8")]
    assert wrong == []


def test_a_file_of_somebody_else_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def read(_: Sequence[str]) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "llm/model.safetensors")

    assert run_program(read, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: llm/model.safetensors cannot be used: Permission denied; ")

    def defect(_: Sequence[str]) -> int:
        raise PermissionError("not of a file")

    with pytest.raises(PermissionError):
        run_program(defect, [])


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs_optuna(_: object) -> int:
        raise ModuleNotFoundError("No module named 'optuna'", name="optuna.samplers")

    assert run_program(needs_optuna, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the package optuna is missing in {sys.executable}")
    assert "pip install -c constraints.txt -e '.[sweep]'" in line
    monkeypatch.setattr("hsft.utils.program._PACKAGE", Path("/site-packages/hsft"))
    assert install_command("optuna") == "pip install 'hsft[sweep]'"
    assert install_command("torch") == "pip install hsft"


def test_extras_named_in_messages_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    from hsft.utils.program import _EXTRAS

    for package, extra in _EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)
        # `import mlflow` is what mlflow-skinny gives.
        assert re.search(rf'"{package}(-skinny)?>', listed)


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 90):
        monkeypatch.setenv("COLUMNS", str(columns))
        longest = max(map(len, help_text().splitlines()))
        assert columns - 15 < longest <= columns

"""Help: every program of docs/programs.md has it, with examples; and the notebook's commands exist."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hsft.config.loader import flat_fields
from hsft.programs.cache import KEYS
from tests.conftest import Project
from tests.helpers import ROOT

NOTEBOOK = ROOT / "demo" / "demo.ipynb"
COMMAND = re.compile(r"^!\{python\} (\S+\.py)(.*)$")


def programs() -> list[str]:
    """Return the programs of the table in docs/programs.md."""
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"^\| `([\w/]+\.py)", page, re.MULTILINE)))


def help_of(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [program, "--help"]
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_table_has_every_program() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.py")}
    there |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "code").glob("*.py")}
    assert set(programs()) == there | {"demo/run.py"}


@pytest.mark.parametrize("program", programs())
def test_every_program_has_help_with_examples(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(program, capsys)
    examples = shown[shown.index("examples:") :].splitlines()[1:]
    assert examples[0].strip().startswith(f"python {program}")


def test_item_caching_shows_its_own_keys_only(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"^  --([\w.]+)  \(", help_of("item_caching.py", capsys), re.MULTILINE)
    assert set(shown) == set(KEYS)
    assert set(KEYS) < set(flat_fields())


def test_help_and_a_mistyped_option_do_not_wait_for_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"  # any import of it now fails
        "programs = sys.argv[1:]\n"
        "for option, wanted in (('--help', 0), ('--no_such_option', 2)):\n"
        "    for program in programs:\n"
        "        sys.argv = [program, option]\n"
        "        try:\n"
        "            runpy.run_path(program, run_name='__main__')\n"
        "        except SystemExit as ended:\n"
        "            assert ended.code == wanted, (program, ended.code)\n"
    )
    ours = [program for program in programs() if program != "demo/run.py"]
    done = subprocess.run(
        [sys.executable, "-c", code, *ours], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(ours)


def commands() -> list[tuple[str, list[str]]]:
    """Return the notebook's commands: program and arguments."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    (hllm,) = [line.partition("= ")[2] for line in lines if line.startswith("hllm = ")]
    found = []
    for line in lines:
        match = COMMAND.match(line.rstrip())
        if match:
            words = match[2].replace("{hllm}", ast.literal_eval(hllm.strip()))
            found.append((match[1], shlex.split(words)))
    return found


def test_the_notebook_is_sound() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            plain = (re.sub(r"^(\s*)!.*$", r"\1pass", line) for line in cell["source"])
            compile("".join(plain), "cell", "exec")
    assert len(commands()) >= 9


@pytest.mark.parametrize(("program", "words"), commands(), ids=lambda value: str(value)[:60])
def test_the_notebooks_commands_are_understood(
    program: str, words: list[str], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if "--config_file" in words:
        module = importlib.import_module(Path(program).stem)
        code, out, err = project.call(module.main, [*words, "--print_config", "True"])
        assert code == 0, err
        assert "dataset: ml-100k" in out
    else:
        shown = help_of(program, project.capsys)
        assert all(word in shown for word in words if word.startswith("--"))


def ends_unread(*words: str) -> tuple[int, str]:
    """Run Python with a standard output that nobody reads: exit code and standard error."""
    # Unbuffered, argparse would meet the closed pipe itself.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, *words],
            env=env,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_output_that_nobody_reads_ends_the_program_quietly(size: int) -> None:
    # A short text fails when the program ends, a long one when it is written.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'code')!r})\n"
        "from hsft.utils.program import run_program\n"
        f"sys.exit(run_program(lambda _: sys.stdout.write('x' * {size}) * 0, []))"
    )
    assert ends_unread("-c", code) == (141, "")


def test_help_that_nobody_reads() -> None:
    assert ends_unread(str(ROOT / "code" / "compare.py"), "--help") == (141, "")


def test_another_broken_pipe_keeps_its_traceback() -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'code')!r})\n"
        "from hsft.utils.program import run_program\n"
        "reading, writing = os.pipe()\n"
        "os.close(reading)\n"
        "sys.exit(run_program(lambda _: os.write(writing, b'x'), []))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr

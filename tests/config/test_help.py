"""Help: every program of docs/programs.md has it, with examples; and the notebook's commands exist."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest

from hsft.config.loader import flat_fields
from hsft.programs.cache import KEYS
from tests.helpers import ROOT


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
        "for option, expected in (('--help', 0), ('--no_such_option', 2)):\n"
        "    for program in programs:\n"
        "        sys.argv = [program, option]\n"
        "        try:\n"
        "            runpy.run_path(program, run_name='__main__')\n"
        "        except SystemExit as ended:\n"
        "            assert ended.code == expected, (program, ended.code)\n"
    )
    ours = [program for program in programs() if program != "demo/run.py"]
    done = subprocess.run(
        [sys.executable, "-c", code, *ours], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(ours)


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

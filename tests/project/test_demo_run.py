"""The order in which demo/run.py runs its commands, and what a failing one stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo import run as demo
from demo.run import Steps, run_models


def script(folder: Path, name: str, *needs: str, code: int = 0) -> list[str]:
    """Return a command that writes a file, and fails where the files it needs are not there."""
    path = folder / f"{name}.py"
    path.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"here = Path({str(folder)!r})\n"
        f"missing = [name for name in {needs!r} if not (here / name).exists()]\n"
        f"print('ran', {name!r}, 'without', missing)\n"
        f"(here / {name!r}).touch()\n"
        f"sys.exit(9 if missing else {code})\n"
    )
    return [str(path)]


def plan(folder: Path, failing: str = "") -> Steps:
    def command(name: str, *needs: str) -> list[str]:
        return script(folder, name, *needs, code=3 if name == failing else 0)

    return Steps(
        llm=[command("llm")],
        data=[command("data"), command("cache", "data")],
        tuning=[command("tuned", "llm", "cache")],
        references=[command("pop", "cache"), command("baseline", "pop")],
        tables=[command("compare", "tuned", "baseline"), command("report", "compare")],
        example=[command("recommend", "tuned", "baseline")],
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.suffix}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "LOG", str(tmp_path / "log.txt"))
    return tmp_path


def test_every_command_runs_after_what_it_needs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_models(plan(folder)) == 0
    assert len(names(folder)) == 9
    shown = capfd.readouterr().out
    assert shown.count("ran ") == 9
    assert "without ['" not in shown


@pytest.mark.parametrize(
    ("failing", "never"),
    [
        ("llm", {"tuned", "compare", "report", "recommend"}),
        ("data", {"cache", "tuned", "pop", "baseline", "compare", "report", "recommend"}),
        ("tuned", {"compare", "report", "recommend"}),
        ("pop", {"baseline", "compare", "report", "recommend"}),
        ("compare", {"report"}),
    ],
)
def test_a_failure_ends_with_its_code(
    folder: Path, capfd: pytest.CaptureFixture[str], failing: str, never: set[str]
) -> None:
    assert run_models(plan(folder, failing)) == 3
    assert not names(folder) & never
    assert f"ran {failing}" in capfd.readouterr().out


def test_the_commands_of_the_plan_exist() -> None:
    for full in (False, True):
        made = demo.steps(full)
        for commands in vars(made).values():
            assert all((demo.ROOT / command[0]).is_file() for command in commands)

"""The README says what the programs do."""

from __future__ import annotations

import pytest

from hsft.config.loader import flat_fields
from tests import key_table
from tests.helpers import ROOT
from tests.project.test_demo import EVALUATE, FINE_TUNE


def test_key_tables_are_the_schema() -> None:
    assert key_table.main(["--check"]) == 0, "run python tests/key_table.py"


def test_an_old_key_table_is_replaced_and_nothing_else() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    old = text.replace("| `seed` | integer |", "| `seed` | number |")
    assert old != text
    assert key_table.with_table(old) == text


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
@pytest.mark.parametrize("command", [EVALUATE, FINE_TUNE])
def test_fixed_commands_stand_in_the_readme(name: str, command: str) -> None:
    assert f"python {command}" in (ROOT / name).read_text(encoding="utf-8")


def test_every_key_is_used_by_the_code() -> None:
    used = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "code" / "hsft").rglob("*.py")
        if path.parent.name != "config"
    )
    used += (ROOT / "code/hsft/config/program.py").read_text(encoding="utf-8")
    unused = [key for key in flat_fields() if f".{key.rpartition('.')[2]}" not in used]
    assert unused == []

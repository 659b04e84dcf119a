"""The README and the page of keys say what the programs do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hsft.config.loader import flat_fields
from tests import key_table
from tests.helpers import EVALUATE, FINE_TUNE, ROOT

READMES = ("README.md", "README_zh.md")
# Names under which the code holds a `Config`.
CONFIGS = ("config",)


def test_key_tables_are_the_schema() -> None:
    assert key_table.main(["--check"]) == 0, "run python tests/key_table.py"


@pytest.mark.parametrize("path", key_table.PAGES, ids=lambda path: path.parent.name)
def test_an_outdated_key_table_is_replaced_and_nothing_else(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    outdated = text.replace("| `seed` | integer |", "| `seed` | number |")
    assert outdated != text
    assert key_table.with_table(outdated) == text


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("command", [EVALUATE, FINE_TUNE])
def test_fixed_commands_stand_in_the_readme(name: str, command: str) -> None:
    assert f"python {command}" in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_the_readme_is_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("name", READMES)
def test_results_are_those_of_the_experiments_page(name: str) -> None:
    measured = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    shown = re.findall(r"\b0\.\d{4}\b(?: \[[^]]+\])?", (ROOT / name).read_text(encoding="utf-8"))
    assert len(shown) >= 9
    assert [figure for figure in shown if figure not in measured] == []


def keys_read(source: str) -> set[str]:
    """Return the keys that a module reads: `config.key`, `config.section.key` and through a name."""
    tree = ast.parse(source)
    # `shape = config.sasrec` makes `shape.layers` mean `sasrec.layers`.
    aliases = {
        node.targets[0].id: node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Attribute)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            owner = getattr(base, "attr", getattr(base, "id", ""))
            names.add(node.attr if owner in CONFIGS else f"{aliases.get(owner, owner)}.{node.attr}")
    return names


def test_keys_read_are_found_by_their_owner() -> None:
    source = "def f(config, x):\n    s = config.sasrec\n    return s.heads, config.loss, x.type\n"
    assert keys_read(source) >= {"sasrec", "sasrec.heads", "loss", "x.type"}
    assert not keys_read(source) & {"type", "heads", "scheduler_args.type"}


def test_every_key_is_used_by_the_code() -> None:
    package = ROOT / "code" / "hsft"
    files = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    files += [package / "config" / "program.py", ROOT / "code" / "main.py"]
    used = set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in files))
    # A property of `Config` uses the keys it resolves, where the code reads the property.
    schema = ast.parse((package / "config" / "schema.py").read_text(encoding="utf-8"))
    [config] = [
        node for node in schema.body if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    for node in config.body:
        if isinstance(node, ast.FunctionDef) and node.name in used:
            used |= keys_read(ast.unparse(node).replace("self.", "config."))
    assert [key for key in flat_fields() if key not in used] == []

"""The law of imports that docs/architecture.md states."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers import ROOT

CODE = ROOT / "code" / "hsft"
# A package imports from itself and from those before it.
ORDER = (
    *("utils", "config", "data", "evaluator", "model", "encoding", "trainer"),
    *("hub", "report", "inputs", "run", "finished", "programs"),
)


def imported(path: Path) -> set[str]:
    """Return the modules of hsft that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("hsft.")}


def test_packages_import_only_those_before_them() -> None:
    for path in CODE.rglob("*.py"):
        package = path.relative_to(CODE).parts[0]
        if package in ORDER:
            # The package itself holds the version, and imports nothing.
            allowed = (*ORDER[: ORDER.index(package) + 1], "__version__")
            wrong = [name for name in imported(path) if name.split(".")[1] not in allowed]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_two_modules_import_each_other() -> None:
    uses = {
        f"hsft.{'.'.join(path.relative_to(CODE).with_suffix('').parts)}": imported(path)
        for path in CODE.rglob("*.py")
    }
    for module, others in uses.items():
        back = [other for other in others if module in uses.get(other, ())]
        assert not back, f"{module} and {back} import each other"


def test_the_page_states_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " → ".join(ORDER) in " ".join(page.split())

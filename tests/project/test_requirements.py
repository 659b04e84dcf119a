"""Requirements: ranges in pyproject.toml, exact versions in constraints.txt, files made from them."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT
from tests.requirement_files import CONSTRAINTS, installed, lowest, main, pinned, project

TOP_LEVEL = {"yaml": "pyyaml"}


def test_the_files_are_up_to_date() -> None:
    assert main(["--check"]) == 0, "run python tests/requirement_files.py"


def test_every_requirement_of_a_user_has_both_bounds() -> None:
    for part, lines in project().items():
        for line in lines:
            operators = {specifier.operator for specifier in Requirement(line).specifier}
            if part != "dev":
                assert operators == {">=", "<"}, line


def test_constraints_lie_within_the_ranges() -> None:
    for lines in project().values():
        for line in lines:
            requirement = Requirement(line)
            if requirement.name != "hsft":
                assert requirement.specifier.contains(pinned(requirement.name)), line


def test_constraints_are_exact_and_torch_is_pinned() -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    exact = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in exact)
    # A range would pull a newer build, with gigabytes of CUDA packages, onto a machine that has
    # this one.
    assert "torch==2.13.0" in exact
    # pip install -r requirements.txt takes these versions.
    assert "-c constraints.txt" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_what_the_package_imports_is_required() -> None:
    """Whatever is imported outside a function belongs to every installation."""
    imported = set()
    for path in (ROOT / "code" / "hsft").rglob("*.py"):
        # Imported in a function, with the extra `serve`.
        if path.name in ("serve_app.py", "serve_limits.py", "serve_metrics.py"):
            continue
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    ours = imported - set(sys.stdlib_module_names) - {"hsft"}
    required = {Requirement(line).name.lower() for line in project()[""]}
    # markupsafe comes with jinja2, which is about it.
    assert {TOP_LEVEL.get(name, name) for name in ours} - {"markupsafe"} <= required


def test_lower_bounds_are_the_versions_of_the_lowest_tests() -> None:
    lines = ["x>=1.2,<2", "y-z[a]>=3; sys_platform == 'linux'", "torch>=2.10,<3"]
    actual = list(lowest(lines))
    assert actual[:2] == ["x==1.2", 'y-z==3; sys_platform == "linux"']
    assert actual[2] == f"torch=={pinned('torch')}"
    with pytest.raises(ValueError, match="no lower bound"):
        list(lowest(["x<2"]))


def test_installed_versions_include_what_packages_need() -> None:
    actual = installed(["pytest-xdist", "not-a-package"])
    assert actual["pytest-xdist"] == version("pytest-xdist")
    assert actual["execnet"] == version("execnet")
    assert "not-a-package" not in actual

"""The requirement files: bounded on both sides, and their lowest versions written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.lowest_requirements import lowest, main


def test_the_lowest_versions_are_up_to_date() -> None:
    assert main(["--check"]) == 0, "run python tests/lowest_requirements.py"


def test_every_requirement_of_a_run_has_both_bounds_or_a_pin() -> None:
    for name in ("requirements.txt", "requirements-demo.txt", "requirements-extra.txt"):
        for line in (ROOT / name).read_text().splitlines():
            line = line.partition("#")[0].partition(";")[0].strip()
            if line and not line.startswith("-r"):
                assert re.fullmatch(r"[\w-]+(==[\d.]+|>=[\d.]+,<[\d.]+)", line), line


def test_lower_bounds_are_taken_from_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# none\nx>=1.2,<2\nruff>=1\n\n")
    (tmp_path / "b.txt").write_text("-r a.txt\ny-z==3.0  # pinned\n")
    assert list(lowest(tmp_path / "b.txt")) == ["x==1.2", "y-z==3.0"]
    (tmp_path / "c.txt").write_text("x<2\n")
    with pytest.raises(ValueError, match="no lower bound"):
        list(lowest(tmp_path / "c.txt"))

"""Write the lowest versions that the requirement files allow, for a test run on them.

python tests/lowest_requirements.py            rewrite requirements-lowest.txt
python tests/lowest_requirements.py --check    exit code 1 when it is out of date

python -m venv /tmp/lowest
/tmp/lowest/bin/pip install -r requirements-lowest.txt
/tmp/lowest/bin/python -m pytest
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "requirements-lowest.txt"
# They take no part in the test run on the lowest versions: some look at the code, some make the
# documentation, and the tests of the pages, of sweeps and of completion are not among those.
LINTERS = {
    *("ruff", "mypy", "pandas-stubs", "types-pyyaml", "selenium", "optuna", "argcomplete"),
    *("mkdocs", "mkdocs-material", "mkdocstrings-python"),
}
_LINE = re.compile(r"([A-Za-z0-9._-]+)\s*(>=|==)\s*([0-9][0-9A-Za-z.]*)(?:,<[0-9.]+)?")


def lowest(path: Path) -> Iterator[str]:
    """Yield `name==lowest version` for each requirement of a file and of the files it names.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].partition(";")[0].strip()
        if line.startswith("-r "):
            yield from lowest(path.parent / line[3:].strip())
        elif line:
            found = _LINE.fullmatch(line)
            if not found:
                raise ValueError(f"{path.name}: '{line}' has no lower bound")
            if found.group(1).lower() not in LINTERS:
                yield f"{found.group(1)}=={found.group(3)}"


def text() -> str:
    """Return the file's content."""
    lines = lowest(ROOT / "requirements-dev.txt")
    return "# Made by tests/lowest_requirements.py.\n" + "".join(f"{line}\n" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Write or check the file."""
    if "--check" in argv:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text() else 1
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

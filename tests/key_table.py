"""Write the key tables of README.md and README_zh.md anew from the schema.

python tests/key_table.py            after a key was added or changed
python tests/key_table.py --check    exit code 1 when a table is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from hsft.config.help import key_table

ROOT = Path(__file__).resolve().parents[1]


def with_table(text: str) -> str:
    """Return a README's text with the table of the schema as it is."""
    table = key_table()
    start = text.index(table.splitlines()[0])
    return text[:start] + table + text[text.index("\n\n", start) + 1 :]


def main(argv: Sequence[str]) -> int:
    """Write or check the tables."""
    old = 0
    for path in (ROOT / "README.md", ROOT / "README_zh.md"):
        text = path.read_text(encoding="utf-8")
        if with_table(text) != text:
            old += 1
            if "--check" not in argv:
                path.write_text(with_table(text), encoding="utf-8")
    return int(old > 0 and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

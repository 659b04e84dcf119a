"""Write the key tables of docs/keys.md and docs/zh/keys.md from the schema.

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
PAGES = (ROOT / "docs" / "keys.md", ROOT / "docs" / "zh" / "keys.md")


def with_table(text: str) -> str:
    """Return a page's text with its table, the last thing on the page, made from the schema."""
    table = key_table()
    return text[: text.index(table.splitlines()[0])] + table


def main(argv: Sequence[str]) -> int:
    """Write or check the tables."""
    outdated = 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if with_table(text) != text:
            outdated += 1
            if "--check" not in argv:
                path.write_text(with_table(text), encoding="utf-8")
    return int(outdated > 0 and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

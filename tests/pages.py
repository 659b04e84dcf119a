"""The project's Markdown pages, and what tests look for in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

PAGES = tuple(sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]))
# English page -> Chinese page.
TRANSLATED = {
    ROOT / "README.md": ROOT / "README_zh.md",
    **{ROOT / "docs" / path.name: path for path in sorted((ROOT / "docs" / "zh").glob("*.md"))},
}
_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page, taken apart.

    Attributes:
        prose: the text outside code blocks.
        commands: the command lines of indented blocks and of `sh` blocks, as words.
        python: the contents of `python` blocks.
    """

    prose: str
    commands: list[list[str]]
    python: list[str]

    @property
    def inline_code(self) -> list[str]:
        """Text between backticks, line breaks as spaces."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]


def read_page(path: Path) -> Page:
    """Take a page apart."""
    text = path.read_text(encoding="utf-8")
    fenced = [(match[2], match[3]) for match in _FENCE.finditer(text)]
    prose: list[str] = []
    lines = [line for kind, block in fenced if kind == "sh" for line in block.splitlines()]
    in_block, before = False, ""
    for line in _FENCE.sub("\n", text).splitlines():
        indented = line.startswith("    ") and not re.match(r" +[-*] ", line)
        in_block = indented and (in_block or not before.strip())
        if in_block:
            lines.append(line.strip())
        else:
            prose.append(line)
        before = line
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    commands = [words for line in joined if (words := shlex.split(line, comments=True))]
    return Page("\n".join(prose), commands, [block for kind, block in fenced if kind == "python"])


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    actual: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        actual.append(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return set(actual)

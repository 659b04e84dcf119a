"""A matplotlib figure as inline SVG: named, with hover values, coloured by the page's style sheet."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

_HOVER = "hover-"


class HoverValues:
    """Texts that a browser shows while the pointer rests on a mark.

    `add` returns the `gid` that the mark's artist gets.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, text: str) -> str:
        """Register a text and return the name of its mark."""
        name = f"{_HOVER}{len(self.texts)}"
        self.texts[name] = text
        return name


def inline_svg(
    figure: Any,
    *,
    title: str,
    description: str,
    colours: Mapping[str, str],
    hover: HoverValues | None = None,
) -> Markup:
    """Return a figure as an `<svg>` element.

    The same figure gives the same bytes. What a drawing has as a file of its own (metadata, style
    sheet, size) is taken out.

    Args:
        figure: a matplotlib figure.
        title, description: for those who do not see it, and shown on hover.
        colours: colour in the figure, `#rrggbb` -> what CSS calls it.
        hover: texts of the figure's marks.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    # ElementTree escapes every text and attribute that it writes.
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    texts = {} if hover is None else hover.texts
    for element in list(root.iter()):
        _make_inline(element, colours, texts)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    _name(root, title, description)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _make_inline(
    element: ElementTree.Element, colours: Mapping[str, str], texts: Mapping[str, str]
) -> None:
    element.tag = element.tag.rpartition("}")[2]
    for qualified in list(element.attrib):
        value = element.attrib.pop(qualified)
        name = qualified.rpartition("}")[2]
        if name == "style":
            rules = [rule for rule in value.split("; ") if not rule.startswith("font-family")]
            value = "; ".join(rules)
            for in_figure, in_css in colours.items():
                value = value.replace(in_figure, in_css)
        # Names of groups repeat from chart to chart; only definitions are referred to.
        if name == "id" and element.tag == "g":
            if value in texts:
                shown = ElementTree.Element("title")
                shown.text = texts[value]
                element.insert(0, shown)
            continue
        element.attrib[name] = value


def _name(root: ElementTree.Element, title: str, description: str) -> None:
    number = hashlib.sha256(f"{title}\0{description}".encode()).hexdigest()[:12]
    names = {"title": (f"title-{number}", title), "desc": (f"desc-{number}", description)}
    for index, (tag, (name, text)) in enumerate(names.items()):
        child = ElementTree.Element(tag, {"id": name})
        child.text = text
        root.insert(index, child)
    root.attrib["role"] = "img"
    root.attrib["aria-labelledby"] = names["title"][0]
    root.attrib["aria-describedby"] = names["desc"][0]

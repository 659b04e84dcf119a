"""One HTML page of sections: no script, nothing fetched, everything that is data escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hsft.report.charts import DARK, LIGHT

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Cell:
    """A table cell of a main text and smaller lines below it; `best` marks a column's best value."""

    text: str
    small: Sequence[str] = ()
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        header: column names.
        rows: cells; the first of each row names the row.
        numeric: cells after the first are set right.
        folded: shown when asked for.
    """

    caption: str
    header: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    numeric: bool = True
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing from `hsft.report.charts`.

    Attributes:
        svg: the drawing, with a title and a description for those who do not see it.
        caption: text below it.
    """

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Listed:
    """One item, of a history or recommended; `target` marks the held-out one."""

    title: str
    item_id: str
    target: bool = False


@dataclass(frozen=True)
class Listing:
    """What one model recommends to a user, and a sentence on where the held-out item ranks."""

    name: str
    items: Sequence[Listed]
    verdict: str


@dataclass(frozen=True)
class Example:
    """One user.

    Attributes:
        user: id.
        history: the latest items, oldest first.
        earlier: number of items before them.
        target: the held-out item.
        listings: one a model.
    """

    user: str
    history: Sequence[Listed]
    earlier: int
    target: Listed
    listings: Sequence[Listing]


@dataclass(frozen=True)
class Section:
    """A part of the page, shown in the order text, charts, tables, examples.

    Attributes:
        title: its heading.
        text: paragraphs.
        charts, tables, examples: its content.
    """

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Page:
    """A page, shown in the order of its attributes.

    Attributes:
        title: its heading.
        headline: what was found, in a sentence.
        charts: drawings below it.
        facts: (name, value).
        sections: the rest.
    """

    title: str
    headline: str
    charts: Sequence[Chart]
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """Return the page as HTML. The same page gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(page=page, light=LIGHT, dark=DARK)

"""Charts as inline SVG: drawn by matplotlib, coloured by the page's style sheet.

Colours are written as CSS variables (`--s0` to `--s7` for series, `--rule` for the grid) and the
text's own colour, so that one drawing serves the light and the dark page. Series differ in marker
and line pattern too. The same data give the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from hsft.utils.errors import one_line

COLOURS = 8
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)))
_WIDTH = 4.4
# What a label of one of four groups has room for.
_TICK_CHARACTERS = 10
# Stand-ins that matplotlib writes and the style sheet's names take the place of.
_INK, _GRID = "#0a0bf0", "#0a0bf1"
_SERIES = [f"#0a0b{number:02x}" for number in range(COLOURS)]
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": _INK,
}


@dataclass(frozen=True)
class Series:
    """One line, or one mark a group.

    Attributes:
        name: for the legend.
        style: number that decides colour, marker and line pattern: a model's row.
        values: float64 [n]; NaN where there is none.
        at: float64 [n], positions on the x axis; unused for groups.
        low, high: float64 [n], an interval, or None.
        marked: positions in `values` to be ringed.
    """

    name: str
    style: int
    values: np.ndarray
    at: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    marked: Sequence[int] = ()


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, ticks: Sequence[int] | None = None
) -> Markup:
    """Draw lines with their bands over whole numbers.

    Args:
        series: the lines.
        x_label, y_label: the axes' names.
        ticks: where the x axis is labelled, which then is logarithmic; None: linear.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    with _drawing(len(series), f"{x_label} {y_label}") as (figure, axes):
        for one in series:
            colour = _SERIES[one.style % COLOURS]
            assert one.at is not None
            shown = slice(None) if ticks is None else [list(one.at).index(tick) for tick in ticks]
            axes.plot(
                one.at,
                one.values,
                color=colour,
                linestyle=_DASHES[one.style % len(_DASHES)],
                marker=_MARKERS[one.style % len(_MARKERS)],
                markevery=shown,
                markersize=4.5,
                linewidth=1.5,
                label=_short(one.name),
            )
            if one.low is not None and one.high is not None:
                axes.fill_between(one.at, one.low, one.high, color=colour, alpha=0.15, linewidth=0)
            if one.marked:
                rings = list(one.marked)
                axes.plot(
                    one.at[rings], one.values[rings], "o", color=colour, markersize=11,
                    fillstyle="none",
                )  # fmt: skip
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure)


def group_chart(groups: Sequence[str], series: Sequence[Series], y_label: str) -> Markup:
    """Draw each series' value with its interval in every group.

    Args:
        groups: names along the x axis, in lines of their own where they have line ends; long lines
            are wrapped.
        series: `values`, `low` and `high` of length `len(groups)`.
        y_label: the y axis' name.
    """
    with _drawing(len(series), f"{list(groups)} {y_label}") as (figure, axes):
        step = 0.7 / max(1, len(series))
        for number, one in enumerate(series):
            assert one.low is not None
            assert one.high is not None
            at = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * step
            spread = np.maximum([one.values - one.low, one.high - one.values], 0)
            axes.errorbar(
                at,
                one.values,
                yerr=spread,
                color=_SERIES[one.style % COLOURS],
                marker=_MARKERS[one.style % len(_MARKERS)],
                linestyle="none",
                markersize=5,
                capsize=2,
                label=_short(one.name),
            )
        axes.set_xticks(np.arange(len(groups)), [_wrapped(name) for name in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(y_label)
        return _svg(figure)


class _drawing:
    """A figure with one pair of axes and room for a legend, under this module's style.

    Ids of definitions are hashes of the content and `salt`, so charts of one page need different ones.
    """

    def __init__(self, entries: int, salt: str) -> None:
        import matplotlib

        self._style = matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt})
        self._entries = entries

    def __enter__(self) -> tuple[Any, Any]:
        from matplotlib.figure import Figure

        self._style.__enter__()
        figure = Figure(figsize=(_WIDTH, 2.9 + 0.19 * self._entries), layout="constrained")
        return figure, figure.subplots()

    def __exit__(self, *ending: Any) -> None:
        self._style.__exit__(*ending)


def _svg(figure: Any) -> Markup:
    figure.legend(loc="outside lower left", handlelength=3.5)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    # ElementTree escapes every text and attribute that it writes.
    root = ElementTree.fromstring(buffer.getvalue())
    _make_inline(root)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _make_inline(root: ElementTree.Element) -> None:
    """Take out what a drawing has as a file of its own and what would reach the whole page."""
    colours = {_INK: "currentColor", _GRID: "var(--rule)"}
    colours |= {stand_in: f"var(--s{number})" for number, stand_in in enumerate(_SERIES)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            kept = name.rpartition("}")[2]
            if kept == "style":
                rules = [rule for rule in value.split("; ") if not rule.startswith("font-family")]
                value = "; ".join(rules)
                for stand_in, colour in colours.items():
                    value = value.replace(stand_in, colour)
            # Groups' names repeat from chart to chart; only definitions are referred to.
            if kept == "id" and element.tag == "g":
                continue
            element.attrib[kept] = value
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)


def _wrapped(name: str) -> str:
    lines = [textwrap.wrap(line, _TICK_CHARACTERS) for line in name.splitlines()]
    return "\n".join(part for parts in lines for part in parts)


def _short(name: str) -> str:
    # A leading underscore would keep matplotlib from listing the name.
    return "\u200b" * name.startswith("_") + one_line(name, 52)

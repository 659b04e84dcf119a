"""Charts: drawn by matplotlib, as inline SVG for the page and as PNG for `comparison.png`.

In SVG colours are CSS variables (`--s0` to `--s7` for series, `--rule` for the grid) and the text's
own colour, so that one drawing serves the light and the dark page. Series differ in marker, line
pattern and hatching too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hsft.report.svg import HoverValues, inline_svg
from hsft.utils.errors import one_line
from hsft.utils.files import atomic_path

# The page's colours of series, on white and on black.
LIGHT = ["#0b5cad", "#b34700", "#0a7350", "#8a3a94", "#7d5a00", "#4d4d4d", "#b0003a", "#00728a"]
DARK = ["#72b5f2", "#ff9c66", "#50cb9b", "#d99ae2", "#e2ba4e", "#bdbdbd", "#ff86a5", "#5ccbe2"]
_LIGHT_INK, _LIGHT_GRID = "#1b1f23", "#d5d9dd"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "|||")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)))
_WIDTH = 4.4
# What a label of one of four groups has room for.
_TICK_CHARACTERS = 10
# Stand-ins that matplotlib writes and the style sheet's names take the place of.
_INK, _GRID = "#0a0bf0", "#0a0bf1"
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(len(LIGHT)))
_CSS = {
    _INK: "currentColor",
    _GRID: "var(--rule)",
    **{stand_in: f"var(--s{number})" for number, stand_in in enumerate(_SERIES)},
}


@dataclass(frozen=True)
class Series:
    """One line, or one mark or bar a group.

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

    def shown(self, number: int) -> str:
        """Return one value in words: `0.1234 [0.1000, 0.1500]`."""
        text = f"{self.values[number]:.4f}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low[number]:.4f}, {self.high[number]:.4f}]"
        return text


@dataclass(frozen=True)
class Bars:
    """Bars of one metric: a group a cut-off K, in it a bar a series.

    Attributes:
        metric: its name.
        cuts: the cut-offs.
        series: `values`, `low` and `high` of length `len(cuts)`.
    """

    metric: str
    cuts: Sequence[int]
    series: Sequence[Series]


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    description: str,
    ticks: Sequence[int] | None = None,
) -> Markup:
    """Draw lines with their bands over whole numbers.

    Args:
        series: the lines.
        x_label, y_label: the axes' names.
        description: for those who do not see it.
        ticks: where the x axis is labelled, which then is logarithmic; None: linear.
    """
    title = f"{y_label} by {x_label}"
    hover = HoverValues()
    with _figure(len(series), title) as (figure, axes):
        for one in series:
            _draw_line(axes, one, ticks, x_label, hover)
        _label_whole_numbers(axes, ticks)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _with_legend(figure, title, description, hover)


def _draw_line(
    axes: Any, series: Series, ticks: Sequence[int] | None, x_label: str, hover: HoverValues
) -> None:
    colour = _SERIES[series.style % len(_SERIES)]
    assert series.at is not None
    labelled = range(len(series.at))
    if ticks is not None:
        labelled = [list(series.at).index(tick) for tick in ticks]  # type: ignore[assignment]
    axes.plot(
        series.at,
        series.values,
        color=colour,
        linestyle=_DASHES[series.style % len(_DASHES)],
        marker=_MARKERS[series.style % len(_MARKERS)],
        markevery=list(labelled),
        markersize=4.5,
        linewidth=1.5,
        label=_legend_name(series.name),
    )
    if series.low is not None and series.high is not None:
        axes.fill_between(series.at, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
    if series.marked:
        rings = list(series.marked)
        axes.plot(
            series.at[rings], series.values[rings], "o", color=colour, markersize=11,
            fillstyle="none",
        )  # fmt: skip
    for number in labelled:
        text = f"{series.name}, {x_label} {series.at[number]:.0f}: {series.shown(number)}"
        _add_hover(axes, series.at[number], series.values[number], hover.add(text))


def _label_whole_numbers(axes: Any, ticks: Sequence[int] | None) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def group_chart(
    groups: Sequence[str], series: Sequence[Series], y_label: str, *, title: str, description: str
) -> Markup:
    """Draw each series' value with its interval in every group.

    Args:
        groups: names along the x axis, in lines of their own where they have line ends; long lines
            are wrapped.
        series: `values`, `low` and `high` of length `len(groups)`.
        y_label: the y axis' name.
        title, description: for those who do not see it.
    """
    hover = HoverValues()
    with _figure(len(series), title) as (figure, axes):
        for number, one in enumerate(series):
            at = _beside(len(groups), number, len(series), 0.7)
            axes.errorbar(
                at,
                one.values,
                yerr=_spread(one),
                color=_SERIES[one.style % len(_SERIES)],
                marker=_MARKERS[one.style % len(_MARKERS)],
                linestyle="none",
                markersize=5,
                capsize=2,
                label=_legend_name(one.name),
            )
            for index, group in enumerate(groups):
                text = f"{one.name}, {group.splitlines()[0]}: {one.shown(index)}"
                _add_hover(axes, at[index], one.values[index], hover.add(text))
        axes.set_xticks(np.arange(len(groups)), [_wrapped(name) for name in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(y_label)
        return _with_legend(figure, title, description, hover)


def bar_chart(bars: Bars, *, description: str) -> Markup:
    """Draw a metric's bars with their intervals."""
    title = f"{bars.metric}@K by model"
    hover = HoverValues()
    with _figure(len(bars.series), title) as (figure, axes):
        _draw_bars(axes, bars, _SERIES, _INK, hover)
        return _with_legend(figure, title, description, hover)


def save_bar_charts(title: str, charts: Sequence[Bars], target: Path) -> None:
    """Draw the bars of several metrics beside each other to a PNG, in the light page's colours."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(_LIGHT_INK, _LIGHT_GRID)):
        rows = len(charts[0].series)
        figure = Figure(figsize=(6 * len(charts), 4.5 + 0.19 * rows), layout="constrained")
        for axes, bars in zip(
            figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True
        ):
            _draw_bars(axes, bars, LIGHT, _LIGHT_INK)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left")
        figure.suptitle(title, fontsize="medium")
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _draw_bars(
    axes: Any, bars: Bars, colours: Sequence[str], ink: str, hover: HoverValues | None = None
) -> None:
    width = 0.8 / max(1, len(bars.series))
    for number, one in enumerate(bars.series):
        colour = colours[one.style % len(colours)]
        drawn = axes.bar(
            _beside(len(bars.cuts), number, len(bars.series), 0.8),
            one.values,
            width * 0.92,
            color=colour,
            # The hatching of a filled bar is drawn in the edge's colour.
            edgecolor=colour,
            alpha=0.85,
            hatch=_HATCHES[one.style % len(_HATCHES)] if one.style >= len(colours) else "",
            yerr=_spread(one),
            error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 2},
            label=_legend_name(one.name),
        )
        if hover is not None:
            for index, (cut, patch) in enumerate(zip(bars.cuts, drawn.patches, strict=True)):
                patch.set_gid(hover.add(f"{one.name}, {bars.metric}@{cut}: {one.shown(index)}"))
    axes.set_xticks(np.arange(len(bars.cuts)), [f"@{cut}" for cut in bars.cuts])
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(bars.metric)


def _beside(groups: int, number: int, of: int, width: float) -> np.ndarray:
    """Return the x positions, float64 [groups], of one of several series that share the groups."""
    return np.arange(groups) + (number - (of - 1) / 2) * width / max(1, of)


def _spread(series: Series) -> np.ndarray:
    assert series.low is not None
    assert series.high is not None
    return np.maximum([series.values - series.low, series.high - series.values], 0)


def _add_hover(axes: Any, x: float, y: float, name: str) -> None:
    """Put an invisible disc over a point, large enough for a pointer to meet."""
    if np.isfinite(y):
        (disc,) = axes.plot([x], [y], "o", color=_INK, markersize=12, alpha=0.0, label="_hover")
        disc.set_gid(name)


def _style(ink: str, grid: str, hash_salt: str | None = None) -> Any:
    return {
        "svg.hashsalt": hash_salt,
        "svg.fonttype": "none",
        "font.size": 9,
        "text.parse_math": False,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": ink,
        "hatch.linewidth": 0.6,
    }


@contextmanager
def _figure(legend_entries: int, title: str) -> Iterator[tuple[Any, Any]]:
    """Make a figure with one pair of axes and room for a legend, in the stand-in colours.

    Ids of definitions are hashes of the content and a salt, so charts of one page need different
    titles.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(_INK, _GRID, title)):
        height = 2.9 + 0.19 * legend_entries
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _with_legend(figure: Any, title: str, description: str, hover: HoverValues) -> Markup:
    figure.legend(loc="outside lower left", handlelength=3.5)
    return inline_svg(figure, title=title, description=description, colours=_CSS, hover=hover)


def _wrapped(name: str) -> str:
    lines = [textwrap.wrap(line, _TICK_CHARACTERS) for line in name.splitlines()]
    return "\n".join(part for parts in lines for part in parts)


def _legend_name(name: str) -> str:
    # A leading underscore would keep matplotlib from listing the name.
    return "\u200b" * name.startswith("_") + one_line(name, 52)

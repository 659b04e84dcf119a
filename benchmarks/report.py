"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsft.utils.files import write_text

# Units of which less is better.
_COSTS = ("s", "MB")


def agreement(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Say where HSFT and the naive way gave the same answers: what -> `n of m equal`.

    Ranks may differ by a place where two scores are equal but for their rounding.
    """
    by_side = {(result["stage"], result["side"]): result.get("extra", {}) for result in results}
    sentences = {}
    for (stage, side), extra in by_side.items():
        if side != "hsft":
            continue
        for name, ours in extra.items():
            theirs = by_side.get((stage, "naive"), {}).get(name)
            if theirs is not None:
                equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
                furthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
                sentences[name] = f"{equal} of {len(ours)} equal"
                if furthest:
                    sentences[name] += f", the others within {furthest}"
    return sentences


def markdown(document: dict[str, Any]) -> str:
    """Write the report: one table a stage, medians with their range, and ratios to HSFT."""
    machine, size = document["machine"], document["size"]
    lines = [
        f"Size {size['name']}: {size['users']:,} users, {size['items']:,} items, "
        f"{size['interactions']:,} interactions, embeddings of {size['dim']} dimensions"
        + (f" ({size['note']})." if size["note"] else "."),
        f"{machine['cores']} cores of an {machine['processor']}, {machine['memory_gib']} GiB, "
        f"{machine['threads']} threads; torch {document['versions']['torch']}, numpy "
        f"{document['versions']['numpy']}, pandas {document['versions']['pandas']}; seed "
        f"{document['seed']}; medians of up to {document['repeats']} runs, with the range; load average "
        f"at the end {machine['load_average'][0]}.",
        "",
        f"    {document['command']}",
    ]
    for stage in dict.fromkeys(result["stage"] for result in document["results"]):
        sides = [result for result in document["results"] if result["stage"] == stage]
        lines += ["", f"### {stage}", "", *_table(sides)]
    if document["agreement"]:
        lines += ["", "Same answers: "]
        lines[-1] += (
            "; ".join(f"{name}: {text}" for name, text in document["agreement"].items()) + "."
        )
    return "\n".join(lines) + "\n"


def copy_into(page: Path, name: str, text: str) -> None:
    """Put a report between a page's marks `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, marked, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not marked or not closed:
        raise ValueError(f"{page} lacks the marks {begin.strip()} and {end}")
    write_text(page, f"{before}{begin}{text}{end}{after}")


def _table(sides: Sequence[dict[str, Any]]) -> list[str]:
    problems = [
        f"{side['side']}: {'skipped, ' if 'skipped' in side else 'failed, '}"
        f"{side.get('skipped') or side.get('error')}"
        for side in sides
        if "figures" not in side
    ]
    done = [side for side in sides if "figures" in side]
    if not done:
        return problems
    names = [side["side"] for side in done]
    others = [name for name in names if name != "hsft"] if "hsft" in names else []
    header = ["", "unit", *names, *(f"HSFT against {name}" for name in others)]
    lines = [_row(header), _row(["---", "---"] + ["---:"] * (len(header) - 2))]
    figures = [{figure["case"]: figure for figure in side["figures"]} for side in done]
    for case in dict.fromkeys(case for side in figures for case in side):
        cells = [side.get(case) for side in figures]
        unit = next(cell["unit"] for cell in cells if cell)
        ours = cells[names.index("hsft")] if "hsft" in names else None
        ratios = [_ratio(ours, cells[names.index(name)], unit) for name in others]
        lines.append(_row([case, unit, *(_value(cell) for cell in cells), *ratios]))
    peaks = [f"{side['peak_rss_mb']:,.0f}" for side in done]
    lines.append(_row(["peak resident memory of the stage", "MB", *peaks, *("" for _ in others)]))
    notes = []
    for side in done:
        texts = dict.fromkeys(figure["note"] for figure in side["figures"] if figure["note"])
        if texts:
            notes.append(f"{side['side']}: {'; '.join(texts)}")
    text = ". ".join([*problems, *notes])
    return [*lines, "", f"{text}."] if text else lines


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, unit: str) -> str:
    if not ours or not theirs or not ours["median"] or not theirs["median"]:
        return ""
    ratio = ours["median"] / theirs["median"]
    return f"{_number(1 / ratio if unit in _COSTS else ratio)}x"


def _value(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    if len(figure["values"]) == 1:
        return _number(figure["median"])
    return f"{_number(figure['median'])} ({_number(figure['min'])} to {_number(figure['max'])})"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

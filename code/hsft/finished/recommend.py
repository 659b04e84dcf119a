"""Recommend items to one user or for one history, new items included."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from hsft.config.options import location_overrides
from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer
from hsft.finished.new_items import add_items
from hsft.finished.open_run import OpenRun, items_read, open_run
from hsft.finished.serve import serve
from hsft.report.result import plain
from hsft.utils.errors import InputError, counted, one_line

# What the text output shows of a history and a title, and how many new items.
_SHOWN_HISTORY, _SHOWN_TITLE, _SHOWN_NEW = 5, 70, 10


def run_recommend(options: argparse.Namespace) -> None:
    """Do what the command line says and write the outcome to standard output.

    Raises:
        InputError: a file, id or option has to be changed.
        Interrupted: a signal ended `--serve`.
    """
    _refuse_contradictions(options)
    asked = None if options.history is None else split_ids(options.history)
    run = open_run(options.run, {"show_progress": True, **location_overrides(options)})
    if options.add_items is not None:
        run = add_items(run, options.add_items)
    if options.index is not None:
        run = run.with_index(options.index)
        _refuse_other_model(run, options.model)
    if options.serve is not None:
        serve(run, options.serve, options.host, options.topk)
        return
    times = None
    if asked is None:
        history = run.history(options.user)
        times = run.history_times(options.user, options.predict_at)
    else:
        history = run.item_numbers(asked)
    model = options.model or (run.index.model if run.index else run.models[-1])
    adding = options.add_items is not None
    candidates = recommendations(
        run,
        run.build(model),
        history,
        run.data.interactions.num_items if adding else options.topk,
        options.exclude_seen,
        times,
    )
    answer = {
        "run": str(options.run),
        "model": model,
        "user": options.user,
        "history": described(run, history),
        "history_read": items_read(run.config, len(history)),
        "recommendations": candidates[: options.topk],
    }
    if adding:
        answer |= {"new_items": new_items(run, candidates), "candidates": len(candidates)}
    if options.json:
        text = json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        text = as_text(answer)
    sys.stdout.write(text)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    names = ("user", "history", "model", "predict_at")
    one_answer = {name: getattr(options, name) for name in names}
    given = [name for name, value in one_answer.items() if value is not None]
    if options.serve is not None and (given or options.json):
        raise InputError(
            f"--{given[0] if given else 'json'} has no meaning with --serve; leave one of them out."
        )
    if options.index is not None and options.add_items is not None:
        raise InputError(
            "--index holds the run's own items and none of --add_items; leave one of them out."
        )
    if options.serve is None and (options.user is None) == (options.history is None):
        raise InputError(
            "name either a user (--user ID) or a history (--history ID,ID,...), and not both; or "
            "open a page with --serve PORT."
        )
    if options.history is not None and options.predict_at is not None:
        raise InputError(
            "--predict_at has no meaning with --history, whose items have no times; name a user "
            "with --user, or leave it out."
        )


def _refuse_other_model(run: OpenRun, name: str | None) -> None:
    if run.index is not None and name not in (None, run.index.model):
        raise InputError(
            f"the index in {run.index.folder} is of the model {run.index.model}, not of {name}; leave "
            f"--index or --model out."
        )


def split_ids(text: str) -> list[str]:
    """Split item ids at commas; blanks around them are dropped.

    Raises:
        InputError: there is none, or one is empty.
    """
    ids = [part.strip() for part in text.split(",")]
    if not text.strip():
        raise InputError("--history is empty; name at least one item id.")
    if not all(ids):
        raise InputError(
            f"--history '{one_line(text, 80)}' has an empty id at position {ids.index('') + 1}; "
            f"separate ids by one comma."
        )
    return ids


def described(run: OpenRun, items: np.ndarray) -> list[dict[str, str]]:
    """Return id and title of item numbers, int [n]; the title is empty where none is known."""
    ids, titles = run.data.interactions.item_ids, run.titles
    return [{"item_id": str(ids[n]), "title": titles.get(str(ids[n]), "")} for n in items]


def recommendations(
    run: OpenRun,
    scorer: Scorer,
    history: np.ndarray,
    topk: int,
    exclude_seen: bool = True,
    times: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return the best items for one history, best first, as plain data.

    Args:
        run: the run.
        scorer: one of its models, as `OpenRun.build` returns.
        history: int [n], n >= 1, item numbers, oldest first.
        topk: items at most; fewer when the catalogue runs out.
        exclude_seen: leave the history's items out.
        times: as `OpenRun.history_times` returns.

    Returns:
        `rank` from 1, `item_id`, `title`, `score`, and `new`: True for an item added to the run.
    """
    best = run.recommend(scorer, [history], topk, exclude_seen, None if times is None else [times])
    items = best.items[0][best.items[0] != PAD]
    scores = best.scores[0][: len(items)]
    return [
        {"rank": rank, **entry, "score": plain(score), "new": bool(number > run.own_items)}
        for rank, (entry, score, number) in enumerate(
            zip(described(run, items), scores, items, strict=True), start=1
        )
    ]


def new_items(run: OpenRun, candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say where the items added to a run are in a ranking.

    Args:
        run: the run with added items.
        candidates: all that `recommendations` ranks.

    Returns:
        `item_id`, `title`, `rank` and `score` of every new item, best first; rank and score are
        None for one that is no candidate, since the history has it.
    """
    keys = ("item_id", "title", "rank", "score")
    ranked = [{key: entry[key] for key in keys} for entry in candidates if entry["new"]]
    ranked_ids = {entry["item_id"] for entry in ranked}
    added = described(run, np.arange(run.own_items + 1, run.data.interactions.num_items + 1))
    left = [{**entry, "rank": None, "score": None} for entry in added]
    return ranked + [entry for entry in left if entry["item_id"] not in ranked_ids]


def as_text(answer: dict[str, Any]) -> str:
    """Write an answer as a few lines of history, a table of recommendations, and new items."""
    history = answer["history"]
    latest = history[-_SHOWN_HISTORY:]
    whose = "the history given" if answer["user"] is None else f"user {answer['user']}"
    lines = [
        f"{answer['run']}, {answer['model']}, {whose}",
        "",
        _about_history(len(history), answer["history_read"], len(latest)),
        *(f"  {_shown(entry['item_id'])}  {_shown(entry['title'])}" for entry in latest),
        "",
    ]
    best = answer["recommendations"]
    if not best:
        return "\n".join([*lines, "no item is left to recommend: the history has them all."]) + "\n"
    cells = [
        [
            str(entry["rank"]),
            "n/a" if entry["score"] is None else f"{entry['score']:.4f}",
            "new" if entry["new"] else "",
            _shown(entry["item_id"]),
            _shown(entry["title"]),
        ]
        for entry in best
    ]
    lines += _columns([["rank", "score", "", "item_id", "title"], *cells])
    if "new_items" in answer:
        lines += ["", _about_new(answer["new_items"], answer["candidates"])]
    return "\n".join(lines) + "\n"


def _about_history(length: int, read: int, shown: int) -> str:
    what = f"history: {counted(length, 'item')}"
    if 0 < read < length:
        what += f"; the model reads the last {read if read > 1 else 'one'}"
    if shown < length:
        return f"{what}. The last {shown}, oldest first:"
    return f"{what}, oldest first:" if read in (0, length) else f"{what}. Oldest first:"


def _about_new(entries: Sequence[dict[str, Any]], candidates: int) -> str:
    """Say where new items rank: `new items: 9001 Dune, rank 312 of 1,684; ...`."""
    parts: list[str] = []
    for entry in entries[:_SHOWN_NEW]:
        rank = "in the history" if entry["rank"] is None else f"rank {entry['rank']:,}"
        of = f" of {candidates:,}" if not parts and entry["rank"] is not None else ""
        name = f"{_shown(entry['item_id'])} {_shown(entry['title'])}".rstrip()
        parts.append(f"{name}, {rank}{of}")
    more = len(entries) - len(parts)
    return "new items: " + "; ".join(parts) + (f"; and {more:,} more" if more else "")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    used = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(cell_len, column)) for column in used]
    # Numbers are right-aligned, text left-aligned; the last column needs no padding.
    right = [column[0] in ("rank", "score") for column in used]
    return [
        "  ".join(
            " " * (width - cell_len(cell)) + cell
            if to_right
            else cell + " " * (width - cell_len(cell))
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in zip(*used, strict=True)
    ]


def _shown(text: str) -> str:
    return one_line(text, _SHOWN_TITLE)

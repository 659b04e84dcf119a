"""Recommend items to one user or for one history, new items included."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from REC.config.options import places
from REC.data.interactions import PAD
from REC.evaluator.evaluator import Scorer
from REC.recipes.new_items import add_items
from REC.recipes.open_run import OpenRun, open_run
from REC.recipes.serve import serve
from REC.report.result import plain
from REC.utils.errors import InputError, one_line

# What the text output shows of a history, and of a title.
_SHOWN_HISTORY, _SHOWN_TITLE = 5, 70


def run_recommend(options: argparse.Namespace) -> None:
    """Do what the command line says and write the outcome to standard output.

    Raises:
        InputError: something the user can mend.
        Interrupted: a signal ended `--serve`.
    """
    _refuse_contradictions(options)
    asked = None if options.history is None else split_ids(options.history)
    run = open_run(options.run, {"show_progress": True, **places(options)})
    if options.add_items is not None:
        run = add_items(run, options.add_items)
    if options.serve is not None:
        serve(run, options.serve, options.host, options.topk)
        return
    history = run.history(options.user) if asked is None else run.item_numbers(asked)
    model = options.model or run.models[-1]
    answer = {
        "run": str(options.run),
        "model": model,
        "user": options.user,
        "history": described(run, history),
        "recommendations": recommendations(
            run, run.build(model), history, options.topk, options.exclude_seen
        ),
    }
    if options.json:
        text = json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        text = as_text(answer, run.config.MAX_ITEM_LIST_LENGTH)
    sys.stdout.write(text)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    one_answer = {name: getattr(options, name) for name in ("user", "history", "model")}
    given = [name for name, value in one_answer.items() if value is not None]
    if options.serve is not None and (given or options.json):
        raise InputError(
            f"--{given[0] if given else 'json'} has no meaning with --serve; leave one of them out."
        )
    if options.serve is None and (options.user is None) == (options.history is None):
        raise InputError(
            "name either a user (--user ID) or a history (--history ID,ID,...), and not both; or "
            "open a page with --serve PORT."
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
            f"--history '{one_line(text, 80)}' has an empty id at place {ids.index('') + 1}; "
            f"separate ids by one comma."
        )
    return ids


def described(run: OpenRun, items: np.ndarray) -> list[dict[str, str]]:
    """Return id and title of item numbers, int [n]; the title is empty where none is known."""
    ids, titles = run.data.interactions.item_ids, run.titles
    return [{"item_id": str(ids[n]), "title": titles.get(str(ids[n]), "")} for n in items]


def recommendations(
    run: OpenRun, scorer: Scorer, history: np.ndarray, topk: int, exclude_seen: bool = True
) -> list[dict[str, Any]]:
    """Return the best items for one history, best first, as plain data.

    Args:
        run: the run.
        scorer: one of its models, as `OpenRun.build` returns.
        history: int [n], n >= 1, item numbers, oldest first.
        topk: items at most; fewer when the catalogue runs out.
        exclude_seen: leave the history's items out.

    Returns:
        `rank` from 1, `item_id`, `title`, `score`, and `new`: True for an item added to the run.
    """
    found = run.recommend(scorer, [history], topk, exclude_seen)
    items = found.items[0][found.items[0] != PAD]
    scores = found.scores[0][: len(items)]
    return [
        {"rank": rank, **entry, "score": plain(score), "new": bool(number > run.own_items)}
        for rank, (entry, score, number) in enumerate(
            zip(described(run, items), scores, items, strict=True), start=1
        )
    ]


def as_text(answer: dict[str, Any], max_length: int) -> str:
    """Write an answer as a few lines of history and a table of recommendations."""
    history = answer["history"]
    latest = history[-_SHOWN_HISTORY:]
    whose = "the history given" if answer["user"] is None else f"user {answer['user']}"
    read = f", of which the model reads the last {max_length}" if len(history) > max_length else ""
    shown = ", the latest" if len(latest) < len(history) else ""
    lines = [
        f"{answer['run']}, {answer['model']}, {whose}",
        "",
        f"history: {len(history)} item{'s' * (len(history) != 1)}{read}{shown}:",
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
    return (
        "\n".join([*lines, *_columns([["rank", "score", "", "item_id", "title"], *cells])]) + "\n"
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    used = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(cell_len, column)) for column in used]
    # Ranks and scores stand right, text stands left; the last column needs no padding.
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

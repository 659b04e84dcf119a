"""Make a data set's two files from a download, and say what they hold."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hsft.data.column_checks import spelling_problem
from hsft.data.csv_rows import RowProblems
from hsft.data.files import dataset_file, default_cache_path, information_file
from hsft.data.interactions import read_interactions
from hsft.data.prepare.amazon import amazon2014, amazon2023, hllm_books
from hsft.data.prepare.hold_out import choose_items, copy_information, without
from hsft.data.prepare.movielens import movielens
from hsft.data.prepare.pixelrec import pixelrec
from hsft.data.prepare.recbole import recbole
from hsft.data.prepare.rows import Download
from hsft.data.prepare.statistics import (
    Statistics,
    dropped_rows,
    format_rows,
    statistics,
    statistics_rows,
)
from hsft.data.prepare.table import (
    Table,
    check_columns,
    core_rows,
    first_of_repeats,
    once_filtered_rows,
    read_events,
)
from hsft.data.prepare.times import first_since
from hsft.data.prepare.write import (
    Described,
    both_files,
    target_files,
    write_interactions,
    write_items,
)
from hsft.utils.errors import InputError, refuse
from hsft.utils.files import is_folder
from hsft.utils.program import command, command_line

log = logging.getLogger(__name__)

_CONFIG = ("code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml")
_ITEM_LLM, _USER_LLM = "model_checkpoints/ItemLLM_complete/", "model_checkpoints/UserLLM_complete/"
_DOWNLOADS: dict[str, Callable[[argparse.Namespace], Download]] = {
    "pixelrec": lambda given: pixelrec(Path(given.interactions), Path(given.items)),
    "amazon2014": lambda given: amazon2014(Path(given.reviews), Path(given.meta), given.item_first),
    "amazon2023": lambda given: amazon2023(Path(given.reviews), Path(given.meta)),
    "hllm-books": lambda given: hllm_books(Path(given.reviews), Path(given.meta)),
    "movielens": lambda given: movielens(Path(given.folder)),
    "recbole": lambda given: recbole(
        Path(given.inter),
        Path(given.item),
        {"title": given.title, "tag": given.tag, "description": given.description},
    ),
}


def prepare(options: argparse.Namespace) -> Statistics:
    """Make `<data_path>/<name>.csv` and `<text_path>/<name>.csv`, or `.parquet`, and print what they hold.

    Args:
        options: of `hsft.data.prepare.options.parse_options`.

    Returns:
        The numbers of the data set written.

    Raises:
        InputError: a file is missing, of another format, has bad rows, or is there already.
        Interrupted: SIGINT or SIGTERM came; nothing is left.
    """
    if options.format == "hold-out":
        return _hold_out(options)
    download = _DOWNLOADS[options.format](options)
    name = options.name or download.name
    target = target_files(
        name,
        options.data_path,
        options.text_path,
        options.overwrite,
        [download.interactions.path, download.items.path],
        parquet=options.files == "parquet",
    )
    if download.note:
        log.info("%s", download.note)
    with both_files(target) as files:
        table, dropped = _interactions(download, options)
        problems = RowProblems(download.items.shown)
        described = write_items(
            files, download.described(download.items, problems), table.kept_items()
        )
        refuse(problems.sentences())
        _refuse_undescribed(download, described)
        write_interactions(files, table)
    dropped |= _items_dropped(described)
    numbers = statistics(table)
    rows = statistics_rows(numbers, described.with_text)
    rows.append(("items without a row, kept without text", f"{described.without_row:,}"))
    left_out = dropped_rows(dropped)
    sys.stdout.write(format_rows(f"{target.data} and {target.text}", rows))
    sys.stdout.write(format_rows("left out", left_out) if left_out else "nothing was left out\n")
    _write_next(name, options)
    return numbers


def _interactions(download: Download, options: argparse.Namespace) -> tuple[Table, dict[str, int]]:
    """Read and filter; returns the interactions, and numbers left out by reason."""
    dropped: dict[str, int] = {}
    rating = options.min_rating if download.has_ratings else None
    problems = RowProblems(download.interactions.shown)
    table, low = read_events(download.events(download.interactions, problems), problems, rating)
    if low:
        dropped[f"interactions rated below {rating:g}"] = low
    warnings = check_columns(table, download.interactions.shown)
    if options.since is not None:
        least, date = first_since(table.timestamps, options.since)
        keep = table.timestamps >= least
        dropped[f"interactions before {date}"] = int((~keep).sum())
        if not keep.any():
            raise InputError(
                f"{download.interactions.shown}: no interaction is left with --since {date}; give an "
                f"earlier date."
            )
        table = table.keep(keep)
        warnings = check_columns(table, download.interactions.shown)
    for warning in warnings:
        log.warning("%s", warning)
    if not options.keep_repeats:
        keep = first_of_repeats(table)
        dropped["interactions that repeat user, item and timestamp"] = int((~keep).sum())
        table = table.keep(keep)
    if download.once_filtered:
        least = download.once_filtered
        before = statistics(table)
        keep = once_filtered_rows(table, least)
        if not keep.any():
            raise InputError(
                f"{download.interactions.shown}: no user is left with {least} interactions with items "
                f"that have {least}; check the file, or use prepare_data.py amazon2014."
            )
        table = table.keep(keep)
        dropped |= _left_out(before, statistics(table), f"fewer than {least} interactions")
    user_min = max(options.k_core, options.min_history)
    if user_min > 1:
        before = statistics(table)
        keep = core_rows(table, user_min, options.k_core)
        if not keep.any():
            raise InputError(
                f"{download.interactions.shown}: no interaction is left with --k_core "
                f"{options.k_core} and --min_history {options.min_history}; give smaller ones."
            )
        table = table.keep(keep)
        words = f"--k_core {options.k_core}" if options.k_core > 1 else ""
        if options.min_history > 1:
            words += f"{' and ' if words else ''}--min_history {options.min_history}"
        dropped |= _left_out(before, statistics(table), words)
    return table, dropped


def _left_out(before: Statistics, after: Statistics, words: str) -> dict[str, int]:
    """Return how many interactions, users and items a filter took."""
    return {
        f"{what}: {words}": getattr(before, what) - getattr(after, what)
        for what in ("interactions", "users", "items")
    }


def _refuse_undescribed(download: Download, described: Described) -> None:
    """Refuse a download whose two files do not name items alike."""
    spelling = spelling_problem(
        described.twins,
        described.described + described.without_row,
        download.interactions.shown,
        download.items.shown,
    )
    if spelling:
        raise InputError(spelling)
    if described.described:
        return
    if not described.unused:
        raise InputError(
            f"{download.items.shown} describes no item at all; check that it is the right file."
        )
    raise InputError(
        f"none of the {described.without_row:,} items of {download.interactions.shown} is in "
        f"{download.items.shown}; {download.doubt}."
    )


def _items_dropped(described: Described) -> dict[str, int]:
    return {
        "rows of items without interactions, which are not in the catalogue": described.unused,
        "rows of items described before": described.repeated,
    }


def _hold_out(options: argparse.Namespace) -> Statistics:
    source = dataset_file(options.data_path, options.dataset)
    information = information_file(options.text_path, options.dataset)
    name = options.name or f"{options.dataset}-warm"
    target = target_files(
        name,
        options.data_path,
        options.text_path,
        options.overwrite,
        [source, information],
        parquet=options.files == "parquet",
    )
    interactions = read_interactions(source)
    held = choose_items(interactions, options.share, options.seed)
    table = without(interactions, held)
    with both_files(target) as files:
        with_text = copy_information(information, files, table.kept_items())
        write_interactions(files, table)
    numbers = statistics(table)
    taken = [
        ("items", _share(int(held.items.sum()), interactions.num_items)),
        ("interactions with them", _share(held.interactions, len(interactions))),
        ("test targets that are such items", _share(held.targets, held.all_targets)),
        ("users without any other item", f"{interactions.num_users - numbers.users:,}"),
    ]
    sys.stdout.write(
        format_rows(f"{target.data} and {target.text}", statistics_rows(numbers, with_text))
    )
    sys.stdout.write(format_rows(f"taken out of {options.dataset}", taken))
    # Embeddings of the full data hold the rest's, and are what the items taken out are ranked by.
    cache = str(default_cache_path(options.data_path, options.dataset))
    words = ["--config_file", *_CONFIG, "--dataset", name]
    words += [*_paths(options), "--item_cache_path", cache]
    words += ["--user_pretrain_dir", _USER_LLM, "--use_qlora", "True"]
    sys.stdout.write(f"\n{_download('user', _USER_LLM)}")
    sys.stdout.write(f"next, with the item cache of {options.dataset}: {_typed('train', words)}\n")
    return numbers


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"


def _write_next(name: str, options: argparse.Namespace) -> None:
    words = ["--config_file", *_CONFIG, "--dataset", name]
    words += [*_paths(options), "--item_pretrain_dir", _ITEM_LLM]
    sys.stdout.write(f"\n{_download('item', _ITEM_LLM)}next: {_typed('cache', words)}\n")


def _typed(name: str, words: Sequence[str]) -> str:
    return command_line(f"{name} {shlex.join(words)}")


def _download(side: str, folder: str) -> str:
    """Return a line on fetching a model folder, or nothing where it is there."""
    if is_folder(Path(folder)):
        return ""
    return f"first, since {folder} is not there: {command(f'download-{side}llm')}\n"


def _paths(options: argparse.Namespace) -> list[str]:
    given = {"data_path": options.data_path, "text_path": options.text_path}
    usual = {"data_path": "dataset", "text_path": "information"}
    return [word for key in given if given[key] != usual[key] for word in (f"--{key}", given[key])]

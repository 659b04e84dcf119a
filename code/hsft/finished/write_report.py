"""Write the HTML report of finished runs: results, and what their models recommend to some users."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsft.config import Config
from hsft.config.schema import READS_EMBEDDINGS
from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.split import Phase, train_item_counts
from hsft.data.time_fields import item_times
from hsft.finished.cold_start import check_cold_start, cold_start
from hsft.finished.example_users import (
    Scored,
    choose_models,
    choose_users,
    example_cards,
    score,
)
from hsft.finished.open_run import (
    OpenRun,
    open_run,
    refuse_changed_data,
    refuse_elsewhere,
)
from hsft.hub.repository import run_folder, run_name
from hsft.report.breakdown import history_groups, popularity_deciles, popularity_groups
from hsft.report.compare import Comparison, load_comparison, run_names
from hsft.report.page import Page, Section, render
from hsft.report.result import read_result
from hsft.report.run_tables import Results, config_section, environment_section
from hsft.report.sections import (
    cold_start_section,
    facts,
    group_section,
    headline,
    metric_charts,
    metric_section,
    popularity_section,
    recall_section,
    training_section,
)
from hsft.run.saved_model import run_config
from hsft.run.setup import Data, eval_protocol, load_data
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import write_text
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

HISTORY, POPULARITY = "By history length", "By item popularity"
EXAMPLES = "Example users"


def write_report(
    run_dirs: Sequence[str | Path],
    target: Path,
    *,
    examples: int = 12,
    users: Sequence[str] = (),
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    full_dataset: str | None = None,
) -> Path:
    """Write the report of runs on the same users to an HTML file.

    A part that needs the runs' data or models, where these are gone, is replaced by the reason.

    Args:
        run_dirs: run folders, scored on the same users.
        target: file that ends in `.html`.
        examples: users drawn for the examples; 0 loads no model.
        users: ids of the users to show instead.
        seed: of the draw.
        overrides: configuration keys with other values, such as a path that moved.
        full_dataset: the data from which items were held out to make the runs' data; adds how the
            last run that reads item embeddings ranks them.

    Returns:
        `target`.

    Raises:
        InputError: the runs cannot be compared, a user is unknown, cold start cannot be measured,
            or the file cannot be written.
        Interrupted: SIGINT or SIGTERM came; nothing was written.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {target} does not end in .html; name an HTML file.")
    with StopSignals():
        # A run that is named twice is shown once.
        run_dirs = list(dict.fromkeys(map(run_folder, run_dirs)))
        comparison = load_comparison(run_dirs)
        results = _named_results(run_dirs)
        # Before the examples, which take long.
        cold_start_run = _cold_start_run(results, full_dataset, overrides)
        log.info("report on %s.", comparison.title)
        sections = [
            metric_section(comparison),
            training_section(comparison, results),
            recall_section(comparison),
            *_breakdowns(comparison, run_dirs[0], overrides),
            _examples(comparison, examples, users, seed, overrides),
            _cold_start(cold_start_run, full_dataset, overrides),
            config_section(results),
            environment_section(results),
        ]
        write_text(target, render(_page(comparison, results, sections)))
    return target


def _page(comparison: Comparison, results: Results, sections: Sequence[Section | None]) -> Page:
    return Page(
        f"HSFT report: {results[0][2]['dataset']}",
        headline(comparison),
        metric_charts(comparison),
        facts(comparison, results),
        [section for section in sections if section is not None],
    )


def _named_results(run_dirs: Sequence[str | Path]) -> Results:
    return [
        (name, Path(run_dir), read_result(run_dir))
        for name, run_dir in zip(run_names(run_dirs), run_dirs, strict=True)
    ]


def _breakdowns(
    comparison: Comparison, run_dir: str | Path, overrides: Mapping[str, Any] | None
) -> list[Section]:
    """Metrics by history length and by popularity, or why there are none."""
    try:
        config = run_config(Path(run_dir), overrides)
        refuse_elsewhere(Path(run_dir), config, overrides)
        # Only then does the item cache decide which interactions there are.
        dropping = config.missing_items == "drop" and config.reads_embeddings
        data = load_data(config, need_cache=dropping)
        dataset = _evaluation_users(data, run_dir, config)
    except InputError as error:
        reason = _why("the breakdown", error)
        return [Section(HISTORY, [reason]), Section(POPULARITY, [reason])]
    segments = dataset.segments
    by_length = history_groups(segments.ends - segments.starts - 1)
    counts = train_item_counts(data.split)
    return [
        group_section(
            HISTORY,
            [
                "Users grouped by the items in their history before the held-out one, cut at the "
                "quartiles; of a longer history a model reads the last MAX_ITEM_LIST_LENGTH items."
            ],
            by_length,
            comparison,
        ),
        popularity_section(
            POPULARITY,
            popularity_groups(counts, dataset.targets),
            popularity_deciles(counts, dataset.targets),
            comparison,
        ),
    ]


def _examples(
    comparison: Comparison,
    count: int,
    users: Sequence[str],
    seed: int,
    overrides: Mapping[str, Any] | None,
) -> Section | None:
    """A few users with what was recommended to them, or why there are none."""
    if count < 1 and not users:
        return None
    models, shown = choose_models(comparison.rows)
    try:
        opened: dict[Path, OpenRun] = {}
        datasets: dict[Path, CachedEmbeddingEvalDataset] = {}
        for folder, _ in models:
            if folder not in opened:
                opened[folder] = open_run(folder, overrides, again=True)
                datasets[folder] = _evaluation_users(
                    opened[folder].data, folder, opened[folder].config
                )
    except InputError as error:
        return Section(EXAMPLES, [_why("the example users", error)])
    first = models[0][0]
    # An unknown user is an error of the command line, so it does not become a line on the page.
    chosen, rule = choose_users(opened[first], datasets[first], count, users, seed)
    scored, reasons = [], []
    for folder, model in models:
        try:
            scored.append(score(opened[folder], model, datasets[folder], chosen))
        except InputError as error:
            reasons.append(_why(f"{model} of {run_name(folder)}", error))
    text = [
        shown,
        f"{rule} Lists are of the whole catalogue without the items of the history; the held-out "
        f"item is marked, and its rank is that of the metrics.",
        *reasons,
        *_agreement(scored),
    ]
    if not scored:
        return Section(EXAMPLES, reasons)
    return Section(
        EXAMPLES, text, examples=example_cards(opened[first], datasets[first], chosen, scored)
    )


def _cold_start_run(
    results: Results, full_dataset: str | None, overrides: Mapping[str, Any] | None
) -> tuple[str, Path] | None:
    """Return name and folder of the last run that can rank items that it was not trained with.

    Returns:
        None where no `full_dataset` is named.

    Raises:
        InputError: there is none, or `cold_start` would refuse it.
    """
    if full_dataset is None:
        return None
    able = [run for run in results if run[2]["config"].get("model") in READS_EMBEDDINGS]
    if not able:
        raise InputError(
            "--cold_start: none of the runs reads item embeddings, so none can rank items that its "
            "data never had; name a fine-tuning run or a baseline."
        )
    name, folder, _ = able[-1]
    check_cold_start(folder, full_dataset, overrides)
    return name, folder


def _cold_start(
    run: tuple[str, Path] | None, full_dataset: str | None, overrides: Mapping[str, Any] | None
) -> Section | None:
    if run is None or full_dataset is None:
        return None
    name, folder = run
    rows = cold_start(folder, full_dataset, overrides, again=True)
    return cold_start_section(name, full_dataset, rows)


def _agreement(scored: Sequence[Scored]) -> list[str]:
    """Say whether the ranks computed now are the recorded ones."""
    lines = []
    for one in scored:
        if one.ranks is None:
            lines.append(f"{one.name} draws another order at every scoring, so its list is new.")
        elif one.differing:
            lines.append(
                f"{one.name}: {one.differing} of {len(one.ranks)} ranks computed now differ from "
                f"the recorded ones. A difference of a few places comes from rounding; a larger one "
                f"means that data, item cache or model have changed since the run."
            )
    if not lines and all(one.recorded is not None for one in scored):
        lines.append("All ranks computed now equal the recorded ones.")
    return lines


def _evaluation_users(
    data: Data, run_dir: str | Path, config: Config
) -> CachedEmbeddingEvalDataset:
    """Return the users that a run scored.

    Raises:
        InputError: the data are not those of the run.
    """
    result = read_result(run_dir)
    phase: Phase = "valid" if result["phase"] == "valid" else "test"
    times = item_times(config, data.interactions)
    dataset = CachedEmbeddingEvalDataset(data.split, phase, config.eval_list_length, times)
    then, now = result.get("data", {}), data.summary()
    changed = [key for key in now if key in then and then[key] != now[key]]
    if changed:
        key = changed[0]
        raise InputError(
            f"the data of {run_dir} have changed since the run ({key.replace('_', ' ')}: "
            f"{then[key]} then, {now[key]} now); name the old ones with --data_path."
        )
    if len(dataset) != result["rows"][0].get("users", len(dataset)):
        raise InputError(
            f"the data of {run_dir} have changed since the run (users scored: "
            f"{result['rows'][0]['users']} then, {len(dataset)} now); name the old ones with "
            f"--data_path."
        )
    refuse_changed_data(run_dir, dataset, eval_protocol(config))
    return dataset


def _why(what: str, error: InputError) -> str:
    reason = one_line(error)
    log.warning("%s is left out: %s", what, reason)
    return f"Left out, {what}: {reason}"

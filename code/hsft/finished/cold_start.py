"""Cold start: how well a finished run ranks items that its data never had."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsft.data.cache import ItemCache
from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.files import information_file
from hsft.data.interactions import Interactions, load_interactions, renumber
from hsft.data.split import cut_at, leave_one_out
from hsft.data.time_fields import item_times
from hsft.evaluator.evaluator import EvalProtocol, Evaluator, Scorer
from hsft.evaluator.intervals import interval
from hsft.evaluator.metrics import per_user
from hsft.finished.new_items import encode_as_trained
from hsft.finished.open_run import OpenRun, open_run
from hsft.model.reference import build_reference
from hsft.report.comparison_files import INTERVALS
from hsft.report.terminal import Blocks, MetricCell, MetricTable
from hsft.run.saved_model import refuse_other_user_llm
from hsft.utils.errors import InputError, one_line
from hsft.utils.progress import Meter

log = logging.getLogger(__name__)

METRICS = ("Recall", "NDCG")
ALL_ITEMS, COLD_ITEMS = "all items", "cold items"
REFERENCES = ("pop", "random", "item_knn")
# Below every score of a model, and finite: infinity times a padded zero would be NaN.
_BELOW_ALL = -1e30


class ColdOnly:
    """Ranks the last items of another scorer's catalogue above all others, among them as it does.

    A further dimension, 1 in every user vector, is 0 in the vectors of those items and far below
    every score in the others'.

    Args:
        scorer: the model.
        own_items: items 1..own_items are the others.
    """

    def __init__(self, scorer: Scorer, own_items: int) -> None:
        self._scorer, self._own_items = scorer, own_items

    @property
    def num_items(self) -> int:
        """Number of items I, the others included."""
        return self._scorer.num_items

    @property
    def reads_times(self) -> bool:
        """Whether `user_vectors` takes the times of the items too, as the other scorer's does."""
        return bool(getattr(self._scorer, "reads_times", False))

    def user_vectors(self, history: Tensor, lengths: Tensor, *times: Tensor) -> Tensor:
        """Int64 [B, T] and [B], and uint8 [B, T, F] of `reads_times` -> float32 [B, D + 1]."""
        vectors = self._scorer.user_vectors(history, lengths, *times).float()
        return torch.cat([vectors, vectors.new_ones((len(vectors), 1))], dim=1)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Item numbers start..end-1 -> float32 [end - start, D + 1]."""
        vectors = self._scorer.item_slice(start, end)
        return self._widen(vectors, torch.arange(start, end, device=vectors.device))

    def item_vectors(self, items: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., D + 1]."""
        return self._widen(self._scorer.item_vectors(items), items)

    def _widen(self, vectors: Tensor, items: Tensor) -> Tensor:
        penalty = torch.where(items > self._own_items, 0.0, _BELOW_ALL).unsqueeze(-1)
        return torch.cat([vectors.float(), penalty.to(vectors.device)], dim=-1)


def cold_start(
    run_dir: str | Path,
    full_dataset: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    again: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a run on the items that were held out from its data.

    The users are those whose test target in the full data, split as the run's was, is a cold item, one
    that the run's own data never had; the history is everything before it. A run of split:
    global_time that left out the items first seen after its training has these as cold items, so
    that the full data may be the run's own. The target is ranked with
    seen items masked, once among all items of the full data and once among its cold items.

    Args:
        run_dir: a run of a model that reads item embeddings.
        full_dataset: name of the data set that the run's own was cut from.
        overrides: configuration keys with other values; `item_cache_path` names the cache of the
            full data where the run's own cache has only the run's items.
        again: this program has read the run's data before and has said how many they are.

    Returns:
        A row for each of the run's models, then `pop` (counted in the run's training items),
        `random` and `item_knn` (cosine of the embeddings to the history), for either kind of
        candidates: `model`, `candidates` (`all items` or `cold items`), `items` (how many candidates
        there are, seen ones not yet taken off), `users`, and `metrics`, name -> `value`, `low` and
        `high` (95 % bootstrap interval over users).

    Raises:
        InputError: the run's model knows items by their ids only; the run's data is the full data
            itself or not part of it; there is no cold test target; or the item cache lacks items.
    """
    run, dataset = _open(run_dir, full_dataset, overrides, again)
    log.info("%d users' test targets are cold items.", len(dataset))
    seen = dataset.count_seen_targets()
    if seen:
        log.info("%d of them are in their user's history already and count as misses.", seen)
    evaluator = _full_ranking(run, dataset)
    rows = [row for name, build in _models(run) for row in _rows(run, evaluator, name, build())]
    return sorted(rows, key=lambda row: row["candidates"] != ALL_ITEMS)


def _full_ranking(run: OpenRun, dataset: CachedEmbeddingEvalDataset) -> Evaluator:
    config = run.config
    protocol = EvalProtocol(
        "full", tuple(config.topk), METRICS, budget_bytes=config.logits_budget_mb << 20
    )
    return Evaluator(
        dataset, protocol, batch_size=config.eval_batch_size, num_workers=config.num_workers
    )


def _rows(run: OpenRun, evaluator: Evaluator, name: str, scorer: Scorer) -> list[dict[str, Any]]:
    """Measure one model with either kind of candidates."""
    all_items = run.data.interactions.num_items
    return [
        {
            "model": name,
            "candidates": candidates,
            "items": items,
            "users": len(evaluator.dataset),
            "metrics": _rank(run, evaluator, ranked, f"{name}, {candidates}"),
        }
        for candidates, items, ranked in (
            (ALL_ITEMS, all_items, scorer),
            (COLD_ITEMS, all_items - run.own_items, ColdOnly(scorer, run.own_items)),
        )
    ]


def check_cold_start(
    run_dir: str | Path, full_dataset: str, overrides: Mapping[str, Any] | None = None
) -> None:
    """Raise what `cold_start` would raise for the same arguments, without ranking anything.

    Raises:
        InputError: as `cold_start`.
    """
    _open(run_dir, full_dataset, overrides, again=True)


def _open(
    run_dir: str | Path, full_dataset: str, overrides: Mapping[str, Any] | None, again: bool
) -> tuple[OpenRun, CachedEmbeddingEvalDataset]:
    """Return the run with the cold items added, and the users whose test target is one of them."""
    given = dict(overrides or {})
    if "item_cache_path" in given:
        given["use_item_cache"] = True
    run = open_run(run_dir, given, again=again)
    run.refuse_new_items()
    refuse_other_user_llm(run.folder, run.config)
    _refuse_same_data(run, full_dataset)
    full = load_interactions(run.config.model_copy(update={"dataset": full_dataset}))
    _refuse_other_data(run, full, full_dataset)
    warm = set(run.data.interactions.item_ids[1:])
    cold = [str(item) for item in full.item_ids[1:] if item not in warm]
    extended = run.with_items(_embeddings(run, cold, full_dataset))
    return extended, _cold_targets(extended, full, full_dataset)


def _refuse_same_data(run: OpenRun, name: str) -> None:
    time = run.data.split.time
    left_out = time is not None and time.cold == "leave_out" and time.cold_items > 0
    if run.config.dataset == name and not left_out:
        shown = one_line(name)
        raise InputError(
            f"{run.folder} was trained on {shown} itself, so none of its items is new to it; make a "
            f"copy without some items (python prepare_data.py hold-out --dataset "
            f"{shlex.quote(shown)}), train on that and name its run."
        )


def _refuse_other_data(run: OpenRun, full: Interactions, name: str) -> None:
    trained_on = run.data.interactions
    for kind, ids, known in (
        ("item", trained_on.item_ids[1:], full.item_ids[1:]),
        ("user", trained_on.user_ids, full.user_ids),
    ):
        lacking = sorted(set(ids) - set(known))
        if lacking:
            raise InputError(
                f"{run.config.dataset}, the data of {run.folder}, is no part of {one_line(name)}: "
                f"that lacks {len(lacking)} of its {len(ids)} {kind}s, for example "
                f"'{one_line(lacking[0], 40)}'; "
                f"name the data set that items were held out from."
            )


def _embeddings(run: OpenRun, cold: Sequence[str], name: str) -> ItemCache:
    """Return the cold items' rows of the run's item cache, or encode them as the run's were."""
    if run.config.trains_items:
        return encode_as_trained(run, information_file(run.config.text_path, name), cold)
    cache = run.data.cache
    assert cache is not None
    rows = cache.rows_of(cold)
    lacking = [item for item, row in zip(cold, rows, strict=True) if row < 0]
    if lacking:
        raise InputError(
            f"{len(lacking)} items of {one_line(name)} are not in the item cache "
            f"{cache.path or 'made now'}, for example {', '.join(lacking[:5])}; encode all of "
            f"{one_line(name)} with item_caching.py and name that cache with --item_cache_path."
        )
    return ItemCache(list(cold), cache.embeddings[torch.from_numpy(rows)], cache.metadata)


def _cold_targets(run: OpenRun, full: Interactions, name: str) -> CachedEmbeddingEvalDataset:
    whole = renumber(full, run.data.interactions.item_ids)
    time = run.data.split.time
    if time is None:
        split = leave_one_out(whole)
    else:
        split = cut_at(whole, time.cuts, score_new_users=time.cold == "rank")
    times = item_times(run.config, split.interactions)
    everyone = CachedEmbeddingEvalDataset(split, "test", run.config.eval_list_length, times)
    dataset = everyone.keep(everyone.targets > run.own_items)
    if not len(dataset):
        raise InputError(
            f"no user's test target in {one_line(name)} is an item that {run.config.dataset} lacks, "
            f"so there is nothing to measure; hold more items out and train on what is left."
        )
    return dataset


def _models(run: OpenRun) -> list[tuple[str, Callable[[], Scorer]]]:
    def reference(name: str) -> Scorer:
        # The split is of the run's own interactions, in which no cold item is counted.
        config = run.config.model_copy(update={"model": name})
        data = run.data
        return build_reference(config, data.split, data.cache, run.fabric.device, data.own_items)

    models = [(name, partial(run.build, name)) for name in run.models]
    others = [name for name in REFERENCES if name not in run.models]
    return [*models, *((name, partial(reference, name)) for name in others)]


def _rank(
    run: OpenRun, evaluator: Evaluator, scorer: Scorer, task: str
) -> dict[str, dict[str, float]]:
    with Meter(f"ranking: {task}", evaluator.own_users, "users", run.config.show_progress) as bar:
        evaluation = evaluator.run(
            scorer, run.fabric.device, on_batch=bar.advance, autocast=run.fabric.autocast
        )
    summary = {}
    for metric in METRICS:
        for k in run.config.topk:
            low, high = interval(metric, evaluation.ranks, k)
            value = float(per_user(metric, evaluation.ranks, k).mean())
            summary[f"{metric}@{k}"] = {"value": value, "low": low, "high": high}
    return summary


def blocks(rows: Sequence[Mapping[str, Any]]) -> Blocks:
    """Write the rows of `cold_start` as paragraphs and a table for either kind of candidates."""
    written: list[str | MetricTable] = [
        f"cold start: {rows[0]['users']} users whose test target is a cold item"
    ]
    for candidates in dict.fromkeys(row["candidates"] for row in rows):
        ranked = [row for row in rows if row["candidates"] == candidates]
        among = f"{'all' if candidates == ALL_ITEMS else 'the'} {ranked[0]['items']} "
        among += "items" if candidates == ALL_ITEMS else "cold items"
        table = [
            (row["model"], [MetricCell(**entry) for entry in row["metrics"].values()])
            for row in ranked
        ]
        written += [
            f"ranked among {among}, seen ones masked:",
            MetricTable(["model", *rows[0]["metrics"]], table),
        ]
    return [
        *written,
        f"{INTERVALS}; ties count against the model, so pop, which counts 0 for every cold item, "
        f"finds none.",
    ]

"""What the models of finished runs recommend to some users, beside the item that was held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.evaluator.evaluator import Evaluator, draw_candidates
from hsft.evaluator.metrics import UNRANKED
from hsft.evaluator.recommend import Recommendations
from hsft.finished.open_run import OpenRun
from hsft.hub.repository import run_name
from hsft.report.compare import Row
from hsft.report.page import Example, Listed, Listing
from hsft.report.result import TUNED, UNTRAINED, read_ranks, read_result
from hsft.run.setup import eval_protocol
from hsft.run.train_and_rank import evaluate
from hsft.utils.errors import InputError

log = logging.getLogger(__name__)

LISTED = 10
_SHOWN_HISTORY = 10


@dataclass(frozen=True)
class Scored:
    """A model's recommendations to B users.

    Attributes:
        name: the model's name.
        best: the best items of the whole catalogue.
        ranks: int64 [B], rank of the held-out item, recomputed; None where that is not possible.
        recorded: int64 [B], the ranks in `ranks.safetensors`; None where the run did not score it.
    """

    name: str
    best: Recommendations
    ranks: np.ndarray | None
    recorded: np.ndarray | None

    @property
    def differing(self) -> int:
        """Users whose recomputed rank is not the recorded one."""
        if self.ranks is None or self.recorded is None:
            return 0
        return int((self.ranks != self.recorded).sum())


def choose_models(rows: Sequence[Row]) -> tuple[list[tuple[Path, str]], str]:
    """Choose whose recommendations are shown: (run folder, model), and say which and why.

    The last fine-tuned row, beside the untrained model of its run; without one the first and the
    last row.
    """
    tuned = [row for row in rows if row.model == TUNED]
    if tuned:
        folder = tuned[-1].folder
        rule = (
            f"The lists are those of {run_name(folder)}, the last fine-tuning run named, and "
            f"of its UserLLM before training, to show what training changed."
        )
        return [(folder, UNTRAINED), (folder, TUNED)], rule
    models = list(dict.fromkeys((row.folder, row.model) for row in (rows[0], rows[-1])))
    if len(models) == 1:
        return models, f"The lists are those of {rows[0].name}, the only model."
    return models, (
        f"The lists are those of the first and the last row, {rows[0].name} and {rows[-1].name}, "
        f"since no run named is a fine-tuning run."
    )


def choose_users(
    run: OpenRun, dataset: CachedEmbeddingEvalDataset, count: int, ids: Sequence[str], seed: int
) -> tuple[np.ndarray, str]:
    """Choose users, and say how.

    Args:
        run: an opened run.
        dataset: its evaluation users.
        count: users drawn where `ids` is empty.
        ids: user ids, or none.
        seed: of the draw.

    Returns:
        int64 [B], positions in `dataset`, and a sentence.

    Raises:
        InputError: there is no such user, or it was not scored.
    """
    if not ids:
        rng = np.random.default_rng(seed)
        count = min(count, len(dataset))
        chosen = np.sort(rng.choice(len(dataset), count, replace=False))
        rule = (
            f"{count} of the {len(dataset):,} users, drawn uniformly at random with seed {seed}; "
            f"none was picked or left out by hand."
        )
        return chosen, rule
    known = {str(user): number for number, user in enumerate(run.data.interactions.user_ids)}
    for user in ids:
        if user not in known:
            some = ", ".join(list(known)[:5])
            raise InputError(
                f"--users: {run.config.dataset} has no user '{user}'; its users are, for example, "
                f"{some}."
            )
    numbers = np.array([known[user] for user in ids], dtype=np.int64)
    missing = [
        user for user, n in zip(ids, numbers, strict=True) if n not in dataset.segments.users
    ]
    if missing:
        raise InputError(
            f"--users: user '{missing[0]}' has no {dataset.phase} target, which needs "
            f"{dataset.split.needs(dataset.phase)}; name others."
        )
    chosen = np.searchsorted(dataset.segments.users, numbers)
    return chosen, f"{len(ids)} of the {len(dataset):,} users, named with --users."


def score(
    run: OpenRun, model: str, dataset: CachedEmbeddingEvalDataset, chosen: np.ndarray
) -> Scored:
    """Recommend to users and rank their held-out items again.

    Args:
        run: the run.
        model: one of its models.
        dataset: its evaluation users.
        chosen: int64 [B], positions in `dataset`.

    Raises:
        InputError: the model is missing or damaged, or does not fit into memory.
    """
    log.info("examples: %s of %s.", model, run.folder)
    scorer = run.build(model)
    histories, times = [dataset[int(row)][:-1] for row in chosen], None
    if dataset.times is not None:
        # The last time is the held-out item's, which a run of predict_at: target alone reads.
        segments, seconds = dataset.segments, dataset.times.seconds
        times = [seconds[segments.starts[row] : segments.ends[row]] for row in chosen]
    best = run.recommend(scorer, histories, topk=LISTED, times=times)
    ranks = None
    # It draws another order at every scoring.
    if model != "random":
        protocol = eval_protocol(run.config)
        sampled = protocol.kind == "sampled"
        evaluator = Evaluator(
            dataset.keep(chosen),
            protocol,
            batch_size=run.config.eval_batch_size,
            candidates=draw_candidates(dataset, protocol)[chosen] if sampled else None,
        )
        ranks = evaluate(run.config, scorer, evaluator, run.fabric, "examples").ranks
    recorded = None
    if any(row["name"] == model for row in read_result(run.folder)["rows"]):
        recorded = read_ranks(run.folder, model)[1][chosen]
    return Scored(f"{run_name(run.folder)}: {model}", best, ranks, recorded)


def example_cards(
    run: OpenRun,
    dataset: CachedEmbeddingEvalDataset,
    chosen: np.ndarray,
    scored: Sequence[Scored],
) -> list[Example]:
    """Put history, recommendations and held-out item of each user together, in words.

    Args:
        run: whose items and titles these are.
        dataset, chosen: as for `score`.
        scored: one a model.
    """
    titles, ids = run.titles, run.data.interactions.item_ids

    def listed(item: int, target: bool = False) -> Listed:
        item_id = str(ids[item])
        return Listed(titles.get(item_id) or "no title", item_id, target)

    cards = []
    for number, row in enumerate(chosen):
        items = dataset[int(row)]
        target = int(items[-1])
        user = dataset.segments.users[row]
        listings = [
            Listing(
                one.name,
                [listed(int(item), int(item) == target) for item in one.best.items[number] if item],
                _rank_sentence(one, number, target),
            )
            for one in scored
        ]
        history = [listed(int(item)) for item in items[:-1][-_SHOWN_HISTORY:]]
        cards.append(
            Example(
                str(run.data.interactions.user_ids[user]),
                history,
                len(items) - 1 - len(history),
                listed(target, target=True),
                listings,
            )
        )
    return cards


def _rank_sentence(scored: Scored, number: int, target: int) -> str:
    computed = None if scored.ranks is None else int(scored.ranks[number])
    recorded = None if scored.recorded is None else int(scored.recorded[number])
    if UNRANKED in (computed, recorded) and recorded in (computed, None):
        return "The held-out item is in the history too, so it has no rank and counts as a miss."
    if recorded is None:
        text = "Rank of the held-out item: not recorded by the run"
        return f"{text}; computed now: {computed}." if computed is not None else f"{text}."
    text = f"Rank of the held-out item: {_shown_rank(recorded)}"
    if computed is not None and computed != recorded:
        return f"{text} recorded by the run, {_shown_rank(computed)} computed now."
    listed = np.flatnonzero(scored.best.items[number] == target)
    if computed is not None and len(listed) and listed[0] + 1 < computed:
        return f"{text}, ties and the protocol's candidates counted as in the metrics."
    return f"{text}."


def _shown_rank(rank: int) -> str:
    return "none" if rank == UNRANKED else str(rank)

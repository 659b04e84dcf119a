"""Open a finished run's folder: its data and its models, ready to score."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hsft.config import Config
from hsft.config.schema import RAW_TIME_MODELS, READS_EMBEDDINGS
from hsft.data.cache import ItemCache, ids_fingerprint
from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.files import information_file, interaction_file
from hsft.data.item_text import read_item_titles, title_column
from hsft.data.prepare.dates import utc_seconds
from hsft.data.time_checks import is_date
from hsft.data.time_fields import ItemTimes, item_times, unit_scale
from hsft.evaluator.evaluator import EvalProtocol, Scorer
from hsft.evaluator.fingerprint import differing_parts, evaluation_fingerprint
from hsft.evaluator.recommend import Recommendations, recommend
from hsft.evaluator.user_vectors import encode_users
from hsft.finished.item_index import IndexedScorer, ItemIndex, open_index
from hsft.hub.repository import run_folder
from hsft.report.result import read_result
from hsft.run.run_dir import CONFIG_FILE
from hsft.run.saved_model import build_model, model_names, run_config, with_trained_items
from hsft.run.setup import Data, load_data
from hsft.trainer.fabric import make_fabric
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_file

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Items whose vectors in an index are compared with the model's.
_COMPARED_ITEMS = 64


@dataclass(frozen=True)
class OpenRun:
    """A run's configuration, data and models.

    Attributes:
        folder: the run's folder.
        config: its configuration, with what moved since.
        data: interactions, split and, where the model needs it, the item cache.
        fabric: Lightning Fabric, launched.
        new_titles: item id -> title of items added after the run.
        index: what `recommend` searches instead of all items, for the model that it was made with.
    """

    folder: Path
    config: Config
    data: Data
    fabric: Fabric
    new_titles: Mapping[str, str] = field(default_factory=dict)
    index: ItemIndex | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that can be built, as the rows of its `result.json` are named.

        A fine-tuning run has `untrained` too, whether or not it was evaluated, unless it trained
        the ItemLLM.
        """
        return model_names(self.config)

    @cached_property
    def titles(self) -> dict[str, str]:
        """Item id -> title, empty without an information file; see `title_column`."""
        try:
            path = information_file(self.config.text_path, self.config.dataset)
        except InputError:
            return dict(self.new_titles)
        column = title_column(path, self.config.text_keys)
        titles = {} if column is None else read_item_titles(path, column)
        return {**titles, **self.new_titles}

    @property
    def own_items(self) -> int:
        """Number of the run's own items; items with higher numbers were added to it."""
        return self.data.num_own_items

    def refuse_new_items(self) -> None:
        """Refuse a run whose model cannot score items that it was not trained with.

        Raises:
            InputError: the run's model knows items by their ids only.
        """
        if self.config.model == "ensemble":
            raise InputError(
                f"{self.folder} is an ensemble, whose weights are for the items of its runs alone; "
                f"name one of these runs."
            )
        if not self.config.reads_embeddings:
            raise InputError(
                f"{self.folder} is a run of {self.config.model}, which knows items by their ids "
                f"and cannot score new ones; name a run of {' or '.join(READS_EMBEDDINGS)}."
            )

    def refuse_known(self, item_ids: Sequence[str]) -> None:
        """Refuse ids of items that are in the catalogue.

        Raises:
            InputError: there are some.
        """
        again = [item for item in item_ids if item in self._number_of]
        if again:
            raise InputError(
                f"{len(again)} of {len(item_ids)} new items are in the catalogue of "
                f"{self.config.dataset} already, for example '{again[0]}'; leave them out."
            )

    def with_items(self, new: ItemCache, titles: Mapping[str, str] | None = None) -> OpenRun:
        """Return the run with items added to its catalogue, without interactions.

        The run's items keep their numbers and the new ones follow, so that a model built from the
        result scores the run's items as before.

        Args:
            new: ids and embeddings, made as the run's item cache was.
            titles: item id -> title of the new items.

        Raises:
            InputError: the run's model cannot score new items, an id is in the catalogue, or the
                embeddings have other dimensions.
        """
        self.refuse_new_items()
        self.refuse_known(new.item_ids)
        cache = self.data.cache
        assert cache is not None
        whole = self.data.interactions
        rows = torch.from_numpy(cache.rows_of(whole.item_ids[1:]))
        if new.dim != cache.dim:
            raise InputError(
                f"the new items' embeddings have {new.dim} dimensions, the item cache "
                f"{cache.path or 'made now'} has {cache.dim}; encode them with the same ItemLLM."
            )
        embeddings = torch.cat([cache.embeddings[rows], new.embeddings])
        item_ids = np.concatenate([whole.item_ids, np.array(new.item_ids, dtype=object)])
        data = Data(
            replace(self.data.split, interactions=replace(whole, item_ids=item_ids)),
            ItemCache(item_ids[1:].tolist(), embeddings, cache.metadata, cache.path),
            self.own_items,
        )
        # An index lacks the new items.
        new_titles = {**self.new_titles, **(titles or {})}
        return replace(self, data=data, new_titles=new_titles, index=None)

    def with_index(self, folder: str | Path) -> OpenRun:
        """Return the run with an exported index, which recommends from then on.

        The model that the index was made with is the one that `build` gives it to. The other models
        search all items.

        Args:
            folder: written by `export.py --format embeddings`.

        Raises:
            InputError: FAISS is not installed, the folder has no index, or it is another run's.
        """
        index, item_ids = open_index(Path(folder))
        own_ids = ids_fingerprint(self.data.interactions.item_ids[1:])
        if index.model not in self.models or item_ids != own_ids:
            raise _foreign_index(self.folder, index)
        return replace(self, index=index)

    def build(self, name: str) -> Scorer:
        """Build one of `models`, in evaluation mode, on the device.

        Raises:
            InputError: there is no such model in this run, its files are missing or damaged, the
                UserLLM's folder holds another model than the run's, or the index other vectors.
        """
        if name not in self.models:
            raise InputError(
                f"{self.folder} has no model '{name}'; it has {', '.join(self.models)}."
            )
        scorer = build_model(self.folder, self.config, self.data, self.fabric, name)
        if self.index is None or self.index.model != name:
            return scorer
        # Wherever the run was trained again since, its vectors are others.
        items = np.unique(np.linspace(1, scorer.num_items, _COMPARED_ITEMS).astype(np.int64))
        with torch.no_grad(), self.fabric.autocast():
            numbers = torch.from_numpy(items).to(self.fabric.device)
            vectors = scorer.item_vectors(numbers).float().numpy(force=True)
        stored = self.index.vectors(items)
        if stored.shape != vectors.shape or _differ(stored, vectors):
            raise _foreign_index(self.folder, self.index)
        return IndexedScorer(scorer, self.index)

    def recommend(
        self,
        scorer: Scorer,
        histories: Sequence[np.ndarray],
        topk: int,
        exclude_seen: bool = True,
        times: Sequence[np.ndarray] | None = None,
    ) -> Recommendations:
        """Return the best items for histories of item numbers, under the run's precision.

        Args:
            scorer: one of the run's models.
            histories, topk, exclude_seen, times: as for `recommend`; `times` is read by a model
                that was trained with `use_timestamps`.

        Raises:
            InputError: the model reads times and there are none.
        """
        reads_times = bool(getattr(scorer, "reads_times", False))
        if reads_times and times is None:
            raise InputError(
                f"{self.folder} was trained with use_timestamps, so a history needs the times of its "
                f"items; name a user of the data (--user), or a run without use_timestamps."
            )
        given = times if reads_times else None
        if not isinstance(scorer, IndexedScorer):
            return self._search_all(scorer, histories, topk, exclude_seen, given)
        if not scorer.can_answer(histories, topk, exclude_seen):
            return self._search_all(scorer.scorer, histories, topk, exclude_seen, given)
        users = self._encode(scorer, histories, given).numpy(force=True)
        seen = histories if exclude_seen else None
        best, whole = scorer.index.best(users, min(topk, scorer.num_items), seen)
        for row in np.flatnonzero(~whole).tolist():
            # Too few of its neighbours were left.
            asked = None if given is None else [given[row]]
            exact = self._search_all(scorer.scorer, [histories[row]], topk, exclude_seen, asked)
            best.items[row], best.scores[row] = exact.items[0], exact.scores[0]
        return best

    def _search_all(
        self,
        scorer: Scorer,
        histories: Sequence[np.ndarray],
        topk: int,
        exclude_seen: bool,
        times: Sequence[np.ndarray] | None,
    ) -> Recommendations:
        with self.fabric.autocast():
            return recommend(
                scorer,
                histories,
                topk=topk,
                max_length=self.config.eval_list_length,
                device=self.fabric.device,
                exclude_seen=exclude_seen,
                batch_size=self.config.eval_batch_size,
                budget_bytes=self.config.logits_budget_mb << 20,
                times=times,
                of_next=self.config.predict_at == "target",
                raw_times=self.config.model in RAW_TIME_MODELS,
            )

    def _encode(
        self, scorer: Scorer, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None
    ) -> torch.Tensor:
        bounds = np.cumsum([0, *(len(history) for history in histories)])
        flat = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
        of_next = self.config.predict_at == "target"
        raw = self.config.model in RAW_TIME_MODELS
        item_times = None if times is None else ItemTimes(np.concatenate(times), of_next, raw)
        size = self.config.eval_batch_size
        with self.fabric.autocast():
            parts = [
                encode_users(
                    scorer,
                    flat,
                    bounds[:-1][first : first + size],
                    bounds[1:][first : first + size],
                    max_length=self.config.eval_list_length,
                    device=self.fabric.device,
                    times=item_times,
                    # Every history before has one time more than items, the request's.
                    time_shifts=np.arange(len(histories))[first : first + size],
                )
                for first in range(0, len(histories), size)
            ]
        return torch.cat(parts)

    def history(self, user_id: str) -> np.ndarray:
        """Return all items of a user, oldest first: int32 [n].

        Raises:
            InputError: the data has no such user.
        """
        return self.data.interactions.items[self._range(user_id)]

    def history_times(self, user_id: str, at: str | None = None) -> np.ndarray | None:
        """Return when a user's items were interacted with, for `recommend`.

        Args:
            user_id: a user of the data.
            at: the time of the request, a date in ISO 8601 or a number in the unit of the data;
                None: now.

        Returns:
            int64 [n + 1], seconds since 1970, the request's last; None for a run that reads no
            times.

        Raises:
            InputError: there is no such user, or `at` is no time, or has no meaning here.
        """
        if at is not None and self.config.predict_at != "target":
            raise InputError(
                f"{self.folder} does not know for when it predicts (predict_at: "
                f"{self.config.predict_at}), so that --predict_at has no meaning; leave it out."
            )
        times = item_times(self.config, self.data.interactions)
        if times is None:
            return None
        asked = int(time.time())
        if at is not None:
            scale = unit_scale(self.data.interactions, self.config.dataset)
            asked = read_time(at, scale, "--predict_at")
        return np.append(times.seconds[self._range(user_id)], asked)

    def _range(self, user_id: str) -> slice:
        """Return where a user's items are among the interactions."""
        data = self.data.interactions
        rows = np.flatnonzero(data.user_ids == user_id)
        if not len(rows):
            some = ", ".join(map(str, data.user_ids[:5]))
            raise InputError(
                f"{self.config.dataset} has no user '{user_id}'; its users are, for example, {some}."
            )
        return slice(data.offsets[rows[0]], data.offsets[rows[0] + 1])

    def item_numbers(self, item_ids: Sequence[str]) -> np.ndarray:
        """Return the numbers of item ids: int64 [n].

        Raises:
            InputError: the data has no such item.
        """
        known = self._number_of
        unknown = [item for item in item_ids if item not in known]
        if unknown:
            some = ", ".join(map(str, self.data.interactions.item_ids[1:6]))
            raise InputError(
                f"{self.config.dataset} has no item '{one_line(unknown[0], 80)}'; its items are, for "
                f"example, {some}."
            )
        return np.array([known[item] for item in item_ids], dtype=np.int64)

    @cached_property
    def _number_of(self) -> dict[str, int]:
        ids = self.data.interactions.item_ids
        return {str(item): number for number, item in enumerate(ids[1:], start=1)}


def read_time(text: str, scale: int, name: str, earliest: int | None = None) -> int:
    """Read a time that a person wrote: seconds since 1970.

    Args:
        text: a date in ISO 8601, in UTC unless it names a zone, or a number in the data's unit.
        scale: how many of these units make a second.
        name: what is read, for the error.
        earliest: seconds of the data's first time, where that may be before 1990.

    Raises:
        InputError: it is no time, or one that models have not met: before 1990 or after 2099.
    """
    try:
        # `20240531` is a date in ISO 8601 too, but a number here.
        is_number = re.fullmatch("[0-9]{1,18}", text)
        seconds = int(text) // scale if is_number else utc_seconds(text)
        if not is_date(seconds) and (earliest is None or seconds < earliest):
            raise ValueError("out of range")
        return seconds
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{name} '{one_line(text, 40)}' is no time of 1990 to 2099; write a date such as "
            f"2024-05-31T18:00, or a number as in the data's timestamps."
        ) from error


def _differ(stored: np.ndarray, vectors: np.ndarray) -> bool:
    """Say whether a row of float32 [n, D] differs by more than 16-bit arithmetic explains."""
    distances = np.linalg.norm(stored - vectors, axis=1)
    return bool((distances > 1e-2 * np.linalg.norm(vectors, axis=1)).any())


def _foreign_index(folder: Path, index: ItemIndex) -> InputError:
    return InputError(
        f"the index in {index.folder} is not of the items and the model '{index.model}' that {folder} "
        f"has now; write it again with export.py --run {folder} --format embeddings."
    )


def items_read(config: Config, length: int) -> int:
    """Return how many of a history's last items decide what a run's model recommends."""
    if config.model in ("pop", "random"):
        return 0
    if config.model in ("item_knn", "tfidf") and config.knn_history == "last":
        return min(length, 1)
    return min(length, config.eval_list_length)


def open_run(
    folder: str | Path, overrides: Mapping[str, Any] | None = None, *, again: bool = False
) -> OpenRun:
    """Open a run that `main.py` made.

    Paths in its configuration are relative to the folder in which it was started.

    Args:
        folder: the run's folder, or `hf://OWNER/NAME`; a run that was stopped can be opened once it
            has a `best/`.
        overrides: configuration keys with other values, such as a path that moved.
        again: this program has read the same interactions before and has said how many they are.

    Raises:
        InputError: the folder is no run, or its data or models are missing.
    """
    folder = run_folder(folder)
    config = run_config(folder, overrides)
    refuse_elsewhere(folder, config, overrides)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    fabric = make_fabric(config)
    # The random reference draws from it.
    fabric.seed_everything(config.seed, workers=True, verbose=False)
    config, trained = with_trained_items(folder, config)
    data = load_data(config, need_cache=config.reads_embeddings, again=again, trained=trained)
    return OpenRun(folder, config, data, fabric)


def refuse_elsewhere(
    folder: Path, config: Config, overrides: Mapping[str, Any] | None = None
) -> None:
    """Refuse to look for a run's data in another folder than the one in which it was made.

    Args:
        folder: the run's folder.
        config: its configuration.
        overrides: keys that were given other values.

    Raises:
        InputError: the data's path is relative, not overridden, and leads nowhere from here.
    """
    path = interaction_file(config)
    if "data_path" in (overrides or {}) or path.is_absolute() or is_file(path):
        return
    raise InputError(
        f"{path.absolute()}, the data of {folder}, does not exist: paths in {CONFIG_FILE} are "
        f"relative to the folder that the run was made in; run this program there, or say where "
        f"things are with --data_path and the like (--help lists them)."
    )


def refuse_changed_data(
    folder: str | Path, dataset: CachedEmbeddingEvalDataset, protocol: EvalProtocol
) -> None:
    """Refuse data in which other items are held out, or that differ otherwise from a run's.

    A run of an earlier version has not recorded what it was scored on.

    Args:
        folder: the folder of a finished run.
        dataset: the users that would be scored now.
        protocol: how.

    Raises:
        InputError: the fingerprint is not the one in the run's result.
    """
    recorded = read_result(folder).get("fingerprint", {})
    unlike = differing_parts(recorded, evaluation_fingerprint(dataset, protocol))
    if unlike:
        raise InputError(
            f"the data of {folder} have changed since the run (other {', '.join(unlike)}); name the "
            f"old ones with --data_path."
        )
